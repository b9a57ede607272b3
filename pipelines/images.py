"""What a split of a data set is to the pipelines: numbered images in memory or in files, with sizes and labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stec.errors import UserError

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

    def limited(self, count: int) -> ImageArray:
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
        """One image in RGB, not rotated by its EXIF tag, as torchvision's ImageFolder opens it.

        Raises UserError where the file cannot be read, or is not of the size that it was indexed with.
        """
        file = self.file(image_id)
        try:
            with Image.open(file) as image:
                if (image.height, image.width) != tuple(self.sizes[image_id]):
                    raise UserError(
                        f"{file} has {image.height} x {image.width} pixels but had {self.sizes[image_id][0]} x "
                        f"{self.sizes[image_id][1]} when it was indexed; delete the index in {cache_folder()}.",
                        local=True,
                    )
                return image.convert("RGB")
        except (OSError, Image.DecompressionBombError) as error:
            raise UserError(f"{file} cannot be read ({error}); delete it or fetch it again.", local=True) from error

    def limited(self, count: int) -> ImageFiles:
        """``count`` of the images, evenly spread: folders are sorted by class."""
        image_ids = np.arange(count) * len(self) // count
        return ImageFiles(
            root=self.root,
            paths=tuple(self.paths[image_id] for image_id in image_ids),
            sizes=self.sizes[image_ids],
            labels=self.labels[image_ids],
        )


def cache_folder() -> Path:
    """Where the indexes of image folders are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stec"


Images = ImageArray | ImageFiles
