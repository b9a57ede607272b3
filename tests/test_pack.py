"""``launch.py pack``: the shards hold what the source held, whatever interrupts it."""

from __future__ import annotations

import io
import os
import re
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import webdataset
from PIL import Image
from pyarrow import parquet
from torchvision.datasets import ImageFolder

import launch
from pipelines.datasets.images import UNLABELED, ImageFiles
from pipelines.datasets.registry import open_data_set
from tests.conftest import smooth_image
from tests.runs import Run
from tests.test_data_sets import random_batches, write_cifar10_binary, write_stl10
from tests.test_faults import SmallDisk, small_disk  # noqa: F401
from tests.test_index import write_shards

SMALL = "--images_per_shard 10 --num_workers 2".split()


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def pack(source: Path, destination: Path, *arguments: str, code: int = 0) -> Path:
    assert launch.main(["pack", str(source), str(destination), *SMALL, *arguments]) == code
    return destination


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path) -> Iterator[tuple[bytes, int]]:
    """Encoded images and labels as the webdataset package reads them."""
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        (image,) = (value for key, value in sample.items() if key in ("jpg", "png"))
        yield image, int(sample.get("cls", UNLABELED))


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """``train`` with 36 images and ``val`` with 12, in three classes."""
    root = tmp_path / "images"
    for n in range(48):
        folder = root / ("val" if n % 4 == 0 else "train") / f"class.{n % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(smooth_image(60 + n, 90, n))
        image.save(folder / (f"{n}.png" if n % 5 == 0 else f"{n}.jpg"))
    return root


def in_class_folders(root: Path) -> list[tuple[bytes, int]]:
    """Encoded images and labels as torchvision finds them."""
    return [(Path(path).read_bytes(), label) for path, label in ImageFolder(str(root)).samples]


def test_class_folders(class_folders: Path, tmp_path: Path) -> None:
    """Bytes and labels are unchanged, classes are mixed, and the shards train as class folders do."""
    packed = pack(class_folders, tmp_path / "packed")
    for split in ("train", "val"):
        assert sorted(samples(packed / split)) == sorted(in_class_folders(class_folders / split))
    labels = [label for _, label in samples(packed / "train")]
    assert labels != sorted(labels) and len(set(labels[:10])) == 3
    index = tmp_path / "cache/stec"
    before = {path: path.stat().st_mtime_ns for path in index.iterdir()}
    data_set = open_data_set("imagenet", packed)
    assert {path: path.stat().st_mtime_ns for path in index.iterdir()} == before, "it is indexed already"
    assert isinstance(data_set.train, ImageFiles) and isinstance(data_set.test, ImageFiles)
    assert not data_set.notes and (len(data_set.train), len(data_set.test)) == (36, 12)
    assert len(data_set.train.files) == 4


def test_a_folder_of_classes_and_one_of_images(class_folders: Path, tmp_path: Path) -> None:
    packed = pack(class_folders / "val", tmp_path / "val")
    assert sorted(samples(packed)) == sorted(in_class_folders(class_folders / "val"))
    packed = pack(class_folders / "val/class.0", tmp_path / "flat")
    assert {label for _, label in samples(packed)} == {UNLABELED}
    loose = {path.read_bytes() for path in (class_folders / "val/class.0").iterdir()}
    assert {image for image, _ in samples(packed)} == loose
    assert len(open_data_set("folder", packed).train) == len(loose)


def test_shards_and_parquet_keep_their_order(class_folders: Path, tmp_path: Path) -> None:
    expected = in_class_folders(class_folders / "train")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as archive:
        for n, (image, label) in enumerate(expected):
            for name, value in ((f"a.{n:03d}.jpg", image), (f"a.{n:03d}.cls", b"%d\n" % label)):
                member = tarfile.TarInfo(name)
                member.size = len(value)
                archive.addfile(member, io.BytesIO(value))
    assert list(samples(pack(tmp_path / "tars", tmp_path / "one"))) == expected
    (tmp_path / "parquet").mkdir()
    images = [{"bytes": image, "path": None} for image, _ in expected]
    table = pyarrow.table({"image": images, "label": [label for _, label in expected]})
    parquet.write_table(table, tmp_path / "parquet/a.parquet", row_group_size=7)
    assert list(samples(pack(tmp_path / "parquet", tmp_path / "two"))) == expected
    assert content(tmp_path / "one").keys() == content(tmp_path / "two").keys()


