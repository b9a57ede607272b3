"""Indexes on disk: complete ones, and partial ones of interrupted scans."""

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

from pipelines.datasets.headers import ROW_DTYPE, ScanResult
from pipelines.datasets.images import PER_IMAGE, ImageFiles, Names
from pipelines.datasets.listing import Layout, Listing, Stamp, stamp
from pipelines.datasets.shard_cache import ShardCache
from pipelines.datasets.urls import RemoteFolder
from pipelines.errors import UserError
from pipelines.files import atomic_write

CACHE_VERSION = 5
"""Increased when the content of an index changes, which it also does with DALI_DECODES."""


@dataclass(frozen=True, kw_only=True)
class SplitIndex:
    """The index of a split of N images."""

    images: ImageFiles
    classes: tuple[str, ...]
    """Names of class folders; of labeled shards, the numbers up to the largest label; else empty."""
    layout: Layout
    notes: tuple[str, ...]
    """Notes on shards for the user."""
    skipped: Mapping[str, int]
    """How many files, or members of shards, are no images of the split, by kind."""
    watched: dict[str, Stamp]
    """Stamps of directories, shards and files with a fault: if one changes, the index is outdated."""
    changed_ns: NDArray[np.int64]
    """[N] int64: when the file of each image was changed; 0 in shards."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stec"


def place(root: Path | RemoteFolder) -> str:
    """The folder or URL ``root``, however it is written."""
    return root.url.rstrip("/") if isinstance(root, RemoteFolder) else str(root.resolve())


def cache_file(root: Path | RemoteFolder, kind: str) -> Path:
    """The file for the index of ``root`` when it is read as ``kind``."""
    digest = hashlib.sha256(f"{kind} {place(root)}".encode(errors="surrogateescape"))
    return cache_folder() / f"{digest.hexdigest()[:24]}.npz"


def read_cache(file: Path, root: Path, shards: ShardCache | None = None) -> SplitIndex | None:
    """The index in ``file``, or None if there is none of ``root``, or of the remote ``shards``, or it is outdated."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if (about["version"], about["root"]) != (CACHE_VERSION, place(shards.remote if shards else root)):
                return None
            watched = {name: (int(changed), int(size)) for name, (changed, size) in about["watched"].items()}
            if shards is not None:
                outdated = watched != {name: shard.stamp for name, shard in shards.shards.items()}
            else:
                outdated = any(stamp(root / name) != before for name, before in watched.items())
            if outdated:
                return None
            images = ImageFiles(
                root=root,
                files=Names(blob=arrays["blob"], offsets=arrays["offsets"]),
                faults={int(image_id): fault for image_id, fault in about["faults"].items()},
                shards=shards,
                **{name: arrays[name] for name in PER_IMAGE},
            )
            return SplitIndex(
                images=images,
                classes=tuple(about["classes"]),
                layout=about["layout"],
                notes=tuple(about["notes"]),
                skipped={kind: int(count) for kind, count in about["skipped"].items()},
                watched=watched,
                changed_ns=arrays["changed_ns"],
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        return None


def write_cache(file: Path, index: SplitIndex) -> bool:
    """Write an index. Returns whether that succeeded; the cache is optional."""
    images = index.images
    about = {
        "version": CACHE_VERSION,
        "root": place(images.shards.remote if images.shards else images.root),
        "classes": index.classes,
        "layout": index.layout,
        "notes": index.notes,
        "skipped": index.skipped,
        "watched": index.watched,
        "faults": images.faults,
    }
    return write_arrays(
        file,
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
        blob=images.files.blob,
        offsets=images.files.offsets,
        changed_ns=index.changed_ns,
        **{name: getattr(images, name) for name in PER_IMAGE},
    )


def write_arrays(file: Path, **arrays: NDArray[Any]) -> bool:
    """Write arrays under a temporary name, then rename the file. Returns whether that succeeded."""
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


def keep(file: Path, content: bytes) -> None:
    """Write a file that can be made again, if it can be written."""
    with suppress(OSError, UserError):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, content)


class PartialIndex:
    """The results of a scan so far, by chunk, in a file that lines are appended to.

    Each line holds a checksum and JSON; the first identifies the listing that is scanned. Lines after an incomplete
    line, or after a first line of another listing, are discarded. If the file cannot be written, the scan goes on
    without it.
    """

    def __init__(self, file: Path, root: Path | RemoteFolder, listing: Listing) -> None:
        self.path = file
        self.done: dict[int, ScanResult] = {}
        self._file: IO[bytes] | None = None
        about = _fingerprint(root, listing)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("a+b")
            self._file.seek(0)
            valid_bytes = 0
            for n, line in enumerate(self._file):
                value = _parse(line)
                if value is None or (n == 0 and value != about):
                    break
                if n > 0:
                    self._restore(value)
                valid_bytes += len(line)
            self._file.truncate(valid_bytes)
            if valid_bytes == 0:
                self._append(about)
        except OSError:
            self._file = None

    def add(self, chunk: int, result: ScanResult) -> None:
        self.done[chunk] = result
        self._append([chunk, result.rows.tolist(), dict(result.faults), result.note, dict(result.skipped)])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def delete(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def _restore(self, value: Any) -> None:
        chunk, rows, faults, note, skipped = value
        self.done[chunk] = ScanResult(
            rows=np.array([tuple(row) for row in rows], ROW_DTYPE),
            faults={int(n): fault for n, fault in faults.items()},
            note=note,
            skipped=skipped,
        )

    def _append(self, value: Any) -> None:
        if self._file is not None:
            body = json.dumps(value).encode()
            try:
                self._file.write(b"%08x %s\n" % (zlib.crc32(body), body))
                self._file.flush()
            except OSError:
                self._file = None


def _parse(line: bytes) -> Any:
    """The value in a line, or None if the line is incomplete."""
    checksum, _, body = line.removesuffix(b"\n").partition(b" ")
    complete = line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(body)
    return json.loads(body) if complete else None


def _fingerprint(root: Path | RemoteFolder, listing: Listing) -> str:
    digest = hashlib.sha256(listing.files.blob.tobytes())
    digest.update(listing.files.offsets.tobytes())
    digest.update(json.dumps([CACHE_VERSION, place(root), listing.layout, listing.watched]).encode())
    return digest.hexdigest()
