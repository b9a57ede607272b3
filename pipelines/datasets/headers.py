"""What a pass over encoded images finds out: size, place, label, whether DALI decodes them as Pillow does, faults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

MAX_PIXELS = 2 * 89_478_485
"""An image that declares more is refused as a decompression bomb: the limit above which Pillow raises an error."""

DALI_DECODES = {
    "JPEG": {"L", "RGB"},
    "MPO": {"L", "RGB"},
    "PNG": {"1", "L", "LA", "P", "RGB", "RGBA"},
    "WEBP": {"RGB", "RGBA"},
}
"""Formats and Pillow's modes for them that DALI 2.4 decodes to Pillow's very pixels. What is not listed differs in some
variant (16-bit gray, CMYK without Adobe's marker, rotated TIFF, PPM with another maximum), raises, or is unknown."""

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
        ("orientation", "u1"),
    ]
)
"""What is found out about an image. One with a fault is 1 x 1, with orientation 1; one in a shard was changed
at 0."""

ORIENTATION = 0x0112
"""The EXIF tag."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of such an orientation upright; from 5 on, height and width change places."""

Header = tuple[int, int, bool, int]
"""Height and width in px as stored, whether Pillow must decode the image, and its orientation (1 to 8)."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a pass found out about some images, in their order."""

    rows: NDArray[np.void]
    """[N] of FOUND."""
    faults: Mapping[int, str]
    """Why images that cannot be used cannot, by their place in ``rows``."""
    remark: str = ""
    """What else a person should know about the file that holds them."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many parts of that file are no images of the data set, by kind."""


def open_lazily(file: IO[bytes]) -> Image.Image:
    """The image in ``file``, its header read and nothing decoded. Raises whatever Pillow raises, or ValueError."""
    image = Image.open(file)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it declares {image.height} x {image.width} pixels; {MAX_PIXELS} are the limit")
    return image


def read_header(file: IO[bytes]) -> Header | str:
    """What the header says; or why it is no image that can be used.

    An image that seems to be cut off is decoded, so that it is known now and not when a batch fails on it.
    """
    try:
        with open_lazily(file) as image:
            largest_gray(image)
            turn = orientation(image)
            needs_pillow = image.mode not in DALI_DECODES.get(image.format or "", ())
            needs_pillow |= turn != 1 and turn != _known_to_dali(image)
            found = image.height, image.width, needs_pillow, turn
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


def orientation(image: Image.Image) -> int:
    """How EXIF or XMP says that an image lies, 1 (upright) to 8; 1 where they say nothing.

    What follows the pixels of a PNG is not looked at.
    """
    if image.format == "TIFF":  # Pillow turns it when it decodes it
        return 1
    with suppress(Exception):  # damaged metadata are no fault of the pixels
        # Not the PNG reader's own method, which decodes all of an image to look for what follows its pixels.
        return _valid(Image.Image.getexif(image))
    return 1


def _known_to_dali(image: Image.Image) -> int:
    """The orientation in the EXIF block, the only one that DALI looks at."""
    exif = Image.Exif()
    with suppress(Exception):
        exif.load(image.info.get("exif", b""))
    return _valid(exif)


def _valid(exif: Image.Exif) -> int:
    found = exif.get(ORIENTATION)
    return int(found) if found in TURNS else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned as ``PIL.ImageOps.exif_transpose`` turns one of that orientation."""
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB. Gray values of more bits are scaled and rounded; Pillow would clip them at 255.

    Raises ValueError for gray values without a largest one (32-bit integers, floats).
    """
    largest = largest_gray(image)
    if largest is None:
        return image.convert("RGB")
    values = np.asarray(image).astype(np.uint32)
    scaled = (2 * 255 * values + largest) // (2 * largest)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def largest_gray(image: Image.Image) -> int | None:
    """White, in an image of one channel with more than 8 bits; None for all other images.

    Raises ValueError where the format says nothing of a largest value.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {kind}; save it in 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return None
    bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0] if isinstance(image, TiffImageFile) else 16
    return (1 << bits) - 1


def reason(error: Exception) -> str:
    """Why an image cannot be used, in a few words on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
