"""Which image files lie below a folder, one folder a class or without labels, and what their headers say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.headers import FOUND, Found, read_header, reason
from pipelines.images import UNLABELLED, Names
from stec.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What torchvision's ImageFolder takes for an image."""

Layout = Literal["class folders", "loose images", "shards"]
Stamp = tuple[int, int]
"""When a file or directory was changed, in ns, and a file's size: another stamp, another content."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies below a root, before any image is looked at."""

    layout: Layout
    files: Names
    """Image files or shards, relative to the root."""
    labels: NDArray[np.int64]
    """[files] int64; of shards, whose labels lie inside, UNLABELLED."""
    classes: tuple[str, ...]
    watched: dict[str, Stamp]
    """What tells that the listing is out of date: directories and shards relative to the root."""


def list_class_folders(root: Path) -> Listing:
    """Images, classes and labels in the order of torchvision's ImageFolder.

    Raises UserError where there is no class, or an empty one. Files with other names are left alone.
    """
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
    if not classes:
        raise UserError(
            f"{root} holds neither class folders nor shards (*.tar); put each class's images into a folder of its own."
        )
    watched = {".": stamp(root)}
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        of_class = image_files(root, name, watched)
        if not of_class:
            raise UserError(f"{root / name} holds no image ({', '.join(EXTENSIONS)}); fill it or delete the folder.")
        names += of_class
        labels += [label] * len(of_class)
    return Listing(
        layout="class folders",
        files=Names.of([os.fsencode(name) for name in names]),
        labels=np.array(labels, np.int64),
        classes=classes,
        watched=watched,
    )


def list_loose_images(root: Path) -> Listing:
    """All images anywhere below ``root``, without labels. Raises UserError where there is none."""
    watched: dict[str, Stamp] = {}
    names = image_files(root, ".", watched)
    if not names:
        raise UserError(
            f"{root} holds neither images ({', '.join(EXTENSIONS)}) nor shards (*.tar); name another folder."
        )
    return Listing(
        layout="loose images",
        files=Names.of([os.fsencode(name) for name in names]),
        labels=np.full(len(names), UNLABELLED, np.int64),
        classes=(),
        watched=watched,
    )


def image_files(root: Path, top: str, watched: dict[str, Stamp]) -> list[str]:
    """Names relative to ``root`` of the images in and below ``top``, in ImageFolder's order.

    ``watched`` receives the directories that they were looked for in. Raises UserError where one cannot be read.
    """
    found = []
    watched[top] = stamp(root / top)
    for directory, subdirectories, files in os.walk(root / top, followlinks=True, onerror=_raise):
        relative = os.path.relpath(directory, root)
        # Before they are listed: what is added in between is noticed the next time.
        for name in subdirectories:
            watched[os.path.normpath(f"{relative}/{name}")] = stamp(Path(directory, name))
        prefix = "" if relative == "." else f"{relative}/"
        found.append((directory, [prefix + name for name in sorted(files) if name.lower().endswith(EXTENSIONS)]))
    return [name for _, names in sorted(found) for name in names]


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed ({error.strerror}); make it readable or delete it.")


def stamp(path: Path) -> Stamp:
    """The stamp of a file or directory, also of one that is not there."""
    try:
        status = path.stat()
    except OSError:
        return 0, -1
    # What a file system calls the size of a directory means nothing.
    return status.st_mtime_ns, 0 if S_ISDIR(status.st_mode) else status.st_size


def read_files(root: Path, names: Sequence[bytes]) -> Found:
    """What the headers of files say that are an image each."""
    prefix = os.path.join(os.fsencode(root), b"")  # noqa: PTH118 - paths as bytes
    rows, faults = [], {}
    for n, name in enumerate(names):
        size_bytes = changed_ns = 0
        header: tuple[int, int, bool] | str
        try:
            with open(prefix + name, "rb") as file:  # noqa: PTH123
                status = os.fstat(file.fileno())
                size_bytes, changed_ns = status.st_size, status.st_mtime_ns
                header = read_header(file)
        except OSError as error:
            header = reason(error)
        if isinstance(header, str):
            faults[n] = header
            header = 1, 1, True
        height, width, needs_pillow = header
        rows.append((0, size_bytes, changed_ns, height, width, UNLABELLED, needs_pillow))
    return Found(rows=np.array(rows, FOUND), faults=faults)
