"""What pipelines yield, and the protocols of loaders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.commands import Commands


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one process: N images with V = 2 views each.

    A process's part of a global batch is ``--accumulate`` of these.
    """

    views: Tensor
    """[N, V, 3, H, W] in [0, 1] on the loader's device, float32, or float16 if the loader is told so; channels-last in
    memory. H and W are equal and constant within an epoch."""
    commands: Commands
    """The executed commands; NumPy arrays on the host."""
    labels: Tensor
    """[N] int64 on the loader's device: of ``labeled_views`` if there are any, otherwise of the images."""
    epoch: int
    positions: NDArray[np.int64]
    """[N]: positions in the epoch."""
    image_ids: NDArray[np.int64]
    """[N]: numbers of the images in the data set."""
    labeled_views: Tensor | None = None
    """[N, 1, 3, H, W], like ``views``: labeled images for the online classifier, if the images themselves have no
    labels."""


@dataclass(frozen=True, kw_only=True)
class PlainBatch:
    """N images without augmentation, for evaluation."""

    images: Tensor
    """[N, 3, H, W] float32 in [0, 1] on the loader's device; channels-last in memory."""
    labels: Tensor
    """[N] int64 on the loader's device."""


class TwoViewLoader(Protocol):
    """A source of training batches that can start at any step and has no state."""

    @property
    def steps_per_epoch(self) -> int: ...

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Endless batches from micro-batch ``first_step`` of the training on, across epochs."""


class PlainLoader(Protocol):
    """A source of images for evaluation."""

    @property
    def batch_size(self) -> int:
        """Largest number of images in a batch."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N] int64 of all images; -1 without a label."""

    @property
    def factors(self) -> Mapping[str, NDArray[np.float32]]:
        """Generative factors of all images by name, [N] each, NaN where an image has none; empty if unknown."""

    def __len__(self) -> int:
        """Number of images."""

    def batches(self, *id_ranges: NDArray[np.int64]) -> Iterator[PlainBatch]:
        """The images with these ids, in this order; no batch holds images of two ranges."""
