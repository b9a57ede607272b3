"""Data sets: files of the real layouts, read like torchvision reads them, and every way a file can be wrong."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10, ImageFolder

from pipelines import splits
from pipelines.datasets import demo
from pipelines.datasets.images import ImageArray, ImageFiles
from pipelines.datasets.registry import open_data_set, open_split
from pipelines.errors import UserError
from tests.conftest import smooth_image

RNG = np.random.default_rng(0)
Batches = dict[str, tuple[np.ndarray, np.ndarray]]


def random_batches(names: list[str], classes: int) -> Batches:
    """Planar pixels [20, 3072] and labels [20] of each official file."""
    return {
        name: (RNG.integers(0, 256, (20, 3072), np.uint8), RNG.integers(0, classes, 20).astype(np.uint8))
        for name in names
    }


CIFAR10_FILES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]


def write_cifar10_binary(root: Path, batches: Batches) -> Path:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, (pixels, labels) in batches.items():
        np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / f"{name}.bin")
    return folder


def write_cifar100_binary(root: Path, batches: Batches) -> Path:
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    for name, (pixels, labels) in batches.items():
        coarse = RNG.integers(0, 20, (20, 1)).astype(np.uint8)
        np.concatenate([coarse, labels[:, None], pixels], axis=1).tofile(folder / f"{name}.bin")
    (folder / "fine_label_names.txt").write_text("\n".join(f"class{k}" for k in range(100)) + "\n")
    return folder


def write_python(
    root: Path, batches: Batches, torchvisions: type[CIFAR10], labels_key: str, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The Python layout; torchvision's table of checksums is replaced by these files' own."""
    folder = root / torchvisions.base_folder
    folder.mkdir(parents=True)
    md5 = {}
    for name, (pixels, labels) in batches.items():
        blob = pickle.dumps({"data": pixels, labels_key: labels.tolist()}, protocol=2)
        (folder / name).write_bytes(blob)
        md5[name] = hashlib.md5(blob).hexdigest()
    meta = pickle.dumps({torchvisions.meta["key"]: [f"class{k}" for k in range(100)]}, protocol=2)
    (folder / torchvisions.meta["filename"]).write_bytes(meta)
    test = [name for name in batches if name.startswith("test")]
    monkeypatch.setattr(torchvisions, "train_list", [[name, md5[name]] for name in batches if name not in test])
    monkeypatch.setattr(torchvisions, "test_list", [[name, md5[name]] for name in test])
    monkeypatch.setattr(torchvisions, "meta", {**torchvisions.meta, "md5": hashlib.md5(meta).hexdigest()})
    return folder


@pytest.mark.parametrize(
    ("name", "files", "classes", "torchvisions", "labels_key", "write_binary"),
    [
        ("cifar10", CIFAR10_FILES, 10, CIFAR10, "labels", write_cifar10_binary),
        ("cifar100", ["train", "test"], 100, CIFAR100, "fine_labels", write_cifar100_binary),
    ],
)
def test_both_cifar_layouts_are_read_like_torchvision_reads_them(
    name: str,
    files: list[str],
    classes: int,
    torchvisions: type[CIFAR10],
    labels_key: str,
    write_binary: Callable[[Path, Batches], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = random_batches(files, classes)
    write_binary(tmp_path / "binary", batches)
    write_python(tmp_path, batches, torchvisions, labels_key, monkeypatch)
    for data_dir in (tmp_path / "binary", tmp_path):
        data_set = open_data_set(name, data_dir)
        assert len(data_set.classes) == classes and data_set.labeled is data_set.train
        for split, train in ((data_set.train, True), (data_set.test, False)):
            theirs = torchvisions(str(tmp_path), train=train)
            np.testing.assert_array_equal(split.pixels, theirs.data)
            np.testing.assert_array_equal(split.labels, theirs.targets)


def test_a_changed_pickle_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_python(tmp_path, random_batches(CIFAR10_FILES, 10), CIFAR10, "labels", monkeypatch)

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "executed",))

    (folder / "data_batch_3").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"data_batch_3 has MD5 .* not unpickled"):
        open_data_set("cifar10", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_truncated_missing_and_wrong_cifar_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither cifar-10-batches-bin nor cifar-10-batches-py"):
        open_data_set("cifar10", tmp_path)
    folder = write_cifar10_binary(tmp_path, random_batches(CIFAR10_FILES, 10))
    whole = (folder / "data_batch_2.bin").read_bytes()
    (folder / "data_batch_2.bin").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"data_batch_2\.bin is truncated"):
        open_data_set("cifar10", tmp_path)
    (folder / "data_batch_2.bin").write_bytes(whole[: 10 * 3073])
    with pytest.raises(UserError, match=r"data_batch_2\.bin is truncated: it holds 10 images where others hold 20"):
        open_data_set("cifar10", tmp_path)
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_2\.bin cannot be read"):
        open_data_set("cifar10", tmp_path)
    (folder / "data_batch_2.bin").write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(UserError, match=r"data_batch_2\.bin gives image 0 the label 11, but labels are 0 to 9"):
        open_data_set("cifar10", tmp_path)


