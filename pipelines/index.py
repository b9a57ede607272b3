"""What each data set is: its splits and its classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pipelines import demo
from pipelines.arrays import STL10_CLASSES, read_cifar10, read_cifar100, read_stl10_split
from pipelines.folders import read_folder
from pipelines.images import ImageArray, Images
from stec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Splits that share their classes."""

    train: Images
    """What pre-training sees."""
    labelled: Images
    """What the probe, nearest neighbours and linear fits learn from; the same as ``train`` where that has labels."""
    test: Images
    classes: tuple[str, ...]


def open_data_set(
    name: str, data_dir: Path | None, *, limit_train: int | None = None, download: bool = False
) -> DataSet:
    """Open a data set by its name, keeping at most ``limit_train`` training images: the first, or of folders, which
    are sorted by class, evenly spread ones.

    ``download`` first fetches CIFAR-10, CIFAR-100 or STL-10 into ``data_dir`` through torchvision, which verifies the
    checksums. Raises UserError where the data is missing, truncated or not what it should be.
    """
    if name == "demo":
        return _limited(_demo(), name, limit_train)
    if data_dir is None:
        raise UserError(f"--dataset {name} needs --data_dir, the folder that holds the data set.")
    if download:
        _download(name, data_dir)
    data_set = {"cifar10": _cifar10, "cifar100": _cifar100, "stl10": _stl10, "imagenet": _imagenet}[name](data_dir)
    return _limited(data_set, name, limit_train)


def open_test_images(name: str, data_dir: Path | None, *, download: bool = False) -> tuple[Images, tuple[str, ...]]:
    """The test split alone and the classes of a data set: all that an evaluation needs to be on disk."""
    if name == "stl10" and data_dir is not None and not download:
        return read_stl10_split(data_dir, "test"), STL10_CLASSES
    if name == "imagenet" and data_dir is not None and not download:
        return read_folder(data_dir, "val")
    data_set = open_data_set(name, data_dir, download=download)
    return data_set.test, data_set.classes


def _cifar10(data_dir: Path) -> DataSet:
    train, test, classes = read_cifar10(data_dir)
    return DataSet(train=train, labelled=train, test=test, classes=classes)


def _cifar100(data_dir: Path) -> DataSet:
    train, test, classes = read_cifar100(data_dir)
    return DataSet(train=train, labelled=train, test=test, classes=classes)


def _stl10(data_dir: Path) -> DataSet:
    unlabelled, labelled, test = (read_stl10_split(data_dir, split) for split in ("unlabeled", "train", "test"))
    return DataSet(train=unlabelled, labelled=labelled, test=test, classes=STL10_CLASSES)


def _imagenet(data_dir: Path) -> DataSet:
    (train, classes), (test, test_classes) = (read_folder(data_dir, split) for split in ("train", "val"))
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise UserError(
            f"{data_dir / 'train'} and {data_dir / 'val'} must hold the same class folders, but {odd[0]} is in one of "
            f"them only (of {len(odd)} such); complete the data set."
        )
    return DataSet(train=train, labelled=train, test=test, classes=classes)


def _demo() -> DataSet:
    splits = []
    for pixels, labels in (demo.render(split="train"), demo.render(split="test")):
        splits.append(ImageArray(pixels=pixels, labels=labels))
    return DataSet(train=splits[0], labelled=splits[0], test=splits[1], classes=demo.CLASSES)


def _limited(data_set: DataSet, name: str, limit_train: int | None) -> DataSet:
    if limit_train is None:
        return data_set
    if limit_train > len(data_set.train):
        raise UserError(
            f"--limit_train {limit_train} is more than the {len(data_set.train)} training images of {name}; "
            f"leave it out to use them all."
        )
    train = data_set.train.limited(limit_train)
    labelled = train if data_set.labelled is data_set.train else data_set.labelled
    return replace(data_set, train=train, labelled=labelled)


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
