"""CIFAR-10 and CIFAR-100, in their binary and their Python layouts."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.archives import check_labels, find_folder, read_bytes
from pipelines.datasets.images import ImageArray
from pipelines.datasets.registry import Source, Split
from pipelines.errors import UserError

CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
PIXEL_BYTES = 3 * 32 * 32


def read_cifar10(source: Source, splits: Sequence[str]) -> list[Split]:
    """The splits ``train`` and ``test`` of CIFAR-10."""
    folder = find_folder(source.data_dir, "cifar-10-batches-bin", "cifar-10-batches-py")
    if folder.name.endswith("-bin"):
        names = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}
        images = [_read_binary(folder, names[split], label_bytes=1, classes=10) for split in splits]
    else:
        from torchvision.datasets import CIFAR10

        checksums = {"train": CIFAR10.train_list, "test": CIFAR10.test_list}
        images = [_read_python(folder, checksums[split], "labels") for split in splits]
    return [Split(images=of_split, classes=CIFAR10_CLASSES) for of_split in images]


def read_cifar100(source: Source, splits: Sequence[str]) -> list[Split]:
    """The splits ``train`` and ``test`` of CIFAR-100, with the fine labels."""
    folder = find_folder(source.data_dir, "cifar-100-binary", "cifar-100-python")
    if folder.name.endswith("-binary"):
        # A record's first byte is the coarse label, its second the fine one.
        images = [_read_binary(folder, [f"{split}.bin"], label_bytes=2, classes=100) for split in splits]
        names = folder / "fine_label_names.txt"
        classes = tuple(read_bytes(names).decode(errors="replace").split())
        if len(classes) != 100:
            raise UserError(f"{names} holds {len(classes)} names instead of 100; unpack CIFAR-100's archive again.")
    else:
        from torchvision.datasets import CIFAR100

        checksums = {"train": CIFAR100.train_list, "test": CIFAR100.test_list}
        images = [_read_python(folder, checksums[split], "fine_labels") for split in splits]
        meta = _unpickle_verified(folder / CIFAR100.meta["filename"], CIFAR100.meta["md5"])
        classes = tuple(str(name) for name in meta[CIFAR100.meta["key"]])
    return [Split(images=of_split, classes=classes) for of_split in images]


def _read_binary(folder: Path, names: Sequence[str], *, label_bytes: int, classes: int) -> ImageArray:
    """Records of ``label_bytes`` labels, the last of which is used, and 3072 bytes of pixels: three planes of rows."""
    record_bytes = label_bytes + PIXEL_BYTES
    batches = []
    for name in names:
        content = np.frombuffer(read_bytes(folder / name), np.uint8)
        if len(content) == 0 or len(content) % record_bytes:
            raise UserError(
                f"{folder / name} is truncated: its {len(content)} bytes are not a whole number of {record_bytes}-byte "
                f"records; unpack the data set's archive again."
            )
        records = content.reshape(-1, record_bytes)
        check_labels(records[:, label_bytes - 1].astype(np.int64), classes, folder / name)
        batches.append(records)
    counts = [len(records) for records in batches]
    if max(counts) - min(counts) > 1:
        shortest = folder / names[counts.index(min(counts))]
        raise UserError(
            f"{shortest} is truncated: it holds {min(counts)} images where others hold {max(counts)}; "
            f"unpack the data set's archive again."
        )
    records = np.concatenate(batches)
    return _image_array(records[:, label_bytes:], records[:, label_bytes - 1])


def _read_python(folder: Path, checksums: Sequence[Sequence[str]], labels_key: str) -> ImageArray:
    batches = [_unpickle_verified(folder / name, md5) for name, md5 in checksums]
    planes = np.concatenate([np.asarray(batch["data"], np.uint8) for batch in batches])
    return _image_array(planes, np.concatenate([np.asarray(batch[labels_key]) for batch in batches]))


def _unpickle_verified(file: Path, md5: str) -> dict[str, list[object]]:
    """Unpickle a file if its MD5 is the official one; unpickling any other could execute code."""
    content = read_bytes(file)
    actual = hashlib.md5(content).hexdigest()
    if actual != md5:
        raise UserError(
            f"{file} has MD5 {actual} instead of the official {md5}, so it is not unpickled; "
            f"download the archive again, or use the binary layout."
        )
    values: dict[str, list[object]] = pickle.loads(content, encoding="latin1")
    return values


def _image_array(planes: NDArray[np.uint8], labels: NDArray[np.integer]) -> ImageArray:
    pixels = np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ImageArray(pixels=pixels, labels=labels.astype(np.int64))
