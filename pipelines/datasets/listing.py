"""Image files below a folder, in class folders or without labels, and the scan of their headers."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.headers import ROW_DTYPE, ScanResult, read_header, reason, row_of
from pipelines.datasets.images import UNLABELED, ImageFiles, Names
from pipelines.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".jfif", ".jpe")
"""Those of torchvision's ImageFolder, and two more of JPEG files."""
COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
ARCHIVES = (*COMPRESSED_TAR, ".zip", ".7z", ".rar")
SYSTEM = frozenset(("#recycle", "$recycle.bin", "@eadir", "__macosx", "desktop.ini", "ehthumbs.db", "lost+found",
                    "system volume information", "thumbs.db"))  # fmt: skip
"""Lower-case names of files and folders that operating systems create, apart from those that begin with a dot."""

HIDDEN = "hidden"
SPECIAL = "special file(s)"
BROKEN = "broken link(s)"
LISTED_TWICE = "link(s) to a folder that is listed already"
OUTSIDE = "image(s) outside class folders"
NO_SUFFIX = "without a usual suffix"
"""Kinds of skipped files, besides suffixes."""
KINDS_SHOWN = 10

Layout = Literal["class folders", "loose images", "shards", "Parquet"]
Stamp = tuple[int, int]
"""When a file or directory was changed, in ns, and a file's size in bytes; it changes with the content."""
MISSING: Stamp = (0, -1)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files below a root, before any is opened."""

    layout: Layout
    files: Names
    """Image files or shards, relative to the root; a Parquet file once for each of its row groups."""
    labels: NDArray[np.int64]
    """[files] int64; UNLABELED for shards, which hold their labels."""
    classes: tuple[str, ...]
    watched: dict[str, Stamp]
    """Stamps of directories and shards, relative to the root: if one changes, the listing is outdated."""
    skipped: Mapping[str, int]
    """How many files and folders are not listed, by kind."""

    @property
    def in_shards(self) -> bool:
        """Whether a file, or each of its row groups, holds many images with their labels."""
        return self.layout in ("shards", "Parquet")


def list_class_folders(root: Path) -> Listing:
    """Images, classes and labels in the order of torchvision's ImageFolder, without hidden files.

    Raises UserError if there is no class, or an empty one.
    """
    skipped: Counter[str] = Counter()
    watched = {".": stamp(root)}
    above = _folders_above(root) | {_identity(root.stat())}
    classes = []
    for entry in os.scandir(root):
        if is_hidden(entry.name):
            skipped[HIDDEN] += 1
        elif not _is_folder(entry):
            kind = OUTSIDE if entry.name.lower().endswith(EXTENSIONS) else _kind_of_entry(entry)
            skipped[kind] += 1
            if kind == BROKEN:
                watched[entry.name] = MISSING
        elif entry.is_symlink() and _identity(entry.stat()) in above:
            skipped[LISTED_TWICE] += 1
        else:
            classes.append(entry.name)
    if not classes:
        _check_archives(root)
        raise UserError(
            f"{root} holds neither class folders nor shards (*.tar, *.parquet){_but(skipped)}; make a folder for "
            f"each class's images."
        )
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(sorted(classes)):
        skipped_in_class = Counter[str]()
        images = image_files(root, name, watched, skipped_in_class)
        if not images:
            raise UserError(
                f"{root / name} holds no image ({', '.join(EXTENSIONS)}){_but(skipped_in_class)}; fill it or "
                f"delete the folder."
            )
        names += images
        labels += [label] * len(images)
        skipped += skipped_in_class
    return Listing(
        layout="class folders",
        files=Names.of([os.fsencode(name) for name in names]),
        labels=np.array(labels, np.int64),
        classes=tuple(sorted(classes)),
        watched=watched,
        skipped=skipped,
    )


def list_loose_images(root: Path) -> Listing:
    """All images anywhere below ``root``, without labels. Raises UserError if there is none."""
    watched: dict[str, Stamp] = {}
    skipped: Counter[str] = Counter()
    names = image_files(root, ".", watched, skipped)
    if not names:
        _check_archives(root)
        raise UserError(
            f"{root} holds neither images ({', '.join(EXTENSIONS)}) nor shards (*.tar, *.parquet){_but(skipped)}; "
            f"convert images of other formats, for example to .png, or name another folder."
        )
    return Listing(
        layout="loose images",
        files=Names.of([os.fsencode(name) for name in names]),
        labels=np.full(len(names), UNLABELED, np.int64),
        classes=(),
        watched=watched,
        skipped=skipped,
    )


def image_files(root: Path, top: str, watched: dict[str, Stamp], skipped: Counter[str]) -> list[str]:
    """Names relative to ``root`` of the images in and below ``top``, in ImageFolder's order.

    Links are followed, but each folder is listed once, by its path without links if it has one. Hidden files are
    skipped. Adds the listed directories and broken links to ``watched``, and counts other files in ``skipped`` by kind.
    Raises UserError if a directory cannot be read.
    """
    seen = _folders_above(root) if top == "." else _folders_above(root) | {_identity(root.stat())}
    names_by_folder: list[tuple[str, list[str]]] = []
    folders, links = [top], list[str]()
    while folders or links:
        # Folders come before links, so that a folder below the root is listed by its path without links.
        if not folders:
            links.sort(reverse=True)
        relative = folders.pop() if folders else links.pop()
        try:
            # Stamped before it is listed, so that a file added in between makes the listing outdated.
            status = (root / relative).stat()
            if _identity(status) in seen:
                skipped[LISTED_TWICE] += 1
                continue
            with os.scandir(root / relative) as scan:
                entries = list(scan)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be listed ({error.strerror}); make it readable or delete it."
            ) from error
        seen.add(_identity(status))
        watched[relative] = _stamp_of(status)
        prefix = "" if relative == "." else f"{relative}/"
        names = []
        for entry in entries:
            if is_hidden(entry.name):
                skipped[HIDDEN] += 1
            elif _is_folder(entry):
                (links if entry.is_symlink() else folders).append(prefix + entry.name)
            elif entry.name.lower().endswith(EXTENSIONS) and not _is_special(entry):
                names.append(entry.name)
            else:
                kind = _kind_of_entry(entry)
                skipped[kind] += 1
                if kind == BROKEN:
                    watched[prefix + entry.name] = MISSING
        names_by_folder.append((prefix.removesuffix("/"), [prefix + name for name in sorted(names)]))
    return [name for _, names in sorted(names_by_folder) for name in names]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or created by an operating system."""
    return name.startswith((".", "PaxHeader")) or name.lower() in SYSTEM


