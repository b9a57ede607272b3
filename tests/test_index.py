"""The index of image files: layouts, formats, faults, interrupted scans, and outdated indexes."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

import launch
from pipelines import splits
from pipelines.datasets.bad_list import BadList, remember
from pipelines.datasets.cache import cache_file
from pipelines.datasets.headers import MAX_PIXELS
from pipelines.datasets.image_folders import check_labels
from pipelines.datasets.images import UNLABELED, ImageFiles, Names
from pipelines.datasets.registry import open_data_set, open_split
from pipelines.datasets.shards import sample_key
from pipelines.errors import BadImage, UserError
from pipelines.splits import read_split, verify_split
from tests.conftest import smooth_image

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stec"


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_image(seed: int, height: int = 40, width: int = 56) -> Image.Image:
    return Image.fromarray(smooth_image(height, width, seed))


def png(height: int, width: int, depth: int, color_type: int, lines: bytes) -> bytes:
    """A PNG file of a kind that Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


BOMB = png(100_000, 100_000, 8, 2, bytes(1000))


def formats() -> dict[str, bytes]:
    """The same image in every format and variant, under the extensions of ImageFolder."""
    rgb = make_image(1)
    height, width = rgb.height, rgb.width
    gray, palette, bilevel, cmyk = rgb.convert("L"), rgb.quantize(64), rgb.convert("1"), rgb.convert("CMYK")
    rgba, gray_alpha = rgb.copy(), gray.copy()
    for image in (rgba, gray_alpha):
        image.putalpha(make_image(2).convert("L"))
    gray16 = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257 ^ 0x35)
    rgb16 = (np.asarray(rgb).astype(">u2") * 257).astype(">u2")
    turned = Image.Exif()
    turned[0x0112] = 6
    adobe = encode(cmyk, quality=90)
    marker = adobe.index(b"Adobe") - 4
    length = 2 + struct.unpack(">H", adobe[marker + 2 : marker + 4])[0]
    transform = adobe.index(b"Adobe") + 11
    bmp16 = ((np.asarray(gray)[::-1] >> 3).astype("<u2") * 0x421).astype("<u2").tobytes()
    nibbles = np.asarray(gray) >> 4
    nibbles = nibbles[:, ::2] << 4 | nibbles[:, 1::2]
    ppm_of_100 = (np.asarray(rgb).astype(int) * 100 // 255).astype(np.uint8).tobytes()
    return {
        "rgb.jpg": encode(rgb, quality=90),
        "gray.jpg": encode(gray, quality=90),
        "444.jpg": encode(rgb, quality=90, subsampling=0),
        "422.jpg": encode(rgb, quality=90, subsampling=1),
        "progressive.jpg": encode(rgb, quality=90, progressive=True),
        "gray progressive.jpg": encode(gray, quality=90, progressive=True),
        "stored as rgb.jpg": encode(rgb, quality=90, keep_rgb=True),
        "turned.jpg": encode(rgb, quality=90, exif=turned),
        "several.jpg": encode(rgb, "MPO", save_all=True, append_images=[gray.convert("RGB")]),
        "cmyk.jpg": adobe,
        "ycck.jpg": adobe[:transform] + b"\x02" + adobe[transform + 1 :],
        "cmyk without marker.jpg": adobe[:marker] + adobe[marker + length :],
        "rgb.png": encode(rgb, "PNG"),
        "png.jpg": encode(rgb, "PNG"),
        "gray.png": encode(gray, "PNG"),
        "palette.png": encode(palette, "PNG"),
        "palette transparent.png": encode(palette, "PNG", transparency=3),
        "palette translucent.png": encode(palette, "PNG", transparency=bytes(range(64))),
        "rgb transparent.png": encode(rgb, "PNG", transparency=rgb.getpixel((3, 3))),
        "bilevel.png": encode(bilevel, "PNG"),
        "gray 4 bits.png": png(height, width, 4, 0, b"".join(b"\0" + line.tobytes() for line in nibbles)),
        "gray 16 bits.png": encode(gray16, "PNG"),
        "rgb 16 bits.png": png(height, width, 16, 2, b"".join(b"\0" + line.tobytes() for line in rgb16)),
        "rgba.png": encode(rgba, "PNG"),
        "gray alpha.png": encode(gray_alpha, "PNG"),
        "turned.png": encode(rgb, "PNG", exif=turned),
        "rgb.bmp": encode(rgb, "BMP"),
        "gray.bmp": encode(gray, "BMP"),
        "rgba.bmp": encode(rgba, "BMP"),
        "16 bits.bmp": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54 + len(bmp16), 0, 0, 54, 40, width, height, 1, 16, 0, 0, 0, 0, 0, 0)
        + bmp16,
        "lossy.webp": encode(rgb, "WEBP", quality=90),
        "lossless.webp": encode(rgb, "WEBP", lossless=True),
        "alpha.webp": encode(rgba, "WEBP", quality=90),
        "rgb.tif": encode(rgb, "TIFF"),
        "turned.tif": encode(rgb, "TIFF", tiffinfo={0x0112: 6}),
        "gray 16 bits.tiff": encode(gray16, "TIFF"),
        "bilevel.tif": encode(bilevel, "TIFF"),
        "rgb.ppm": encode(rgb, "PPM"),
        "gray.pgm": encode(gray, "PPM"),
        "maximum 100.ppm": b"P6 %d %d 100\n" % (width, height) + ppm_of_100,
        "gif.png": encode(rgb, "GIF"),
        "jpeg 2000.jpg": encode(rgb, "JPEG2000"),
        "tga.jpg": encode(rgb, "TGA"),
    }


