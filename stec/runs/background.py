"""Work in a background thread, such as writing a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class Background:
    """Calls one function at a time in a daemon thread.

    If it raises, ``on_failure`` is called in that thread, and ``finish`` raises the error. As a context manager it
    waits for the function at the end, except after a KeyboardInterrupt, by which the user refuses to wait.
    """

    def __init__(self, on_failure: Callable[[], None]) -> None:
        self._on_failure = on_failure
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, _value: object, _traceback: TracebackType | None) -> None:
        if self._thread is not None and kind is not KeyboardInterrupt:
            self._thread.join()

    def start(self, action: Callable[[], object]) -> None:
        """Call ``action`` in the thread; call ``finish`` before the next ``start``."""
        assert self._thread is None, "the previous action is not finished"
        self._thread = threading.Thread(target=self._run, args=(action,), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the function, if one was started, and raise its error."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            self._error = error
            self._on_failure()
