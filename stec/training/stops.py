"""Signals that ask a run to stop, and the agreement of its processes on the step at which they stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from pipelines.errors import Interrupted
from stec.distributed.processes import num_processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; the signal that schedulers send before they kill; the one that SLURM can be asked to send earlier."""
FAILURE = max(SIGNALS) + 1
"""The number that replaces a signal's if the run itself cannot continue."""


def exit_code(number: int, stop_exit_code: int) -> int:
    """The program's exit code after the signal ``number``."""
    return 130 if number == signal.SIGINT else stop_exit_code


@contextmanager
def immediately(
    stop_exit_code: int, advice: str = "resume a run from its last checkpoint by --resume auto"
) -> Iterator[None]:
    """While open, signals raise Interrupted at any point of the program; Ctrl-C first raises KeyboardInterrupt.

    Further SIGTERMs and SIGUSR1s are ignored, because the one that a launcher sends as it ends must not interrupt the
    cleanup.
    """
    sentence = f"Stopped immediately; {advice}."

    def stop(number: int, _frame: object) -> None:
        for other in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(other, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted(sentence, exit_code=exit_code(number, stop_exit_code))

    handled = [number for number in SIGNALS if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(sentence, exit_code=exit_code(signal.SIGINT, stop_exit_code)) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequests:
    """While open, a signal is recorded as a request to stop, which reaches all processes.

    A second Ctrl-C acts as without this class; further SIGTERMs do not, as launchers and schedulers may each send one.

    After each step, the processes exchange their requests by an all-reduce of one number between CPUs (gloo), which
    runs in the background and is read after the next step: no process waits for a GPU or for the network, all of them
    read the same number at the same step, and a request takes effect one step later than on a single process. A process
    that dies breaks the exchange, so the others notice it within a step or two, even if NCCL would wait; a process that
    hangs breaks it after ``timeout``.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._requested = 0
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if num_processes() > 1 else None
        self._exchange: tuple[torch.Tensor, Any] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: object, _traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame: object) -> None:
        # After Ctrl-C, which also ends the launcher, more signals may follow: the first one is the request.
        self._requested = self._requested or number
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def request(self) -> None:
        """Request a stop as a signal does, with the number ``FAILURE``; may be called from any thread."""
        self._requested = FAILURE

    def after_step(self, *, last: bool) -> int:
        """The signal that a process received, or ``FAILURE``, the same on all processes; 0 if there is none.

        Call it after each step on all processes. After the ``last`` step it waits for the exchange.
        """
        if self._group is None:
            return self._requested
        agreed = self._received()
        if agreed == 0:
            request = torch.tensor(self._requested)
            self._exchange = request, dist.all_reduce(request, dist.ReduceOp.MAX, group=self._group, async_op=True)
            if last:
                agreed = self._received()
        return agreed

    def _received(self) -> int:
        if self._exchange is None:
            return 0
        request, work = self._exchange
        work.wait()
        self._exchange = None
        return int(request)