@pytest.fixture
def every_format(tmp_path: Path) -> Path:
    root = tmp_path / "formats"
    (root / "class").mkdir(parents=True)
    for name, content in formats().items():
        (root / "class" / name).write_bytes(content)
    return root


def test_every_format_matches_torchvision(every_format: Path) -> None:
    for below in ("b/d", "b-c", "a", "b"):
        (every_format / "class" / below).mkdir(parents=True, exist_ok=True)
        (every_format / "class" / below / "more.jpg").write_bytes(encode(make_image(3)))
    images = read_split(every_format, "class folders").images
    reference = ImageFolder(str(every_format))
    assert len(images) == len(reference) == len(formats()) + 4 and not images.faults
    for n, (path, _) in enumerate(reference.samples):
        expected = default_loader(path)
        assert str(images.path(n)) == images.name(n) == os.fsdecode(images.path_bytes(np.array([n])).tobytes()) == path
        assert images.encoded(n).tobytes() == Path(path).read_bytes() and images.size_bytes[n] == len(images.encoded(n))
        assert tuple(images.sizes[n]) == (expected.height, expected.width), path
        if "gray 16 bits" not in path:  # torchvision clips these at 255.
            np.testing.assert_array_equal(np.asarray(images.open(n)), np.asarray(expected), err_msg=path)


