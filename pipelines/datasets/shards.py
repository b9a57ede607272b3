"""Images in tar shards of WebDataset's layout, and the scan of their headers and labels.

A shard is a sequence of samples. A sample is a run of members with the same name up to the first dot of the last part
of their paths: ``key.jpg`` and ``key.cls``, the class as digits.

Two kinds of samples are read that the webdataset package does not recognize. A name with more dots is a separate
sample (``22.05.png`` has the key ``22.05``), unless its run holds a plain ``22.jpg`` or there is a word between the
dots: ``key.left.jpg`` is a part of the sample ``key``. And a label that is not next to its image is matched by key.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from pipelines.datasets.headers import ROW_DTYPE, Header, ScanResult, read_header, row_of
from pipelines.datasets.images import UNLABELED, Names
from pipelines.datasets.listing import (
    COMPRESSED_TAR,
    EXTENSIONS,
    HIDDEN,
    Listing,
    image_files,
    is_hidden,
    is_regular,
    kind_of,
    stamp,
)
from pipelines.errors import UserError

IMAGE_SUFFIXES = frozenset(extension[1:] for extension in EXTENSIONS)
LABEL_SUFFIX = "cls"
SIDECARS = frozenset((LABEL_SUFFIX, "json", "txt"))
"""Suffixes of members that belong to images and are not counted as skipped."""
PART = re.compile(r"[a-z_][\w-]*")
"""The lower-case word between the dots of ``key.left.jpg``."""
PARTS = "image(s) named KEY.PART.jpg, parts of a sample KEY without an image KEY.jpg"
LINKS = "link(s) in shards"
"""Kinds of skipped members, besides those of listed files."""
PACKED = "pack.json"
"""What ``launch.py pack`` writes next to shards: how they were made."""
MAX_LABEL = 10**6
"""A larger label is refused: the online linear classifier has a row of weights for each class."""


def list_shards(root: Path) -> Listing | None:
    """The shards directly in ``root``, or None if there are none.

    Raises UserError if a shard is compressed, or ``root`` also holds image files.
    """
    watched = {".": stamp(root)}
    names = sorted(entry.name for entry in os.scandir(root) if not is_hidden(entry.name) and _is_tar(entry))
    shards = [name for name in names if name.lower().endswith(".tar")]
    if not shards:
        return None
    for name in names:
        if name.lower().endswith(COMPRESSED_TAR):
            raise UserError(
                f"{root / name} is compressed, so that single images cannot be read; unpack it to a .tar, or move it "
                f"elsewhere if it does not belong to the shards ({shards[0]})."
            )
    skipped: Counter[str] = Counter()
    loose = image_files(root, ".", {}, skipped)
    if loose:
        raise UserError(
            f"{root} holds both shards ({shards[0]}) and image files ({loose[0]}); if these were unpacked from the "
            f".tar, move it elsewhere, else move them to another folder."
        )
    skipped[".tar"] -= len(shards)
    skipped[".json"] -= (root / PACKED).is_file()
    watched |= {name: stamp(root / name) for name in shards}
    return Listing(
        layout="shards",
        files=Names.of([os.fsencode(name) for name in shards]),
        labels=np.full(len(shards), UNLABELED, np.int64),
        classes=(),
        watched=watched,
        skipped=+skipped,
    )


def _is_tar(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith((".tar", *COMPRESSED_TAR)) and is_regular(entry)


def read_shard(path: Path, shard: str) -> ScanResult:
    """Scan the images of a shard, in their order.

    Notes and errors call it ``shard``. A truncated shard has a note; its last image has a fault if it is incomplete.
    Raises UserError if the file is no tar archive, a label is invalid, or a sample has two images.
    """
    size = path.stat().st_size
    samples: list[_Sample] = []
    skipped: Counter[str] = Counter()
    try:
        with tarfile.open(path, "r:") as archive:
            for key, run in _runs(archive, skipped):
                samples += _samples(key, run, archive, shard, size)
            # Not archive.fileobj, whose position is undefined here.
            with path.open("rb") as file:
                file.seek(archive.offset)
                complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise UserError(f"{shard} is no uncompressed tar archive ({error}); unpack it or delete it.") from error
    except OSError as error:
        raise UserError(f"{shard} cannot be read ({error.strerror}); make it readable or delete it.") from error
    images = [sample for sample in samples if sample.member is not None]
    others = [sample for sample in samples if sample.member is None]
    _join_labels(images, others)
    keys = {sample.key for sample in images}
    skipped.update(kind for sample in others if sample.key not in keys for kind in sample.others)
    return ScanResult(
        rows=np.array([sample.row(size) for sample in images], ROW_DTYPE),
        faults={n: sample.header for n, sample in enumerate(images) if isinstance(sample.header, str)},
        note="" if complete else f"{shard} is cut off: it ends without an end mark after {len(images)} images",
        skipped=skipped,
    )


def sample_key(name: str) -> tuple[str, str] | None:
    """Split a member's name into its sample's key and a suffix, as the webdataset package does.

    None if the member belongs to no sample.
    """
    match = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", name)
    if match is None or re.match(r"__[^/]*__($|/)", name):
        return None
    return match[1], match[2].lower()


@dataclass(kw_only=True)
class _Sample:
    key: str
    member: tarfile.TarInfo | None = None
    """The image."""
    header: Header | str = ""
    label: int = UNLABELED
    others: list[str] = field(default_factory=list)
    """Kinds of the other members, without sidecars."""

    def row(self, shard_bytes: int) -> tuple[int, int, int, int, int, int, bool, int]:
        """The values of ROW_DTYPE."""
        assert self.member is not None
        first = self.member.offset_data
        size = min(self.member.size, max(0, shard_bytes - first))
        return row_of(self.header, offset=first, size_bytes=size, label=self.label)


_Run = list[tuple[tarfile.TarInfo, str]]
"""Members of a sample with their suffixes."""


def _runs(archive: tarfile.TarFile, skipped: Counter[str]) -> Iterator[tuple[str, _Run]]:
    """Keys and runs of members, as in the webdataset package; other members are counted in ``skipped``."""
    key, run = "", _Run()
    for member in _members(archive):
        parts = sample_key(member.name)
        if any(is_hidden(part) for part in member.name.split("/") if part not in ("", ".", "..")):
            skipped[HIDDEN] += 1
        elif not member.isreg():
            if kind_of(member.name) in EXTENSIONS:
                skipped[LINKS] += 1
        elif parts is None:
            if not re.match("__[^/]*__", member.name):
                skipped[kind_of(member.name)] += 1
        else:
            if parts[0] != key:
                yield key, run
                key, run = parts[0], []
            run.append((member, parts[1]))
    yield key, run


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive without folders, up to its end or the point where it was truncated."""
    while True:
        try:
            member = archive.next()
        except tarfile.ReadError:
            return
        if member is None:
            return
        archive.members.clear()  # type: ignore[attr-defined]  # Else tarfile keeps all members.
        if not member.isdir():
            yield member


