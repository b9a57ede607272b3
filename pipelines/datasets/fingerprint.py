"""A fingerprint that identifies a set of images without reading all pixels."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.images import ImageArray, Images

SAMPLED = 256
"""Images in memory or in a memory map of which the pixels are read, evenly spaced."""


def fingerprint(images: Images) -> str:
    """``sha256:`` and a digest, independent of the folder that holds the images.

    The digest is of all labels; of the shape and the pixels of ``SAMPLED`` images in memory; of image files' names,
    offsets, and sizes in bytes and pixels. Changes of other pixels are not detected.
    """
    if isinstance(images, ImageArray):
        sampled = np.unique(np.linspace(0, len(images) - 1, SAMPLED).astype(np.int64))
        arrays: tuple[NDArray[Any], ...] = (images.upright(sampled),)
    else:
        names = images.files
        arrays = (names.blob, names.offsets, images.file_of, images.offset, images.size_bytes, images.sizes)
    digest = hashlib.sha256()
    for array in (images.labels, *arrays):
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return f"sha256:{digest.hexdigest()}"