def test_a_data_dir_one_level_off_is_told_where_the_data_is(tmp_path: Path) -> None:
    folder = write_cifar10_binary(tmp_path / "data", random_batches(CIFAR10_FILES, 10))
    for wrong in (folder, tmp_path):
        with pytest.raises(UserError, match=f"use --data_dir {tmp_path / 'data'}") as told:
            open_data_set("cifar10", wrong)
        assert str(wrong) in str(told.value)


def test_limit_train_keeps_the_first_images(tmp_path: Path) -> None:
    write_cifar10_binary(tmp_path, random_batches(CIFAR10_FILES, 10))
    whole, limited = open_data_set("cifar10", tmp_path), open_data_set("cifar10", tmp_path, limit_train=30)
    np.testing.assert_array_equal(limited.train.pixels, whole.train.pixels[:30])
    assert limited.labeled is limited.train and len(limited.test) == len(whole.test)
    with pytest.raises(UserError, match="more than the 100 training images"):
        open_data_set("cifar10", tmp_path, limit_train=101)


def write_stl10(root: Path) -> Path:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for split, count in (("unlabeled", 7), ("train", 5), ("test", 4)):
        images = np.stack([smooth_image(96, 96, seed) for seed in range(count)])
        images.transpose(0, 3, 2, 1).tofile(folder / f"{split}_X.bin")
        if split != "unlabeled":
            RNG.integers(1, 11, count).astype(np.uint8).tofile(folder / f"{split}_y.bin")
    (folder / "class_names.txt").write_text("airplane bird car cat deer dog horse monkey ship truck".replace(" ", "\n"))
    return folder


