"""Data sets: files of the real layouts, read like torchvision reads them, and every way a file can be wrong."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from pipelines import demo
from pipelines.index import open_data_set
from stec.errors import UserError

RNG = np.random.default_rng(0)
TRAIN_FILES = [f"data_batch_{k}" for k in range(1, 6)]


@pytest.fixture
def cifar_batches() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Planar pixels [20, 3072] and labels [20] of each official file."""
    return {
        name: (RNG.integers(0, 256, (20, 3072), np.uint8), RNG.integers(0, 10, 20).astype(np.uint8))
        for name in [*TRAIN_FILES, "test_batch"]
    }


def write_binary(root: Path, batches: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for name, (pixels, labels) in batches.items():
        np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / f"{name}.bin")
    return folder


def write_python(
    root: Path, batches: dict[str, tuple[np.ndarray, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The Python layout; torchvision's table of checksums is replaced by these files' own."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    md5 = {}
    for name, (pixels, labels) in batches.items():
        blob = pickle.dumps({"data": pixels, "labels": labels.tolist()}, protocol=2)
        (folder / name).write_bytes(blob)
        md5[name] = hashlib.md5(blob).hexdigest()
    meta = pickle.dumps({"label_names": list("abcdefghij")}, protocol=2)
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in TRAIN_FILES])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()})
    return folder


def test_both_cifar_layouts_are_read_like_torchvision_reads_them(
    tmp_path: Path, cifar_batches: dict[str, tuple[np.ndarray, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "binary").mkdir()
    write_binary(tmp_path / "binary", cifar_batches)
    write_python(tmp_path, cifar_batches, monkeypatch)
    for data_dir in (tmp_path / "binary", tmp_path):
        data_set = open_data_set("cifar10", data_dir)
        for split, train in ((data_set.train, True), (data_set.test, False)):
            theirs = CIFAR10(str(tmp_path), train=train)
            np.testing.assert_array_equal(split.images, theirs.data)
            np.testing.assert_array_equal(split.labels, theirs.targets)


def test_a_changed_pickle_is_not_unpickled(
    tmp_path: Path, cifar_batches: dict[str, tuple[np.ndarray, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_python(tmp_path, cifar_batches, monkeypatch)

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    (folder / "data_batch_3").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"data_batch_3 has MD5 .* not unpickled"):
        open_data_set("cifar10", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_truncated_missing_and_wrong_files(
    tmp_path: Path, cifar_batches: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    with pytest.raises(UserError, match="holds neither cifar-10-batches-bin nor cifar-10-batches-py"):
        open_data_set("cifar10", tmp_path)
    folder = write_binary(tmp_path, cifar_batches)
    whole = (folder / "data_batch_2.bin").read_bytes()
    (folder / "data_batch_2.bin").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"data_batch_2\.bin is truncated"):
        open_data_set("cifar10", tmp_path)
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_2\.bin cannot be read"):
        open_data_set("cifar10", tmp_path)
    (folder / "data_batch_2.bin").write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(UserError, match="label 11, but"):
        open_data_set("cifar10", tmp_path)


def test_limit_train_keeps_the_first_images(
    tmp_path: Path, cifar_batches: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    write_binary(tmp_path, cifar_batches)
    whole, limited = open_data_set("cifar10", tmp_path), open_data_set("cifar10", tmp_path, 30)
    np.testing.assert_array_equal(limited.train.images, whole.train.images[:30])
    assert len(limited.test) == len(whole.test)
    with pytest.raises(UserError, match="more than the 100 training images"):
        open_data_set("cifar10", tmp_path, 101)


def test_the_demo_set_is_fixed_balanced_and_split() -> None:
    train, labels = demo.render(split="train")
    again, _ = demo.render(split="train")
    np.testing.assert_array_equal(train, again)
    assert train.shape == (8192, 32, 32, 3) and train.dtype == np.uint8
    assert np.ptp(np.bincount(labels)) <= 1
    test, _ = demo.render(split="test")
    everything = np.concatenate([train, test]).reshape(len(train) + len(test), -1)
    assert len(np.unique(everything, axis=0)) == len(everything), "no image occurs twice"


def test_the_demo_set_cannot_be_solved_by_colour() -> None:
    """A classifier by mean colour and contrast, the nearest class mean, does hardly better than chance."""
    (train, train_labels), (test, test_labels) = demo.render(split="train"), demo.render(split="test")

    def features(images: np.ndarray) -> np.ndarray:
        return np.concatenate([images.mean((1, 2)), images.std((1, 2))], axis=1)

    means = np.stack([features(train[train_labels == k]).mean(0) for k in range(10)])
    nearest = ((features(test)[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == test_labels).mean() < 0.2
