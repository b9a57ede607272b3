"""Images that cannot be used: they are reported once, listed, and replaced by others."""

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
"""Replacements that are drawn for a position; all of them bad is out of the question as long as few images are."""
REPORTED_AT_START = 10
"""Of more images than these that were bad before, the rest are a number."""


class BadImages:
    """The bad images of a split: those that were known before, and those that a run meets.

    A replacement is a pure function of (seed, epoch, position) and of which images are bad, a fact of the files. So it
    is the same on any number of processes and after a resume, no matter which process met what first.

    ``max_fraction``: more bad images than this share of all raise UserError.
    """

    def __init__(self, images: Images, *, max_fraction: float = 0.01) -> None:
        self.images, self.max_fraction = images, max_fraction
        self._list: BadList | None = None
        self._say: Callable[[str], None] = print
        self._counted, self._sums_up = 0, True
        self._is_bad = np.zeros(len(images), bool)
        self._is_bad[list(images.faults) if isinstance(images, ImageFiles) else []] = True
        self._check_fraction()
        self._counted = self.count

    def list_in(self, file: Path, say: Callable[[str], None], *, main: bool = True) -> None:
        """List what is met from now on in ``file``, a ``BadList``, and ``say`` it.

        What the file holds already, from an earlier part of the run, is known from now on. ``main``: of several
        processes the one that also lists what was known before, and sums up each epoch.
        """
        self._list, self._say, self._sums_up = BadList(file), say, main
        self.know(file)
        if main and isinstance(self.images, ImageFiles) and self.images.faults:
            added = self._listed([self.images.bad(image_id, why) for image_id, why in self.images.faults.items()])
            for bad in added[:REPORTED_AT_START]:
                self._report(bad)
            if len(added) > REPORTED_AT_START:
                say(f"... and {len(added) - REPORTED_AT_START} more bad images, listed in {file}.")
        self._counted = self._count_of_all_processes()

    def know(self, file: Path) -> None:
        """Take those images out of use that the list in ``file`` names; nothing is written there."""
        if isinstance(self.images, ImageFiles):
            self._is_bad[list(BadList(file).faults(self.images))] = True
            self._check_fraction()

    def add(self, found: Sequence[BadImage]) -> None:
        """Take images out of use. Raises UserError where that makes too many."""
        # Another process may have met one first: it is reported once.
        for bad in self._listed(found):
            self._report(bad)
        for bad in found:
            self.exclude(bad.image_id)
        self._check_fraction()

    def exclude(self, image_id: int) -> None:
        """Take an image out of use, and nothing else."""
        self._is_bad[image_id] = True

    def end_epoch(self, epoch: int) -> None:
        """Say how many images turned out to be bad in the epoch that ends, on all processes, if any did."""
        if not self._sums_up:
            return
        count = self._count_of_all_processes()
        if count > self._counted:
            where = f"; they are listed in {self._list.file}" if self._list is not None else ""
            self._say(
                f"Epoch {epoch + 1}: {count - self._counted} images turned out to be bad and are replaced by others; "
                f"{count} of {len(self.images)} are known{where}."
            )
            self._counted = count

    def replace(
        self, image_ids: NDArray[np.int64], *, seed: int, epoch: int, positions: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The images [N] for these positions [N] of an epoch, others in the places of bad ones."""
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
        """How many are known."""
        return int(self._is_bad.sum())

    def _count_of_all_processes(self) -> int:
        if self._list is None or not isinstance(self.images, ImageFiles):
            return self.count
        return len(self._list.faults(self.images))

    def _report(self, bad: BadImage) -> None:
        self._say(f"Bad image, replaced by another one: {bad.name} ({bad.reason})")

    def _listed(self, found: Sequence[BadImage]) -> Sequence[BadImage]:
        """Add images to the list, if there is one; returns those that were not in it."""
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
