"""What each data set is: its classes, where its bytes are, each image's size."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines import demo
from stec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ImageArray:
    """Images of one size in memory."""

    images: NDArray[np.uint8]
    """[N, H, W, 3] uint8."""
    labels: NDArray[np.int64]
    """[N] int64, 0 to the number of classes - 1."""

    def __len__(self) -> int:
        return len(self.images)

    def image_hw(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N, 2]: height and width in px of the images named by ``image_ids``."""
        return np.broadcast_to(np.array(self.images.shape[1:3], np.int64), (len(image_ids), 2))


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A training and a test split with the same classes."""

    train: ImageArray
    test: ImageArray
    classes: tuple[str, ...]


def open_data_set(name: str, data_dir: Path | None, limit_train: int | None = None) -> DataSet:
    """Open a data set by its name, keeping at most the first ``limit_train`` training images.

    Raises UserError where the data is missing, truncated or not what it should be.
    """
    if name == "demo":
        data_set = _demo()
    else:
        if data_dir is None:
            raise UserError(f"--dataset {name} needs --data_dir, the folder that holds the data set.")
        data_set = _cifar10(data_dir)
    if limit_train is not None:
        train = data_set.train
        if limit_train > len(train):
            raise UserError(
                f"--limit_train {limit_train} is more than the {len(train)} training images of {name}; "
                f"leave it out to use them all."
            )
        train = ImageArray(images=train.images[:limit_train], labels=train.labels[:limit_train])
        data_set = replace(data_set, train=train)
    return data_set


def _demo() -> DataSet:
    images, labels = demo.render(split="train")
    test_images, test_labels = demo.render(split="test")
    return DataSet(
        train=ImageArray(images=images, labels=labels),
        test=ImageArray(images=test_images, labels=test_labels),
        classes=demo.CLASSES,
    )


CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
_CIFAR_PIXELS = 3 * 32 * 32


def _cifar10(data_dir: Path) -> DataSet:
    """CIFAR-10 in its binary layout, else in its Python layout; ``data_dir`` holds the unpacked folder."""
    binary, python = data_dir / "cifar-10-batches-bin", data_dir / "cifar-10-batches-py"
    if binary.is_dir():
        files = [binary / f"data_batch_{k}.bin" for k in range(1, 6)], [binary / "test_batch.bin"]
        splits = [_read_cifar_binary(split, classes=len(CIFAR10_CLASSES)) for split in files]
    elif python.is_dir():
        from torchvision.datasets import CIFAR10

        splits = [_read_cifar_python(python, dict(listed)) for listed in (CIFAR10.train_list, CIFAR10.test_list)]
    else:
        raise UserError(
            f"{data_dir} holds neither {binary.name} nor {python.name}; unpack CIFAR-10's binary or Python archive "
            f"there, or point --data_dir to the folder that contains it."
        )
    return DataSet(train=splits[0], test=splits[1], classes=CIFAR10_CLASSES)


def _read_cifar_binary(files: list[Path], *, classes: int) -> ImageArray:
    """Records of one label byte and 3072 bytes of pixels: red, green, blue, each row by row."""
    record_bytes = 1 + _CIFAR_PIXELS
    parts = []
    for file in files:
        try:
            blob = np.fromfile(file, np.uint8)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); unpack CIFAR-10's archive again.") from error
        if len(blob) == 0 or len(blob) % record_bytes:
            raise UserError(
                f"{file} is truncated: its {len(blob)} bytes are not a whole number of {record_bytes}-byte records; "
                f"unpack CIFAR-10's archive again."
            )
        parts.append(blob.reshape(-1, record_bytes))
    records = np.concatenate(parts)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= classes:
        raise UserError(
            f"{files[0].parent} holds label {labels.max()}, but CIFAR-10 has {classes} classes; "
            f"unpack its archive again."
        )
    return ImageArray(images=_planes_to_pixels(records[:, 1:]), labels=labels)


def _read_cifar_python(folder: Path, md5_by_name: dict[str, str]) -> ImageArray:
    """Pickled batches; a file is unpickled only after its MD5 has proved it to be the official one."""
    pixels, labels = [], []
    for name, md5 in md5_by_name.items():
        file = folder / name
        try:
            blob = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); unpack CIFAR-10's archive again.") from error
        found = hashlib.md5(blob).hexdigest()
        if found != md5:
            raise UserError(
                f"{file} has MD5 {found} instead of CIFAR-10's {md5}, so it is not unpickled; "
                f"download the archive again, or use the binary layout."
            )
        batch = pickle.loads(blob, encoding="latin1")
        pixels.append(np.asarray(batch["data"], np.uint8))
        labels.append(np.asarray(batch["labels"], np.int64))
    return ImageArray(images=_planes_to_pixels(np.concatenate(pixels)), labels=np.concatenate(labels))


def _planes_to_pixels(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
