"""Numbered images with sizes and labels, in memory or in files."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.datasets.headers import open_lazily, read_header, read_orientation, reason, to_rgb, upright
from pipelines.datasets.row_groups import CACHE_BYTES, RowGroups, byte_range, row_group_numbers
from pipelines.errors import BadImage, UserError

if TYPE_CHECKING:
    from pipelines.datasets.shard_cache import ShardCache

UNLABELED = -1
PER_IMAGE = ("file_of", "offset", "size_bytes", "sizes", "labels", "needs_pillow", "orientation")
"""The arrays of ``ImageFiles`` with an entry for each image."""
OPEN_SHARDS = 256
"""The most shards that a process keeps open; it may have 1024 files open."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageArray:
    """Images of one size in memory or in a memory-mapped file. Hashed by identity."""

    pixels: NDArray[np.uint8]
    """[N, H, W, 3] or [N, 3, W, H] uint8, by ``layout``."""
    labels: NDArray[np.int64]
    """[N] int64, 0 to the number of classes - 1, or UNLABELED."""
    layout: Literal["HWC", "CWH"] = "HWC"
    """CWH is STL-10's: color planes of columns."""
    factors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Generative factors of the images by name, [N] each, NaN where an image has none; empty if they are unknown."""

    def __len__(self) -> int:
        return len(self.pixels)

    def image_hw(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N, 2]: height and width in px of the images ``image_ids`` [N]."""
        height, width = (self.pixels.shape[self.layout.index(axis) + 1] for axis in "HW")
        return np.broadcast_to(np.array([height, width], np.int64), (len(image_ids), 2))

    def upright(self, image_ids: NDArray[np.int64] | slice) -> NDArray[np.uint8]:
        """The images as [N, H, W, 3] uint8."""
        pixels = self.pixels[image_ids]
        return pixels if self.layout == "HWC" else pixels.transpose(0, 3, 2, 1)

    def open(self, image_id: int) -> Image.Image:
        """One image in RGB."""
        return Image.fromarray(np.ascontiguousarray(self.upright(slice(image_id, image_id + 1))[0]))

    def limited(self, count: int) -> ImageArray:
        """The first ``count`` images."""
        factors = {name: values[:count] for name, values in self.factors.items()}
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count], factors=factors)


@dataclass(frozen=True, kw_only=True, eq=False)
class Names:
    """N file names as bytes, concatenated, so that a million of them load in one read."""

    blob: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    """[N + 1]: where each name begins, and where the last one ends."""

    @classmethod
    def of(cls, names: Sequence[bytes]) -> Names:
        offsets = np.zeros(len(names) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, names), np.int64, len(names)), out=offsets[1:])
        return cls(blob=np.frombuffer(b"".join(names), np.uint8), offsets=offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, n: int) -> bytes:
        return self.blob[self.offsets.item(n) : self.offsets.item(n + 1)].tobytes()


