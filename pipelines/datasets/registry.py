"""The table of data sets, and the functions that open one by its name.

A new data set needs a file with its reader and a row in ``DATA_SETS``, nothing else. A reader opens some splits of the
data set, given by the names that ``splits`` in the row has for them, and returns them in that order::

    def read_it(source: Source, splits: Sequence[str]) -> list[Split]: ...

It raises UserError if the data is missing or damaged. The other fields of a row are described in ``DataSetTraits``.

No reader and no large library is imported until a data set is opened: ``launch.py --help`` needs the table.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.datasets.urls import RemoteFolder
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.datasets.images import Images

SplitName = Literal["train", "labeled", "test"]
"""The splits of a ``DataSet``."""
Progress = Callable[[str, int, int], None]
"""Callback(description, done, total) that reports progress."""


def no_progress(_description: str, _done: int, _total: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a reader needs to know."""

    data_dir: Path | RemoteFolder
    """A folder at a URL only if the data set can be ``remote``."""
    exif_orientation: bool = False
    """Whether image files are turned upright by their EXIF orientation."""
    progress: Progress = no_progress


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split as a reader returns it."""

    images: Images
    classes: tuple[str, ...] = ()
    """Class names in the order of the labels; empty if there are no labels."""
    notes: tuple[str, ...] = ()
    """Sentences to print before training."""


@dataclass(frozen=True, kw_only=True)
class DataSetTraits:
    """A row of the table: how a data set is read, and what the method fixes for it."""

    reader: str
    """The reader as ``module:function``."""
    splits: Mapping[SplitName, str]
    """Which splits there are, and the reader's names for them."""
    view_size_px: int
    stem: Literal["cifar", "stl10", "imagenet"]
    jitter_strength: float
    blur_and_solarize: bool = False
    """Whether its recipes blur and solarize views."""
    resize_px: int | None = None
    """For evaluation, the shorter side is resized to this and the center cut out; None: images are used as they are."""
    needs_data_dir: bool = True
    remote: bool = False
    """Whether it can be read from a URL."""
    torchvision_class: str | None = None
    """The class of ``torchvision.datasets`` that downloads it."""
    hub_name: str | None = None
    """Its name on the Hugging Face Hub."""

    def at(self, view_size_px: int | None) -> DataSetTraits:
        """The same for another view size (None: this one), with evaluation's resizing in proportion."""
        if view_size_px is None:
            return self
        resize_px = None if self.resize_px is None else self.resize_px * view_size_px // self.view_size_px
        return dataclasses.replace(self, view_size_px=view_size_px, resize_px=resize_px)


_TRAIN_TEST: Mapping[SplitName, str] = {"train": "train", "labeled": "train", "test": "test"}

DATA_SETS: dict[str, DataSetTraits] = {
    "demo": DataSetTraits(
        reader="pipelines.datasets.demo:read_demo",
        splits=_TRAIN_TEST,
        view_size_px=32,
        stem="cifar",
        jitter_strength=1.0,
        needs_data_dir=False,
    ),
    "cifar10": DataSetTraits(
        reader="pipelines.datasets.cifar:read_cifar10",
        splits=_TRAIN_TEST,
        view_size_px=32,
        stem="cifar",
        jitter_strength=0.5,
        torchvision_class="CIFAR10",
        hub_name="uoft-cs/cifar10",
    ),
    "cifar100": DataSetTraits(
        reader="pipelines.datasets.cifar:read_cifar100",
        splits=_TRAIN_TEST,
        view_size_px=32,
        stem="cifar",
        jitter_strength=0.5,
        torchvision_class="CIFAR100",
        hub_name="uoft-cs/cifar100",
    ),
    "stl10": DataSetTraits(
        reader="pipelines.datasets.stl10:read_stl10",
        splits={"train": "unlabeled", "labeled": "train", "test": "test"},
        view_size_px=96,
        stem="stl10",
        jitter_strength=1.0,
        blur_and_solarize=True,
        torchvision_class="STL10",
    ),
    "imagenet": DataSetTraits(
        reader="pipelines.datasets.image_folders:read_imagenet",
        splits={"train": "train", "labeled": "train", "test": "val"},
        view_size_px=224,
        stem="imagenet",
        jitter_strength=1.0,
        blur_and_solarize=True,
        resize_px=256,
        remote=True,
        hub_name="ILSVRC/imagenet-1k",
    ),
    "folder": DataSetTraits(
        reader="pipelines.datasets.image_folders:read_folder",
        splits={"train": "all images"},
        view_size_px=224,
        stem="imagenet",
        jitter_strength=1.0,
        blur_and_solarize=True,
        resize_px=256,
        remote=True,
    ),
}

