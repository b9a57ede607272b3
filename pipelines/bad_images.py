"""Images that cannot be used: they are told once, listed, and other images stand in for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.images import ImageFiles, Images
from stec.commands import REPLACEMENT_STREAM, generator
from stec.errors import BadImage, UserError

CANDIDATES = 64
"""Stand-ins that are drawn for a position; all of them bad is out of the question as long as few images are."""


class BadImages:
    """The bad images of a split: those that its index found, and those that a run meets.

    A stand-in is a pure function of (seed, epoch, position) and of which images are bad, a fact of the files. So it is
    the same on any number of processes and after a resume, no matter which process met what first.

    ``max_share``: more bad images than this share of all raise UserError.
    """

    def __init__(self, images: Images, *, max_share: float = 0.01) -> None:
        self.images, self.max_share = images, max_share
        self.listed_in: Path | None = None
        self._say: Callable[[str], None] = print
        self._is_bad = np.zeros(len(images), bool)
        self._is_bad[list(images.faults) if isinstance(images, ImageFiles) else []] = True
        self._check_share()

    def list_in(self, file: Path, say: Callable[[str], None]) -> None:
        """List what is met from now on in ``file``, a line of image id, name and reason each, and ``say`` it.

        What the file holds already, from an earlier part of the run, is known from now on.
        """
        self.listed_in, self._say = file, say
        self.know(file)

    def know(self, file: Path) -> None:
        """Take those images out of use that the list in ``file`` names; nothing is written there."""
        self._is_bad[self._listed(file)] = True
        self._check_share()

    def add(self, bad: BadImage) -> None:
        """Take an image out of use. Raises UserError where that makes too many."""
        assert isinstance(self.images, ImageFiles), "images in memory are never bad"
        # Another process may have met it first: it is told once.
        if bad.image_id not in self._listed(self.listed_in):
            name = self.images.name(bad.image_id)
            self._say(f"Bad image, another one stands in for it: {name} ({bad.reason})")
            if self.listed_in is not None:
                line = "\t".join((str(bad.image_id), name, bad.reason)).replace("\n", " ") + "\n"
                try:
                    # One short write at the end of the file: processes that share it do not mix their lines.
                    with self.listed_in.open("a") as file:
                        file.write(line)
                except OSError as error:
                    raise UserError(
                        f"{self.listed_in} cannot be written ({error.strerror}); check the disk."
                    ) from error
        self._is_bad[bad.image_id] = True
        self._check_share()

    def replace(
        self, image_ids: NDArray[np.int64], *, seed: int, epoch: int, positions: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The images [N] for these positions [N] of an epoch, stand-ins in the places of bad ones."""
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

    def _listed(self, file: Path | None) -> list[int]:
        """Ids in a list on disk; lines that are none are left alone."""
        if file is None or not file.exists():
            return []
        starts = (line.split("\t", 1)[0] for line in file.read_text(errors="replace").splitlines())
        return [int(start) for start in starts if start.isdecimal() and int(start) < len(self.images)]

    def _check_share(self) -> None:
        count = self.count
        if count > self.max_share * len(self.images):
            where = f", listed in {self.listed_in}" if self.listed_in is not None else ""
            raise UserError(
                f"{count} of {len(self.images)} training images are bad{where}, more than --max_bad_share "
                f"{self.max_share}; mend the data set (launch.py index DATA --verify full lists them) or allow more.",
                local=True,
            )
