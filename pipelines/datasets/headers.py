"""Headers of encoded images: size, orientation, whether DALI decodes them as Pillow does, and faults."""

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
"""An image that declares more is refused as a decompression bomb; above this limit Pillow raises an error."""

DALI_DECODES = {
    "JPEG": {"L", "RGB"},
    "MPO": {"L", "RGB"},
    "PNG": {"1", "L", "LA", "P", "RGB", "RGBA"},
    "WEBP": {"RGB", "RGBA"},
}
"""Formats and Pillow's modes for which DALI 2.4 decodes the same pixels as Pillow. All others differ in some variant
(16-bit gray, CMYK without Adobe's marker, rotated TIFF, PPM with another maximum), raise, or are untested."""

END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""The last bytes of an image by format."""
START_OF_SCAN = b"\xff\xda"
"""The marker of a JPEG that follows its header."""
TAIL_BYTES = 2**16
"""The end mark is searched in this many bytes, as cameras append data to it."""

ROW_DTYPE = np.dtype(
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
"""What a scan records of an image. An image with a fault is 1 x 1, with orientation 1. In shards changed_ns is 0."""

ORIENTATION = 0x0112
"""The EXIF tag."""

TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image upright, by orientation; from 5 on, it exchanges height and width."""

Header = tuple[int, int, bool, int]
"""Height and width in px as stored, whether Pillow must decode the image, and its orientation (1 to 8)."""
FAULTY: Header = (1, 1, True, 1)


def row_of(
    header: Header | str, *, offset: int = 0, size_bytes: int, changed_ns: int = 0, label: int
) -> tuple[int, int, int, int, int, int, bool, int]:
    """The values of ROW_DTYPE; ``header`` is as returned by ``read_header``."""
    height, width, needs_pillow, orientation = FAULTY if isinstance(header, str) else header
    return offset, size_bytes, changed_ns, height, width, label, needs_pillow, orientation


@dataclass(frozen=True, kw_only=True)
class ScanResult:
    """What a scan of N images recorded, in their order."""

    rows: NDArray[np.void]
    """[N] of ROW_DTYPE."""
    faults: Mapping[int, str]
    """Why images cannot be used, by their row."""
    note: str = ""
    """A note for the user on the file that holds the images."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """How many members of that file are no images of the data set, by kind."""


def open_lazily(file: IO[bytes]) -> Image.Image:
    """The image in ``file``, its header read and nothing decoded. Raises what Pillow raises, or ValueError."""
    image = Image.open(file)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it declares {image.height} x {image.width} pixels; {MAX_PIXELS} are the limit")
    return image


def read_header(file: IO[bytes]) -> Header | str:
    """The header of an image, or why the image cannot be used.

    An image without an end mark is decoded to find out now whether that fails, and not in training. If it does not,
    Pillow must decode it again: a GPU's decoder may make other pixels of it, without an error.
    """
    try:
        with open_lazily(file) as image:
            white_level(image)
            orientation = read_orientation(image)
            needs_pillow = image.mode not in DALI_DECODES.get(image.format or "", ())
            needs_pillow |= orientation != 1 and orientation != _orientation_for_dali(image)
            height, width = image.height, image.width
            if not _has_end_mark(file, image.format or ""):
                image.load()
                needs_pillow = True
            return height, width, needs_pillow, orientation
    except MemoryError:
        raise
    except Exception as error:  # Pillow's exceptions for damaged files have no common base class.
        return reason(error)


def _has_end_mark(file: IO[bytes], image_format: str) -> bool:
    """Whether the file has its format's end mark; True for formats without one. Keeps the file's position."""
    mark = END_MARKS.get(image_format)
    if mark is None:
        return True
    position = file.tell()
    file.seek(-len(mark), os.SEEK_END)
    has_mark = file.read() == mark
    if not has_mark:
        tail = file.tell() - TAIL_BYTES
        # A thumbnail in the header has an end mark as well.
        file.seek(max(tail, 0 if image_format == "PNG" else _first_scan(file)))
        has_mark = mark in file.read()
    file.seek(position)
    return has_mark


def _first_scan(file: IO[bytes]) -> int:
    """Where the header of a JPEG ends: the position of the first marker that is not a segment of the header."""
    file.seek(2)
    while True:
        position = file.tell()
        marker, length = file.read(2), file.read(2)
        while marker == b"\xff\xff":  # fill bytes
            marker, length = b"\xff" + length[:1], length[1:] + file.read(1)
        if len(length) < 2 or marker[0] != 0xFF or marker == START_OF_SCAN:
            return position
        file.seek(int.from_bytes(length) - 2, os.SEEK_CUR)


def read_orientation(image: Image.Image) -> int:
    """An image's orientation by EXIF or XMP, 1 (upright) to 8; 1 if there is none.

    Metadata after the pixels of a PNG is ignored.
    """
    if image.format == "TIFF":  # Pillow turns it when it decodes it.
        return 1
    with suppress(Exception):  # Damaged metadata is no fault of the pixels.
        # Not the PNG reader's own method, which decodes the whole image to search for metadata after the pixels.
        return _orientation_in(Image.Image.getexif(image))
    return 1


def _orientation_for_dali(image: Image.Image) -> int:
    """The orientation in the EXIF block; DALI reads no XMP."""
    exif = Image.Exif()
    with suppress(Exception):
        exif.load(image.info.get("exif", b""))
    return _orientation_in(exif)


def _orientation_in(exif: Image.Exif) -> int:
    value = exif.get(ORIENTATION)
    return int(value) if value in TRANSPOSES else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned as ``PIL.ImageOps.exif_transpose`` turns one of that orientation."""
    return image.transpose(TRANSPOSES[orientation]) if orientation in TRANSPOSES else image


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB. Gray values of more bits are scaled and rounded; Pillow would clip them at 255.

    Raises ValueError for gray values without a maximum (32-bit integers, floats).
    """
    white = white_level(image)
    if white is None:
        return image.convert("RGB")
    values = np.asarray(image).astype(np.uint32)
    scaled = (2 * 255 * values + white) // (2 * white)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def white_level(image: Image.Image) -> int | None:
    """The largest gray value of an image with one channel of more than 8 bits; None for other images.

    Raises ValueError if the format defines no largest value.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {kind}; save it in 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return None
    bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0] if isinstance(image, TiffImageFile) else 16
    return (1 << bits) - 1


def reason(error: Exception) -> str:
    """Why an image cannot be used: an error's message on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