def test_stl10_is_read_like_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Column-major images come out upright, labels count from 0."""
    write_stl10(tmp_path)
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    data_set = open_data_set("stl10", tmp_path)
    for split, name in ((data_set.train, "unlabeled"), (data_set.labeled, "train"), (data_set.test, "test")):
        theirs = STL10(str(tmp_path), split=name)
        assert isinstance(split, ImageArray)
        np.testing.assert_array_equal(split.upright(slice(None)), theirs.data.transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(split.labels, theirs.labels)
        np.testing.assert_array_equal(np.asarray(split.open(3)), np.asarray(theirs[3][0]))
    np.testing.assert_array_equal(data_set.train.upright(np.array([2]))[0], smooth_image(96, 96, 2))
    assert list(data_set.classes) == theirs.classes


def test_wrong_stl10_files(tmp_path: Path) -> None:
    folder = write_stl10(tmp_path)
    whole = (folder / "train_y.bin").read_bytes()
    (folder / "train_y.bin").write_bytes(whole + b"\x01")
    with pytest.raises(UserError, match=r"train_y\.bin holds 6 labels for the 5 images"):
        open_data_set("stl10", tmp_path)
    (folder / "train_y.bin").write_bytes(whole[:2] + b"\x00" + whole[3:])
    with pytest.raises(UserError, match=r"gives image 2 the label 0, but labels are 1 to 10"):
        open_data_set("stl10", tmp_path)
    with (folder / "unlabeled_X.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"unlabeled_X\.bin has a wrong size"):
        open_data_set("stl10", tmp_path)


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two splits of three classes of small pictures in several formats, and a cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "photographs"
    for s, split in enumerate(("train", "val")):
        for k, name in enumerate(("zebra", "ant", "m/nested")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for n, extension in enumerate(("JPEG", "png", "jpg")):
                image = Image.fromarray(smooth_image(40 + 9 * n, 70 - 11 * k, seed=10 * s + 3 * k + n))
                (image.convert("L") if n == 2 else image).save(folder / f"{9 - n}.{extension}")
    (root / "train" / "zebra" / "notes.txt").write_text("no image")
    return root


def test_folders_are_read_like_torchvision_reads_them(photographs: Path) -> None:
    """Order, labels, sizes and pixels; also the second time, from the cache."""
    for _ in range(2):
        data_set = open_data_set("imagenet", photographs)
        for split, name in ((data_set.train, "train"), (data_set.test, "val")):
            theirs = ImageFolder(str(photographs / name))
            assert isinstance(split, ImageFiles)
            assert [str(split.path(n)) for n in range(len(split))] == [path for path, _ in theirs.samples]
            np.testing.assert_array_equal(split.labels, theirs.targets)
            for n in range(len(split)):
                np.testing.assert_array_equal(np.asarray(split.open(n)), np.asarray(theirs[n][0]))
                assert tuple(split.sizes[n]) == theirs[n][0].size[::-1]
        assert list(data_set.classes) == theirs.classes == ["ant", "m", "zebra"]


def test_a_changed_folder_is_noticed(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_data_set("imagenet", photographs)
    monkeypatch.setattr(splits, "_scan", lambda *_: pytest.fail("the cache was not used"))
    open_data_set("imagenet", photographs)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(photographs.parent / "cache"))
    Image.new("RGB", (5, 6)).save(photographs / "train" / "m" / "nested" / "new.png")
    after = open_data_set("imagenet", photographs)
    assert len(after.train) == len(before.train) + 1


def test_a_foreign_or_broken_cache_is_not_believed(photographs: Path) -> None:
    expected = open_data_set("imagenet", photographs).train.sizes
    (train_cache, *_) = sorted((photographs.parent / "cache" / "stec").glob("*.npz"))
    for content in (b"", b"broken", train_cache.read_bytes()[:100]):
        for cache in (photographs.parent / "cache" / "stec").glob("*.npz"):
            cache.write_bytes(content)
        np.testing.assert_array_equal(open_data_set("imagenet", photographs).train.sizes, expected)


def test_wrong_folders(photographs: Path) -> None:
    for wrong in (photographs / "train", photographs.parent):
        with pytest.raises(UserError, match=f"use --data_dir {photographs}"):
            open_data_set("imagenet", wrong)
    (photographs / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no image"):
        open_data_set("imagenet", photographs)
    Image.new("RGB", (5, 6)).save(photographs / "train" / "empty" / "filled.png")
    with pytest.raises(UserError, match="must hold the same class folders, but empty is in one of them only"):
        open_data_set("imagenet", photographs)


def test_limited_folders_keep_all_classes(photographs: Path) -> None:
    """Folders are sorted by class: the first images alone would be of one class."""
    limited = open_data_set("imagenet", photographs, limit_train=3).train
    assert sorted(limited.labels) == [0, 1, 2] and len(limited) == len(limited.sizes) == 3


def test_an_evaluation_needs_the_test_images_alone(tmp_path: Path, photographs: Path) -> None:
    folder = write_stl10(tmp_path / "stl")
    (folder / "unlabeled_X.bin").unlink()
    images, classes = open_split("stl10", tmp_path / "stl", "test")
    assert (len(images), len(classes)) == (4, 10)
    shutil.rmtree(photographs / "train")
    images, classes = open_split("imagenet", photographs, "test")
    assert (len(images), len(classes)) == (9, 3)


def test_what_cannot_be_downloaded_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--download 1 cannot fetch imagenet"):
        open_data_set("imagenet", tmp_path, download=True)


@pytest.mark.parametrize("content", ["kept", "cut off", "other", "unwritable"])
def test_the_demo_set_is_kept_where_that_can_be(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And painted again where what was kept is not whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(demo.IMAGES, "test", 20)
    if content == "unwritable":
        (tmp_path / "cache").write_text("no folder")
    painted, labels = demo.render(split="test")
    for image, label in (demo.load(split="test"), demo.load(split="test")):
        assert np.array_equal(image, painted) and np.array_equal(label, labels)
    if content == "unwritable":
        return
    (file,) = (tmp_path / "cache" / "stec").iterdir()
    whole = file.read_bytes()
    if content != "kept":
        # One pixel's bits turned over, or the end gone.
        other = bytearray(whole)
        other[1000] ^= 255
        file.write_bytes(whole[:-100] if content == "cut off" else bytes(other))
    else:
        monkeypatch.setattr(demo, "render", None)
    assert np.array_equal(demo.load(split="test")[0], painted)
    assert file.read_bytes() == whole


def test_the_demo_set_is_fixed_balanced_and_split() -> None:
    train, labels = demo.render(split="train")
    again, _ = demo.render(split="train")
    np.testing.assert_array_equal(train, again)
    assert train.shape == (8192, 32, 32, 3) and train.dtype == np.uint8
    assert np.ptp(np.bincount(labels)) <= 1
    test, _ = demo.render(split="test")
    everything = np.concatenate([train, test]).reshape(len(train) + len(test), -1)
    assert len(np.unique(everything, axis=0)) == len(everything), "no image occurs twice"


def test_the_demo_set_cannot_be_solved_by_color() -> None:
    """A classifier by mean color and contrast, the nearest class mean, does hardly better than chance."""
    (train, train_labels), (test, test_labels) = demo.render(split="train"), demo.render(split="test")

    def features(images: np.ndarray) -> np.ndarray:
        return np.concatenate([images.mean((1, 2)), images.std((1, 2))], axis=1)

    means = np.stack([features(train[train_labels == k]).mean(0) for k in range(10)])
    nearest = ((features(test)[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == test_labels).mean() < 0.2