def test_dali_decodes_its_formats_as_pillow_does(every_format: Path) -> None:
    """Complete images and crop boxes of them, in all common formats."""
    dali = pytest.importorskip("nvidia.dali")
    images = read_split(every_format, "class folders").images
    ids = np.flatnonzero(~images.needs_pillow).tolist()
    names = {images.path(n).name for n in ids}
    assert {"rgb.jpg", "gray.jpg", "progressive.jpg", "turned.jpg", "rgb.png", "palette.png", "rgba.png"} <= names
    assert not {"gray 16 bits.png", "cmyk without marker.jpg", "maximum 100.ppm", "turned.tif", "gif.png"} & names

    @dali.pipeline_def(batch_size=len(ids), num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> object:
        encoded = dali.fn.external_source(lambda: [images.encoded(n) for n in ids], batch=True)
        options = {"output_type": dali.types.RGB, "adjust_orientation": False}
        box = dali.fn.decoders.image_slice(encoded, start=[7, 11], shape=[20, 30], axes=[0, 1], **options)
        return dali.fn.decoders.image(encoded, **options), box

    complete, box = pipeline().run()
    for k, n in enumerate(ids):
        expected = np.asarray(images.open(n)).astype(int)
        assert abs(np.asarray(complete.at(k)) - expected).max() <= 1, images.name(n)
        assert abs(np.asarray(box.at(k)) - expected[7:27, 11:41]).max() <= 1, images.name(n)


def write_shards(root: Path, *, labels: bool = True, shards: int = 3, per_shard: int = 5) -> Path:
    """Shards of the webdataset package whose keys have folders and dots, with other members."""
    root.mkdir(parents=True)
    for s in range(shards):
        with webdataset.TarWriter(str(root / f"train-{s:03d}.tar")) as writer:
            for n in range(per_shard):
                seed = s * per_shard + n
                extension = ("jpg", "PNG", "jpeg")[n % 3]
                sample = {
                    "__key__": f"part.{s}/{seed:04d}",
                    extension: encode(make_image(seed, 30 + seed, 50 - seed), "PNG" if extension == "PNG" else "JPEG"),
                    "json": b"{}",
                    "seg.png": encode(make_image(99), "PNG"),
                }
                writer.write(sample | ({"cls": str(seed % 4).encode()} if labels else {}))
    return root


def test_shards_match_webdataset(tmp_path: Path) -> None:
    """In keys, order, bytes, labels and pixels; also when read from the cache."""
    root = write_shards(tmp_path / "train")
    urls = sorted(str(path) for path in root.glob("*.tar"))
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pilrgb"))
    raw = list(webdataset.WebDataset(urls, shardshuffle=False))
    for _ in range(2):
        split = read_split(root, "class folders")
        images = split.images
        assert split.layout == "shards" and split.classes == ("0", "1", "2", "3") and not split.notes
        assert len(images) == len(decoded) == 15 and images.in_shards and not images.faults
        for n, (sample, encoded) in enumerate(zip(decoded, raw)):
            extension = next(name for name in ("jpg", "png", "jpeg") if name in sample)
            shard, member = images.name(n).split(": ")
            assert shard == str(images.path(n)) == sample["__url__"] == urls[images.shard_of[n]]
            assert sample_key(member) == (sample["__key__"], extension)
            assert images.encoded(n).tobytes() == encoded[extension]
            assert images.labels[n] == sample["cls"]
            np.testing.assert_array_equal(np.asarray(images.open(n)), np.asarray(sample[extension]))
            assert tuple(images.sizes[n]) == sample[extension].size[::-1]


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.seg.png", "d.x/a.jpg", "./d/a.JPG", "noext", ".hidden", "d/.jpg", "__meta__/x.jpg", "_a.jpg"]
)
def test_keys_of_members_match_webdataset(name: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    buffer.seek(0)
    files = webdataset.tariterators.tar_file_expander([{"url": "here", "stream": buffer}])
    samples = list(webdataset.tariterators.group_by_keys(files))
    expected = [(sample["__key__"], next(k for k in sample if k[0] != "_")) for sample in samples]
    assert sample_key(name) == (expected[0] if expected else None)


def test_imagenet_in_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "train")
    write_shards(tmp_path / "val", shards=1)
    data_set = open_data_set("imagenet", tmp_path, limit_train=10)
    assert data_set.labeled is data_set.train and data_set.classes == ("0", "1", "2", "3")
    assert (len(data_set.train), len(data_set.test)) == (10, 5)
    images, classes = open_split("imagenet", tmp_path, "test")
    assert (len(images), len(classes)) == (5, 4)
    shutil.rmtree(tmp_path / "val")
    write_shards(tmp_path / "val", labels=False)
    with pytest.raises(UserError, match=r"val .*\.cls.*--dataset folder"):
        open_data_set("imagenet", tmp_path)


