"""Images in Parquet files in the layout of the Hugging Face Hub, and the scan of their headers and labels.

A column is a struct with the encoded image as ``bytes`` (its ``path`` is not used). A column ``label`` of integers is
optional; -1 and null are no label. A row group is a shard: it is read as a whole.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets.headers import ROW_DTYPE, Header, ScanResult, read_header, reason, row_of
from pipelines.datasets.images import UNLABELED, Names
from pipelines.datasets.listing import Listing, image_files, is_hidden, is_regular, stamp
from pipelines.datasets.row_groups import as_array, image_column, open_parquet, read_column
from pipelines.datasets.shards import MAX_LABEL
from pipelines.errors import UserError

SUFFIX = ".parquet"
LABEL = "label"
SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val", "test")}
"""What the names of a split's files begin with, in order of preference, if all splits are in one folder."""


def split_files(folder: Path, split: str) -> list[str]:
    """Names of the Parquet files of ``train`` or ``val`` in a folder that holds several splits."""
    return names_of_split(_names(folder), split)


def names_of_split(names: Sequence[str], kind: str) -> list[str]:
    """Those of the names of Parquet files that are of the split ``kind``; all if that is no split."""
    if kind not in SPLIT_NAMES:
        return list(names)
    for prefix in SPLIT_NAMES[kind]:
        if matching := [name for name in names if re.match(rf"{prefix}\b", name.replace("_", "-"))]:
            return matching
    return []


def list_parquet(root: Path, kind: str) -> Listing | None:
    """The row groups of the Parquet files directly in ``root``, each listed by the name of its file.

    ``kind`` ``train`` or ``val`` is only that split. None if there are no Parquet files, or if there are image files:
    Parquet files next to these hold metadata. Raises UserError if a file is damaged or has no images.
    """
    watched = {".": stamp(root)}
    names = names_of_split(_names(root), kind)
    skipped: Counter[str] = Counter()
    if not names or image_files(root, ".", {}, skipped):
        return None
    skipped[SUFFIX] = 0
    watched |= {name: stamp(root / name) for name in names}
    files = [os.fsencode(name) for name in names for _ in range(count_row_groups(root / name, str(root / name)))]
    return Listing(
        layout="Parquet",
        files=Names.of(files),
        labels=np.full(len(files), UNLABELED, np.int64),
        classes=(),
        watched=watched,
        skipped=+skipped,
    )


def read_row_group(path: Path, group: int, shown: str) -> ScanResult:
    """Scan the images of a row group, given its file and its number, in their order.

    Raises UserError, which calls the file ``shown``, if it cannot be read or a label is invalid.
    """
    try:
        with open_parquet(path) as file:
            images = read_column(file, group, f"{image_column(file)}.bytes")
            labels = _labels(file, group, shown) if LABEL in file.schema_arrow.names else [UNLABELED] * len(images)
    except (OSError, ValueError) as error:
        raise _unreadable(shown, error) from error
    rows, faults = [], {}
    for n, (image, label) in enumerate(zip(images, labels)):
        content: bytes | memoryview = b""
        header: Header | str
        try:
            content = as_array(image).data
            header = read_header(io.BytesIO(content))
        except ValueError as error:
            header = reason(error)
        if isinstance(header, str):
            faults[n] = header
        rows.append(row_of(header, offset=n, size_bytes=len(content), label=label))
    return ScanResult(rows=np.array(rows, ROW_DTYPE), faults=faults)


def _names(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(SUFFIX) and not is_hidden(entry.name) and is_regular(entry)
    )


def count_row_groups(path: Path, shown: str) -> int:
    """Raises UserError, which calls the file ``shown``, if it is damaged or has no images."""
    try:
        with open_parquet(path) as file:
            if image_column(file) is None:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(
                    f"{shown} has no column of images, a struct with the binary field bytes, but only {names}; save it "
                    f"with encoded images, or move it elsewhere."
                )
            return int(file.num_row_groups)
    except (OSError, ValueError) as error:
        raise _unreadable(shown, error) from error


def _labels(file: Any, group: int, shown: str) -> Sequence[int]:
    labels = read_column(file, group, LABEL).to_pylist()
    result = []
    for label in labels:
        label = UNLABELED if label is None else label
        if not isinstance(label, int) or not UNLABELED <= label <= MAX_LABEL:
            raise UserError(f"{shown}: the column {LABEL} holds {label!r}; a label is a number from 0 to {MAX_LABEL}.")
        result.append(int(label))
    return result


def _unreadable(shown: str, error: Exception) -> UserError:
    return UserError(f"{shown} cannot be read as Parquet ({reason(error)}); fetch it again or delete it.")
