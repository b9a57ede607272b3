"""What each data set is: its splits and its classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.datasets import demo
from pipelines.datasets.arrays import STL10_CLASSES, read_cifar10, read_cifar100, read_stl10_split
from pipelines.datasets.cache import Split
from pipelines.datasets.folders import is_hidden
from pipelines.datasets.images import UNLABELED, ImageArray, Images
from pipelines.datasets.remarks import empty_classes, largest_labeled, remarks
from pipelines.errors import UserError
from pipelines.splits import Kind, Progress, read_split, silent

SPLITS = ("train", "val")
SplitName = Literal["train", "labeled", "test"]
"""The splits of a ``DataSet``."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Splits that share their classes."""

    train: Images
    """What pre-training sees."""
    labeled: Images | None
    """What the online classifier, kNN and linear probing learn from; the same as ``train`` where that has labels."""
    test: Images | None
    classes: tuple[str, ...]
    """Empty where there are no labels."""
    remarks: tuple[str, ...] = ()
    """What a person should know about the image files, a sentence each."""


def open_data_set(
    name: str,
    data_dir: Path | None,
    *,
    limit_train: int | None = None,
    download: bool = False,
    exif_orientation: bool = False,
    progress: Progress = silent,
) -> DataSet:
    """Open a data set by its name, keeping at most ``limit_train`` training images: the first, or of folders, which
    are sorted by class, evenly spread ones.

    ``download`` first fetches CIFAR-10, CIFAR-100 or STL-10 into ``data_dir`` through torchvision, which verifies the
    checksums. With ``exif_orientation`` image files are turned upright. ``progress`` hears about the pass over image
    files that are not indexed yet. Raises UserError where the data is missing, truncated or not what it should be.
    """
    if name == "demo":
        return _limited(_demo(), name, limit_train)
    if data_dir is None:
        raise UserError(f"--dataset {name} needs --data_dir, the folder that holds the data set.")
    if download:
        _download(name, data_dir)
    if name == "imagenet":
        data_set = _imagenet(data_dir, exif_orientation, progress)
    elif name == "folder":
        data_set = _folder(data_dir, exif_orientation, progress)
    else:
        data_set = {"cifar10": _cifar10, "cifar100": _cifar100, "stl10": _stl10}[name](data_dir)
    return _limited(data_set, name, limit_train)


def open_split(
    name: str,
    data_dir: Path | None,
    split: SplitName,
    *,
    download: bool = False,
    exif_orientation: bool = False,
    progress: Progress = silent,
) -> tuple[Images, tuple[str, ...]]:
    """One split alone, the only one that must be on disk, and the classes of a data set.

    Raises UserError where there is none.
    """
    if name == "folder" and split != "train":
        raise UserError(f"--dataset folder has no {split} images; name another --split or data set.")
    if name == "stl10" and data_dir is not None and not download:
        file = {"train": "unlabeled", "labeled": "train", "test": "test"}[split]
        return read_stl10_split(data_dir, file), STL10_CLASSES
    if name == "imagenet" and data_dir is not None and not download:
        found = _labeled_split(data_dir, "val" if split == "test" else "train", exif_orientation, progress)
        return found.images, found.classes
    data_set = open_data_set(name, data_dir, download=download, exif_orientation=exif_orientation, progress=progress)
    images = {"train": data_set.train, "labeled": data_set.labeled, "test": data_set.test}[split]
    assert images is not None, "all others have all splits"
    return images, data_set.classes


def _cifar10(data_dir: Path) -> DataSet:
    train, test, classes = read_cifar10(data_dir)
    return DataSet(train=train, labeled=train, test=test, classes=classes)


def _cifar100(data_dir: Path) -> DataSet:
    train, test, classes = read_cifar100(data_dir)
    return DataSet(train=train, labeled=train, test=test, classes=classes)


def _stl10(data_dir: Path) -> DataSet:
    unlabeled, labeled, test = (read_stl10_split(data_dir, split) for split in ("unlabeled", "train", "test"))
    return DataSet(train=unlabeled, labeled=labeled, test=test, classes=STL10_CLASSES)


def _imagenet(data_dir: Path, exif_orientation: bool, progress: Progress) -> DataSet:
    train, val = (_labeled_split(data_dir, name, exif_orientation, progress) for name in SPLITS)
    if train.layout == val.layout == "class folders" and train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(
            f"{data_dir / 'train'} and {data_dir / 'val'} must hold the same class folders, but {odd[0]} is in one of "
            f"them only (of {len(odd)} such); complete the data set."
        )
    if len(val.classes) > len(train.classes):
        raise UserError(
            f"{data_dir / 'val'} has {len(val.classes)} classes, the largest label at {largest_labeled(val)}, but "
            f"{data_dir / 'train'} has {len(train.classes)}; both must count them alike."
        )
    return DataSet(
        train=train.images,
        labeled=train.images,
        test=val.images,
        classes=train.classes,
        remarks=(*remarks(train), *remarks(val)),
    )