def test_images_without_labels(tmp_path: Path, every_format: Path) -> None:
    """Anywhere below a folder, or in shards, whose labels are ignored."""
    write_shards(tmp_path / "shards")
    (every_format / "on top.png").write_bytes(encode(make_image(0), "PNG"))
    for root, count in ((every_format, len(formats()) + 1), (tmp_path / "shards", 15)):
        data_set = open_data_set("folder", root)
        assert (len(data_set.train), data_set.labeled, data_set.test, data_set.classes) == (count, None, None, ())
        assert (data_set.train.labels == UNLABELED).all()
        assert len(open_data_set("folder", root, limit_train=4).train) == 4
    with pytest.raises(UserError, match=r"--dataset folder .*test"):
        open_split("folder", every_format, "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty .*\*\.tar"):
        open_data_set("folder", tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere"):
        open_data_set("folder", tmp_path / "nowhere")


def add(shard: Path, **members: bytes) -> None:
    """Append members; two underscores in their names are dots."""
    with tarfile.open(shard, "a") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_invalid_shards_are_reported(tmp_path: Path) -> None:
    image = encode(make_image(0))

    def check_refused(match: str, **members: bytes) -> None:
        root = write_shards(tmp_path / str(len(list(tmp_path.iterdir()))), shards=1)
        add(root / "train-000.tar", **members)
        with pytest.raises(UserError, match=match) as error:
            check_labels(read_split(root, "class folders"))
        assert "train-000.tar" in str(error.value) and "\n" not in str(error.value)

    check_refused(r"train-000\.tar: late\.jpg .*\.cls", late__jpg=image)
    check_refused("late.cls .*'cat'", late__jpg=image, late__cls=b"cat")
    check_refused("late.cls .*'-1'", late__jpg=image, late__cls=b"-1")
    check_refused("two images .*late", late__jpg=image, late__png=image)

    root = write_shards(tmp_path / "other", shards=1)
    (root / "sub").mkdir()
    (root / "sub" / "loose.jpg").write_bytes(image)
    with pytest.raises(UserError, match=r"train-000\.tar.*sub/loose\.jpg"):
        read_split(root, "class folders")
    shutil.rmtree(root / "sub")
    (root / "train-001.tar").write_text("no archive")
    with pytest.raises(UserError, match=r"train-001\.tar "):
        read_split(root, "class folders")
    (root / "train-001.tar").rename(root / "train-001.tar.gz")
    with pytest.raises(UserError, match=r"train-001\.tar\.gz "):
        read_split(root, "class folders")


def test_a_truncated_shard(tmp_path: Path) -> None:
    """At any byte: the images before it are read, an incomplete image has a fault, and there is a note."""
    root = write_shards(tmp_path / "complete", shards=1)
    expected = read_split(root, "class folders").images
    content = (root / "train-000.tar").read_bytes()
    third, last = (int(expected.offset[n]) for n in (2, 4))
    lengths = [third - 512, third - 300, third, third + 40, third + int(expected.size_bytes[2]), last + 600]
    for length, intact in zip(lengths, (2, 2, 2, 2, 3, 4)):
        truncated = tmp_path / str(length)
        truncated.mkdir()
        (truncated / "train-000.tar").write_bytes(content[:length])
        split = read_split(truncated, "class folders")
        images = split.images
        assert "train-000.tar" in split.notes[0]
        good = [n for n in range(len(images)) if n not in images.faults]
        assert len(good) == intact
        for n in good:
            assert images.encoded(n).tobytes() == expected.encoded(n).tobytes()
            assert images.labels[n] == expected.labels[n]
        for n in images.faults:
            with pytest.raises(BadImage, match=f" {length},"):
                images.open(n)


def test_a_shard_that_is_truncated_before_a_label(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "train", shards=2)
    image = encode(make_image(0))
    add(root / "train-001.tar", late__jpg=image, late__cls=b"1")
    with tarfile.open(root / "train-001.tar") as archive:
        label = archive.getmember("late.cls").offset
    os.truncate(root / "train-001.tar", label)
    split = read_split(root, "class folders")
    check_labels(split)
    assert list(split.images.faults) == [10]


def write_folders(root: Path, count: int, classes: int = 2) -> Path:
    """Class folders of ``count`` links to four files."""
    sources = [encode(make_image(n, 20 + n, 30)) for n in range(4)]
    (root / "source").mkdir(parents=True)
    for n, content in enumerate(sources):
        (root / "source" / f"{n}.jpg").write_bytes(content)
    for n in range(count):
        folder = root / "train" / f"class {n % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(root / "source" / f"{n * 7 % 4}.jpg", folder / f"{n}.jpg")
    return root / "train"


def assert_same(one: ImageFiles, two: ImageFiles) -> None:
    assert [one.name(n) for n in range(len(one))] == [two.name(n) for n in range(len(two))]
    for field in ("file_of", "offset", "size_bytes", "sizes", "labels", "needs_pillow"):
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
        assert getattr(one, field).dtype == getattr(two, field).dtype
    assert dict(one.faults) == dict(two.faults)


class Stopped(Exception):
    pass


def raise_stopped(*_: object) -> None:
    raise Stopped


def test_a_killed_scan_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed by SIGKILL after a chunk, in several processes."""
    root = write_folders(tmp_path, 4 * splits.FILES_PER_CHUNK - 5)
    (root / "class 1" / "bad.jpg").write_text("no image")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom pipelines.splits import read_split\n"
        "if __name__ == '__main__':\n"
        "    progress = lambda *about: [print(about, flush=True), time.sleep(60)]\n"
        "    read_split(Path(sys.argv[1]), 'class folders', progress)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, str(script), str(root)]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE) as process:
        assert b"indexing images" in process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    partial_index = cache_file(root, "class folders").with_suffix(".partial")
    with partial_index.open("ab") as file:
        file.write(b"12345678 [1, [[0, 5")
    with pytest.raises(Stopped):
        read_split(root, "class folders", raise_stopped)
    calls = []
    resumed = read_split(root, "class folders", lambda *about: calls.append(about[1:])).images
    assert [done for done, _ in calls] == [3072, 4092] and not partial_index.exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    calls.clear()
    uninterrupted = read_split(root, "class folders", lambda *about: calls.append(about[1:])).images
    assert len(calls) == 4
    assert_same(resumed, uninterrupted)
    assert len(resumed.faults) == 1


def test_a_partial_index_of_other_files_is_discarded(tmp_path: Path) -> None:
    root = write_folders(tmp_path, 8)
    with pytest.raises(Stopped):
        read_split(root, "class folders", raise_stopped)
    assert cache_file(root, "class folders").with_suffix(".partial").exists()
    (root / "class 0" / "new.png").write_bytes(encode(make_image(5, 11, 12), "PNG"))
    images = read_split(root, "class folders").images
    assert len(images) == 9 and (11, 12) in [tuple(size) for size in images.sizes]


def test_a_changed_shard_is_indexed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_shards(tmp_path / "train", shards=2)
    before = read_split(root, "class folders").images
    monkeypatch.setattr(splits, "_scan", lambda *_: pytest.fail("the cache was not used"))
    assert_same(read_split(root, "class folders").images, before)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(root / "train-001.tar") as archive:
        label = archive.getmember("part.1/0009.cls").offset_data
    with (root / "train-001.tar").open("r+b") as file:
        file.seek(label)
        file.write(b"0")
    after = read_split(root, "class folders").images
    assert before.labels[9] == 1 and after.labels[9] == 0


def test_a_cache_of_another_data_set_is_ignored(tmp_path: Path, empty_cache: Path) -> None:
    one = write_folders(tmp_path / "one", 4)
    two = write_folders(tmp_path / "two", 6)
    for folder in (one, two):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (10**9, 10**9))
    read_split(one, "class folders")
    shutil.copy(cache_file(one, "class folders"), cache_file(two, "class folders"))
    assert len(read_split(two, "class folders").images) == 6
    array = empty_cache / "array.npz"
    np.savez(array, about=np.zeros(3))
    shutil.copy(array, cache_file(two, "class folders"))
    assert len(read_split(two, "class folders").images) == 6


def test_bad_images_do_not_stop_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a fault, until its file is repaired, which changes no folder."""
    root = write_folders(tmp_path, 6)
    bad = root / "class 0"
    (bad / "bomb.png").write_bytes(BOMB)
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "link.jpg").symlink_to(tmp_path / "nowhere")
    (bad / "page.jpg").write_text("<html>")
    images = read_split(root, "class folders").images
    by_name = {images.path(n).name: why for n, why in images.faults.items()}
    assert by_name.keys() == {"bomb.png", "empty.jpg", "link.jpg", "page.jpg"}
    assert "limit" in by_name["bomb.png"] and "No such file" in by_name["link.jpg"]
    for n in images.faults:
        with pytest.raises(BadImage, match=images.path(n).name) as error:
            images.open(n)
        assert (error.value.image_id, error.value.reason) == (n, images.faults[n])
        assert error.value.local and "\n" not in str(error.value) and "0x" not in str(error.value)
    some = images.limited(5)
    names = [some.path(n).name for n in range(5)]
    assert [names[n] for n in some.faults] == [name for name in names if name in by_name]
    assert some.faults

    (bad / "page.jpg").write_bytes(encode(make_image(0, 9, 8)))
    repaired = read_split(root, "class folders").images
    assert len(repaired.faults) == 3 and (9, 8) in [tuple(size) for size in repaired.sizes]
    shutil.rmtree(root / "class 1")
    for path in bad.iterdir():
        path.unlink()
    (bad / "page.jpg").write_text("<html>")
    with pytest.raises(UserError, match=r"page\.jpg"):
        read_split(root, "class folders")


