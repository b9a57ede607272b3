"""What a command does, as matrices: windows, the change from view i to view j, and colors.

Coordinates are x to the right and y **up**; an image, and likewise a view, is the square [-1, 1]^2.
Shapes: N images, V views.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.color import color_maps
from pipelines.commands import Commands

Convention = Literal["official", "exact", "egocentric"]


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


def following_windows(
    theta_from: NDArray[np.float64], command: NDArray[np.floating], convention: Convention = "official"
) -> NDArray[np.float64]:
    """The window matrices [N, 3, 3] that the commands [N, 2, 3] lead to from ``theta_from`` [N, 3, 3].

    The inverse of ``relative_windows``: a view's window and the command to the other view give the other's window.
    """
    whole = np.zeros_like(theta_from)
    whole[:, :2], whole[:, 2, 2] = command, 1
    if convention == "egocentric":
        return theta_from @ whole
    if convention == "exact":
        return whole @ theta_from
    return whole @ np.linalg.inv(official_inverse(theta_from))


def windows_of(theta: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Left, top, width and height [..., 4] of windows as shares of the image, and whether they are flipped [...].

    ``theta`` [..., 3, 3] are window matrices; what is off their diagonal, a shear, is left out, and a window may reach
    beyond the image.
    """
    half_width, half_height = np.abs(theta[..., 0, 0]), np.abs(theta[..., 1, 1])
    left, top = (theta[..., 0, 2] - half_width + 1) / 2, (1 - theta[..., 1, 2] - half_height) / 2
    return np.stack([left, top, half_width, half_height], axis=-1), theta[..., 0, 0] < 0


def color_matrices(commands: Commands, mean: float = 0.5) -> NDArray[np.float64]:
    """[N, V, 3, 4]: jitter and gray of each view as one affine map of colors in [0, 1], the last column added.

    The turn of the hue is a rotation about the gray axis here, its nearest linear map. A contrast moves colors toward
    the gray mean of the view, which the command does not know: ``mean`` stands for it, as it is before the jitter.
    """
    angle = 2 * np.pi * commands.hue_turns.astype(np.float64)[..., None, None]
    axis = np.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    rotation = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) / 3 + np.sin(angle) * axis
    (before, weights_before), (after, weights_after) = color_maps(commands, "before"), color_maps(commands, "after")
    offset_before = weights_before.sum(-1) * mean
    # A gray mean passes a rotation about the gray axis, and the first map scales it by its row sum and adds the offset.
    mean_after = before[..., 0, :].sum(-1) * mean + offset_before
    matrix = np.empty((*commands.top.shape, 3, 4))
    matrix[..., :3] = after @ rotation @ before
    offset = after.sum(-1) * offset_before[..., None] + (weights_after.sum(-1) * mean_after)[..., None]
    matrix[..., 3] = offset
    return matrix


def relative_colors(
    commands: Commands, *, from_view: int = 0, to_view: int = 1, mean: float = 0.5
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The color change from one view to the other: [N, 3, 4] float32, and where there is one, [N] bool.

    ``matrix @ (r, g, b, 1)`` turns the first view's colors into the second's, clamping and rounding aside, as far as
    both are invertible; where one is not (gray, or a factor near 0) the matrix holds NaN. ``mean`` as in
    ``color_matrices``.
    """
    matrices = color_matrices(commands, mean)
    first, second = matrices[:, from_view], matrices[:, to_view]
    # Determinants are products of factors of about 1; float32 factors leave a few parts in 10 million.
    valid = (np.abs(np.linalg.det(first[..., :3])) > 1e-5) & (np.abs(np.linalg.det(second[..., :3])) > 1e-5)
    relative = np.full(first.shape, np.nan)
    linear = second[valid][..., :3] @ np.linalg.inv(first[valid][..., :3])
    relative[valid, :, :3] = linear
    relative[valid, :, 3] = second[valid][..., 3] - np.einsum("nij,nj->ni", linear, first[valid][..., 3])
    return relative.astype(np.float32), valid


def relative_factors(commands: Commands, *, from_view: int = 0, to_view: int = 1) -> NDArray[np.float32]:
    """[N, 6] float32: the second view's value less the first's, of what is not geometry.

    The columns are the factors of brightness, contrast and saturation, the hue in turns (-0.5 to 0.5, the short way
    round), the blur's standard deviation in px of the view, and solarization (1 if only the second view is solarized,
    -1 if only the first).
    """
    names = ("brightness", "contrast", "saturation", "hue_turns", "sigma_px", "solarize")
    values = np.stack([getattr(commands, name).astype(np.float32) for name in names], axis=-1)
    difference: NDArray[np.float32] = values[:, to_view] - values[:, from_view]
    difference[:, 3] -= np.rint(difference[:, 3])
    return difference
