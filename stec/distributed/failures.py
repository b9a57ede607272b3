"""When one of several processes fails, the others say which one, and why."""

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
def shared(how_to_go_on: str = "go on from the last checkpoint by --resume auto") -> Iterator[None]:
    """Tell the other processes of a failure inside, and turn what theirs causes here into a UserError that names it.

    An error that all processes run into together is no news to the others; neither is an interruption.
    """
    if num_processes() == 1:
        yield
        return
    try:
        yield
    except UserError as error:
        if error.local:
            _leave_word(str(error))
        raise
    except Exception as error:
        if not _lost_contact(error):
            _leave_word(f"{type(error).__name__}: {error}")
            raise
        raise _who_failed(how_to_go_on) from error


def _lost_contact(error: Exception) -> bool:
    """Whether the exchange with another process broke off or timed out."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(sign in text for sign in ("gloo", "connection closed by peer", "connection reset", "nccl"))
    )


def _store() -> dist.Store:
    """What torch.distributed found the processes with; it needs no working exchange between them."""
    return dist.PrefixStore("stec", dist.distributed_c10d._get_default_store())


def _leave_word(message: str) -> None:
    with suppress(RuntimeError, ValueError):  # the process that keeps the store may be gone
        _store().set("failed", f"Process {process_index()} failed: {message}")


def _who_failed(advice: str) -> UserError:
    """What a failed process left word of, else which ones do not answer a roll call.

    Said by the main process or, where that is gone without a word, by the first that is left.
    """
    # A launcher that noticed the failure, too, asks the others to end: not before they have spoken.
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
            return UserError(f"{store.get('failed').decode().rstrip('.')}; mend that, and {advice}.")
    except (RuntimeError, ValueError):
        return UserError(f"Process 0, which keeps the others in touch, is gone; {advice}.", local=process_index() == 1)
    if not silent:
        return UserError(f"The processes lost contact with each other though all are there; {advice}.")
    first_left = min(set(range(num_processes())) - set(silent))
    return UserError(
        f"Process {', '.join(map(str, silent))} died or does not answer; {advice}.", local=process_index() == first_left
    )
