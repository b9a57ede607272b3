"""Row groups of Parquet files with images: opened by pyarrow, decoded as a whole, and kept in memory up to a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.datasets.images import Names

CACHE_BYTES = 2**30
"""The most bytes of decoded row groups that a process keeps; at least the row group in use is kept."""


def open_parquet(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``.

    Raises OSError or ValueError if the file cannot be opened, and UserError if pyarrow is missing.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f'Reading {path} needs pyarrow; run pip install "stec[parquet]".') from error
    return parquet.ParquetFile(path)


def image_column(file: Any) -> str | None:
    """The name of the first column that is a struct with binary ``bytes``; None if there is none."""
    from pyarrow import types

    for field in file.schema_arrow:
        if types.is_struct(field.type):
            position = field.type.get_field_index("bytes")
            if position >= 0 and _is_binary(types, field.type.field(position).type):
                return str(field.name)
    return None


def read_column(file: Any, group: int, column: str) -> Any:
    """The column of a row group as a ``pyarrow.ChunkedArray``; ``image.bytes`` is a field of a struct.

    Raises OSError or ValueError if it is damaged.
    """
    from pyarrow import compute

    name, _, member = column.partition(".")
    values = file.read_row_group(group, columns=[column], use_threads=False).column(name)
    return compute.struct_field(values, member) if member else values


def encoded_images(path: Path, group: int) -> Any:
    """The encoded images of a row group as a ``pyarrow.ChunkedArray`` of bytes.

    Raises OSError or ValueError if the file cannot be read or holds no images.
    """
    with open_parquet(path) as file:
        column = image_column(file)
        if column is None or group >= file.num_row_groups:
            raise ValueError("its Parquet file was replaced since it was indexed")
        return read_column(file, group, f"{column}.bytes")


def row_group_numbers(files: Names) -> list[int]:
    """The number of each row group in its Parquet file, of which ``files`` are the names, in order."""
    numbers: list[int] = []
    for n in range(len(files)):
        numbers.append(numbers[-1] + 1 if n > 0 and files[n - 1] == files[n] else 0)
    return numbers


def as_array(value: Any) -> NDArray[np.uint8]:
    """The bytes [size] uint8 of a value of ``encoded_images``, without a copy. Raises ValueError if it is null."""
    buffer = value.as_buffer()
    if buffer is None:
        raise ValueError("its bytes are null")
    return np.frombuffer(buffer, np.uint8)


def byte_range(path: Path, group: int) -> tuple[int, int]:
    """The first byte and the number of bytes of a row group's images in its file. Raises as ``encoded_images``."""
    with open_parquet(path) as file:
        column = image_column(file)
        parts = file.metadata.row_group(group)
        for k in range(parts.num_columns):
            part = parts.column(k)
            if part.path_in_schema == f"{column}.bytes":
                # pyarrow returns 0 or None if there is no dictionary, depending on the version.
                first = min(part.dictionary_page_offset or part.data_page_offset, part.data_page_offset)
                return first, part.total_compressed_size
    return 0, 0


class RowGroups:
    """Decoded row groups, of which the least recently used are dropped above CACHE_BYTES. For several threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def image(self, path: Path, group: int, row: int) -> NDArray[np.uint8]:
        """The encoded bytes [size] uint8 of an image. Raises as ``encoded_images``."""
        # Decoding under the lock keeps several threads from decoding the same row group.
        with self._lock:
            images = self._kept.get((path, group))
            if images is None:
                images = encoded_images(path, group)
                self._kept[path, group] = images
                self._bytes += images.nbytes
                while self._bytes > CACHE_BYTES and len(self._kept) > 1:
                    _, dropped = self._kept.popitem(last=False)
                    self._bytes -= dropped.nbytes
            self._kept.move_to_end((path, group))
        if row >= len(images):
            raise ValueError("its row group is shorter than when it was indexed")
        return as_array(images[row])


def _is_binary(types: Any, kind: Any) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))
