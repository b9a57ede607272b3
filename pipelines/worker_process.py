"""The set-up of worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def begin_work(_number: int = 0) -> None:
    """Ignore signals to stop, which are for the main process, and exit when it has exited."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Without this, a worker would wait forever for a main process that was killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
