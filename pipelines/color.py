"""What jitter and gray do to the colors of a view, as affine maps.

Shapes: N images, V views.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.commands import Commands

GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in luma (ITU-R BT.601), as Pillow and torchvision use them."""


def color_maps(commands: Commands, part: Literal["before", "after"]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Jitter and gray before or after the rotation of the hue, per view: ``rgb -> A @ rgb + q . mean``.

    Returns A [N, V, 3, 3] and q [N, V, 3], both float32, where ``mean`` is the mean color of the map's input, and
    the same sum is added to each channel.

    Brightness b, contrast c and saturation s act as ``b I``, ``c x + (1-c) w . mean`` and ``s I + (1-s) 1 w^T`` with
    the gray weights w. All three map gray to gray, and saturation preserves luma, so they commute:
    ``A = b c (s I + (1-s) 1 w^T)`` and ``q = (1-c) b w``. Unlike torchvision, this does not round and clamp between the
    steps. Gray, ``1 w^T``, comes last.
    """
    w = GRAY_WEIGHTS
    rank = np.argsort(commands.order, axis=-1)

    def factor(values: NDArray[np.float32], kind: int) -> NDArray[np.float64]:
        in_part = (rank[..., kind] < rank[..., 3]) == (part == "before")
        return np.where(in_part, values.astype(np.float64), 1.0)[..., None]

    b, c, s = factor(commands.brightness, 0), factor(commands.contrast, 1), factor(commands.saturation, 2)
    linear = (b * c)[..., None] * (s[..., None] * np.eye(3) + ((1 - s) * w)[..., None, :])
    if part == "after":
        linear = np.where(commands.gray[..., None, None], (w @ linear)[..., None, :], linear)
    return linear.astype(np.float32), ((1 - c) * b * w).astype(np.float32)