def _samples(key: str, run: _Run, archive: tarfile.TarFile, shard: str, shard_bytes: int) -> Iterator[_Sample]:
    """The samples in a run: ``key``, or several with dots in their keys."""
    plain = any(suffix in IMAGE_SUFFIXES for _, suffix in run)
    samples: dict[str, _Sample] = {}
    for member, suffix in run:
        word, dot, last = suffix.rpartition(".")
        full_key = key
        if dot and not plain and not PART.fullmatch(word):
            full_key, suffix = member.name.rpartition(".")[0], last
        sample = samples.setdefault(full_key, _Sample(key=full_key))
        _add(sample, member, suffix, archive, shard, shard_bytes)
    yield from samples.values()


def _add(
    sample: _Sample, member: tarfile.TarInfo, suffix: str, archive: tarfile.TarFile, shard: str, shard_bytes: int
) -> None:
    """Add a member to its sample."""
    truncated = member.offset_data + member.size > shard_bytes
    if suffix in IMAGE_SUFFIXES:
        if sample.member is not None:
            raise UserError(f"{shard} holds two images named {sample.key}; give each image another name.")
        sample.member = member
        if truncated:
            sample.header = f"its shard was cut off at byte {shard_bytes}, before the image's end"
        elif member.issparse():
            sample.header = "it is stored as a sparse file; make the shard without tar's --sparse"
        else:
            sample.header = read_header(_content(archive, member))
    elif suffix == LABEL_SUFFIX:
        if not truncated:
            sample.label = _label(_content(archive, member).read(), member, shard)
    elif suffix not in SIDECARS:
        sample.others.append(PARTS if suffix.rpartition(".")[2] in IMAGE_SUFFIXES else kind_of(member.name))


def _label(content: bytes, member: tarfile.TarInfo, shard: str) -> int:
    try:
        label = int(content)
    except ValueError:
        label = UNLABELED
    if not 0 <= label <= MAX_LABEL:
        shown = content[:40].decode(errors="replace")
        raise UserError(f"{shard}: {member.name} holds {shown!r}; a label is a number from 0 to {MAX_LABEL}.")
    return label


def _join_labels(images: Sequence[_Sample], others: Sequence[_Sample]) -> None:
    """Give images the labels elsewhere in the shard whose keys are unique."""
    lone = [sample for sample in others if sample.label != UNLABELED]
    if not lone:
        return
    counts = Counter(sample.key for sample in images), Counter(sample.key for sample in lone)
    labels = {sample.key: sample.label for sample in lone}
    for image in images:
        if image.label == UNLABELED and [count[image.key] for count in counts] == [1, 1]:
            image.label = labels[image.key]


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None, "only regular files have samples"
    return content
