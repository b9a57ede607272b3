"""CIFAR-10, CIFAR-100 and STL-10 in their official binary layouts, the CIFARs also in their Python layout."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.images import UNLABELED, ImageArray
from pipelines.errors import UserError

CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
STL10_CLASSES = tuple("airplane bird car cat deer dog horse monkey ship truck".split())
_CIFAR_PIXELS = 3 * 32 * 32
_STL10_PIXELS = 3 * 96 * 96

TwoSplits = tuple[ImageArray, ImageArray, tuple[str, ...]]


def read_cifar10(data_dir: Path) -> TwoSplits:
    """Train split, test split and class names of CIFAR-10; ``data_dir`` holds the unpacked folder."""
    folder = find_folder(data_dir, "cifar-10-batches-bin", "cifar-10-batches-py")
    if folder.name.endswith("-bin"):
        files = [folder / f"data_batch_{k}.bin" for k in range(1, 6)], [folder / "test_batch.bin"]
        train, test = (_read_cifar_binary(split, label_bytes=1, classes=10) for split in files)
    else:
        from torchvision.datasets import CIFAR10

        train, test = (
            _read_cifar_python(folder, dict(listed), "labels") for listed in (CIFAR10.train_list, CIFAR10.test_list)
        )
    return train, test, CIFAR10_CLASSES


def read_cifar100(data_dir: Path) -> TwoSplits:
    """Train split, test split and fine class names of CIFAR-100; ``data_dir`` holds the unpacked folder."""
    folder = find_folder(data_dir, "cifar-100-binary", "cifar-100-python")
    if folder.name.endswith("-binary"):
        # A record's first byte is the coarse label, its second the fine one.
        train, test = (
            _read_cifar_binary([folder / name], label_bytes=2, classes=100) for name in ("train.bin", "test.bin")
        )
        names = folder / "fine_label_names.txt"
        classes = tuple(_read_bytes(names).decode(errors="replace").split())
        if len(classes) != 100:
            raise UserError(f"{names} holds {len(classes)} names instead of 100; unpack CIFAR-100's archive again.")
    else:
        from torchvision.datasets import CIFAR100

        train, test = (
            _read_cifar_python(folder, dict(listed), "fine_labels")
            for listed in (CIFAR100.train_list, CIFAR100.test_list)
        )
        meta = _unpickle_verified(folder / CIFAR100.meta["filename"], CIFAR100.meta["md5"])
        classes = tuple(str(name) for name in meta[CIFAR100.meta["key"]])
    return train, test, classes


def read_stl10_split(data_dir: Path, split: str) -> ImageArray:
    """The split ``unlabeled``, ``train`` or ``test`` of STL-10; ``data_dir`` holds ``stl10_binary``.

    The images are not loaded but mapped into memory: the unlabeled ones alone are 2.8 GB.
    """
    folder = find_folder(data_dir, "stl10_binary")
    pixels = _map_stl10(folder / f"{split}_X.bin")
    if split == "unlabeled":
        return ImageArray(pixels=pixels, labels=np.full(len(pixels), UNLABELED, np.int64), layout="CWH")
    file = folder / f"{split}_y.bin"
    labels = np.frombuffer(_read_bytes(file), np.uint8).astype(np.int64) - 1
    if len(labels) != len(pixels):
        raise UserError(
            f"{file} holds {len(labels)} labels for the {len(pixels)} images of {split}_X.bin; "
            f"unpack STL-10's archive again."
        )
    _check_labels(labels, len(STL10_CLASSES), file, first=1)
    return ImageArray(pixels=pixels, labels=labels, layout="CWH")


def find_folder(data_dir: Path, *names: str) -> Path:
    """The first of the folders ``names`` in ``data_dir``. Raises UserError that says where one was found instead."""
    for name in names:
        if (data_dir / name).is_dir():
            return data_dir / name
    wanted = " nor ".join(names)
    elsewhere = data_dir.resolve().parent if data_dir.resolve().name in names else None
    if elsewhere is None and data_dir.is_dir():
        below = (path.parent for name in names for path in sorted(data_dir.glob(f"*/{name}")))
        elsewhere = next(below, None)
    if elsewhere is not None:
        raise UserError(
            f"--data_dir {data_dir} does not hold {names[0]}, but {elsewhere} does; use --data_dir {elsewhere}."
        )
    raise UserError(
        f"--data_dir {data_dir} holds {'neither ' if len(names) > 1 else 'no '}{wanted}; unpack the data set's archive "
        f"there, name the folder that contains it, or fetch it by --download 1."
    )


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); unpack the data set's archive again.") from error


def _check_labels(labels: NDArray[np.int64], classes: int, file: Path, *, first: int = 0) -> None:
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        where = int(np.argmax(wrong))
        raise UserError(
            f"{file} gives image {where} the label {labels[where] + first}, but labels are {first} to "
            f"{classes - 1 + first}; unpack the data set's archive again."
        )


def _read_cifar_binary(files: list[Path], *, label_bytes: int, classes: int) -> ImageArray:
    """Records of label bytes, the last of which counts, and 3072 bytes of pixels: red, green, blue, each row by row."""
    record_bytes = label_bytes + _CIFAR_PIXELS
    parts = []
    for file in files:
        blob = np.frombuffer(_read_bytes(file), np.uint8)
        if len(blob) == 0 or len(blob) % record_bytes:
            raise UserError(
                f"{file} is truncated: its {len(blob)} bytes are not a whole number of {record_bytes}-byte records; "
                f"unpack the data set's archive again."
            )
        records = blob.reshape(-1, record_bytes)
        _check_labels(records[:, label_bytes - 1].astype(np.int64), classes, file)
        parts.append(records)
    counts = [len(part) for part in parts]
    if max(counts) - min(counts) > 1:
        shortest = files[counts.index(min(counts))]
        raise UserError(
            f"{shortest} is truncated: it holds {min(counts)} images where others hold {max(counts)}; "
            f"unpack the data set's archive again."
        )
    records = np.concatenate(parts)
    return ImageArray(
        pixels=_planes_to_pixels(records[:, label_bytes:]), labels=records[:, label_bytes - 1].astype(np.int64)
    )


def _read_cifar_python(folder: Path, md5_by_name: dict[str, str], labels_key: str) -> ImageArray:
    batches = [_unpickle_verified(folder / name, md5) for name, md5 in md5_by_name.items()]
    planes = np.concatenate([np.asarray(batch["data"], np.uint8) for batch in batches])
    labels = np.concatenate([np.asarray(batch[labels_key], np.int64) for batch in batches])
    return ImageArray(pixels=_planes_to_pixels(planes), labels=labels)


def _unpickle_verified(file: Path, md5: str) -> dict[str, list[object]]:
    """Unpickle a file, but only after its MD5 has proved it to be the official one."""
    blob = _read_bytes(file)
    found = hashlib.md5(blob).hexdigest()
    if found != md5:
        raise UserError(
            f"{file} has MD5 {found} instead of the official {md5}, so it is not unpickled; "
            f"download the archive again, or use the binary layout."
        )
    content: dict[str, list[object]] = pickle.loads(blob, encoding="latin1")
    return content


def _planes_to_pixels(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _map_stl10(file: Path) -> NDArray[np.uint8]:
    """[N, 3, W, H] uint8: color planes of columns."""
    try:
        size = file.stat().st_size
        if size == 0 or size % _STL10_PIXELS:
            raise UserError(
                f"{file} has a wrong size: its {size} bytes are not a whole number of {_STL10_PIXELS}-byte images; "
                f"unpack STL-10's archive again."
            )
        return np.memmap(file, np.uint8, "r").reshape(-1, 3, 96, 96)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); unpack STL-10's archive again.") from error
