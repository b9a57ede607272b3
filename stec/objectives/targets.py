"""What the inverse model predicts: a table of targets that are computed from commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.commands import Commands
from stec.objectives.geometry import Convention, relative_windows


@dataclass(frozen=True, kw_only=True)
class Target:
    """Numbers that relate view i to view j; the inverse model predicts the bin of each of them."""

    entries: tuple[tuple[str, ...], ...]
    """Names of the entries, by row and column."""
    limits: tuple[float, ...]
    """For each column: its entries are sorted into equal bins from -limit to limit."""
    values: Callable[[Commands, Convention], NDArray[np.float32]]
    """Computes the entries [N, rows, columns] from the commands of N images."""
    valid: Callable[[Commands], NDArray[np.bool_]]
    """Computes which pairs the loss includes [N]."""


TARGETS = {
    "window": Target(
        entries=(("x scale", "x shear", "x shift"), ("y shear", "y scale", "y shift")),
        limits=(2.0, 2.0, 0.5),
        values=lambda commands, convention: relative_windows(commands, convention=convention),
        valid=lambda commands: np.logical_not(commands.solarize.any(axis=1)),
    ),
}
"""``window`` is the official target: the command from view i to view j, without pairs that have a solarized view."""
