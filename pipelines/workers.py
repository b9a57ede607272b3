"""Items made by worker processes, which come back over a pipe each.

Unlike PyTorch's DataLoader this needs no shared memory, which containers have little of, and a worker that is killed is
noticed at once, even in the middle of an item: nobody else holds the other end of its pipe.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from stec.errors import UserError

K = TypeVar("K")
T = TypeVar("T")

ITEMS_AHEAD = 2
"""Items that are asked for of each worker before they are needed."""


class _Worker:
    """A process that makes items, and a thread that fetches them, so that it makes the next one meanwhile."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.connection, its = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_work, args=(make, its, self.connection), daemon=True)
        self.process.start()
        its.close()
        self.thread = ThreadPoolExecutor(1)

    def ask(self, key: Any) -> Future[Any]:
        return self.thread.submit(self._fetch, key)

    def _fetch(self, key: Any) -> Any:
        try:
            self.connection.send(key)
            return self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(1)
            code = self.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise UserError(
                f"A worker process that prepares images {how}; where memory was short, use fewer of them by "
                f"--num_workers, or a smaller --batch_size.",
                local=True,
            ) from error

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.thread.shutdown(cancel_futures=True)
        self.connection.close()


def made_by_workers(make: Callable[[K], T], keys: Iterable[K], count: int) -> Generator[T]:
    """``make`` of each key, in this order, by ``count`` processes. What it makes is pickled; tensors should be arrays.

    Raises UserError where a worker dies or cannot be started.
    """
    # A DALI pipeline that nobody holds any more ends its threads when Python collects it. A worker forked before that
    # would wait for ever: it inherits the pipeline, but no threads.
    gc.collect()
    workers: list[_Worker] = []

    def end() -> None:
        while workers:
            workers.pop().end()

    # Python's own end waits for workers, which ignore its SIGTERM.
    atexit.register(end)
    try:
        try:
            workers += (_Worker(make) for _ in range(count))
        except OSError as error:
            raise UserError(
                f"Worker processes cannot be started ({error.strerror}); use --num_workers 0.", local=True
            ) from error
        asked: deque[Future[T]] = deque()
        for worker, key in zip(cycle(workers), keys):
            asked.append(worker.ask(key))
            if len(asked) == ITEMS_AHEAD * count:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()
    finally:
        end()
        atexit.unregister(end)


def _work(make: Callable[[Any], Any], connection: Connection[Any, Any], other_end: Connection[Any, Any]) -> None:
    """Make what is asked for until the main process is gone, which decides when to stop."""
    other_end.close()  # only the main process's may be left, and those of later workers, which end before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        try:
            key = connection.recv()
        except (EOFError, OSError):
            return
        item = make(key)
        try:
            connection.send(item)
        except OSError:
            return
