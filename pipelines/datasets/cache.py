"""Indexes on disk: those of whole splits, and what an interrupted pass over the images has found out so far."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.folders import Layout, Listing, Stamp, stamp
from pipelines.datasets.headers import FOUND, Found
from pipelines.datasets.images import ImageFiles, Names

CACHE_VERSION = 3
"""Another one, another content: also where DALI_DECODES changes."""
ARRAYS = ("file_of", "offset", "size_bytes", "sizes", "labels", "needs_pillow", "orientation")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The index of a split."""

    images: ImageFiles
    classes: tuple[str, ...]
    """Class folders' names; of labeled shards, the numbers up to the largest label; else none."""
    layout: Layout
    remarks: tuple[str, ...]
    """What a person should know about shards."""
    left_out: Mapping[str, int]
    """How many files, or members of shards, are no images of the split, by kind."""
    watched: dict[str, Stamp]
    """What tells that the index is out of date: directories, shards, and files with a fault."""
    changed_ns: NDArray[np.int64]
    """[N] int64: when the file of each image was changed; 0 in shards."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stec"


def cache_file(root: Path, kind: str) -> Path:
    """Where the index of ``root``, read as a split of such a kind, is kept."""
    known = hashlib.sha256(f"{kind} {root.resolve()}".encode(errors="surrogateescape"))
    return cache_folder() / f"{known.hexdigest()[:24]}.npz"


def read_cache(file: Path, root: Path) -> Split | None:
    """The index in ``file``, or None where there is none of ``root``, or something has changed since."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if (about["version"], about["root"]) != (CACHE_VERSION, str(root.resolve())):
                return None
            watched = {name: (int(changed), int(size)) for name, (changed, size) in about["watched"].items()}
            if any(stamp(root / name) != before for name, before in watched.items()):
                return None
            images = ImageFiles(
                root=root,
                files=Names(blob=arrays["blob"], offsets=arrays["offsets"]),
                faults={int(image_id): fault for image_id, fault in about["faults"].items()},
                **{name: arrays[name] for name in ARRAYS},
            )
            return Split(
                images=images,
                classes=tuple(about["classes"]),
                layout=about["layout"],
                remarks=tuple(about["remarks"]),
                left_out={kind: int(count) for kind, count in about["left_out"].items()},
                watched=watched,
                changed_ns=arrays["changed_ns"],
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        return None


def write_cache(file: Path, split: Split) -> bool:
    """Keep an index. Returns whether it could be written: it is done without."""
    images = split.images
    about = {
        "version": CACHE_VERSION,
        "root": str(images.root.resolve()),
        "classes": split.classes,
        "layout": split.layout,
        "remarks": split.remarks,
        "left_out": split.left_out,
        "watched": split.watched,
        "faults": images.faults,
    }
    return write_arrays(
        file,
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
        blob=images.files.blob,
        offsets=images.files.offsets,
        changed_ns=split.changed_ns,
        **{name: getattr(images, name) for name in ARRAYS},
    )


def write_arrays(file: Path, **arrays: NDArray[Any]) -> bool:
    """Write arrays to a temporary name and rename it. Returns whether that could be done."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
        temporary.replace(file)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        return False
    return True


class Partial:
    """What a pass has found out so far, chunk by chunk, in a file that only grows.

    Each line holds a checksum and JSON; the first says which listing the pass goes through. What follows a line that is
    not whole, or a first line about another listing, is forgotten. Where the file cannot be written it is done without.
    """

    def __init__(self, file: Path, root: Path, listing: Listing) -> None:
        self.path = file
        self.done: dict[int, Found] = {}
        self._file: IO[bytes] | None = None
        about = _fingerprint(root, listing)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("a+b")
            self._file.seek(0)
            kept = 0
            for n, line in enumerate(self._file):
                value = _value(line)
                if value is None or (n == 0 and value != about):
                    break
                if n > 0:
                    self._take(value)
                kept += len(line)
            self._file.truncate(kept)
            if kept == 0:
                self._append(about)
        except OSError:
            self._file = None

    def add(self, chunk: int, found: Found) -> None:
        self.done[chunk] = found
        self._append([chunk, found.rows.tolist(), dict(found.faults), found.remark, dict(found.left_out)])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def delete(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def _take(self, value: Any) -> None:
        chunk, rows, faults, remark, left_out = value
        self.done[chunk] = Found(
            rows=np.array([tuple(row) for row in rows], FOUND),
            faults={int(n): fault for n, fault in faults.items()},
            remark=remark,
            left_out=left_out,
        )

    def _append(self, value: Any) -> None:
        if self._file is not None:
            body = json.dumps(value).encode()
            try:
                self._file.write(b"%08x %s\n" % (zlib.crc32(body), body))
                self._file.flush()
            except OSError:
                self._file = None


def _value(line: bytes) -> Any:
    """What a line holds, or None where it is not whole."""
    checksum, _, body = line.removesuffix(b"\n").partition(b" ")
    whole = line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(body)
    return json.loads(body) if whole else None


def _fingerprint(root: Path, listing: Listing) -> str:
    known = hashlib.sha256(listing.files.blob.tobytes())
    known.update(listing.files.offsets.tobytes())
    known.update(json.dumps([CACHE_VERSION, str(root.resolve()), listing.layout, listing.watched]).encode())
    return known.hexdigest()