def _folder(data_dir: Path, exif_orientation: bool, progress: Progress) -> DataSet:
    if not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir} is no folder; name the one that holds the images.")
    split = turned(read_split(data_dir, "loose images", progress), exif_orientation)
    images = split.images
    unlabeled = replace(images, labels=np.full(len(images), UNLABELED, np.int64))
    return DataSet(train=unlabeled, labeled=None, test=None, classes=(), remarks=tuple(remarks(split)))


def turned(split: Split, exif_orientation: bool) -> Split:
    """The split with its images upright, where that is asked for."""
    return replace(split, images=split.images.turned_upright()) if exif_orientation else split


def _labeled_split(data_dir: Path, name: str, exif_orientation: bool, progress: Progress) -> Split:
    """The split ``train`` or ``val``, in class folders or shards. Raises UserError where it has no labels."""
    root = data_dir / name
    if not root.is_dir():
        raise UserError(_where_instead(data_dir))
    split = turned(read_split(root, "class folders", progress), exif_orientation)
    if not split.classes:
        raise UserError(f"The shards in {root} hold no labels (.cls); train without them by --dataset folder.")
    check_labels(split)
    if name == "train":
        check_classes(split)
    return split


def check_labels(split: Split) -> None:
    """Raise UserError where some images have labels and others, that are no bad ones, have none."""
    missing = np.setdiff1d(np.flatnonzero(split.images.labels == UNLABELED), list(split.images.faults))
    if split.classes and len(missing):
        raise UserError(
            f"{split.images.name(int(missing[0]))} has no label (.cls) beside it, but others have (it is one of "
            f"{len(missing)}); give all images labels or none."
        )


def check_classes(split: Split) -> None:
    """Raise UserError where shards for training have labels so large that there are more classes than images, and most
    of them empty: the online linear classifier would have a row of weights for each."""
    count = len(split.classes)
    if count > len(split.images) and 2 * empty_classes(split) > count:
        raise UserError(
            f"{empty_classes(split)} of the {count} classes of {split.images.root} have no image: the largest label is "
            f"that of {largest_labeled(split)}; number the classes from 0 without gaps."
        )


def splits_below(data_dir: Path) -> dict[str, tuple[Path, Kind]]:
    """The splits that ``data_dir`` seems to hold by name: ``train`` and ``val``, or all its images as one.

    Raises UserError where it is no folder.
    """
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} is no folder; name the one that holds the data set.")
    try:
        named: dict[str, tuple[Path, Kind]] = {
            name: (data_dir / name, "class folders")
            for name in SPLITS
            if (data_dir / name).is_dir()
            and any(
                not is_hidden(path.name) and (path.is_dir() or path.suffix.lower() == ".tar")
                for path in (data_dir / name).iterdir()
            )
        }
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); make it readable.") from error
    return named or {"all images": (data_dir, "loose images")}


def _where_instead(data_dir: Path) -> str:
    needed = " and ".join(SPLITS)
    candidates = [data_dir.resolve().parent]
    if data_dir.is_dir():
        candidates += sorted(path for path in data_dir.iterdir() if path.is_dir())
    for candidate in candidates:
        if all((candidate / split).is_dir() for split in SPLITS):
            return f"--data_dir {data_dir} does not hold {needed}, but {candidate} does; use --data_dir {candidate}."
    return f"--data_dir {data_dir} must hold the folders {needed}, each with class folders or tar shards."


def _demo() -> DataSet:
    splits = []
    for pixels, labels in (demo.load(split="train"), demo.load(split="test")):
        splits.append(ImageArray(pixels=pixels, labels=labels))
    return DataSet(train=splits[0], labeled=splits[0], test=splits[1], classes=demo.CLASSES)


def _limited(data_set: DataSet, name: str, limit_train: int | None) -> DataSet:
    if limit_train is None:
        return data_set
    if limit_train > len(data_set.train):
        raise UserError(
            f"--limit_train {limit_train} is more than the {len(data_set.train)} training images of {name}; "
            f"leave it out to use them all."
        )
    train = data_set.train.limited(limit_train)
    labeled = train if data_set.labeled is data_set.train else data_set.labeled
    return replace(data_set, train=train, labeled=labeled)


def _download(name: str, data_dir: Path) -> None:
    from torchvision import datasets

    try:
        if name in ("cifar10", "cifar100"):
            {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](str(data_dir), download=True)
        elif name == "stl10":
            datasets.STL10(str(data_dir), split="unlabeled", download=True)
        else:
            raise UserError(f"--download 1 cannot fetch {name}: get it from its owners and unpack it in {data_dir}.")
    except (OSError, RuntimeError) as error:
        raise UserError(f"{name} could not be downloaded to {data_dir} ({error}); fetch it by hand.") from error