@pytest.mark.parametrize("data_set", ["cifar10", "stl10"])
def test_arrays_are_packed_without_loss(data_set: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if data_set == "cifar10":
        names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
        write_cifar10_binary(source, random_batches(names, 10))
        folders = {"train": "train", "test": "val"}
    else:
        write_stl10(source)
        folders = {"train": "unlabeled", "labeled": "train", "test": "val"}
    packed = pack(source, tmp_path / "packed")
    arrays = open_data_set(data_set, source)
    for split, folder in folders.items():
        images = getattr(arrays, split)
        pixels = images.upright(slice(None))
        expected = sorted((values.tobytes(), label) for values, label in zip(pixels, images.labels.tolist()))
        decoded = [(np.asarray(Image.open(io.BytesIO(image))), label) for image, label in samples(packed / folder)]
        assert sorted((values.tobytes(), label) for values, label in decoded) == expected


def test_only_large_images_are_scaled(tmp_path: Path) -> None:
    """By their shorter side; the orientation stays."""
    (tmp_path / "source").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    large = Image.fromarray(smooth_image(300, 450, 1))
    large.save(tmp_path / "source/a.jpg", exif=exif)
    Image.fromarray(smooth_image(300, 200, 2)).save(tmp_path / "source/b.png")
    Image.fromarray(smooth_image(150, 900, 3)).save(tmp_path / "source/c.jpg")
    Image.fromarray(smooth_image(400, 151, 4).mean(2).astype(np.uint16) * 257).save(tmp_path / "source/d.png")
    packed = pack(tmp_path / "source", tmp_path / "packed", "--max_side", "150", "--quality", "90")
    with tarfile.open(packed / "shard-000000.tar") as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}
    images = {name: Image.open(io.BytesIO(value)) for name, value in members.items()}
    assert {name: image.size for name, image in images.items()} == {
        "000000000.jpg": (225, 150),
        "000000001.jpg": (150, 225),
        "000000002.jpg": (900, 150),
        "000000003.jpg": (150, 397),
    }
    assert members["000000002.jpg"] == (tmp_path / "source/c.jpg").read_bytes()
    assert images["000000000.jpg"].getexif()[0x0112] == 6
    reference = np.asarray(large.resize((225, 150), Image.Resampling.LANCZOS)).astype(float)
    assert np.abs(np.asarray(images["000000000.jpg"]) - reference).mean() < 2
    gray = np.asarray(images["000000003.jpg"]).astype(float)
    assert abs(gray.mean() - smooth_image(400, 151, 4).mean()) < 2, "16 bits are scaled to 8"


@pytest.mark.parametrize("arguments", [[], ["--max_side", "50"]], ids=["as they are", "scaled"])
def test_the_shards_do_not_depend_on_the_workers(class_folders: Path, tmp_path: Path, arguments: list[str]) -> None:
    one, two = (pack(class_folders, tmp_path / k, "--num_workers", k, *arguments) for k in ("1", "5"))
    assert content(one) == content(two)
    with tarfile.open(one / "train/shard-000000.tar") as archive:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in archive} == {(0, 0, 0, "", 0o644)}


