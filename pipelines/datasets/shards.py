"""Which images lie in tar shards of WebDataset's layout, where in them, with which labels, and what their headers say.

A shard is a sequence of samples, a sample a run of members with the same name up to the first dot of its last part:
``key.jpg`` and ``key.cls``, the class as digits. Only headers and labels are read.

Two things that the webdataset package does not take for samples are taken here. A name with more dots is a sample of
its own, ``22.05.png`` of the key ``22.05``, unless its run holds a plain ``22.jpg``, or a word lies between the dots as
in ``key.left.jpg``: then it is a part of the sample ``key``. And a label that does not lie beside its image is found by
the key.
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

from pipelines.datasets.folders import (
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
from pipelines.datasets.headers import FOUND, Found, Header, read_header
from pipelines.datasets.images import UNLABELED, Names
from pipelines.errors import UserError

IMAGE_SUFFIXES = frozenset(extension[1:] for extension in EXTENSIONS)
LABEL_SUFFIX = "cls"
SIDECARS = frozenset((LABEL_SUFFIX, "json", "txt"))
"""Suffixes of what is expected beside images."""
PART = re.compile(r"[a-z_][\w-]*")
"""What lies between the dots of ``key.left.jpg``, in small letters."""
PARTS = "image(s) named KEY.PART.jpg, parts of a sample KEY without an image KEY.jpg"
LINKS = "link(s) in shards"
"""Kinds of what is left out, beside those of folders."""
MAX_LABEL = 10**6
"""A larger label is taken for a mistake: the online linear classifier has a row of weights for each class."""


def list_shards(root: Path) -> Listing | None:
    """The shards directly in ``root``, or None where there is none.

    Raises UserError where others are compressed, or images lie beside them.
    """
    watched = {".": stamp(root)}
    names = sorted(entry.name for entry in os.scandir(root) if not is_hidden(entry.name) and _is_tar(entry))
    shards = [name for name in names if name.lower().endswith(".tar")]
    if not shards:
        return None
    for name in names:
        if name.lower().endswith(COMPRESSED_TAR):
            raise UserError(
                f"{root / name} is compressed, so that no image can be read on its own; unpack it to a .tar, or if it "
                f"does not belong to the shards beside it ({shards[0]}), move it elsewhere."
            )
    left_out: Counter[str] = Counter()
    beside = image_files(root, ".", {}, left_out)
    if beside:
        raise UserError(
            f"{root} holds both shards ({shards[0]}) and image files ({beside[0]}); if these were unpacked from the "
            f".tar, move it elsewhere, else put them into folders of their own."
        )
    left_out[".tar"] -= len(shards)
    watched |= {name: stamp(root / name) for name in shards}
    return Listing(
        layout="shards",
        files=Names.of([os.fsencode(name) for name in shards]),
        labels=np.full(len(shards), UNLABELED, np.int64),
        classes=(),
        watched=watched,
        left_out=+left_out,
    )


def _is_tar(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith((".tar", *COMPRESSED_TAR)) and is_regular(entry)


def read_shard(shard: Path) -> Found:
    """The images of a shard in their order, with labels or UNLABELED.

    Of a shard that was cut off, the images before the cut are there, the one in it has a fault, and there is a remark.
    Raises UserError for a file that is no tar archive, a label that is none, or a sample of two images.
    """
    size = shard.stat().st_size
    samples: list[_Sample] = []
    left_out: Counter[str] = Counter()
    try:
        with tarfile.open(shard, "r:") as archive:
            for key, run in _runs(archive, left_out):
                samples += _samples(key, run, archive, shard, size)
            # Not archive.fileobj, which tarfile may have left anywhere.
            with shard.open("rb") as file:
                file.seek(archive.offset)
                whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise UserError(f"{shard} is no uncompressed tar archive ({error}); unpack it or delete it.") from error
    except OSError as error:
        raise UserError(f"{shard} cannot be read ({error.strerror}); make it readable or delete it.") from error
    images = [sample for sample in samples if sample.member is not None]
    others = [sample for sample in samples if sample.member is None]
    _join_labels(images, others)
    keys = {sample.key for sample in images}
    left_out.update(kind for sample in others if sample.key not in keys for kind in sample.others)
    return Found(
        rows=np.array([sample.row(size) for sample in images], FOUND),
        faults={n: sample.header for n, sample in enumerate(images) if isinstance(sample.header, str)},
        remark="" if whole else f"{shard} is cut off: it ends without an end mark, after {len(images)} images",
        left_out=left_out,
    )


def sample_key(name: str) -> tuple[str, str] | None:
    """The key of the sample that a member belongs to, and the member's suffix; None for what is no part of a sample.

    The same split as the webdataset package's: at the first dot of the last part of the path.
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
    """Kinds of the other members, but for sidecars."""

    def row(self, shard_bytes: int) -> tuple[int, int, int, int, int, int, bool, int]:
        """A row of FOUND."""
        assert self.member is not None
        height, width, needs_pillow, turn = (1, 1, True, 1) if isinstance(self.header, str) else self.header
        first = self.member.offset_data
        size = min(self.member.size, max(0, shard_bytes - first))
        return first, size, 0, height, width, self.label, needs_pillow, turn


