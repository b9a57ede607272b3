"""Lists on disk of bad images; an entry is valid as long as the image's file does not change."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipelines.datasets.images import ImageFiles
from pipelines.datasets.listing import Stamp, stamp_of_image
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

    Images are identified by name, so that a data set may grow, and by size and time, so that an image may be repaired.
    Several processes may add lines. A name that is not UTF-8 is written as its bytes.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lines: list[_Line] = []
        self._read_bytes = 0

    def faults(self, images: ImageFiles) -> dict[int, str]:
        """Why images are bad according to the list, by image id."""
        self._read_new_lines()
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
            if stamp_of_image(images, image_id) == (line.changed_ns, line.size_bytes):
                faults[image_id] = line.reason
        return faults

    def add(self, images: ImageFiles, bad_images: Iterable[BadImage]) -> list[BadImage]:
        """Add the images that are not in the list, and return them. Raises OSError if the file cannot be written."""
        self._read_new_lines()
        known = {(line.name, line.size_bytes, line.changed_ns) for line in self._lines}
        added, content = [], b""
        for bad in bad_images:
            name, (changed_ns, size_bytes) = _name(images, bad.image_id), stamp_of_image(images, bad.image_id)
            if (name, size_bytes, changed_ns) not in known:
                content += _encode(bad.image_id, name, bad.reason, (changed_ns, size_bytes))
                added.append(bad)
        if content:
            # A single write at the end of the file keeps the lines of several processes apart.
            with self.file.open("ab", buffering=0) as file:
                file.write(content)
        return added

    def rewrite(self, images: ImageFiles, faults: dict[int, str]) -> None:
        """Replace the list by ``faults`` of ``images``. Raises UserError if the file cannot be written."""
        lines = (
            _encode(image_id, _name(images, image_id), reason, stamp_of_image(images, image_id))
            for image_id, reason in faults.items()
        )
        atomic_write(self.file, b"".join(lines))
        self._lines, self._read_bytes = [], 0

    def _read_new_lines(self) -> None:
        """Read the lines that were added since the last call; invalid lines are ignored."""
        try:
            with self.file.open("rb") as file:
                file.seek(self._read_bytes)
                content = file.read()
        except OSError:
            return
        complete = content[: content.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        for line in complete.decode("utf-8", "surrogateescape").split("\n"):
            with suppress(ValueError):
                image_id, name, reason, size_bytes, changed_ns = line.split("\t")
                self._lines.append(_Line(int(image_id), name, reason, int(size_bytes), int(changed_ns)))


def remember(images: ImageFiles, bad_images: Iterable[BadImage]) -> None:
    """Add bad images to the list beside their index, if there is one and it can be written, for later runs."""
    if images.bad_list is not None:
        with suppress(OSError):
            BadList(images.bad_list).add(images, bad_images)


def _name(images: ImageFiles, image_id: int) -> str:
    """An image's name without tabs and line breaks."""
    return images.name(image_id).translate({9: " ", 10: " ", 13: " "})


def _encode(image_id: int, name: str, reason: str, file_stamp: Stamp) -> bytes:
    changed_ns, size_bytes = file_stamp
    reason = " ".join(reason.split())
    return os.fsencode(f"{image_id}\t{name}\t{reason}\t{size_bytes}\t{changed_ns}\n")
