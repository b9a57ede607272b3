"""Which files and members of shards are images, and how the others are reported."""

from __future__ import annotations

import io
import os
import socket
import struct
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from torchvision.datasets import ImageFolder

import launch
from pipelines.datasets import listing
from pipelines.datasets.cache import SplitIndex
from pipelines.datasets.headers import read_header, to_rgb
from pipelines.datasets.image_folders import check_classes, splits_below
from pipelines.datasets.images import UNLABELED
from pipelines.datasets.notes import LARGE_PIXELS, notes_on
from pipelines.datasets.registry import open_data_set
from pipelines.errors import UserError
from pipelines.splits import read_split, verify_split
from tests.runs import Run
from tests.test_index import encode, make_image

JPEG = encode(make_image(0))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fill(folder: Path, *names: str, content: bytes = JPEG) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def names_of(split: SplitIndex) -> list[str]:
    """Names of files or members, relative to the root."""
    images = split.images
    return [images.name(n).removeprefix(f"{images.root}/") for n in range(len(images))]


def loose(root: Path) -> SplitIndex:
    """The index of images without labels, after a check that the cache returns the same."""
    scanned = read_split(root, "loose images")
    cached = read_split(root, "loose images")
    assert notes_on(cached) == notes_on(scanned) and dict(cached.skipped) == dict(scanned.skipped)
    assert names_of(cached) == names_of(scanned)
    return cached


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_links_in_a_loop(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", "a/1.jpg", "b/2.jpg")
    for name, target in {"up": "..", "up 2": "../.", "here": ".", "above": "../..", "self": "self"}.items():
        (root / "a" / name).symlink_to(target)
    (root / "a" / "self.jpg").symlink_to("self.jpg")
    split = loose(root)
    assert names_of(split) == ["a/1.jpg", "a/self.jpg", "b/2.jpg"]
    assert list(split.images.faults) == [1]
    assert split.skipped == {listing.LISTED_TWICE: 4, listing.BROKEN: 1}
    # The class a has neither the images of b nor those of a folder next to the root.
    fill(tmp_path, "next/3.jpg")
    (root / "c").symlink_to("..")
    (root / "d").symlink_to("d")
    split = read_split(root, "class folders")
    assert split.classes == ("a", "b") and names_of(split) == ["a/1.jpg", "a/self.jpg", "b/2.jpg"]
    assert split.images.labels.tolist() == [0, 0, 1]


def test_a_folder_is_listed_once_by_its_path_without_links(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", "b/1.jpg", "b/deep/2.jpg")
    fill(tmp_path / "elsewhere", "3.jpg", "deep/4.jpg")
    for name, target in {"a": "b", "a/more": "", "c": "../elsewhere", "d": "../elsewhere/deep"}.items():
        if target:
            (root / name).symlink_to(target)
    assert names_of(loose(root)) == ["b/1.jpg", "b/deep/2.jpg", "c/3.jpg", "c/deep/4.jpg"]
    # But in every class that links to it.
    assert names_of(read_split(root, "class folders")) == [
        *("a/1.jpg", "a/deep/2.jpg", "b/1.jpg", "b/deep/2.jpg", "c/3.jpg", "c/deep/4.jpg", "d/4.jpg")
    ]


def test_links_to_other_folders_match_imagefolder(tmp_path: Path) -> None:
    root = fill(
        tmp_path / "data", "a/x.jpg", "a/b/x.jpg", "a/b-c/x.jpg", "a/x.jpg.d/x.jpg", "B.jpg/X.JPG", "B.jpg/a.Jpeg"
    )
    fill(tmp_path / "elsewhere", "2.jpg", "1.png", "deep/0.jpg")
    (root / "a" / "b" / "link").symlink_to(tmp_path / "elsewhere")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "B.jpg" / "b.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    split = read_split(root, "class folders")
    expected = ImageFolder(str(root))
    assert list(split.classes) == expected.classes and not split.skipped
    assert [(str(split.images.path(n)), label) for n, label in enumerate(split.images.labels)] == expected.samples


def test_only_regular_files_are_images(tmp_path: Path) -> None:
    """Reading a pipe or a device may never end; a broken link is a bad image."""
    root = fill(tmp_path / "data", "good.jpg", "folder.jpg/inside.jpg")
    os.mkfifo(root / "pipe.jpg")
    (root / "link to pipe.png").symlink_to("pipe.jpg")
    (root / "zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(root / "socket.jpeg"))
    (root / "broken.jpg").symlink_to("nowhere.jpg")
    (root / "broken.txt").symlink_to("nowhere.txt")
    os.mkfifo(root / "shard.tar")
    split = loose(root)
    assert names_of(split) == ["broken.jpg", "good.jpg", "folder.jpg/inside.jpg"]
    assert "No such file" in split.images.faults[0] and len(split.images.faults) == 1
    assert split.skipped == {listing.SPECIAL: 5, listing.BROKEN: 1}


@pytest.mark.parametrize("kind", ["class folders", "loose images"])
def test_a_broken_link_that_is_repaired_is_listed(kind: str, tmp_path: Path) -> None:
    root = fill(tmp_path / "data", "a/0.jpg")
    (root / "b").symlink_to(tmp_path / "disk")
    assert read_split(root, kind).skipped == {listing.BROKEN: 1}
    fill(tmp_path / "disk", "1.jpg")
    assert names_of(read_split(root, kind)) == ["a/0.jpg", "b/1.jpg"]


@pytest.mark.parametrize(
    "name",
    [
        *(".ipynb_checkpoints/a.jpg", "__MACOSX/a/._0.jpg", ".Trash/a.jpg", ".git/config", "@eaDir/a.jpg", "._a.jpg"),
        *(".DS_Store", "Thumbs.db", "desktop.ini", "a/._0.jpg", "a/.b/c.jpg", "a/@eaDir/0.jpg/x.jpg"),
    ],
)
def test_hidden_and_system_files_are_neither_classes_nor_images(name: str, tmp_path: Path) -> None:
    root = fill(tmp_path / "data" / "train", "a/0.jpg", "b/0.jpg")
    fill(root, name)
    split = read_split(root, "class folders")
    assert split.classes == ("a", "b") and names_of(split) == ["a/0.jpg", "b/0.jpg"]
    assert split.skipped == {listing.HIDDEN: 1}
    assert names_of(loose(root)) == ["a/0.jpg", "b/0.jpg"]
    (note,) = notes_on(split)
    assert str(root) in note and "1 hidden" in note


def test_a_split_of_hidden_folders_is_ignored(tmp_path: Path) -> None:
    fill(tmp_path / "data", "train/0.jpg", "train/.ipynb_checkpoints/0.jpg")
    assert list(splits_below(tmp_path / "data")) == ["all images"]


def test_the_root_may_be_hidden(tmp_path: Path) -> None:
    assert names_of(loose(fill(tmp_path / ".data", "a/0.jpg"))) == ["a/0.jpg"]


def test_files_that_are_no_images_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By suffix in lower case; also in an index from the cache."""
    root = fill(tmp_path / "data", "a.JPG", "b.JPEG", "c.jfif", "d.JPE", "e.Png")
    kinds = {"HEIC": 3, "gif": 2, "avif": 2, "CR2": 1, "svg": 1, "tar.gz": 1}
    for kind, count in kinds.items():
        fill(root, *(f"{n}.photo.{kind}" for n in range(count)))
    fill(root, "README", "a.b c")
    split = loose(root)
    assert names_of(split) == ["a.JPG", "b.JPEG", "c.jfif", "d.JPE", "e.Png"] and not split.images.faults
    assert split.skipped == {**{f".{kind.lower()}": count for kind, count in kinds.items()}, listing.NO_SUFFIX: 2}
    for _ in range(2):
        assert launch.main(["index", str(root)]) == 0
        out = capsys.readouterr().out
        assert "3 .heic" in out and "2 .gif" in out and "1 .tar.gz" in out
    assert any("3 .heic" in note for note in open_data_set("folder", root).notes)
    fill(root, "new.heic")
    assert loose(root).skipped[".heic"] == 4


def test_rare_kinds_are_summed_up() -> None:
    text = listing.format_counts({f".k{n}": n for n in range(1, 100)})
    counts = [int(part.split()[0]) for part in text.split(", ")]
    assert sum(counts) == 99 * 100 // 2 and len(counts) == listing.KINDS_SHOWN + 1 and "99 .k99" in text


@pytest.mark.parametrize("kind", ["class folders", "loose images"])
def test_a_folder_without_images_is_reported_with_its_contents(kind: str, tmp_path: Path) -> None:
    fill(tmp_path / "data", "a/0.heic", "a/1.HEIC", "a/2.dng", "a/._0.heic")
    with pytest.raises(UserError, match=r"2 \.heic, 1 \.dng, 1 hidden") as error:
        read_split(tmp_path / "data", kind)
    assert str(tmp_path / "data") in str(error.value) and "\n" not in str(error.value)


def test_images_outside_class_folders_are_counted(tmp_path: Path) -> None:
    split = read_split(fill(tmp_path / "data", "a/0.jpg", "x.jpg", "y.png", "z.txt"), "class folders")
    assert split.skipped == {listing.OUTSIDE: 2, ".txt": 1}


@pytest.mark.parametrize("kind", ["class folders", "loose images"])
@pytest.mark.parametrize("name", ["images.tar.gz", "images.zip", "images.TGZ", "images.rar"])
def test_an_archive_next_to_its_images(kind: str, name: str, tmp_path: Path) -> None:
    """It is skipped next to images, and reported if there are none."""
    root = fill(tmp_path / "data", name, content=b"archive")
    with pytest.raises(UserError, match=f"{name} "):
        read_split(root, kind)
    split = read_split(fill(root, "images/0.jpg"), kind)
    assert len(split.images) == 1 and list(split.skipped.values()) == [1]
    # A .tar may hold the same images or others.
    write_tar(root / "images.tar", {"0.jpg": JPEG})
    (root / name).unlink()
    with pytest.raises(UserError, match=r"images\.tar.*images/0\.jpg"):
        read_split(root, kind)


def test_hidden_files_are_no_shards(tmp_path: Path) -> None:
    root = write_tar(tmp_path / "data" / "0.tar", {"0.jpg": JPEG}).parent
    fill(root, "._0.tar", content=b"\0\5\x16\7")
    fill(root, "0.idx", "index.json", content=b"")
    split = loose(root)
    assert len(split.images) == 1 and split.skipped == {listing.HIDDEN: 1, ".idx": 1, ".json": 1}


def webdataset_samples(shard: Path) -> list[dict[str, bytes]]:
    return list(webdataset.WebDataset([str(shard)], shardshuffle=False))


DOTTED = {
    "WhatsApp Image 2024-01-05 at 10.11.12.jpeg": "WhatsApp Image 2024-01-05 at 10.11.12",
    "d.e/22.05.png": "d.e/22.05",
    "clip.0001.JPG": "clip.0001",
    "IMG_1_jpg.rf.0a1b2c3d.jpg": "IMG_1_jpg.rf.0a1b2c3d",
    "St. Peter.jpg": "St. Peter",
}


def test_names_with_dots_are_images(tmp_path: Path) -> None:
    """With their labels, next to them or not."""
    for order in (1, -1):
        members = dict.fromkeys(DOTTED, JPEG) | {f"{key}.cls": b"%d" % n for n, key in enumerate(DOTTED.values())}
        members = dict(sorted(members.items())) if order == 1 else members
        shard = write_tar(tmp_path / str(order) / "0.tar", members)
        split = read_split(shard.parent, "class folders")
        labels = {name.partition(": ")[2]: label for name, label in zip(names_of(split), split.images.labels.tolist())}
        assert labels == {name: n for n, name in enumerate(DOTTED)}
        assert not split.skipped and not split.images.faults


def test_parts_of_samples_are_no_images(tmp_path: Path) -> None:
    """As in webdataset if the sample has an image KEY.jpg; else they are counted."""
    members = {"a.jpg": JPEG, "a.seg.png": JPEG, "a.0.jpg": JPEG, "a.cls": b"1", "b.left.jpg": JPEG, "b.cls": b"0"}
    members |= {"b.right.jpg": JPEG, "c.png": encode(make_image(1), "PNG"), "c.1.txt": b"", "c.cls": b"0"}
    shard = write_tar(tmp_path / "data" / "0.tar", members)
    split = read_split(shard.parent, "class folders")
    expected = [sample for sample in webdataset_samples(shard) if "jpg" in sample or "png" in sample]
    assert [split.images.encoded(n).tobytes() for n in range(2)] == [members["a.jpg"], members["c.png"]]
    assert split.images.labels.tolist() == [int(sample["cls"]) for sample in expected] == [1, 0]
    assert list(split.skipped.values()) == [2] and "KEY.PART.jpg" in next(iter(split.skipped))
    parts = write_tar(tmp_path / "parts" / "0.tar", {"b.left.jpg": JPEG, "b.right.jpg": JPEG}).parent
    for _ in range(2):
        with pytest.raises(UserError, match=r"2 .*KEY\.PART\.jpg"):
            read_split(parts, "loose images")


def test_members_that_are_no_images_are_counted(tmp_path: Path) -> None:
    """Except for members that belong to an image."""
    members = {
        "a.jpg": JPEG,
        "a.json": b"{}",
        "a.heic": b"",
        "b.HEIC": b"",
        "b.json": b"{}",
        "c.gif": b"",
        "c.txt": b"",
    }
    members |= {"._a.jpg": b"", "d/._a.jpg": b"", "__MACOSX/._a.jpg": b"", "PaxHeaders.7/a.jpg": b"", "README": b""}
    members |= {"__info__/x.jpg": JPEG, "__meta__": b""}
    shard = write_tar(tmp_path / "data" / "0.tar", members)
    with tarfile.open(shard, "a") as archive:
        for name, kind in {"d": tarfile.DIRTYPE, "e.jpg": tarfile.LNKTYPE, "f.jpg": tarfile.SYMTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            archive.addfile(info)
    split = loose(shard.parent)
    assert names_of(split) == ["0.tar: a.jpg"]
    skipped = dict(split.skipped)
    assert skipped.pop("link(s) in shards") == 2
    assert skipped == {".heic": 1, ".gif": 1, listing.HIDDEN: 4, listing.NO_SUFFIX: 1}


def test_labels_that_are_not_next_to_their_images(tmp_path: Path) -> None:
    keys = [f"d/{n:02d}" for n in range(6)]
    images = {f"{key}.jpg": encode(make_image(n)) for n, key in enumerate(keys)}
    labels = {f"{key}.cls": b"%d" % (n % 3) for n, key in enumerate(keys)}
    for name, members in {"after": images | labels, "before": labels | images}.items():
        split = read_split(write_tar(tmp_path / name / "0.tar", members).parent, "class folders")
        assert split.images.labels.tolist() == [0, 1, 2, 0, 1, 2] and not split.skipped
        assert [split.images.encoded(n).tobytes() for n in range(6)] == list(images.values())


def test_labels_of_repeated_keys_are_not_matched(tmp_path: Path) -> None:
    """As in concatenated shards: only the label next to an image is used."""
    shard = write_tar(tmp_path / "data" / "0.tar", {"a.jpg": JPEG, "a.cls": b"0", "b.jpg": JPEG, "b.cls": b"1"})
    with tarfile.open(shard, "a") as archive:
        for name, content in {"a.cls": b"2", "a.jpg": JPEG, "c.jpg": JPEG, "b.cls": b"3", "a.txt": b""}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    labels = read_split(shard.parent, "class folders").images.labels.tolist()
    assert labels == [int(sample.get("cls", b"-1")) for sample in webdataset_samples(shard) if "jpg" in sample]
    assert labels == [0, 1, 2, UNLABELED]


def labeled_shard(root: Path, labels: list[int]) -> Path:
    members = {
        f"{n:03d}.{kind}": JPEG if kind == "jpg" else b"%d" % k for n, k in enumerate(labels) for kind in ("jpg", "cls")
    }
    return write_tar(root / "0.tar", members).parent


def test_labels_with_gaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = read_split(labeled_shard(tmp_path / "few", [0, 1, 4, 1]), "class folders")
    check_classes(few)
    (note,) = notes_on(few)
    assert "2 of 5 classes" in note and "0.tar: 002.jpg (4)" in note
    # A subset of a larger data set has gaps.
    check_classes(read_split(labeled_shard(tmp_path / "part", [0, 99] * 60), "class folders"))
    labeled_shard(tmp_path / "data" / "train", [0, 1, 999_999, 1])
    labeled_shard(tmp_path / "data" / "val", [0, 1])
    for arguments in (
        ["index", str(tmp_path / "data")],
        ["--dataset", "imagenet", "--data_dir", str(tmp_path / "data")],
    ):
        assert launch.main(arguments) == 2
        err = capsys.readouterr().err
        assert "0.tar: 002.jpg (999999)" in err and "999997 of the 1000000 classes" in err
    labeled_shard(tmp_path / "other" / "train", [0, 1])
    labeled_shard(tmp_path / "other" / "val", [0, 7])
    with pytest.raises(UserError, match=r"0\.tar: 001\.jpg \(7\)"):
        open_data_set("imagenet", tmp_path / "other")


def test_a_truncated_shard_has_a_note(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "data" / "0.tar", {f"{n}.jpg": JPEG for n in range(4)})
    os.truncate(shard, shard.stat().st_size // 2)
    for _ in range(2):
        assert any("0.tar" in note for note in open_data_set("folder", shard.parent).notes)


def tiff_of_12_bits(pixels: bytes) -> bytes:
    """A TIFF file of two 12-bit pixels, which Pillow does not write."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(pixels) + 1) + pixels + b"\0"
    return header + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def test_gray_of_more_than_8_bits_is_scaled(tmp_path: Path) -> None:
    """Every value, as NumPy rounds; through the index."""
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(ramp / 65535 * 255).astype(np.uint8)
    root = tmp_path / "data"
    root.mkdir()
    Image.fromarray(ramp).save(root / "0.png")
    Image.fromarray(ramp).save(root / "1.tif")
    (root / "2.pgm").write_bytes(b"P5 256 256 65535\n" + ramp.astype(">u2").tobytes())
    (root / "3.pgm").write_bytes(b"P2 256 256 65535\n" + " ".join(map(str, ramp.ravel())).encode())
    big_endian = Image.frombytes("I;16B", (256, 256), ramp.astype(">u2").tobytes())
    big_endian.save(root / "4.tif")
    images = loose(root).images
    assert not images.faults and images.needs_pillow.all()
    for n in range(5):
        np.testing.assert_array_equal(np.asarray(images.open(n)), np.repeat(expected[..., None], 3, axis=2), str(n))
    # Other maxima.
    fill(tmp_path / "other", "0.pgm", content=b"P5 2 1 1023\n" + np.array([1023, 512], ">u2").tobytes())
    fill(tmp_path / "other", "1.tif", content=tiff_of_12_bits(b"\xff\xf8\x00"))
    images = loose(tmp_path / "other").images
    assert [np.asarray(images.open(n))[0, :, 0].tolist() for n in range(2)] == [[255, 128]] * 2


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_maximum_are_bad(dtype: type, tmp_path: Path) -> None:
    wide = Image.fromarray(np.linspace(0, 7e4, 64).reshape(8, 8).astype(dtype))
    buffer = io.BytesIO()
    wide.save(buffer, "TIFF")
    assert isinstance(read_header(buffer), str)
    with pytest.raises(ValueError, match="8 or 16 bits"):
        to_rgb(wide)
    images = loose(fill(fill(tmp_path / "data", "a.tif", content=buffer.getvalue()), "b.jpg")).images
    assert list(images.faults) == [0] and "8 or 16 bits" in images.faults[0]


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """The tests may run as root, which may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.mark.parametrize("closed", ["train", "train/a", "train/a/deep", "shards/0.tar"])
def test_an_unreadable_path_is_named(
    closed: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        fill(root, "train/a/0.jpg", "train/a/deep/1.jpg")
        write_tar(root / "shards" / "0.tar", {"0.jpg": JPEG})
        (root / closed).chmod(0)
        request.getfixturevalue("as_nobody")
        assert launch.main(["index", str(root / "shards" if "shards" in closed else root)]) == 2
        err = capsys.readouterr().err
        os.seteuid(os.getuid())
        (root / closed).chmod(0o755)
    assert str(root / closed) in err and err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b compressed"])
def test_an_invalid_tar_is_named(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = fill(tmp_path / "data", "0.tar", content=content)
    assert launch.main(["index", str(root)]) == 2
    err = capsys.readouterr().err
    assert str(root / "0.tar") in err and err.count("\n") == 1


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """In another process, as pytest's output accepts any character."""
    root = tmp_path / os.fsdecode(b"r\xe9sum\xe9")
    fill(root, "good.jpg")
    for content in (JPEG[:-100], b"no image"):
        (root / os.fsdecode(b"caf\xe9%d.jpg" % len(content))).write_bytes(content)
    bad = tmp_path / "bad.tsv"
    out = Run("index", root, "--verify", "full", "--bad", bad).end()
    assert "caf" in out and "2 bad images" in out
    lines = bad.read_bytes().splitlines()
    listed = sorted(line.split(b"\t")[0] for line in lines)
    assert listed == sorted(os.fsencode(path) for path in root.iterdir() if path.name != "good.jpg")


def test_a_folder_whose_images_are_all_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By decoding; and usable again when one is repaired."""
    damaged = bytearray(encode(Image.linear_gradient("L"), "PNG"))
    damaged[len(damaged) // 2] ^= 1
    root = fill(tmp_path / "data", *(f"{n}.jpg" for n in range(4)), content=bytes(damaged))
    split = loose(root)
    with pytest.raises(UserError, match=r"0\.jpg"):
        verify_split(split)
    for arguments in ([], ["--verify", "full", "--bad", str(tmp_path / "bad.tsv")]):
        assert launch.main(["index", str(root), *arguments]) == 2
        err = capsys.readouterr().err
        assert "0.jpg" in err
    assert len(loose(fill(root, "0.jpg")).images) == 4


def test_large_images_are_reported(tmp_path: Path) -> None:
    side = int(LARGE_PIXELS**0.5)
    for name, height, count in (("below", side, 3), ("above", side + 40, 2)):
        root = fill(
            tmp_path / name, *(f"{n}.png" for n in range(count)), content=encode(Image.new("L", (side, height)), "PNG")
        )
        fill(root, "small.jpg")
        notes = [note for note in notes_on(loose(root)) if "megapixels" in note]
        assert len(notes) == (name == "above"), name