_Run = list[tuple[tarfile.TarInfo, str]]
"""Members of the same key, with their suffixes."""


def _runs(archive: tarfile.TarFile, left_out: Counter[str]) -> Iterator[tuple[str, _Run]]:
    """Runs of members, as the webdataset package makes samples of them; ``left_out`` counts what is in none."""
    key, run = "", _Run()
    for member in _members(archive):
        parts = sample_key(member.name)
        if any(is_hidden(part) for part in member.name.split("/") if part not in ("", ".", "..")):
            left_out[HIDDEN] += 1
        elif not member.isreg():
            left_out[LINKS] += kind_of(member.name) in EXTENSIONS
        elif parts is None:
            left_out[kind_of(member.name)] += re.match("__[^/]*__", member.name) is None
        else:
            if parts[0] != key:
                yield key, run
                key, run = parts[0], []
            run.append((member, parts[1]))
    yield key, run
    for kind in [kind for kind, count in left_out.items() if not count]:
        del left_out[kind]


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive but folders, until it ends or is cut off."""
    while True:
        try:
            member = archive.next()
        except tarfile.ReadError:
            return
        if member is None:
            return
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile remembers all members otherwise
        if not member.isdir():
            yield member


def _samples(key: str, run: _Run, archive: tarfile.TarFile, shard: Path, shard_bytes: int) -> Iterator[_Sample]:
    """What a run holds: the sample ``key``, or samples with dots in their keys."""
    plain = any(suffix in IMAGE_SUFFIXES for _, suffix in run)
    samples: dict[str, _Sample] = {}
    for member, suffix in run:
        between, dot, last = suffix.rpartition(".")
        own_key, own_suffix = key, suffix
        if dot and not plain and not PART.fullmatch(between):
            own_key, own_suffix = member.name.rpartition(".")[0], last
        sample = samples.setdefault(own_key, _Sample(key=own_key))
        _add(sample, member, own_suffix, archive, shard, shard_bytes)
    yield from samples.values()


def _add(
    sample: _Sample, member: tarfile.TarInfo, suffix: str, archive: tarfile.TarFile, shard: Path, shard_bytes: int
) -> None:
    """Enter a member into its sample."""
    cut = member.offset_data + member.size > shard_bytes
    if suffix in IMAGE_SUFFIXES:
        if sample.member is not None:
            raise UserError(f"{shard} holds two images of the name {sample.key}; give each image a name of its own.")
        sample.member = member
        if cut:
            sample.header = f"its shard was cut off at byte {shard_bytes}, before the image's end"
        elif member.issparse():
            sample.header = "it is stored without its zeros; make the shard without tar's --sparse"
        else:
            sample.header = read_header(_content(archive, member))
    elif suffix == LABEL_SUFFIX:
        if not cut:
            sample.label = _label(_content(archive, member).read(), member, shard)
    elif suffix not in SIDECARS:
        sample.others.append(PARTS if suffix.rpartition(".")[2] in IMAGE_SUFFIXES else kind_of(member.name))


def _label(content: bytes, member: tarfile.TarInfo, shard: Path) -> int:
    try:
        label = int(content)
    except ValueError:
        label = UNLABELED
    if not 0 <= label <= MAX_LABEL:
        shown = content[:40].decode(errors="replace")
        raise UserError(f"{shard}: {member.name} holds {shown!r}; a label is a number from 0 to {MAX_LABEL}.")
    return label


def _join_labels(images: Sequence[_Sample], others: Sequence[_Sample]) -> None:
    """Give images the labels that lie elsewhere in the shard, where their keys leave no doubt."""
    lone = [sample for sample in others if sample.label != UNLABELED]
    if not lone:
        return
    times = Counter(sample.key for sample in images), Counter(sample.key for sample in lone)
    labels = {sample.key: sample.label for sample in lone}
    for image in images:
        if image.label == UNLABELED and [count[image.key] for count in times] == [1, 1]:
            image.label = labels[image.key]


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None, "only regular files are asked for"
    return content