def kind_of(name: str) -> str:
    """The kind of a file that is no image: its suffix in lower case, or NO_SUFFIX."""
    suffix = re.search(r"(\.tar)?\.[a-z0-9_~]{1,12}$", name.lower())
    return suffix[0] if suffix else NO_SUFFIX


def format_counts(skipped: Mapping[str, int]) -> str:
    """The counts of the most frequent kinds, such as ``8 .heic, 3 hidden``."""
    by_count = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {kind}" for kind, count in by_count[:KINDS_SHOWN]]
    if others := sum(count for _, count in by_count[KINDS_SHOWN:]):
        parts.append(f"{others} of other kinds")
    return ", ".join(parts)


def _but(skipped: Mapping[str, int]) -> str:
    return f", but {format_counts(skipped)}" if skipped else ""


def _check_archives(root: Path) -> None:
    """Raise UserError if there is an archive in a folder without images."""
    for name in sorted(entry.name for entry in os.scandir(root)):
        if name.lower().endswith(ARCHIVES) and not is_hidden(name):
            raise UserError(f"{root / name} is a compressed archive, which cannot be read; unpack it.")


def _folders_above(root: Path) -> set[tuple[int, int]]:
    """Identities of the folders that hold the root; a link to one of them makes a loop."""
    return {_identity(folder.stat()) for folder in root.resolve().parents}


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False


def is_regular(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file or a link to one."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a pipe, socket or device, or a link to one; reading it could block or never end."""
    # A broken link is listed as a bad image, as its target may be on a disk that is not mounted.
    return not is_regular(entry) and _exists(entry)


def _exists(entry: os.DirEntry[str]) -> bool:
    try:
        return bool(entry.stat())
    except OSError:
        return False


def _kind_of_entry(entry: os.DirEntry[str]) -> str:
    if _is_special(entry):
        return SPECIAL
    return BROKEN if entry.is_symlink() and not _exists(entry) else kind_of(entry.name)


def stamp(path: Path) -> Stamp:
    """The stamp of a file or directory; MISSING if there is none."""
    try:
        return _stamp_of(path.stat())
    except OSError:
        return MISSING


def stamp_of_image(images: ImageFiles, image_id: int) -> Stamp:
    """The stamp of the file or shard that holds an image; of a remote shard, as it was listed."""
    if images.shards is not None:
        return images.shards.shards[images.file_name(image_id)].stamp
    return stamp(images.path(image_id))


def _stamp_of(status: os.stat_result) -> Stamp:
    # The size of a directory depends on the file system.
    return status.st_mtime_ns, 0 if S_ISDIR(status.st_mode) else status.st_size


def read_files(root: Path, names: Sequence[bytes]) -> ScanResult:
    """Scan the headers of image files ``names`` below ``root``."""
    prefix = os.path.join(os.fsencode(root), b"")  # noqa: PTH118 - paths as bytes
    rows, faults = [], {}
    for n, name in enumerate(names):
        size_bytes = changed_ns = 0
        try:
            with open(prefix + name, "rb") as file:  # noqa: PTH123
                status = os.fstat(file.fileno())
                size_bytes, changed_ns = status.st_size, status.st_mtime_ns
                header = read_header(file)
        except OSError as error:
            header = reason(error)
        if isinstance(header, str):
            faults[n] = header
        rows.append(row_of(header, size_bytes=size_bytes, changed_ns=changed_ns, label=UNLABELED))
    return ScanResult(rows=np.array(rows, ROW_DTYPE), faults=faults)