def test_a_decompression_bomb_is_refused_without_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    root = write_folders(tmp_path, 2)
    (root / "class 0" / "bomb.png").write_bytes(BOMB)
    images = read_split(root, "class folders").images
    (n,) = images.faults
    assert "100000 x 100000" in images.faults[n] and str(MAX_PIXELS) in images.faults[n]
    without_faults = dataclasses.replace(images, faults={})
    with pytest.raises(BadImage, match="100000 x 100000"):
        without_faults.open(n)


def test_files_that_changed_since_they_were_indexed(tmp_path: Path) -> None:
    root = write_folders(tmp_path, 6)
    images = read_split(root, "class folders").images
    for n, content in enumerate((b"", images.encoded(1).tobytes()[:-20], encode(make_image(0, 99, 98)))):
        images.path(n).unlink()
        images.path(n).write_bytes(content)
    images.path(3).unlink()
    for n, reason in ((0, "no image"), (1, "truncated"), (3, "No such file")):
        with pytest.raises(BadImage, match=reason) as error:
            images.open(n)
        copy = pickle.loads(pickle.dumps(error.value))
        assert (str(copy), copy.image_id, copy.reason) == (str(error.value), n, error.value.reason)
    shards = read_split(write_shards(tmp_path / "shards", shards=2), "class folders").images
    (tmp_path / "shards" / "train-000.tar").unlink()
    os.truncate(tmp_path / "shards" / "train-001.tar", int(shards.offset[6]))
    for n, reason in ((0, "No such file"), (6, "shorter")):
        with pytest.raises(BadImage, match=reason):
            shards.open(n)
    shards.read_ahead(0)
    shards.read_ahead(1)


