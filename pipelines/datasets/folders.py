"""Which image files lie below a folder, one folder a class or without labels, and what their headers say."""

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

from pipelines.datasets.headers import FOUND, Found, Header, read_header, reason
from pipelines.datasets.images import UNLABELED, Names
from pipelines.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".jfif", ".jpe")
"""What torchvision's ImageFolder takes for an image, and two more names of JPEG files, which it leaves out."""
COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
ARCHIVES = (*COMPRESSED_TAR, ".zip", ".7z", ".rar")
SYSTEM = frozenset(
    {
        "#recycle",
        "$recycle.bin",
        "@eadir",
        "__macosx",
        "desktop.ini",
        "ehthumbs.db",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)
"""Files and folders, in small letters, that systems leave among others and that do not begin with a dot."""

HIDDEN = "hidden"
SPECIAL = "special file(s)"
BROKEN = "broken link(s)"
AGAIN = "link(s) to a folder that is listed already"
OUTSIDE = "image(s) outside class folders"
UNNAMED = "without a usual suffix"
"""Kinds of what is left out, beside suffixes."""
KINDS_SHOWN = 10

Layout = Literal["class folders", "loose images", "shards"]
Stamp = tuple[int, int]
"""When a file or directory was changed, in ns, and a file's size: another stamp, another content."""
MISSING: Stamp = (0, -1)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies below a root, before any image is looked at."""

    layout: Layout
    files: Names
    """Image files or shards, relative to the root."""
    labels: NDArray[np.int64]
    """[files] int64; of shards, whose labels lie inside, UNLABELED."""
    classes: tuple[str, ...]
    watched: dict[str, Stamp]
    """What tells that the listing is out of date: directories and shards relative to the root."""
    left_out: Mapping[str, int]
    """How many files and folders are none of these, by kind."""


def list_class_folders(root: Path) -> Listing:
    """Images, classes and labels in the order of torchvision's ImageFolder, without what is hidden.

    Raises UserError where there is no class, or an empty one.
    """
    left_out: Counter[str] = Counter()
    watched = {".": stamp(root)}
    above = _folders_above(root) | {_identity(root.stat())}
    classes = []
    for entry in os.scandir(root):
        if is_hidden(entry.name):
            left_out[HIDDEN] += 1
        elif not _is_folder(entry):
            kind = OUTSIDE if entry.name.lower().endswith(EXTENSIONS) else _kind_of_entry(entry)
            left_out[kind] += 1
            if kind == BROKEN:
                watched[entry.name] = MISSING
        elif entry.is_symlink() and _identity(entry.stat()) in above:
            left_out[AGAIN] += 1
        else:
            classes.append(entry.name)
    if not classes:
        _check_archives(root)
        raise UserError(
            f"{root} holds neither class folders nor shards (*.tar){_but(left_out)}; put each class's images into a "
            f"folder of its own."
        )
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(sorted(classes)):
        of_class = Counter[str]()
        images = image_files(root, name, watched, of_class)
        if not images:
            raise UserError(
                f"{root / name} holds no image ({', '.join(EXTENSIONS)}){_but(of_class)}; fill it or delete the folder."
            )
        names += images
        labels += [label] * len(images)
        left_out += of_class
    return Listing(
        layout="class folders",
        files=Names.of([os.fsencode(name) for name in names]),
        labels=np.array(labels, np.int64),
        classes=tuple(sorted(classes)),
        watched=watched,
        left_out=left_out,
    )


def list_loose_images(root: Path) -> Listing:
    """All images anywhere below ``root``, without labels. Raises UserError where there is none."""
    watched: dict[str, Stamp] = {}
    left_out: Counter[str] = Counter()
    names = image_files(root, ".", watched, left_out)
    if not names:
        _check_archives(root)
        raise UserError(
            f"{root} holds neither images ({', '.join(EXTENSIONS)}) nor shards (*.tar){_but(left_out)}; convert images "
            f"of other kinds, say to .png, or name another folder."
        )
    return Listing(
        layout="loose images",
        files=Names.of([os.fsencode(name) for name in names]),
        labels=np.full(len(names), UNLABELED, np.int64),
        classes=(),
        watched=watched,
        left_out=left_out,
    )


def image_files(root: Path, top: str, watched: dict[str, Stamp], left_out: Counter[str]) -> list[str]:
    """Names relative to ``root`` of the images in and below ``top``, in ImageFolder's order.

    Links are followed, but each folder is listed once, by the path without links where it has one, and nothing that is
    hidden is listed. ``watched`` receives the directories where images were looked for, and broken links; ``left_out``
    counts what is no image, by kind. Raises UserError where a directory cannot be read.
    """
    seen = _folders_above(root) if top == "." else _folders_above(root) | {_identity(root.stat())}
    found: list[tuple[str, list[str]]] = []
    folders, links = [top], list[str]()
    while folders or links:
        # What lies in the tree comes before what is linked: a link to another part of it adds nothing.
        if not folders:
            links.sort(reverse=True)
        relative = folders.pop() if folders else links.pop()
        try:
            # Stamped before it is listed: what is added in between is noticed the next time.
            status = (root / relative).stat()
            if _identity(status) in seen:
                left_out[AGAIN] += 1
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
                left_out[HIDDEN] += 1
            elif _is_folder(entry):
                (links if entry.is_symlink() else folders).append(prefix + entry.name)
            elif entry.name.lower().endswith(EXTENSIONS) and not _is_special(entry):
                names.append(entry.name)
            else:
                kind = _kind_of_entry(entry)
                left_out[kind] += 1
                if kind == BROKEN:
                    watched[prefix + entry.name] = MISSING
        found.append((prefix.removesuffix("/"), [prefix + name for name in sorted(names)]))
    return [name for _, names in sorted(found) for name in names]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left by a system among others."""
    return name.startswith((".", "PaxHeader")) or name.lower() in SYSTEM


def kind_of(name: str) -> str:
    """The kind of a file that is no image: its suffix in small letters."""
    suffix = re.search(r"(\.tar)?\.[a-z0-9_~]{1,12}$", name.lower())
    return suffix[0] if suffix else UNNAMED


def counted(left_out: Mapping[str, int]) -> str:
    """How many there are of the commonest kinds, as in ``8 .heic, 3 hidden``."""
    by_count = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {kind}" for kind, count in by_count[:KINDS_SHOWN]]
    if others := sum(count for _, count in by_count[KINDS_SHOWN:]):
        parts.append(f"{others} of other kinds")
    return ", ".join(parts)


def _but(left_out: Mapping[str, int]) -> str:
    return f", but {counted(left_out)}" if left_out else ""


def _check_archives(root: Path) -> None:
    """Raise UserError where an archive lies in a folder that holds nothing else of use."""
    for name in sorted(entry.name for entry in os.scandir(root)):
        if name.lower().endswith(ARCHIVES) and not is_hidden(name):
            raise UserError(f"{root / name} is a compressed archive, from which no image can be read; unpack it.")


def _folders_above(root: Path) -> set[tuple[int, int]]:
    """A link to one of these leads back to the root."""
    return {_identity(folder.stat()) for folder in root.resolve().parents}


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one, mostly from what listing found out already."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_regular(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file that can be read to its end, or a link to one."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether an entry, or what it links to, is a pipe, socket or device, which would be waited for or never ends."""
    # A broken link stays an image, a bad one: its target may be on a disk that is missing.
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
    """The stamp of a file or directory, also of one that is not there."""
    try:
        return _stamp_of(path.stat())
    except OSError:
        return MISSING


def _stamp_of(status: os.stat_result) -> Stamp:
    # What a file system calls the size of a directory means nothing.
    return status.st_mtime_ns, 0 if S_ISDIR(status.st_mode) else status.st_size


def read_files(root: Path, names: Sequence[bytes]) -> Found:
    """What the headers of files say that are an image each."""
    prefix = os.path.join(os.fsencode(root), b"")  # noqa: PTH118 - paths as bytes
    rows, faults = [], {}
    for n, name in enumerate(names):
        size_bytes = changed_ns = 0
        header: Header | str
        try:
            with open(prefix + name, "rb") as file:  # noqa: PTH123
                status = os.fstat(file.fileno())
                size_bytes, changed_ns = status.st_size, status.st_mtime_ns
                header = read_header(file)
        except OSError as error:
            header = reason(error)
        if isinstance(header, str):
            faults[n] = header
            header = 1, 1, True, 1
        height, width, needs_pillow, orientation = header
        rows.append((0, size_bytes, changed_ns, height, width, UNLABELED, needs_pillow, orientation))
    return Found(rows=np.array(rows, FOUND), faults=faults)
