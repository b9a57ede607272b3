"""Which images lie in tar shards of WebDataset's layout, where in them, with which labels, and what their headers say.

A shard is a sequence of samples, a sample a run of members with the same name up to the first dot of its last part:
``key.jpg`` and ``key.cls``, the class as digits. Only headers and labels are read.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from pipelines.folders import EXTENSIONS, Listing, image_files, stamp
from pipelines.headers import FOUND, Found, read_header
from pipelines.images import UNLABELLED, Names
from stec.errors import UserError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
IMAGE_SUFFIXES = frozenset(extension[1:] for extension in EXTENSIONS)
MAX_LABEL = 10**6
"""A larger label is taken for a mistake: the probe has a row of weights for each class."""


def list_shards(root: Path) -> Listing | None:
    """The shards directly in ``root``, or None where there is none.

    Raises UserError where shards are compressed, or images lie beside them.
    """
    watched = {".": stamp(root)}
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_file())
    for name in names:
        if name.lower().endswith(COMPRESSED):
            raise UserError(
                f"{root / name} is compressed, so that no image can be read on its own; unpack it to a .tar."
            )
    shards = [name for name in names if name.endswith(".tar")]
    if not shards:
        return None
    beside = image_files(root, ".", {})
    if beside:
        raise UserError(
            f"{root} holds both shards ({shards[0]}) and image files ({beside[0]}); put them into folders of their own."
        )
    watched |= {name: stamp(root / name) for name in shards}
    return Listing(
        layout="shards",
        files=Names.of([os.fsencode(name) for name in shards]),
        labels=np.full(len(shards), UNLABELLED, np.int64),
        classes=(),
        watched=watched,
    )


def read_shard(shard: Path) -> Found:
    """The images of a shard in their order, with labels or UNLABELLED.

    Of a shard that was cut off, the images before the cut are there, the one in it has a fault, and there is a remark.
    Raises UserError for a file that is no tar archive, a label that is none, or a sample of two images.
    """
    size = shard.stat().st_size
    samples: list[_Sample] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in _members(archive):
                _add(samples, archive, member, shard, size)
            # Not archive.fileobj, which tarfile may have left anywhere.
            with shard.open("rb") as file:
                file.seek(archive.offset)
                whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise UserError(f"{shard} is no uncompressed tar archive ({error}); unpack it or delete it.") from error
    except OSError as error:
        raise UserError(f"{shard} cannot be read ({error.strerror}); make it readable or delete it.") from error
    images = [sample for sample in samples if sample.member is not None]
    return Found(
        rows=np.array([sample.row(size) for sample in images], FOUND),
        faults={n: sample.header for n, sample in enumerate(images) if isinstance(sample.header, str)},
        remark="" if whole else f"{shard} is cut off: it ends without an end mark, after {len(images)} images",
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
    header: tuple[int, int, bool] | str = ""
    label: int = UNLABELLED

    def row(self, shard_bytes: int) -> tuple[int, int, int, int, int, int, bool]:
        """A row of FOUND."""
        assert self.member is not None
        height, width, needs_pillow = (1, 1, True) if isinstance(self.header, str) else self.header
        first = self.member.offset_data
        size_bytes = min(self.member.size, max(0, shard_bytes - first))
        return first, size_bytes, 0, height, width, self.label, needs_pillow


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files in an archive, until it ends or is cut off."""
    while True:
        try:
            member = archive.next()
        except tarfile.ReadError:
            return
        if member is None:
            return
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile remembers all members otherwise
        if member.isreg():
            yield member


def _add(
    samples: list[_Sample], archive: tarfile.TarFile, member: tarfile.TarInfo, shard: Path, shard_bytes: int
) -> None:
    """Enter a member into the last sample, or into a new one."""
    parts = sample_key(member.name)
    if parts is None:
        return
    key, suffix = parts
    if not samples or samples[-1].key != key:
        samples.append(_Sample(key=key))
    sample, cut = samples[-1], member.offset_data + member.size > shard_bytes
    if suffix in IMAGE_SUFFIXES:
        if sample.member is not None:
            raise UserError(f"{shard} holds two images of the name {key}; give each image a name of its own.")
        sample.member = member
        if cut:
            sample.header = f"its shard was cut off at byte {shard_bytes}, before the image's end"
        else:
            sample.header = read_header(_content(archive, member))
    elif suffix == "cls" and not cut:
        text = _content(archive, member).read()
        try:
            sample.label = int(text)
        except ValueError:
            sample.label = UNLABELLED
        if not 0 <= sample.label <= MAX_LABEL:
            shown = text[:40].decode(errors="replace")
            raise UserError(f"{shard}: {member.name} holds {shown!r}; a label is a number from 0 to {MAX_LABEL}.")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None, "only regular files are asked for"
    return content
