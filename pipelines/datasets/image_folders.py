"""Data sets of image files, tar shards or Parquet files: ``imagenet``, with labeled splits, and ``folder``, without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from pipelines.datasets.cache import SplitIndex
from pipelines.datasets.images import UNLABELED
from pipelines.datasets.listing import is_hidden
from pipelines.datasets.notes import count_empty_classes, largest_label, notes_on
from pipelines.datasets.parquet import split_files
from pipelines.datasets.registry import Source, Split
from pipelines.datasets.remote import shard_names
from pipelines.datasets.urls import MissingFolder, RemoteFolder, list_files
from pipelines.errors import UserError
from pipelines.splits import Kind, read_split

SPLITS = ("train", "val")


def read_imagenet(source: Source, splits: Sequence[str]) -> list[Split]:
    """The splits ``train`` and ``val``, each in class folders or shards with labels, or in Parquet files."""
    indexes = [_read_labeled(source, name) for name in splits]
    if len(indexes) == 2:
        _check_same_classes(*indexes)
    return [Split(images=index.images, classes=index.classes, notes=notes_on(index)) for index in indexes]


def read_folder(source: Source, _splits: Sequence[str]) -> list[Split]:
    """All images below a folder, or in the shards in it, without their labels."""
    if isinstance(source.data_dir, Path) and not source.data_dir.is_dir():
        raise UserError(f"--data_dir {source.data_dir} is no folder; name the one that holds the images.")
    index = read_split(source.data_dir, "loose images", source.progress)
    index = apply_orientation(index, source.exif_orientation)
    unlabeled = replace(index.images, labels=np.full(len(index.images), UNLABELED, np.int64))
    return [Split(images=unlabeled, notes=notes_on(index))]


def apply_orientation(index: SplitIndex, exif_orientation: bool) -> SplitIndex:
    """The index, with its images turned upright if ``exif_orientation``."""
    return replace(index, images=index.images.turned_upright()) if exif_orientation else index


def check_labels(index: SplitIndex) -> None:
    """Raise UserError if some usable images have labels and others do not."""
    missing = np.setdiff1d(np.flatnonzero(index.images.labels == UNLABELED), list(index.images.faults))
    if index.classes and len(missing):
        raise UserError(
            f"{index.images.name(int(missing[0]))} has no label (.cls, or the column label), but other images have one "
            f"({len(missing)} without a label); give all images labels or none."
        )


def check_classes(index: SplitIndex) -> None:
    """Raise UserError if shards for training have more classes than images, and most classes are empty.

    The online linear classifier has a row of weights for each class.
    """
    count, empty = len(index.classes), count_empty_classes(index)
    if count > len(index.images) and 2 * empty > count:
        raise UserError(
            f"{empty} of the {count} classes of {index.images.source} have no image; the largest label is that of "
            f"{largest_label(index)}; number the classes from 0 without gaps."
        )


def splits_below(data_dir: Path | RemoteFolder) -> Mapping[str, tuple[Path | RemoteFolder, Kind]]:
    """The splits in ``data_dir`` by name: ``train`` and ``val`` if they hold folders or shards, else all its images.

    Raises UserError if it is no folder.
    """
    if isinstance(data_dir, RemoteFolder):
        found = {name: _remote_split(data_dir, name) for name in SPLITS}
        return {name: split for name, split in found.items() if split} or {"all images": (data_dir, "loose images")}
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} is no folder; name the one that holds the data set.")
    try:
        named: dict[str, tuple[Path, Kind]] = {
            name: (data_dir / name, "class folders")
            for name in SPLITS
            if (data_dir / name).is_dir()
            and any(
                not is_hidden(path.name) and (path.is_dir() or path.suffix.lower() in (".tar", ".parquet"))
                for path in (data_dir / name).iterdir()
            )
        }
        if not named and all(split_files(data_dir, name) for name in SPLITS):
            named = {name: (data_dir, cast(Kind, name)) for name in SPLITS}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); make it readable.") from error
    return named or {"all images": (data_dir, "loose images")}


def _read_labeled(source: Source, name: str) -> SplitIndex:
    root, kind = _split_of(source.data_dir, name)
    index = apply_orientation(read_split(root, kind, source.progress), source.exif_orientation)
    if not index.classes:
        raise UserError(
            f"The shards in {root} hold no labels (.cls, or the column label of Parquet files); use --dataset folder "
            f"to train without labels."
        )
    check_labels(index)
    if name == "train":
        check_classes(index)
    return index


def _split_of(data_dir: Path | RemoteFolder, name: str) -> tuple[Path | RemoteFolder, Kind]:
    """Where a split is, and how it is read. Raises UserError if it is missing."""
    if isinstance(data_dir, RemoteFolder):
        found = _remote_split(data_dir, name)
        if found is None:
            raise UserError(
                f"--data_dir {data_dir} must hold shards (*.tar, *.parquet) in {data_dir / name}, or {name}-*.parquet; "
                f"launch.py pack writes shards."
            )
        return found
    if not (data_dir / name).is_dir() and data_dir.is_dir() and split_files(data_dir, name):
        return data_dir, cast(Kind, name)
    if not (data_dir / name).is_dir():
        raise UserError(_missing_splits(data_dir))
    return data_dir / name, "class folders"


def _remote_split(data_dir: RemoteFolder, name: str) -> tuple[RemoteFolder, Kind] | None:
    """A split at a URL, or None if there is none. Raises UserError if ``data_dir`` cannot be listed."""
    files = list_files(data_dir)  # Before a folder in it, of which less is known.
    with suppress(MissingFolder):
        if shard_names(list_files(data_dir / name), "class folders"):
            return data_dir / name, "class folders"
    return (data_dir, cast(Kind, name)) if shard_names(files, name) else None


def _check_same_classes(train: SplitIndex, val: SplitIndex) -> None:
    if train.layout == val.layout == "class folders" and train.classes != val.classes:
        unmatched = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(
            f"{train.images.source} and {val.images.source} must hold the same class folders, but {unmatched[0]} is in "
            f"one of them only ({len(unmatched)} such folders); complete the data set."
        )
    if len(val.classes) > len(train.classes):
        raise UserError(
            f"{val.images.source} has {len(val.classes)} classes (the largest label is that of {largest_label(val)}), "
            f"but {train.images.source} has {len(train.classes)}; both must number the classes in the same way."
        )


def _missing_splits(data_dir: Path) -> str:
    required = " and ".join(SPLITS)
    candidates = [data_dir.resolve().parent]
    if data_dir.is_dir():
        candidates += sorted(path for path in data_dir.iterdir() if path.is_dir())
    for candidate in candidates:
        if all((candidate / split).is_dir() for split in SPLITS):
            return f"--data_dir {data_dir} does not hold {required}, but {candidate} does; use --data_dir {candidate}."
    return (
        f"--data_dir {data_dir} must hold the folders {required}, each with class folders or shards, or "
        f"train-*.parquet and validation-*.parquet."
    )
