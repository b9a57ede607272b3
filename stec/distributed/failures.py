"""The report of which process failed and why, by the others."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from pipelines.errors import UserError
from stec.distributed.processes import num_processes, process_index

ROLL_CALL_SECONDS = 5.0


@contextmanager
def shared(advice: str = "resume from the last checkpoint by --resume auto") -> Iterator[None]:
    """Report a failure of this process to the others, and raise a UserError that names the process if another failed.

    An error that all processes raise together is not reported, nor is an interruption.
    """
    if num_processes() == 1:
        yield
        return
    try:
        yield
    except UserError as error:
        if error.local:
            _report(str(error))
        raise
    except Exception as error:
        if not _lost_contact(error):
            _report(f"{type(error).__name__}: {error}")
            raise
        raise _who_failed(advice) from error


def _lost_contact(error: Exception) -> bool:
    """Whether the exchange with another process was broken off or timed out."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(sign in text for sign in ("gloo", "connection closed by peer", "connection reset", "nccl"))
    )


def _store() -> dist.Store:
    """The store that torch.distributed connected the processes with; it works without collectives."""
    # PyTorch has no public function that returns it.
    return dist.PrefixStore("stec", dist.distributed_c10d._get_default_store())


def _report(message: str) -> None:
    with suppress(RuntimeError, ValueError):  # the process that keeps the store may be gone
        _store().set("failed", f"Process {process_index()} failed: {message}")


def _who_failed(advice: str) -> UserError:
    """The error that a failed process reported, or else the processes that do not answer a roll call.

    It is printed by the main process or, if that does not answer, by the first process that does.
    """
    # A launcher that noticed the failure also ends the others, which must not be before they have reported it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        store = _store()
        store.set(f"here {process_index()}", "")
        deadline = time.monotonic() + ROLL_CALL_SECONDS
        silent = list(range(num_processes()))
        while silent and not store.check(["failed"]) and time.monotonic() < deadline:
            time.sleep(0.1)
            silent = [rank for rank in silent if not store.check([f"here {rank}"])]
        if store.check(["failed"]):
            return UserError(f"{store.get('failed').decode().rstrip('.')}; fix that, and {advice}.")
    except (RuntimeError, ValueError):
        return UserError(f"Process 0, which connects the processes, died; {advice}.", local=process_index() == 1)
    if not silent:
        return UserError(f"The processes lost contact with each other although all of them run; {advice}.")
    first_alive = min(set(range(num_processes())) - set(silent))
    return UserError(
        f"Process {', '.join(map(str, silent))} died or does not answer; {advice}.",
        local=process_index() == first_alive,
    )
