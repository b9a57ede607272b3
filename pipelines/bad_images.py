"""Bad images: reported once, listed, and replaced by others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.commands import REPLACEMENT_STREAM, generator
from pipelines.datasets.bad_list import BadList
from pipelines.datasets.images import ImageFiles, Images
from pipelines.errors import BadImage, UserError

CANDIDATES = 64
"""Replacements drawn for a position; with few bad images, it is practically impossible that all of them are bad."""
REPORTED_AT_START = 10
"""Number of images known to be bad that are reported by name at the start."""


class BadImages:
    """The bad images of a split: those known before, and those found during a run.

    A replacement is a pure function of (seed, epoch, position) and of the set of bad images, which depends on the files
    only. So it is the same on any number of processes and after a resume.

    A larger fraction of bad images than ``max_fraction`` raises UserError.
    """

    def __init__(self, images: Images, *, max_fraction: float = 0.01) -> None:
        self.images, self.max_fraction = images, max_fraction
        self._list: BadList | None = None
        self._report_line: Callable[[str], None] = print
        self._counted, self._sums_up = 0, True
        self._is_bad = np.zeros(len(images), bool)
        self._is_bad[list(images.faults) if isinstance(images, ImageFiles) else []] = True
        self._check_fraction()
        self._counted = self.count

    def list_in(self, file: Path, report: Callable[[str], None], *, main: bool = True) -> None:
        """Append bad images to ``file``, a ``BadList``, and pass one line each to ``report``.

        Images that the file already holds are excluded. With ``main``, on one of several processes, also list those
        known before, and report the number at the end of each epoch.
        """
        self._list, self._report_line, self._sums_up = BadList(file), report, main
        self.know(file)
        if main and isinstance(self.images, ImageFiles) and self.images.faults:
            added = self._listed([self.images.bad(image_id, why) for image_id, why in self.images.faults.items()])
            for bad in added[:REPORTED_AT_START]:
                self._report(bad)
            if len(added) > REPORTED_AT_START:
                report(f"... and {len(added) - REPORTED_AT_START} more bad images, listed in {file}.")
        self._counted = self._count_of_all_processes()

    def know(self, file: Path) -> None:
        """Exclude the images in the list ``file``, without writing to it."""
        if isinstance(self.images, ImageFiles):
            self._is_bad[list(BadList(file).faults(self.images))] = True
            self._check_fraction()

    def add(self, found: Sequence[BadImage]) -> None:
        """Exclude images, and report them. Raises UserError if there are too many."""
        # An image that another process found first has been reported already.
        for bad in self._listed(found):
            self._report(bad)
        for bad in found:
            self.exclude(bad.image_id)
        self._check_fraction()

    def exclude(self, image_id: int) -> None:
        """Exclude an image without reporting it."""
        self._is_bad[image_id] = True

    def end_epoch(self, epoch: int) -> None:
        """Report the number of images found to be bad in the epoch on all processes, if any."""
        if not self._sums_up:
            return
        count = self._count_of_all_processes()
        if count > self._counted:
            where = f"; they are listed in {self._list.file}" if self._list is not None else ""
            self._report_line(
                f"Epoch {epoch + 1}: {count - self._counted} images were found to be bad and are replaced by others; "
                f"{count} of {len(self.images)} are known{where}."
            )
            self._counted = count

    def replace(
        self, image_ids: NDArray[np.int64], *, seed: int, epoch: int, positions: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The images [N] for these positions [N] of an epoch, with bad images replaced."""
        if not self._is_bad[image_ids].any():
            return image_ids
        replaced = image_ids.copy()
        for n in np.flatnonzero(self._is_bad[image_ids]):
            counter = int(positions[n]) * (CANDIDATES // 4)
            uniforms = generator(REPLACEMENT_STREAM, seed, epoch, counter).random(CANDIDATES)
            candidates = (uniforms * len(self.images)).astype(np.int64)
            good = candidates[~self._is_bad[candidates]]
            if not len(good):
                raise UserError(
                    f"No good image was found in {CANDIDATES} draws of {len(self.images)}; check the data set."
                )
            replaced[n] = good[0]
        return replaced

    @property
    def count(self) -> int:
        """Number of known bad images."""
        return int(self._is_bad.sum())

    def _count_of_all_processes(self) -> int:
        if self._list is None or not isinstance(self.images, ImageFiles):
            return self.count
        return len(self._list.faults(self.images))

    def _report(self, bad: BadImage) -> None:
        self._report_line(f"Bad image, replaced by another one: {bad.name} ({bad.reason})")

    def _listed(self, found: Sequence[BadImage]) -> Sequence[BadImage]:
        """Add images to the list, if there is one; returns those that are new."""
        if self._list is None:
            return [bad for bad in found if not self._is_bad[bad.image_id]]
        assert isinstance(self.images, ImageFiles), "images in memory are never bad"
        try:
            return self._list.add(self.images, found)
        except OSError as error:
            raise UserError(f"{self._list.file} cannot be written ({error.strerror}); check the disk.") from error

    def _check_fraction(self) -> None:
        count = self.count
        if count > self.max_fraction * len(self.images):
            where = f", listed in {self._list.file}" if self._list is not None else ""
            raise UserError(
                f"{count} of {len(self.images)} training images are bad{where}, more than --max_bad_fraction "
                f"{self.max_fraction}; fix the data set (launch.py index DATA --verify full lists them) or allow more.",
                local=True,
            )
