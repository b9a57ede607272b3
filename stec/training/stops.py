"""Signals that ask a run to stop, and how its processes agree to."""

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
"""Ctrl-C; what schedulers send before they kill; what SLURM can be asked to send earlier."""


FAILURE = max(SIGNALS) + 1
"""What stands in a signal's place where it is the run itself that cannot go on."""


def exit_code(number: int, stop_exit_code: int) -> int:
    """The program's exit code after the signal ``number``."""
    return 130 if number == signal.SIGINT else stop_exit_code


@contextmanager
def immediately(
    stop_exit_code: int, how_to_go_on: str = "a run goes on from its last checkpoint by --resume auto"
) -> Iterator[None]:
    """While open, signals raise Interrupted wherever the program is; of Ctrl-C, it comes out as that.

    Further SIGTERMs and SIGUSR1s are ignored: a launcher that ends, too, must not disturb what is cleaned up.
    """
    sentence = f"Stopped at once; {how_to_go_on}."

    def stop(number: int, _frame: object) -> None:
        for other in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(other, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted(sentence, exit_code=exit_code(number, stop_exit_code))

    heeded = [number for number in SIGNALS if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(sentence, exit_code=exit_code(signal.SIGINT, stop_exit_code)) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequests:
    """While open, signals are noted instead of acting, and all processes learn of one that any of them got.

    A second Ctrl-C acts as ever; further SIGTERMs do not, as launchers and schedulers may each send one.

    After each step, every process sends its note to the others through an all-reduce of one number between CPUs (gloo),
    which runs in the background and is read after the next step: no process waits for a GPU or for the network, all of
    them read the same at the same step, and a request is served one step later than on a single process. As a process
    that dies breaks the exchange, this is also how the others notice within a step or two, even where the GPUs' own
    library would wait; one that hangs is given up after ``timeout``.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._own = 0
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if num_processes() > 1 else None
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: object, _traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        # Of Ctrl-C, which a launcher notices, too, and then ends, the first signal is what was meant.
        self._own = self._own or number
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def ask(self) -> None:
        """Ask all processes to stop as a signal would, with ``FAILURE`` for its number; from any thread."""
        self._own = FAILURE

    def after_step(self, *, last: bool) -> int:
        """The signal that some process got, or ``FAILURE``, the same on all of them; 0: none.

        Call it after each step on all processes. After the ``last`` step the answer is waited for, as no later one
        could give it.
        """
        if self._group is None:
            return self._own
        agreed = self._received()
        if agreed == 0:
            note = torch.tensor(self._own)
            self._sent = note, dist.all_reduce(note, dist.ReduceOp.MAX, group=self._group, async_op=True)
            if last:
                agreed = self._received()
        return agreed

    def _received(self) -> int:
        if self._sent is None:
            return 0
        note, exchange = self._sent
        exchange.wait()
        self._sent = None
        return int(note)