def test_open_shards_are_not_pickled(tmp_path: Path) -> None:
    images = read_split(write_shards(tmp_path / "train"), "class folders").images
    contents = [images.encoded(n).tobytes() for n in range(len(images))]
    pickled = pickle.dumps(images)
    assert len(pickled) < 4000
    copy = pickle.loads(pickled)
    assert [copy.encoded(n).tobytes() for n in range(len(images))] == contents


def test_the_number_of_open_shards_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.datasets.images.OPEN_SHARDS", 2)
    images = read_split(write_shards(tmp_path / "train"), "class folders").images

    def count_open() -> int:
        descriptors = Path("/proc/self/fd")
        return sum("train-0" in str(each.readlink()) for each in descriptors.iterdir() if each.is_symlink())

    for n in (0, 5, 10, 0, 14, 6):
        images.open(n)
        assert 1 <= count_open() <= 2


def test_a_shard_that_is_truncated_while_it_is_open(tmp_path: Path) -> None:
    """With a memory map, SIGBUS would end the process."""
    images = read_split(write_shards(tmp_path / "train", shards=1), "class folders").images
    images.open(0)
    last = len(images) - 1
    os.truncate(images.path(last), int(images.offset[last]) + 100)
    with pytest.raises(BadImage, match="shorter"):
        images.open(last)
    images.open(0)


def test_a_replaced_file_is_detected(tmp_path: Path) -> None:
    """By ``check_files`` or ``update``; it changes no folder."""
    root = write_folders(tmp_path, 6)
    before = read_split(root, "class folders").images
    before.path(2).write_bytes(encode(make_image(0, 99, 98)))
    assert_same(read_split(root, "class folders").images, before)
    after = read_split(root, "class folders", check_files=True).images
    assert after.sizes[2].tolist() == [99, 98]
    assert_same(read_split(root, "class folders").images, after)

    after.path(3).write_bytes(encode(make_image(0, 55, 54)))
    assert not after.update(2) and after.update(3) and not after.update(3)
    assert after.sizes[3].tolist() == [55, 54]
    assert read_split(root, "class folders").images.sizes[3].tolist() == [55, 54]
    after.path(4).write_text("<html>")
    with pytest.raises(BadImage, match="no image"):
        after.update(4)


