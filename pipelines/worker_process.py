"""What every process that works for a main process does first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def begin_work(_number: int = 0) -> None:
    """Leave it to the main process when to stop, and end when that is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # A main process that was killed says nothing: a worker would wait for ever, for work or to hand it over.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
