"""Notes on a split of image files for the user to read before training."""

from __future__ import annotations

import numpy as np

from pipelines.datasets.cache import SplitIndex
from pipelines.datasets.images import UNLABELED
from pipelines.datasets.listing import format_counts

LARGE_PIXELS = 2_000_000
"""If half of the images are larger, decoding takes most of the time (measured in docs/data.md)."""


def notes_on_files(index: SplitIndex) -> list[str]:
    """A sentence each on skipped files, truncated shards and empty classes."""
    images = index.images
    notes = [f"{note}." for note in index.notes]
    if index.skipped:
        notes.insert(0, f"Skipped in {images.source}: {format_counts(index.skipped)}.")
    if index.classes and (empty := count_empty_classes(index)):
        notes.append(
            f"{empty} of {len(index.classes)} classes have no image in {images.source}; the largest label is that of "
            f"{largest_label(index)}."
        )
    return notes


def notes_on(index: SplitIndex) -> tuple[str, ...]:
    """The same, and a sentence each on rotated and large photographs."""
    images, notes = index.images, notes_on_files(index)
    rotated = int((images.orientation != 1).sum())
    if rotated and not images.exif_orientation:
        notes.append(
            f"{rotated} of {len(images)} images in {images.source} are rotated by EXIF and used as they are stored; "
            f"--exif_orientation 1 turns them upright."
        )
    median = int(np.median(images.sizes.prod(axis=1)))
    if median > LARGE_PIXELS:
        notes.append(
            f"The images in {images.source} are large (median {median / 1e6:.0f} megapixels), so decoding them takes "
            f"most of the time; launch.py pack --max_side 512 makes smaller copies (docs/data.md)."
        )
    return tuple(notes)


def count_empty_classes(index: SplitIndex) -> int:
    """The number of classes without an image."""
    labels = index.images.labels
    return len(index.classes) - len(np.unique(labels[labels != UNLABELED]))


def largest_label(index: SplitIndex) -> str:
    """The name of an image with the largest label, and the label in parentheses."""
    n = int(index.images.labels.argmax())
    return f"{index.images.name(n)} ({index.images.labels[n]})"