def test_bad_images_are_remembered_until_their_files_change(tmp_path: Path) -> None:
    """Also if the folder grows, which changes image ids."""
    root = write_folders(tmp_path, 6)
    images = read_split(root, "class folders").images
    name = images.path(3)
    remember(images, [images.bad(3, "broken\tdata\nstream"), images.bad(4, "gone")])
    remember(images, [images.bad(3, "again")])
    faults = read_split(root, "class folders").images.faults
    assert faults == {3: "broken data stream", 4: "gone"}
    assert read_split(root, "class folders").images.limited(2).faults == {1: "broken data stream"}

    for n in range(3):
        (root / "class 0" / f"0 before all others {n}.jpg").write_bytes(encode(make_image(n)))
    grown = read_split(root, "class folders").images
    assert sorted(grown.path(n) for n in grown.faults) == sorted([name, images.path(4)])
    name.write_bytes(encode(make_image(7)))
    assert [grown.path(n) for n in read_split(root, "class folders").images.faults] == [images.path(4)]


def test_invalid_lines_in_a_list_of_bad_images_are_ignored(tmp_path: Path) -> None:
    root = write_folders(tmp_path, 6)
    (root / "class 0" / os.fsdecode(b"caf\xe9\n.jpg")).write_bytes(encode(make_image(0)))
    images = read_split(root, "class folders").images
    (not_utf8,) = (n for n in range(len(images)) if b"\xe9" in os.fsencode(images.path(n)))
    bad_list = BadList(tmp_path / "bad.tsv")
    assert bad_list.faults(images) == {}
    assert len(bad_list.add(images, [images.bad(not_utf8, "bad"), images.bad(0, "bad")])) == 2
    assert bad_list.add(images, [images.bad(not_utf8, "bad")]) == []
    with bad_list.file.open("ab") as file:
        file.write(b"\xff\xfe\n1\told format\treason\nx\ty\tz\t1\t2\n99\tgone.jpg\treason\t5\t6\n3\thalf a li")
    assert BadList(bad_list.file).faults(images) == {not_utf8: "bad", 0: "bad"}
    assert bad_list.faults(images) == {not_utf8: "bad", 0: "bad"}


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    raw = [b"a.jpg", "ä ö.jpg".encode(), b"\xff\xfe.jpg", b"", b"x" * 300]
    names = Names.of(raw)
    assert [names[n] for n in range(len(names))] == raw
    assert len(Names.of([])) == 0
    folder = tmp_path / "train" / "class"
    folder.mkdir(parents=True)
    for name in raw[:3]:
        (folder / os.fsdecode(name)).write_bytes(encode(make_image(0)))
    for _ in range(2):
        images = read_split(tmp_path / "train", "class folders").images
        expected = ImageFolder(str(tmp_path / "train"))
        assert [str(images.path(n)) for n in range(3)] == [path for path, _ in expected.samples]


def test_the_cache_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(read_split(write_folders(tmp_path, 4), "class folders").images) == 4


