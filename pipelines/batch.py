"""The contract between pipelines and training: what one step receives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.commands import Commands


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass of one process holds: N images, V = 2 views each.

    A process's share of a global batch is one of these, or ``--accumulate`` of them.
    """

    views: Tensor
    """[N, V, 3, H, W] float32 in [0, 1] on the loader's device; channels-last in memory. H and W are equal,
    and the same throughout an epoch."""
    commands: Commands
    """The very commands that were executed to make the views; NumPy, on the host."""
    labels: Tensor
    """[N] int64 on the loader's device: of ``labeled_views`` where there are any, else of the images."""
    epoch: int
    positions: NDArray[np.int64]
    """[N]: the images' positions in the epoch."""
    image_ids: NDArray[np.int64]
    """[N]: the images' numbers in the data set."""
    labeled_views: Tensor | None = None
    """[N, 1, 3, H, W], like ``views``: labeled images for the online classifier, where the images themselves have no
    labels."""


@dataclass(frozen=True, kw_only=True)
class PlainBatch:
    """N images as evaluation sees them: no augmentation."""

    images: Tensor
    """[N, 3, H, W] float32 in [0, 1] on the loader's device; channels-last in memory."""
    labels: Tensor
    """[N] int64 on the loader's device."""


class TwoViewLoader(Protocol):
    """Where training gets its batches: a stateless source that can start at any step."""

    @property
    def steps_per_epoch(self) -> int: ...

    def batches(self, first_chunk: int) -> Iterator[Batch]:
        """Endless batches from chunk ``first_chunk`` of the whole training on, across epochs."""


class PlainLoader(Protocol):
    """Where evaluation gets its images."""

    @property
    def batch_size(self) -> int:
        """Images in a batch, at most."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N] int64, of all images; -1 where there is none."""

    def __len__(self) -> int:
        """Number of images."""

    def batches(self, *stretches: NDArray[np.int64]) -> Iterator[PlainBatch]:
        """The images of these numbers, in this order; no batch holds images of two stretches."""
