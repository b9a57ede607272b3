"""Data sets: the real layouts are read as torchvision reads them, and damaged files are reported."""

from __future__ import annotations

import hashlib
import pickle
import pkgutil
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10, ImageFolder

from pipelines import splits
from pipelines.datasets import demo
from pipelines.datasets.images import ImageArray, ImageFiles
from pipelines.datasets.registry import DATA_SETS, DataSetTraits, Source, Split, open_data_set, open_split
from pipelines.errors import UserError
from tests.conftest import smooth_image

RNG = np.random.default_rng(0)
Batches = dict[str, tuple[np.ndarray, np.ndarray]]


def random_batches(names: list[str], classes: int) -> Batches:
    """Planar pixels [20, 3072] and labels [20] for each official file."""
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
    root: Path, batches: Batches, reference: type[CIFAR10], labels_key: str, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The Python layout; torchvision's checksums are replaced by those of these files."""
    folder = root / reference.base_folder
    folder.mkdir(parents=True)
    md5 = {}
    for name, (pixels, labels) in batches.items():
        content = pickle.dumps({"data": pixels, labels_key: labels.tolist()}, protocol=2)
        (folder / name).write_bytes(content)
        md5[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({reference.meta["key"]: [f"class{k}" for k in range(100)]}, protocol=2)
    (folder / reference.meta["filename"]).write_bytes(meta)
    test = [name for name in batches if name.startswith("test")]
    monkeypatch.setattr(reference, "train_list", [[name, md5[name]] for name in batches if name not in test])
    monkeypatch.setattr(reference, "test_list", [[name, md5[name]] for name in test])
    monkeypatch.setattr(reference, "meta", {**reference.meta, "md5": hashlib.md5(meta).hexdigest()})
    return folder


@pytest.mark.parametrize(
    ("name", "files", "classes", "reference", "labels_key", "write_binary"),
    [
        ("cifar10", CIFAR10_FILES, 10, CIFAR10, "labels", write_cifar10_binary),
        ("cifar100", ["train", "test"], 100, CIFAR100, "fine_labels", write_cifar100_binary),
    ],
)
def test_both_cifar_layouts_match_torchvision(
    name: str,
    files: list[str],
    classes: int,
    reference: type[CIFAR10],
    labels_key: str,
    write_binary: Callable[[Path, Batches], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = random_batches(files, classes)
    write_binary(tmp_path / "binary", batches)
    write_python(tmp_path, batches, reference, labels_key, monkeypatch)
    for data_dir in (tmp_path / "binary", tmp_path):
        data_set = open_data_set(name, data_dir)
        assert len(data_set.classes) == classes and data_set.labeled is data_set.train
        for split, train in ((data_set.train, True), (data_set.test, False)):
            expected = reference(str(tmp_path), train=train)
            np.testing.assert_array_equal(split.pixels, expected.data)
            np.testing.assert_array_equal(split.labels, expected.targets)


def test_a_changed_pickle_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_python(tmp_path, random_batches(CIFAR10_FILES, 10), CIFAR10, "labels", monkeypatch)

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "executed",))

    (folder / "data_batch_3").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"data_batch_3 .*MD5"):
        open_data_set("cifar10", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_damaged_cifar_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cifar-10-batches-bin .*cifar-10-batches-py"):
        open_data_set("cifar10", tmp_path)
    folder = write_cifar10_binary(tmp_path, random_batches(CIFAR10_FILES, 10))
    content = (folder / "data_batch_2.bin").read_bytes()
    (folder / "data_batch_2.bin").write_bytes(content[:-100])
    with pytest.raises(UserError, match=rf"data_batch_2\.bin .*{len(content) - 100} bytes"):
        open_data_set("cifar10", tmp_path)
    (folder / "data_batch_2.bin").write_bytes(content[: 10 * 3073])
    with pytest.raises(UserError, match=r"data_batch_2\.bin .*10 images .*20"):
        open_data_set("cifar10", tmp_path)
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_2\.bin .*No such file"):
        open_data_set("cifar10", tmp_path)
    (folder / "data_batch_2.bin").write_bytes(b"\x0b" + content[1:])
    with pytest.raises(UserError, match=r"data_batch_2\.bin .*image 0 .*11.* 0 to 9"):
        open_data_set("cifar10", tmp_path)


def test_a_data_dir_one_level_off_is_corrected_in_the_error(tmp_path: Path) -> None:
    folder = write_cifar10_binary(tmp_path / "data", random_batches(CIFAR10_FILES, 10))
    for wrong in (folder, tmp_path):
        with pytest.raises(UserError, match=f"use --data_dir {tmp_path / 'data'}") as error:
            open_data_set("cifar10", wrong)
        assert str(wrong) in str(error.value)


def test_limit_train_keeps_the_first_images(tmp_path: Path) -> None:
    write_cifar10_binary(tmp_path, random_batches(CIFAR10_FILES, 10))
    full, limited = open_data_set("cifar10", tmp_path), open_data_set("cifar10", tmp_path, limit_train=30)
    np.testing.assert_array_equal(limited.train.pixels, full.train.pixels[:30])
    assert limited.labeled is limited.train and len(limited.test) == len(full.test)
    with pytest.raises(UserError, match=r"--limit_train 101 .*100 "):
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


def test_stl10_matches_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Column-major images are returned upright; labels begin at 0."""
    write_stl10(tmp_path)
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    data_set = open_data_set("stl10", tmp_path)
    for split, name in ((data_set.train, "unlabeled"), (data_set.labeled, "train"), (data_set.test, "test")):
        expected = STL10(str(tmp_path), split=name)
        assert isinstance(split, ImageArray)
        np.testing.assert_array_equal(split.upright(slice(None)), expected.data.transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(split.labels, expected.labels)
        np.testing.assert_array_equal(np.asarray(split.open(3)), np.asarray(expected[3][0]))
    np.testing.assert_array_equal(data_set.train.upright(np.array([2]))[0], smooth_image(96, 96, 2))
    assert list(data_set.classes) == expected.classes


def test_damaged_stl10_files_are_reported(tmp_path: Path) -> None:
    folder = write_stl10(tmp_path)
    labels = (folder / "train_y.bin").read_bytes()
    (folder / "train_y.bin").write_bytes(labels + b"\x01")
    with pytest.raises(UserError, match=r"train_y\.bin .*6 labels .*5 images"):
        open_data_set("stl10", tmp_path)
    (folder / "train_y.bin").write_bytes(labels[:2] + b"\x00" + labels[3:])
    with pytest.raises(UserError, match=r"image 2 .*label 0.* 1 to 10"):
        open_data_set("stl10", tmp_path)
    with (folder / "unlabeled_X.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=rf"unlabeled_X\.bin .*{7 * 3 * 96 * 96 + 4} bytes"):
        open_data_set("stl10", tmp_path)


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two splits of three classes of small images in several formats, and an empty cache."""
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


def test_class_folders_match_torchvision(photographs: Path) -> None:
    """In order, labels, sizes and pixels; also when read from the cache."""
    for _ in range(2):
        data_set = open_data_set("imagenet", photographs)
        for split, name in ((data_set.train, "train"), (data_set.test, "val")):
            expected = ImageFolder(str(photographs / name))
            assert isinstance(split, ImageFiles)
            assert [str(split.path(n)) for n in range(len(split))] == [path for path, _ in expected.samples]
            np.testing.assert_array_equal(split.labels, expected.targets)
            for n in range(len(split)):
                np.testing.assert_array_equal(np.asarray(split.open(n)), np.asarray(expected[n][0]))
                assert tuple(split.sizes[n]) == expected[n][0].size[::-1]
        assert list(data_set.classes) == expected.classes == ["ant", "m", "zebra"]


def test_a_changed_folder_is_indexed_again(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_data_set("imagenet", photographs)
    monkeypatch.setattr(splits, "_scan", lambda *_: pytest.fail("the cache was not used"))
    open_data_set("imagenet", photographs)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(photographs.parent / "cache"))
    Image.new("RGB", (5, 6)).save(photographs / "train" / "m" / "nested" / "new.png")
    after = open_data_set("imagenet", photographs)
    assert len(after.train) == len(before.train) + 1


def test_an_invalid_cache_is_ignored(photographs: Path) -> None:
    expected = open_data_set("imagenet", photographs).train.sizes
    (train_cache, *_) = sorted((photographs.parent / "cache" / "stec").glob("*.npz"))
    for content in (b"", b"damaged", train_cache.read_bytes()[:100]):
        for cache in (photographs.parent / "cache" / "stec").glob("*.npz"):
            cache.write_bytes(content)
        np.testing.assert_array_equal(open_data_set("imagenet", photographs).train.sizes, expected)


def test_wrong_folders_are_reported(photographs: Path) -> None:
    for wrong in (photographs / "train", photographs.parent):
        with pytest.raises(UserError, match=f"use --data_dir {photographs}"):
            open_data_set("imagenet", wrong)
    (photographs / "train" / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty .*no image"):
        open_data_set("imagenet", photographs)
    Image.new("RGB", (5, 6)).save(photographs / "train" / "empty" / "filled.png")
    with pytest.raises(UserError, match="empty"):
        open_data_set("imagenet", photographs)


def test_limited_folders_keep_all_classes(photographs: Path) -> None:
    """Folders are sorted by class, so the first images have one class."""
    limited = open_data_set("imagenet", photographs, limit_train=3).train
    assert sorted(limited.labels) == [0, 1, 2] and len(limited) == len(limited.sizes) == 3


def test_one_split_can_be_opened_without_the_others(tmp_path: Path, photographs: Path) -> None:
    folder = write_cifar10_binary(tmp_path / "cifar", random_batches(CIFAR10_FILES, 10))
    (folder / "data_batch_1.bin").unlink()
    images, classes = open_split("cifar10", tmp_path / "cifar", "test")
    assert (len(images), len(classes)) == (20, 10)
    folder = write_stl10(tmp_path / "stl")
    (folder / "unlabeled_X.bin").unlink()
    images, classes = open_split("stl10", tmp_path / "stl", "test")
    assert (len(images), len(classes)) == (4, 10)
    shutil.rmtree(photographs / "train")
    images, classes = open_split("imagenet", photographs, "test")
    assert (len(images), len(classes)) == (9, 3)


def read_toy(source: Source, splits: Sequence[str]) -> list[Split]:
    pixels = np.zeros((int((source.data_dir / "count").read_text()), 8, 8, 3), np.uint8)
    return [Split(images=ImageArray(pixels=pixels, labels=np.zeros(len(pixels), np.int64)), classes=tuple(splits))]


def test_a_row_and_a_reader_make_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a test split."""
    traits = DataSetTraits(
        reader=f"{__name__}:read_toy",
        splits={"train": "all", "labeled": "all"},
        view_size_px=8,
        stem="cifar",
        jitter_strength=0.5,
    )
    monkeypatch.setitem(DATA_SETS, "toy", traits)
    (tmp_path / "count").write_text("7")
    data_set = open_data_set("toy", tmp_path, limit_train=5)
    assert (len(data_set.train), data_set.test, data_set.classes) == (5, None, ("all",))
    assert data_set.labeled is data_set.train
    with pytest.raises(UserError, match=r"toy .*test"):
        open_split("toy", tmp_path, "test")
    with pytest.raises(UserError, match=r"toy .*--data_dir"):
        open_data_set("toy", None)


def test_every_reader_exists() -> None:
    for traits in DATA_SETS.values():
        assert callable(pkgutil.resolve_name(traits.reader))
        if traits.torchvision_class is not None:
            assert hasattr(torchvision.datasets, traits.torchvision_class)


def test_a_data_set_without_a_download_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--download 1 .*imagenet"):
        open_data_set("imagenet", tmp_path, download=True)


@pytest.mark.parametrize("cache", ["valid", "truncated", "damaged", "unwritable"])
def test_the_demo_set_is_cached(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And painted again if the cached file is damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(demo.IMAGES, "test", 20)
    if cache == "unwritable":
        (tmp_path / "cache").write_text("no folder")
    painted = demo.render(split="test")
    for loaded in (demo.load(split="test"), demo.load(split="test")):
        assert np.array_equal(loaded.pixels, painted.pixels) and np.array_equal(loaded.labels, painted.labels)
        assert list(loaded.factors) == list(painted.factors)
        assert all(np.array_equal(loaded.factors[k], painted.factors[k], equal_nan=True) for k in painted.factors)
    if cache == "unwritable":
        return
    (file,) = (tmp_path / "cache" / "stec").iterdir()
    content = file.read_bytes()
    if cache != "valid":
        damaged = bytearray(content)
        damaged[1000] ^= 255
        file.write_bytes(content[:-100] if cache == "truncated" else bytes(damaged))
    else:
        monkeypatch.setattr(demo, "render", None)
    assert np.array_equal(demo.load(split="test").pixels, painted.pixels)
    assert file.read_bytes() == content


def test_the_demo_set_is_deterministic_balanced_and_without_duplicates() -> None:
    rendered = demo.render(split="train")
    train, test = rendered.pixels, demo.render(split="test").pixels
    np.testing.assert_array_equal(train, demo.render(split="train").pixels)
    assert train.shape == (8192, 32, 32, 3) and train.dtype == np.uint8
    assert np.ptp(np.bincount(rendered.labels)) <= 1
    everything = np.concatenate([train, test]).reshape(len(train) + len(test), -1)
    assert len(np.unique(everything, axis=0)) == len(everything)


def test_the_demo_set_cannot_be_classified_by_color() -> None:
    """The nearest class mean of mean color and contrast is hardly more accurate than chance."""
    train, test = demo.load(split="train"), demo.load(split="test")

    def features(images: np.ndarray) -> np.ndarray:
        return np.concatenate([images.mean((1, 2)), images.std((1, 2))], axis=1)

    means = np.stack([features(train.pixels[train.labels == k]).mean(0) for k in range(10)])
    nearest = ((features(test.pixels)[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == test.labels).mean() < 0.2


def test_the_factors_of_the_demo_set_are_those_of_the_pixels() -> None:
    """The color under the center of a disc, where nothing covers it, and the ranges that the factors are drawn from."""
    images = demo.render(split="test")
    factors = images.factors
    for name, low, high in (("x", -0.4, 0.4), ("y", -0.4, 0.4), ("size", 0.4, 0.55), ("red", 0, 1)):
        assert low <= factors[name].min() and factors[name].max() <= high
        assert np.ptp(factors[name]) > 0.8 * (high - low)
    round_shapes = np.isin(images.labels, [demo.CLASSES.index("disc"), demo.CLASSES.index("ring")])
    assert np.array_equal(np.isnan(factors["rotation sine"]), round_shapes)
    norms = np.hypot(factors["rotation sine"], factors["rotation cosine"])[~round_shapes]
    np.testing.assert_allclose(norms, 1, atol=1e-6)
    discs = np.flatnonzero(images.labels == 0)
    column, row = (((factors[name][discs] + 1) / 2 * demo.SIZE_PX).astype(int) for name in "xy")
    for channel, name in enumerate(("red", "green", "blue")):
        # Texture and noise move a color by less than the factor varies from image to image.
        difference = images.pixels[discs, row, column, channel] / 255 - factors[name][discs]
        assert np.sqrt((difference**2).mean()) < 0.1 < factors[name].std()
        other_way = images.pixels[discs, column, row, channel] / 255 - factors[name][discs]
        assert (other_way**2).mean() > 1.3 * (difference**2).mean(), "x is the column"
