"""What the inverse model predicts: a table of targets that are computed from commands. A new one is a row.

Shapes: N pairs of views, R x C entries of a target. View "from" is i and view "to" is j, or the other way around.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.commands import Commands
from stec.config import TargetName
from stec.geometry import Convention, relative_factors, relative_windows


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Commands of pairs of views, with what their values depend on besides."""

    commands: Commands
    view_size_px: int
    jitter_strength: float = 1.0
    """Factor of the range of the color jitter."""
    convention: Convention = "official"
    """Of the crop boxes."""
    from_view: int = 0
    to_view: int = 1


@dataclass(frozen=True, kw_only=True)
class Target:
    """Numbers that relate one view to another, and how the inverse model predicts them."""

    entries: tuple[tuple[str, ...], ...]
    """Names of the entries, R rows of C."""
    loss: Literal["bins", "classes", "regression"]
    """``bins``: the mean cross-entropy over equal bins of each entry; ``classes``: the values are class indices, and
    the loss is their cross-entropy; ``regression``: the mean squared error."""
    values: Callable[[Pairs], NDArray[Any]]
    """Computes the entries [N, R, C] of N pairs, float32."""
    valid: Callable[[Commands], NDArray[np.bool_]] = lambda commands: np.ones(len(commands.gray), np.bool_)
    """Computes which pairs the loss includes, bool [N]."""
    limits: tuple[float, ...] = ()
    """For each column: its entries are sorted into equal bins from -limit to limit."""
    classes: tuple[str, ...] = ()
    """Names of the classes."""
    weight: float = 1.0
    """Default weight of its loss in that of the inverse model."""

    @property
    def shape(self) -> tuple[int, int]:
        """R and C."""
        return len(self.entries), len(self.entries[0])

    def outputs(self, n_bins: int) -> int:
        """How many outputs an entry has, of a model that sorts into ``n_bins``."""
        return {"bins": n_bins, "classes": len(self.classes), "regression": 1}[self.loss]


def _colors(pairs: Pairs) -> NDArray[np.float32]:
    """Differences in units of half the range in which a factor or a hue is drawn: -2 to 2."""
    factors = relative_factors(pairs.commands, from_view=pairs.from_view, to_view=pairs.to_view)
    return factors[:, None, :4] / (np.array([0.8, 0.8, 0.8, 0.2], np.float32) * np.float32(pairs.jitter_strength))


def _sigmas(pairs: Pairs) -> NDArray[np.float32]:
    """Differences in px of a view of 224 px: -2 to 2, if the view is blurred as officially."""
    factors = relative_factors(pairs.commands, from_view=pairs.from_view, to_view=pairs.to_view)
    return factors[:, None, 4:5] * np.float32(224 / pairs.view_size_px)


def _which(name: str) -> Callable[[Pairs], NDArray[np.float32]]:
    """Which of the two views has it: an index of ``EITHER``."""

    def values(pairs: Pairs) -> NDArray[np.float32]:
        has = getattr(pairs.commands, name)
        return (has[:, pairs.from_view] + 2.0 * has[:, pairs.to_view]).astype(np.float32)[:, None, None]

    return values


EITHER = ("none", "i only", "j only", "both")

TARGETS: dict[TargetName, Target] = {
    "window": Target(
        entries=(("x scale", "x shear", "x shift"), ("y shear", "y scale", "y shift")),
        loss="bins",
        limits=(2.0, 2.0, 0.5),
        values=lambda pairs: relative_windows(
            pairs.commands, from_view=pairs.from_view, to_view=pairs.to_view, convention=pairs.convention
        ),
        valid=lambda commands: np.logical_not(commands.solarize.any(axis=1)),
    ),
    "color": Target(
        entries=(("brightness", "contrast", "saturation", "hue"),),
        loss="regression",
        values=_colors,
        valid=lambda commands: np.logical_not(commands.gray.any(axis=1)),
        weight=0.1,
    ),
    "blur": Target(entries=(("sigma",),), loss="regression", values=_sigmas, weight=0.1),
    "solarize": Target(entries=(("solarize",),), loss="classes", classes=EITHER, values=_which("solarize"), weight=0.1),
    "gray": Target(entries=(("gray",),), loss="classes", classes=EITHER, values=_which("gray"), weight=0.1),
}
"""``window`` is the official target: the command from view i to view j, without pairs that have a solarized view.

The others are the rest of the efference copy. Colors are undefined if a view is gray. Their weights are small: a model
that has to tell colors apart keeps them in its features, at the expense of shapes (docs/objectives.md).
"""