class _OpenFile:
    """A file that is open for reading until its last reference is gone, in any thread."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFiles:
    """N encoded images in files below ``root``: one per file, or many per file (a tar shard, or a Parquet file, each
    of whose row groups is a shard).

    Those of ``shards`` are remote, and are fetched when their images are read. ``update`` corrects an image's entries
    if its file was replaced.
    """

    root: Path
    files: Names
    """Names of the files relative to ``root``; that of a Parquet file once for each of its row groups."""
    file_of: NDArray[np.int32]
    """[N] int32: the index in ``files`` of the file, or row group, that holds an image."""
    offset: NDArray[np.int64]
    """[N] int64: an image's first byte in that file, or its row in that row group."""
    size_bytes: NDArray[np.int64]
    """[N] int64: the number of encoded bytes."""
    sizes: NDArray[np.int64]
    """[N, 2] int64: height and width in px as ``open`` returns the image; 1 x 1 if it has a fault."""
    labels: NDArray[np.int64]
    """[N] int64, 0 to the number of classes - 1, or UNLABELED."""
    needs_pillow: NDArray[np.bool_]
    """[N] bool: whether DALI may decode other pixels than Pillow."""
    orientation: NDArray[np.uint8]
    """[N] uint8: the orientation by EXIF, 1 (upright as stored) to 8."""
    exif_orientation: bool = False
    """Whether images are turned upright by ``orientation``; ImageFolder leaves them as stored."""
    faults: Mapping[int, str] = field(default_factory=dict)
    """Why images cannot be used, by image id."""
    index_file: Path | None = None
    """The index on disk that these images were read from; ``update`` deletes it if a file has changed."""
    bad_list: Path | None = None
    """The list on disk of images that could not be decoded after they were indexed."""
    shards: ShardCache | None = None
    """Where the files come from if they are remote; ``root`` is then the folder of the cache."""

    def __len__(self) -> int:
        return len(self.file_of)

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens its own files.
        return {name: value for name, value in self.__dict__.items() if name not in ("_open_shards", "_row_groups")}

    def image_hw(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N, 2]: height and width in px of the images ``image_ids`` [N]."""
        return self.sizes[image_ids]

    @cached_property
    def in_shards(self) -> bool:
        """Whether files hold many images."""
        # A tar archive begins with a header: no image in one has offset 0.
        return self.in_parquet or bool(self.offset.any())

    @cached_property
    def in_parquet(self) -> bool:
        """Whether images are in row groups of Parquet files."""
        return len(self.files) > 0 and self.files[0].lower().endswith(b".parquet")

    @property
    def shard_of(self) -> NDArray[np.int32]:
        """[N] int32: the shard that holds each image."""
        return self.file_of

    @cached_property
    def shards_in_memory(self) -> int | None:
        """The number of shards that can be shuffled together, if a process keeps them in memory; None: any number."""
        if not self.in_parquet:
            return None
        largest = int(np.bincount(self.file_of, self.size_bytes).max(initial=1))
        # A half, as images of the next shards are read before the last ones of these.
        return max(1, CACHE_BYTES // 2 // max(1, largest))

    @property
    def source(self) -> str:
        """The folder or URL that holds the images, for the user."""
        return str(self.root if self.shards is None else self.shards.remote)

    def path(self, image_id: int) -> Path:
        """The local file or shard that holds the image; a remote one is not there before it is fetched."""
        return Path(os.fsdecode(self._path(image_id)))

    def file_name(self, image_id: int) -> str:
        """The name in ``files`` of the file or shard that holds the image."""
        return os.fsdecode(self.files[self.file_of.item(image_id)])

    def path_bytes(self, image_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """[N, longest] uint8: paths padded with zeros, for DALI's file reader."""
        names = np.array([self._path(image_id) for image_id in image_ids.tolist()], np.bytes_)
        return names.view(np.uint8).reshape(len(names), -1)

    def name(self, image_id: int) -> str:
        """The image's name for the user: its path, ``shard.tar: member``, or its row of a Parquet file."""
        path = os.path.join(self.source, self.file_name(image_id))  # noqa: PTH118
        if self.in_parquet:
            return (
                f"{path}: row {self.offset[image_id]} of row group {self._numbers_in_file[self.file_of.item(image_id)]}"
            )
        if not self.in_shards:
            return path
        end = int(self.offset[image_id])
        try:
            header = tarfile.TarInfo.frombuf(self._read(image_id, end - 512, 512), "utf-8", "surrogateescape")
        except (OSError, ValueError, tarfile.HeaderError):
            return f"{path}: image at byte {end}"
        return f"{path}: {header.name}"

    def encoded(self, image_id: int) -> NDArray[np.uint8]:
        """The encoded bytes [size_bytes] uint8; of an image in its own file, all that the file holds now.

        Raises BadImage if they are missing, and UserError if the disk fails.
        """
        try:
            if not self.in_shards:
                return np.fromfile(os.fsdecode(self._path(image_id)), np.uint8)
            first, size = int(self.offset[image_id]), int(self.size_bytes[image_id])
            if self.in_parquet:
                group = self._numbers_in_file[self.file_of.item(image_id)]
                with self._opened(image_id):
                    return self._row_groups.image(self.path(image_id), group, first)
            content = self._read(image_id, first, size)
        except (OSError, ValueError) as error:
            path = self.path(image_id)
            if isinstance(error, FileNotFoundError | ValueError) and os.path.isdir(path.parent):  # noqa: PTH112
                raise self.bad(image_id, reason(error)) from error
            # No fault of the image: listed as bad, it would be missing when the run continues.
            raise UserError(
                f"{path} cannot be read ({reason(error)}); make it readable again, and continue with --resume auto.",
                local=True,
            ) from error
        if len(content) < size:
            raise self.bad(image_id, "its shard is shorter than when it was indexed")
        return np.frombuffer(content, np.uint8)

    def open(self, image_id: int) -> Image.Image:
        """One image in RGB, upright with ``exif_orientation``.

        Same as torchvision's ImageFolder, except for 16-bit gray (``headers.to_rgb``). If its file was replaced, its
        size may differ from ``sizes`` (see ``update``). Raises BadImage if it cannot be decoded, and UserError if the
        disk fails.
        """
        if image_id in self.faults:
            raise self.bad(image_id, self.faults[image_id])
        content = io.BytesIO(self.encoded(image_id).data)
        try:
            with open_lazily(content) as image:
                orientation = read_orientation(image) if self.exif_orientation else 1
                return upright(to_rgb(image), orientation)
        except MemoryError as error:
            name = self.name(image_id)
            raise UserError(f"Memory ran out while {name} was decoded; end other processes.", local=True) from error
        except Exception as error:  # Pillow's exceptions for damaged files have no common base class.
            raise self.bad(image_id, reason(error)) from error

    def update(self, image_id: int) -> bool:
        """Read an image's header again, in case its file was replaced since it was indexed.

        Returns whether anything changed; the index on disk is then deleted, so that the next run makes a new one.
        Raises BadImage if the image cannot be read.
        """
        content = self.encoded(image_id)
        header = read_header(io.BytesIO(content.data))
        if isinstance(header, str):
            raise self.bad(image_id, header)
        height, width, needs_pillow, orientation = header
        if self.exif_orientation and orientation >= 5:
            height, width = width, height
        if (len(content), height, width) == (self.size_bytes[image_id], *self.sizes[image_id]):
            return False
        self.size_bytes[image_id] = len(content)
        self.sizes[image_id] = height, width
        self.needs_pillow[image_id] = needs_pillow
        self.orientation[image_id] = orientation
        if self.index_file is not None:
            with suppress(OSError):
                self.index_file.unlink()
        return True

    def bad(self, image_id: int, reason: str) -> BadImage:
        """The error for an image that cannot be used."""
        return BadImage(self.name(image_id), image_id, reason)

    def read_ahead(self, shard: int) -> None:
        """Ask the system to read a shard into its page cache, without waiting for it."""
        if hasattr(os, "posix_fadvise"):
            # A missing shard is reported when its images are needed.
            with suppress(OSError, ValueError):
                path = self._path_of_file(shard)
                # 0 bytes are all up to the file's end.
                extent = (
                    byte_range(Path(os.fsdecode(path)), self._numbers_in_file[shard]) if self.in_parquet else (0, 0)
                )
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, *extent, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def limited(self, count: int) -> ImageFiles:
        """``count`` of the images, evenly spaced, as folders are sorted by class."""
        image_ids = np.arange(count) * len(self) // count
        new_ids = {int(old): new for new, old in enumerate(image_ids)} if self.faults else {}
        return replace(
            self,
            **{name: getattr(self, name)[image_ids] for name in PER_IMAGE},
            faults={new_ids[old]: fault for old, fault in self.faults.items() if old in new_ids},
        )

    def turned_upright(self) -> ImageFiles:
        """The same images, turned upright by ``orientation``."""
        return replace(
            self,
            sizes=np.where(self.orientation[:, None] >= 5, self.sizes[:, ::-1], self.sizes),
            exif_orientation=True,
        )

    @cached_property
    def _prefix(self) -> bytes:
        return os.path.join(os.fsencode(self.root), b"")  # noqa: PTH118 - paths as bytes

    def _path(self, image_id: int) -> bytes:
        return self._path_of_file(self.file_of.item(image_id))

    def _path_of_file(self, n: int) -> bytes:
        if self.shards is not None:
            return os.fsencode(self.shards.paths[os.fsdecode(self.files[n])])
        return self._prefix + self.files[n]

    def _opened(self, image_id: int) -> AbstractContextManager[Any]:
        """Keeps the shard of an image in the cache while it is open, if the shard is remote."""
        if self.shards is None:
            return nullcontext()
        return self.shards.opened(self.file_name(image_id))

    @cached_property
    def _numbers_in_file(self) -> list[int]:
        """The number in its Parquet file of each row group."""
        return row_group_numbers(self.files)

    @cached_property
    def _row_groups(self) -> RowGroups:
        return RowGroups()

    @cached_property
    def _open_shards(self) -> dict[int, _OpenFile]:
        return {}

    def _read(self, image_id: int, first: int, size: int) -> bytes:
        """``size`` bytes from byte ``first`` on of the shard that holds an image; fewer at its end.

        Not from a memory map: if a mapped shard is truncated, SIGBUS ends the process.
        """
        if self.shards is not None:
            # Not kept open, so that any other process may delete it afterwards.
            with self._opened(image_id) as (descriptor, _):
                return os.pread(descriptor, size, first)
        shard = int(self.file_of[image_id])
        file = self._open_shards.get(shard)
        if file is None:
            file = _OpenFile(self.path(image_id))
            if len(self._open_shards) >= OPEN_SHARDS:
                self._open_shards.pop(next(iter(self._open_shards)), None)
            self._open_shards[shard] = file
        return os.pread(file.descriptor, size, first)


Images = ImageArray | ImageFiles
