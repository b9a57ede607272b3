"""Commands as matrices: crop boxes, and the command from view i to view j; and differences of the other factors.

Coordinates are x to the right and y **up**; images and views are the square [-1, 1]^2.
Shapes: N images, V views.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.commands import Commands

Convention = Literal["official", "exact", "egocentric"]


def window_matrices(commands: Commands) -> NDArray[np.float64]:
    """Matrices [N, V, 3, 3] that map coordinates of a view to coordinates of its source image.

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
    """The official code's inverse of window matrices [..., 3, 3], which is correct in the linear part only.

    The official code inverts the linear part and only negates the translation, although the inverse of ``x -> s x + t``
    translates by ``-t/s``. Published models were trained with it, so it is the default convention.
    """
    inverse = np.linalg.inv(theta).astype(np.float64)
    inverse[..., :2, 2] = -theta[..., :2, 2]
    return inverse


def relative_windows(
    commands: Commands, *, from_view: int = 0, to_view: int = 1, convention: Convention = "official"
) -> NDArray[np.float32]:
    """The commands float32 [N, 2, 3] that turn the crop box of one view into that of the other.

    The inverse model recovers them.

    ``official``: ``theta_to @ official_inverse(theta_from)``; ``exact``: the same with the true inverse;
    ``egocentric``: ``inverse(theta_from) @ theta_to``, in the coordinates of the first view.
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


def following_windows(
    theta_from: NDArray[np.float64], command: NDArray[np.floating], convention: Convention = "official"
) -> NDArray[np.float64]:
    """Apply commands [N, 2, 3] to window matrices ``theta_from`` [N, 3, 3]; returns the matrices of the other views.

    The inverse of ``relative_windows``.
    """
    matrix = np.zeros_like(theta_from)
    matrix[:, :2], matrix[:, 2, 2] = command, 1
    if convention == "egocentric":
        return theta_from @ matrix
    if convention == "exact":
        return matrix @ theta_from
    return matrix @ np.linalg.inv(official_inverse(theta_from))


def windows_of(theta: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Left, top, width and height [..., 4] of crop boxes as fractions of the image, and whether they are flipped [...].

    ``theta`` [..., 3, 3] are window matrices; shears are ignored, and a crop box may extend beyond the image.
    """
    half_width, half_height = np.abs(theta[..., 0, 0]), np.abs(theta[..., 1, 1])
    left, top = (theta[..., 0, 2] - half_width + 1) / 2, (1 - theta[..., 1, 2] - half_height) / 2
    return np.stack([left, top, half_width, half_height], axis=-1), theta[..., 0, 0] < 0


def relative_factors(commands: Commands, *, from_view: int = 0, to_view: int = 1) -> NDArray[np.float32]:
    """Differences float32 [N, 6] of the second view's colors, blur and solarization from the first view's.

    The columns are the factors of brightness, contrast and saturation, the hue in turns (-0.5 to 0.5, the shorter
    way), the standard deviation of the blur in px of the view, and solarization (1 if only the second view is
    solarized, -1 if only the first).
    """
    names = ("brightness", "contrast", "saturation", "hue_turns", "sigma_px", "solarize")
    values = np.stack([getattr(commands, name).astype(np.float32) for name in names], axis=-1)
    difference: NDArray[np.float32] = values[:, to_view] - values[:, from_view]
    difference[:, 3] -= np.rint(difference[:, 3])
    return difference
