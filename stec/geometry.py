"""What a command does, as matrices: windows, the change from view i to view j, and colours.

Coordinates are x to the right and y **up**; an image, and likewise a view, is the square [-1, 1]^2.
Shapes: N images, V views.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stec.commands import Commands

Convention = Literal["official", "exact", "egocentric"]

GREY_WEIGHTS = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in luma (ITU-R BT.601), as Pillow and torchvision use them."""


def window_matrices(commands: Commands) -> NDArray[np.float64]:
    """[N, V, 3, 3]: maps coordinates of a view to coordinates of its source image.

    ``[[sx, 0, tx], [0, sy, ty], [0, 0, 1]]`` with ``sx = w/W`` (negative when flipped), ``sy = h/H``,
    ``tx = w/W - 1 + 2 left/W`` and ``ty = 1 - h/H - 2 top/H``.
    """
    theta = np.zeros((*commands.top.shape, 3, 3))
    scale_x = commands.width / commands.source_width
    scale_y = commands.height / commands.source_height
    theta[..., 0, 0] = np.where(commands.flip, -scale_x, scale_x)
    theta[..., 1, 1] = scale_y
    theta[..., 0, 2] = scale_x - 1 + 2 * commands.left / commands.source_width
    theta[..., 1, 2] = 1 - scale_y - 2 * commands.top / commands.source_height
    theta[..., 2, 2] = 1
    return theta


def official_inverse(theta: NDArray[np.float64]) -> NDArray[np.float64]:
    """The official code's inverse of window matrices [..., 3, 3]: right in the linear part only.

    The official implementation inverts the linear part and merely negates the translation, where the true inverse of
    ``x -> s x + t`` translates by ``-t/s``. Published models were trained on this, so it is the default convention.
    """
    inverse = np.linalg.inv(theta).astype(np.float64)
    inverse[..., :2, 2] = -theta[..., :2, 2]
    return inverse


def relative_windows(
    commands: Commands, *, from_view: int = 0, to_view: int = 1, convention: Convention = "official"
) -> NDArray[np.float32]:
    """[N, 2, 3] float32: the command that turns one view's window into the other's, which the inverse model recovers.

    ``official``: ``theta_to @ official_inverse(theta_from)``; ``exact``: the same with the true inverse;
    ``egocentric``: ``inverse(theta_from) @ theta_to``, the change as seen from within the first view.
    """
    theta = window_matrices(commands)
    theta_from, theta_to = theta[:, from_view], theta[:, to_view]
    if convention == "egocentric":
        relative = np.linalg.inv(theta_from) @ theta_to
    elif convention == "exact":
        relative = theta_to @ np.linalg.inv(theta_from)
    else:
        relative = theta_to @ official_inverse(theta_from)
    return relative[:, :2].astype(np.float32)


def colour_maps(commands: Commands) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Jitter and grey as one affine map per view: ``rgb -> A @ rgb + q . mean``, the same sum added to each channel.

    Returns A [N, V, 3, 3] and q [N, V, 3], both float32, where ``mean`` is the view's own mean colour before the map.

    Brightness b, contrast c and saturation s act as ``b I``, ``c x + (1-c) grey(mean)`` and ``s I + (1-s) 1 w^T``
    (w: the grey weights); the hue is a rotation R about the grey axis 1, which is closer to torchvision's HSV hue than
    a rotation in YIQ. All four keep the grey axis, so for any order the product has a closed form:

    * ``w^T`` passes through a saturation unchanged (``w . 1 = 1``), so where contrast takes its grey mean only
      the hue before it matters: ``u = w``, or ``u = w^T R``, or ``u = s w^T R + (1-s) w`` (saturation, then hue).
    * ``A = b c (s R + (1-s) 1 v^T)`` with ``v = w^T R`` where the hue comes before the saturation, else ``v = w``.
    * ``q = (1-c) b u``.

    What this leaves out is the clamping to [0, 1] between torchvision's four steps.
    """
    w = GREY_WEIGHTS
    angle = 2 * np.pi * commands.hue_turns.astype(np.float64)
    cos, sin = np.cos(angle)[..., None], np.sin(angle)[..., None]
    ones = np.ones((3, 3))
    cross = np.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    rotation = cos[..., None] * np.eye(3) + ((1 - cos) / 3)[..., None] * ones + sin[..., None] * cross
    rotated_grey = cos * w + (1 - cos) / 3 + sin * (w @ cross)

    step = np.argsort(commands.order, axis=-1)
    contrast_at, saturation_at, hue_at = step[..., 1], step[..., 2], step[..., 3]
    b = commands.brightness.astype(np.float64)[..., None]
    c = commands.contrast.astype(np.float64)[..., None]
    s = commands.saturation.astype(np.float64)[..., None]

    v = np.where((hue_at < saturation_at)[..., None], rotated_grey, w)
    linear = (b * c)[..., None] * (s[..., None] * rotation + ((1 - s) * v)[..., None, :])
    u = np.where((saturation_at < hue_at)[..., None], s * rotated_grey + (1 - s) * w, rotated_grey)
    u = np.where((hue_at < contrast_at)[..., None], u, w)
    mean_weights = (1 - c) * b * u

    grey = np.broadcast_to((w @ linear)[..., None, :], linear.shape)
    linear = np.where(commands.grey[..., None, None], grey, linear)
    return linear.astype(np.float32), mean_weights.astype(np.float32)
