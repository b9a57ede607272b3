"""Fetches remote shards before their images are needed, as many as fit in the cache."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.images import ImageFiles, Images
from pipelines.datasets.shard_cache import ShardCache
from pipelines.errors import UserError

T = TypeVar("T")

TRANSFERS = 4
"""Shards that a process fetches at a time."""
AGAIN_S = 1.0
"""After which shards that could not be fetched, or have been deleted, are fetched again."""
THREAD = "shard-transfer"
"""Name of the threads that fetch. They end after what they are fetching, which nobody waits for."""


class ShardOrder:
    """The shards of a sequence of images, by the first position that needs them."""

    def __init__(self, shard_at: NDArray[np.int32]) -> None:
        """``shard_at`` [positions] int32: the shard that each position needs."""
        shards, first = np.unique(shard_at, return_index=True)
        _, back = np.unique(shard_at[::-1], return_index=True)
        order = np.argsort(first)
        self._shards, self._last = shards[order], len(shard_at) - 1 - back[order]

    def after(self, position: int) -> NDArray[np.int32]:
        """The shards that are needed from a position on, the soonest first."""
        return self._shards[self._last >= position]


def reading_ahead(
    images: Images, items: Iterable[T], needed: Callable[[int], NDArray[np.int32]], first: int = 0
) -> Iterator[T]:
    """The ``items``; meanwhile, if the images are remote, the shards that are needed from an item on are fetched.

    ``needed`` gives them by the number of the item, which for the first one is ``first``, the soonest first.
    """
    if not isinstance(images, ImageFiles) or images.shards is None:
        yield from items
        return
    transfers = _Transfers(images.shards)
    iterator, count, asked = iter(items), -1, 0.0
    try:
        for n in itertools.count(first):
            shards, now = needed(n), time.monotonic()
            if len(shards) != count or now > asked + AGAIN_S:
                count, asked = len(shards), now
                transfers.want([os.fsdecode(images.files[shard]) for shard in shards.tolist()])
            try:
                item = next(iterator)
            except StopIteration:
                return
            yield item
    finally:
        transfers.close()


class _Transfers:
    """Threads that fetch what was wanted last, each shard once: while nobody asks, others may need the cache.

    A shard that cannot be fetched is left to who needs it, with the error.
    """

    def __init__(self, shards: ShardCache) -> None:
        self._shards = shards
        self._wanted: Sequence[str] = ()
        self._pending: deque[str] = deque()
        self._closed = False
        self._changed = threading.Condition()
        for _ in range(TRANSFERS):
            threading.Thread(target=self._work, name=THREAD, daemon=True).start()

    def want(self, names: Sequence[str]) -> None:
        """Fetch as many of these shards as the cache holds, the first ones first."""
        fit, free = [], self._shards.remote.cache_bytes
        for name in dict.fromkeys(names):
            free -= self._shards.shards[name].stamp[1]
            if free < 0:
                break
            fit.append(name)
        with self._changed:
            self._wanted, self._pending = fit, deque(fit)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._pending and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                name, wanted = self._pending.popleft(), self._wanted
            if not self._shards.holds(name):
                # Else those that were fetched first would have to make room before those that are not needed any more.
                self._shards.touch(wanted)
                with suppress(UserError, OSError):
                    self._shards.fetch(name, wait=False)
