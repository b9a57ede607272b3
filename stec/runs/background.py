"""Work beside training, such as writing a checkpoint, which training waits for only when it has to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class Background:
    """Does one thing at a time in a thread of its own, which does not keep the program from ending.

    ``on_failure`` is called in that thread when something went wrong; ``finish`` then raises it. As a context it waits
    at the end for what goes on, but not after Ctrl-C: whoever presses it while that is waited for wants no more of it.
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
        """Begin; what was begun before must be finished."""
        assert self._thread is None, "finish comes first"
        self._thread = threading.Thread(target=self._run, args=(action,), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for what was begun, if anything, and raise what it raised."""
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