def test_bad_images_are_listed_and_left_out(
    class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those whose header is damaged, and those that cannot be decoded, where they are scaled."""
    cut, damaged = class_folders / "train/class.1/1.jpg", class_folders / "train/class.1/25.png"
    cut.write_bytes(cut.read_bytes()[:200])
    values = bytearray(damaged.read_bytes())
    values[len(values) // 2] ^= 0xFF
    damaged.write_bytes(values)
    packed = pack(class_folders, tmp_path / "packed", "--max_side", "50")
    listed = dict(line.split("\t") for line in (tmp_path / "bad-images.tsv").read_text().splitlines())
    assert listed.keys() == {str(cut), str(damaged)} and "2 bad images" in capsys.readouterr().out
    assert len(list(samples(packed / "train"))) == 34
    (tmp_path / "bad-images.tsv").unlink()
    before = content(packed)
    pack(class_folders, packed, "--max_side", "50")
    assert content(packed) == before, "nothing was missing"
    assert (tmp_path / "bad-images.tsv").read_text().count("\n") == 2, "those of an earlier call are listed"


def test_what_index_says_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here, of a source shard that is cut off between two members."""
    source = write_shards(tmp_path / "source", shards=2, per_shard=5)
    shard = source / "train-001.tar"
    with tarfile.open(shard) as archive:
        ends = [member.offset for member in archive if member.name.endswith((".jpg", ".jpeg", ".PNG"))]
    os.truncate(shard, ends[2])
    pack(source, tmp_path / "packed")
    assert re.search(r"train-001.tar .*cut off", capsys.readouterr().out.replace("\n", " "))
    (tmp_path / "file").touch()
    assert launch.main(["pack", str(source), str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


@dataclass(frozen=True)
class SignalAfterShard:
    """Sends this process a signal once there is a shard."""

    folder: Path
    number: signal.Signals

    def __call__(self) -> None:
        def watch() -> None:
            while not list(self.folder.glob("*.tar")):
                time.sleep(0.001)
            os.kill(os.getpid(), self.number)

        threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_an_interrupted_call_is_continued(tmp_path: Path, number: signal.Signals) -> None:
    source, packed = tmp_path / "source", tmp_path / "packed"
    source.mkdir()
    for n in range(60):
        Image.fromarray(smooth_image(400, 400, n)).save(source / f"{n}.png")
    arguments = ["--max_side", "390", "--images_per_shard", "5"]
    whole = content(pack(source, tmp_path / "whole", *arguments))
    stop = SignalAfterShard(packed, number)
    command = ["pack", str(source), str(packed), *SMALL, *arguments, "--bad", str(tmp_path / "bad.tsv")]
    Run(*command, prepare=stop).end(-number if number == signal.SIGKILL else 130)
    finished = {path: path.stat().st_mtime_ns for path in packed.glob("*.tar")}
    assert 0 < len(finished) < 12
    if number == signal.SIGINT:
        assert not list(packed.glob(".*"))
    pack(source, packed, *arguments)
    assert content(packed) == whole
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished shards are kept"


def test_a_full_disk(tmp_path: Path, small_disk: SmallDisk) -> None:  # noqa: F811
    """One sentence, complete shards only, and the rest once there is room."""
    source, packed = tmp_path / "source", small_disk.folder / "packed"
    source.mkdir()
    rng = np.random.default_rng(0)
    for n in range(30):
        Image.fromarray(rng.integers(0, 256, (60, 60, 3), np.uint8)).save(source / f"{n}.png")
    whole = content(pack(source, tmp_path / "whole"))
    command = ["pack", source, packed, *SMALL, "--bad", tmp_path / "bad.tsv"]
    run = Run(*command, prepare=small_disk.fill)
    run.end(2)
    assert run.err.count("\n") == 1 and "shard-" in run.err and "cannot be written (" in run.err
    assert content(packed).items() <= whole.items()
    if small_disk.mounted:
        small_disk.free()
    Run(*command).end()
    assert content(packed) == whole


def test_mistakes_are_refused(class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: Any) -> str:
        before = written()
        pack(*arguments, code=2)
        assert written() == before
        return capsys.readouterr().err

    def written() -> dict[str, bytes]:
        return {name: value for name, value in content(tmp_path).items() if not name.startswith("cache/")}

    packed = pack(class_folders / "val", tmp_path / "packed")
    assert "other images or settings" in refused(class_folders / "val", packed, "--max_side", "20")
    assert "other images or settings" in refused(class_folders / "train", packed)
    assert "one in the other" in refused(class_folders, class_folders / "packed")
    assert "is not empty" in refused(packed, class_folders)
    assert "existing folder" in refused(class_folders, tmp_path / "no/such")
    assert "no folder" in refused(tmp_path / "missing", tmp_path / "new")
    write_stl10(tmp_path)
    write_cifar10_binary(tmp_path, random_batches(["data_batch_1"], 10))
    assert "cifar10 and stl10" in refused(tmp_path, tmp_path.parent / f"{tmp_path.name}-packed")
