"""What a person should know about a split before training on it, a sentence each."""

from __future__ import annotations

import numpy as np

from pipelines.datasets.cache import Split
from pipelines.datasets.folders import counted
from pipelines.datasets.images import UNLABELED

LARGE_PIXELS = 2_000_000
"""Where half of the images have more, decoding takes most of the time; docs/train-on-my-images.md has the figures."""


def remarks(split: Split) -> list[str]:
    """What was left out, shards that were cut off, classes without images, and photographs that lie or are large."""
    images = split.images
    sentences = [f"{remark}." for remark in split.remarks]
    if split.left_out:
        sentences.insert(0, f"Left out of {images.root}: {counted(split.left_out)}.")
    if split.classes and (empty := empty_classes(split)):
        sentences.append(
            f"{empty} of {len(split.classes)} classes have no image in {images.root}; the largest label is that of "
            f"{largest_labeled(split)}."
        )
    turned = int((images.orientation != 1).sum())
    if turned and not images.exif_orientation:
        sentences.append(
            f"{turned} of {len(images)} images in {images.root} are rotated by EXIF and used as they are stored; "
            f"--exif_orientation 1 turns them upright."
        )
    median = int(np.median(images.sizes.prod(axis=1)))
    if median > LARGE_PIXELS:
        sentences.append(
            f"The images in {images.root} are large (median {median / 1e6:.0f} megapixels), so that decoding them "
            f"takes most of the time; train on smaller copies, which docs/train-on-my-images.md makes."
        )
    return sentences


def empty_classes(split: Split) -> int:
    """How many classes have no image."""
    labels = split.images.labels
    return len(split.classes) - len(np.unique(labels[labels != UNLABELED]))


def largest_labeled(split: Split) -> str:
    """An image with the largest label, and that label, for a person."""
    n = int(split.images.labels.argmax())
    return f"{split.images.name(n)} ({split.images.labels[n]})"