if TYPE_CHECKING:
    DataSetName = str
else:
    DataSetName = Literal[tuple(DATA_SETS)]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Splits that share their classes."""

    train: Images
    """For pre-training."""
    labeled: Images | None
    """For the online classifier, kNN and linear probing; the same object as ``train`` if that has labels."""
    test: Images | None
    classes: tuple[str, ...]
    """Class names in the order of the labels; empty if there are no labels."""
    notes: tuple[str, ...] = ()
    """Sentences about the image files to print before training."""


def open_data_set(
    name: str,
    data_dir: Path | RemoteFolder | None,
    *,
    limit_train: int | None = None,
    download: bool = False,
    exif_orientation: bool = False,
    progress: Progress = no_progress,
) -> DataSet:
    """Open a data set of ``DATA_SETS`` by its name.

    ``data_dir`` is a local folder, or a ``RemoteFolder`` of shards. ``limit_train`` is the largest number of training
    images: the first ones, or of image files, which are sorted by class, evenly spaced ones. ``download`` fetches the
    data set into ``data_dir`` by torchvision, which verifies checksums. ``exif_orientation`` turns image files upright.
    ``progress`` reports the scan of image files that are not indexed yet. Raises UserError if the data is missing,
    damaged, or fewer images than ``limit_train``.
    """
    splits = _read_splits(name, data_dir, DATA_SETS[name].splits, download, exif_orientation, progress)
    train = images = splits["train"].images
    if limit_train is not None:
        if limit_train > len(images):
            raise UserError(
                f"--limit_train {limit_train} is more than the {len(images)} training images of {name}; leave it out "
                f"to use them all."
            )
        train = images.limited(limit_train)
    labeled, test = (splits[role].images if role in splits else None for role in ("labeled", "test"))
    return DataSet(
        train=train,
        labeled=train if labeled is images else labeled,
        test=test,
        classes=splits["train"].classes,
        notes=tuple(dict.fromkeys(note for split in splits.values() for note in split.notes)),
    )


def open_split(
    name: str,
    data_dir: Path | RemoteFolder | None,
    split: SplitName,
    *,
    download: bool = False,
    exif_orientation: bool = False,
    progress: Progress = no_progress,
) -> tuple[Images, tuple[str, ...]]:
    """One split, and the class names; only this split must be on disk. Options as in ``open_data_set``.

    Raises UserError if the data set has no such split.
    """
    if split not in DATA_SETS[name].splits:
        raise UserError(f"--dataset {name} has no {split} images; name another --split or data set.")
    opened = _read_splits(name, data_dir, [split], download, exif_orientation, progress)[split]
    return opened.images, opened.classes


def _read_splits(
    name: str,
    data_dir: Path | RemoteFolder | None,
    splits: Iterable[SplitName],
    download: bool,
    exif_orientation: bool,
    progress: Progress,
) -> dict[SplitName, Split]:
    traits = DATA_SETS[name]
    if traits.needs_data_dir:
        if data_dir is None:
            raise UserError(f"--dataset {name} needs --data_dir, the folder that holds the data set.")
        if isinstance(data_dir, RemoteFolder) and not traits.remote:
            able = " and ".join(other for other in DATA_SETS if DATA_SETS[other].remote)
            raise UserError(
                f"--dataset {name} cannot be read from a URL, only {able} can; copy {data_dir} to a local folder."
            )
        if download:
            _download(name, data_dir)
    source = Source(data_dir=data_dir or Path(), exif_orientation=exif_orientation, progress=progress)
    names = list(dict.fromkeys(traits.splits[split] for split in splits))
    by_name = dict(zip(names, pkgutil.resolve_name(traits.reader)(source, names)))
    return {split: by_name[traits.splits[split]] for split in splits}


def _download(name: str, data_dir: Path | RemoteFolder) -> None:
    torchvision_class = DATA_SETS[name].torchvision_class
    if torchvision_class is None:
        raise UserError(f"--download 1 cannot fetch {name}; get it from its owners and unpack it in {data_dir}.")
    from torchvision import datasets

    try:
        getattr(datasets, torchvision_class)(str(data_dir), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{name} could not be downloaded to {data_dir} ({error}); fetch it by hand.") from error