def write_damaged(root: Path) -> Path:
    """An image that is damaged between a valid header and end."""
    content = bytearray(encode(make_image(3), "PNG"))
    content[len(content) // 2] ^= 1
    (root / "class 0" / "damaged.png").write_bytes(content)
    return root / "class 0" / "damaged.png"


@pytest.mark.parametrize("count", [6, 300])
def test_verifying_finds_images_with_valid_headers_that_cannot_be_decoded(tmp_path: Path, count: int) -> None:
    """In one process and in several; they have faults until they are repaired."""
    root = write_folders(tmp_path, count)
    file = write_damaged(root)
    split = read_split(root, "class folders")
    assert not split.images.faults
    verified = verify_split(split)
    (n,) = verified.images.faults
    assert verified.images.path(n) == file
    assert_same(read_split(root, "class folders").images, verified.images)
    file.write_bytes(encode(make_image(3), "PNG"))
    assert not read_split(root, "class folders").images.faults


def test_verifying_removes_wrong_entries_of_the_list(tmp_path: Path) -> None:
    root = write_folders(tmp_path, 6)
    images = read_split(root, "class folders").images
    remember(images, [images.bad(3, "memory ran out")])
    split = read_split(root, "class folders")
    assert split.images.faults.keys() == {3}
    assert not verify_split(split).images.faults
    assert not read_split(root, "class folders").images.faults


@pytest.mark.parametrize(("image_format", "end"), [("JPEG", b"\xff\xd9"), ("PNG", b"IEND\xaeB`\x82")])
def test_truncated_images_are_detected_by_their_end_mark(tmp_path: Path, image_format: str, end: bytes) -> None:
    """Also if data follows the end mark."""
    root = tmp_path / "train"
    root.mkdir()
    content = encode(make_image(0, 90, 80), image_format)
    assert content.endswith(end)
    for name, written in {
        "0 complete": content,
        "1 longer": content + b"more" * 300,
        "2 truncated": content[: len(content) * 6 // 10],
        "3 without end mark": content[:-2],
        "4 padded": content[: len(content) * 6 // 10] + bytes(len(content) * 4 // 10),
    }.items():
        (root / f"{name}.img.{image_format.lower()}").write_bytes(written)
    images = read_split(root, "loose images").images
    faults = images.faults
    expected = set()
    for n, path in enumerate(sorted(root.iterdir())):
        try:
            Image.open(path).convert("RGB")
        except OSError:
            expected.add(n)
    assert faults.keys() == expected and {2} <= faults.keys() <= {2, 3, 4}
    # Decoders of GPUs may not notice what Pillow tolerates.
    left_to_pillow = images.needs_pillow & np.array([n not in faults for n in range(len(images))])
    assert set(np.flatnonzero(left_to_pillow)) == {3, 4} - expected


def test_the_end_mark_of_a_thumbnail_is_not_that_of_the_image(tmp_path: Path) -> None:
    """Nor is one in a comment."""
    root = tmp_path / "train"
    root.mkdir()
    thumbnail = encode(make_image(1, 16, 16), "JPEG")
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    image = make_image(0, 90, 80)
    for name, options in {"exif": {"exif": exif.tobytes() + thumbnail}, "comment": {"comment": thumbnail}}.items():
        image.save(root / f"{name}.jpg", **options)
        content = (root / f"{name}.jpg").read_bytes()
        assert thumbnail in content
        fill = b"\xff" * 3
        for kind, written in {
            "longer": content + b"more",
            "truncated": content[:-300],
            "without end mark": content[:-2] + b"more",
            "without end mark, with fill bytes": content[:2] + fill + content[2:-2] + b"more",
        }.items():
            (root / f"{name} {kind}.jpg").write_bytes(written)
    images = read_split(root, "loose images").images
    kinds = {n: images.name(n).removesuffix(".jpg").partition(" ")[2] for n in range(len(images))}
    assert {kinds[n] for n in images.faults} == {"truncated"} and len(images.faults) == 2
    left_to_pillow = {*np.flatnonzero(images.needs_pillow)} - images.faults.keys()
    assert left_to_pillow == {n for n, kind in kinds.items() if kind.startswith("without end mark")}


def test_the_index_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folders(tmp_path, 6)
    write_shards(tmp_path / "val")
    (root / "class 1" / "page.jpg").write_text("<html>")
    write_damaged(root)
    assert launch.main(["index", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for text in ("class folders", "shards", "page.jpg", "bad images"):
        assert text in out
    bad = tmp_path / "bad.tsv"
    assert launch.main(["index", str(tmp_path), "--verify", "full", "--bad", str(bad)]) == 0
    lines = [line.split("\t") for line in bad.read_text().splitlines()]
    assert [Path(name).name for name, _ in lines] == ["damaged.png", "page.jpg"] and lines[0][1]
    assert launch.main(["index", str(tmp_path / "train" / "class 0")]) == 0
    assert "loose images" in capsys.readouterr().out
    assert launch.main(["index", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert launch.main(["index", str(tmp_path), "--bad", str(tmp_path)]) == 2
    assert f"--bad {tmp_path}" in capsys.readouterr().err
