"""Lists on disk of images that turned out to be bad, which hold as long as their files stay as they are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipelines.datasets.folders import Stamp, stamp
from pipelines.datasets.images import ImageFiles
from pipelines.errors import BadImage
from pipelines.files import atomic_write


class _Line(NamedTuple):
    image_id: int
    name: str
    reason: str
    size_bytes: int
    changed_ns: int


class BadList:
    """A file with a line for each bad image: image id, name, reason, and its file's size in bytes and time in ns.

    An image is known by its name, so that a data set may grow, and only as long as its file has that size and time, so
    that it may be repaired. Several processes may add lines; a name that is not UTF-8 is written as the bytes it is.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lines: list[_Line] = []
        self._read_bytes = 0

    def faults(self, images: ImageFiles) -> dict[int, str]:
        """Which of the images are bad according to the list, and why."""
        self._read_on()
        ids: dict[str, int] | None = None
        faults: dict[int, str] = {}
        for line in self._lines:
            image_id = line.image_id
            if image_id >= len(images) or _name(images, image_id) != line.name:
                if ids is None:
                    ids = {_name(images, n): n for n in range(len(images))}
                if line.name not in ids:
                    continue
                image_id = ids[line.name]
            if stamp(images.path(image_id)) == (line.changed_ns, line.size_bytes):
                faults[image_id] = line.reason
        return faults

    def add(self, images: ImageFiles, found: Iterable[BadImage]) -> list[BadImage]:
        """Add images that are not in the list; returns those that were added. Raises OSError where the disk refuses."""
        self._read_on()
        known = {(line.name, line.size_bytes, line.changed_ns) for line in self._lines}
        added, content = [], b""
        for bad in found:
            name, (changed_ns, size_bytes) = _name(images, bad.image_id), stamp(images.path(bad.image_id))
            if (name, size_bytes, changed_ns) not in known:
                content += _encoded(bad.image_id, name, bad.reason, (changed_ns, size_bytes))
                added.append(bad)
        if content:
            # One write at the end of the file: processes that share it do not mix their lines.
            with self.file.open("ab", buffering=0) as file:
                file.write(content)
        return added

    def rewrite(self, images: ImageFiles, faults: dict[int, str]) -> None:
        """Replace the list by that of these images. Raises UserError where the disk refuses."""
        lines = (
            _encoded(image_id, _name(images, image_id), reason, stamp(images.path(image_id)))
            for image_id, reason in faults.items()
        )
        atomic_write(self.file, b"".join(lines))
        self._lines, self._read_bytes = [], 0

    def _read_on(self) -> None:
        """Take in the lines that were added since; what is no line of such a list is left alone."""
        try:
            with self.file.open("rb") as file:
                file.seek(self._read_bytes)
                content = file.read()
        except OSError:
            return
        complete = content[: content.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        for line in complete.decode("utf-8", "surrogateescape").split("\n"):
            parts = line.split("\t")
            with suppress(ValueError):
                image_id, name, reason, size_bytes, changed_ns = parts
                self._lines.append(_Line(int(image_id), name, reason, int(size_bytes), int(changed_ns)))


def remember(images: ImageFiles, found: Iterable[BadImage]) -> None:
    """Keep bad images for later runs, in the list beside their index, if they have one and the disk allows it."""
    if images.bad_list is not None:
        with suppress(OSError):
            BadList(images.bad_list).add(images, found)


def _name(images: ImageFiles, image_id: int) -> str:
    """An image's name on one line of the list."""
    return images.name(image_id).translate({9: " ", 10: " ", 13: " "})


def _encoded(image_id: int, name: str, reason: str, file_stamp: Stamp) -> bytes:
    changed_ns, size_bytes = file_stamp
    reason = " ".join(reason.split())
    return os.fsencode(f"{image_id}\t{name}\t{reason}\t{size_bytes}\t{changed_ns}\n")
