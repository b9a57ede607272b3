"""What a split of a data set is to the pipelines: numbered images in memory or in files, with sizes and labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

UNLABELLED = -1


@dataclass(frozen=True, kw_only=True)
class ImageArray:
    """Images of one size as bytes in memory, or in a memory-mapped file."""

    pixels: NDArray[np.uint8]
    """[N, H, W, 3] or [N, 3, W, H] uint8, as ``layout`` says."""
    labels: NDArray[np.int64]
    """[N] int64, 0 to the number of classes - 1, or UNLABELLED."""
    layout: Literal["HWC", "CWH"] = "HWC"
    """CWH is how STL-10 stores an image: colour plane after plane, each column by column."""

    def __len__(self) -> int:
        return len(self.pixels)

    def image_hw(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N, 2]: height and width in px of the images named by ``image_ids``."""
        height, width = (self.pixels.shape[self.layout.index(axis) + 1] for axis in "HW")
        return np.broadcast_to(np.array([height, width], np.int64), (len(image_ids), 2))

    def upright(self, image_ids: NDArray[np.int64] | slice) -> NDArray[np.uint8]:
        """[N, H, W, 3] uint8."""
        pixels = self.pixels[image_ids]
        return pixels if self.layout == "HWC" else pixels.transpose(0, 3, 2, 1)

    def open(self, image_id: int) -> Image.Image:
        """One image in RGB."""
        return Image.fromarray(np.ascontiguousarray(self.upright(slice(image_id, image_id + 1))[0]))

    def first(self, count: int) -> ImageArray:
        """The first ``count`` images."""
        return ImageArray(pixels=self.pixels[:count], labels=self.labels[:count], layout=self.layout)


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Encoded images, each a file below ``root``."""

    root: Path
    paths: tuple[str, ...]
    """N paths relative to ``root``."""
    sizes: NDArray[np.int64]
    """[N, 2] int64: height and width in px as stored, before any EXIF rotation."""
    labels: NDArray[np.int64]
    """[N] int64, 0 to the number of classes - 1, or UNLABELLED."""

    def __len__(self) -> int:
        return len(self.paths)

    def image_hw(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N, 2]: height and width in px of the images named by ``image_ids``."""
        return self.sizes[image_ids]

    def file(self, image_id: int) -> Path:
        return self.root / self.paths[image_id]

    def open(self, image_id: int) -> Image.Image:
        """One image in RGB, not rotated by its EXIF tag, as torchvision's ImageFolder opens it."""
        with Image.open(self.file(image_id)) as image:
            return image.convert("RGB")

    def first(self, count: int) -> ImageFiles:
        """The first ``count`` images."""
        return ImageFiles(
            root=self.root, paths=self.paths[:count], sizes=self.sizes[:count], labels=self.labels[:count]
        )


Images = ImageArray | ImageFiles
