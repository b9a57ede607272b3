"""STL-10 in its binary layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.archives import check_labels, find_folder, read_bytes
from pipelines.datasets.images import UNLABELED, ImageArray
from pipelines.datasets.registry import Source, Split
from pipelines.errors import UserError

CLASSES = tuple("airplane bird car cat deer dog horse monkey ship truck".split())
IMAGE_BYTES = 3 * 96 * 96


def read_stl10(source: Source, splits: Sequence[str]) -> list[Split]:
    """The splits ``unlabeled``, ``train`` and ``test`` of STL-10, mapped into memory: ``unlabeled`` has 2.8 GB."""
    folder = find_folder(source.data_dir, "stl10_binary")
    return [Split(images=_read_split(folder, split), classes=CLASSES) for split in splits]


def _read_split(folder: Path, split: str) -> ImageArray:
    pixels = _map_pixels(folder / f"{split}_X.bin")
    if split == "unlabeled":
        return ImageArray(pixels=pixels, labels=np.full(len(pixels), UNLABELED, np.int64), layout="CWH")
    file = folder / f"{split}_y.bin"
    labels = np.frombuffer(read_bytes(file), np.uint8).astype(np.int64) - 1
    if len(labels) != len(pixels):
        raise UserError(
            f"{file} holds {len(labels)} labels for the {len(pixels)} images of {split}_X.bin; "
            f"unpack STL-10's archive again."
        )
    check_labels(labels, len(CLASSES), file, first=1)
    return ImageArray(pixels=pixels, labels=labels, layout="CWH")


def _map_pixels(file: Path) -> NDArray[np.uint8]:
    """[N, 3, W, H] uint8: color planes of columns."""
    try:
        size = file.stat().st_size
        if size == 0 or size % IMAGE_BYTES:
            raise UserError(
                f"{file} has a wrong size: its {size} bytes are not a whole number of {IMAGE_BYTES}-byte images; "
                f"unpack STL-10's archive again."
            )
        return np.memmap(file, np.uint8, "r").reshape(-1, 3, 96, 96)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); unpack STL-10's archive again.") from error
