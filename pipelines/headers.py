"""What a pass over encoded images finds out: size, place, label, whether DALI decodes them as Pillow does, faults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 2 * 89_478_485
"""An image that declares more is refused as a decompression bomb: the limit above which Pillow raises an error."""

DALI_DECODES = {
    "JPEG": {"L", "RGB"},
    "MPO": {"L", "RGB"},
    "PNG": {"1", "L", "LA", "P", "RGB", "RGBA"},
    "WEBP": {"RGB", "RGBA"},
}
"""Formats and Pillow's modes for them that DALI 2.4 decodes to Pillow's very pixels. What is not listed differs in some
variant (16-bit grey, CMYK without Adobe's marker, rotated TIFF, PPM with another maximum), raises, or is unknown."""

END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""What the files of these formats end with."""
TAIL_BYTES = 2**16
"""Cameras add data behind the end mark; in so many bytes it is looked for."""

FOUND = np.dtype(
    [
        ("offset", "i8"),
        ("size_bytes", "i8"),
        ("changed_ns", "i8"),
        ("height", "i8"),
        ("width", "i8"),
        ("label", "i8"),
        ("needs_pillow", "?"),
    ]
)
"""What is found out about an image. One with a fault is 1 x 1; one in a shard was changed at 0."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a pass found out about some images, in their order."""

    rows: NDArray[np.void]
    """[N] of FOUND."""
    faults: Mapping[int, str]
    """Why images that cannot be used cannot, by their place in ``rows``."""
    remark: str = ""
    """What else a person should know about the file that holds them."""


def open_lazily(file: IO[bytes]) -> Image.Image:
    """The image in ``file``, its header read and nothing decoded. Raises whatever Pillow raises, or ValueError."""
    image = Image.open(file)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it declares {image.height} x {image.width} pixels; {MAX_PIXELS} are the limit")
    return image


def read_header(file: IO[bytes]) -> tuple[int, int, bool] | str:
    """Height, width, and whether Pillow must decode the image; or why it is none.

    An image that seems to be cut off is decoded, so that it is known now and not when a batch fails on it.
    """
    try:
        with open_lazily(file) as image:
            found = image.height, image.width, image.mode not in DALI_DECODES.get(image.format or "", ())
            if not _has_end(file, image.format or ""):
                image.load()
            return found
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers meet foreign bytes: what they raise has no common base.
        return reason(error)


def _has_end(file: IO[bytes], image_format: str) -> bool:
    """Whether a file of a format with an end mark has one. Where Pillow reads in the file is left as it was."""
    mark = END_MARKS.get(image_format)
    if mark is None:
        return True
    before = file.tell()
    file.seek(-len(mark), os.SEEK_END)
    found = file.read() == mark
    if not found:
        size = file.tell()
        file.seek(max(0, size - TAIL_BYTES))
        found = mark in file.read()
    file.seek(before)
    return found


def reason(error: Exception) -> str:
    """Why an image cannot be used, in a few words on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
