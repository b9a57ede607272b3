"""Matrices of commands: against pixels, against composition, against a slow product of steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pipelines import reference
from stec.commands import Commands, Policy, draw
from stec.geometry import GREY_WEIGHTS, colour_maps, relative_windows, window_matrices
from tests.conftest import smooth_image


def some_commands(count: int = 200, **policy: float) -> Commands:
    image_hw = np.tile([[96, 128]], (count, 1))
    return draw(Policy(**policy), seed=7, epoch=0, first_position=0, image_hw=image_hw)


def test_window_matrix_describes_the_pixels() -> None:
    """Sampling the source where the matrix says gives the view that torchvision cuts out."""
    image = smooth_image(96, 128, seed=0)
    policy = Policy(size=64, p_color_jitter=-1, p_grayscale=-1)
    commands = some_commands(12, size=64, p_color_jitter=-1, p_grayscale=-1)
    source = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    for n in range(len(commands)):
        theta = torch.from_numpy(window_matrices(commands)[n, 0])
        # grid_sample's y axis points down: mirror it on both sides.
        down = torch.diag(torch.tensor([1.0, -1, 1], dtype=torch.float64))
        grid = F.affine_grid((down @ theta @ down)[None, :2].float(), [1, 3, 64, 64], align_corners=False)
        sampled = F.grid_sample(source, grid, align_corners=False, padding_mode="border")
        view = reference.execute(Image.fromarray(image), commands, policy, n, 0)
        # A view's border pixels see past the window when sampled, but not when it is cut out first.
        assert (sampled[0] - view).abs()[:, 2:-2, 2:-2].mean() * 255 < 1


def as_square(command: np.ndarray) -> np.ndarray:
    bottom = np.broadcast_to(np.array([[[0.0, 0, 1]]]), (len(command), 1, 3))
    return np.concatenate([command.astype(np.float64), bottom], axis=1)


@pytest.mark.parametrize("convention", ["exact", "egocentric"])
def test_there_and_back_is_identity(convention: str) -> None:
    commands = some_commands()
    there = as_square(relative_windows(commands, convention=convention))
    back = as_square(relative_windows(commands, from_view=1, to_view=0, convention=convention))
    np.testing.assert_allclose(back @ there, np.broadcast_to(np.eye(3), there.shape), atol=1e-4)


def test_exact_command_turns_one_window_into_the_other() -> None:
    commands = some_commands()
    theta = window_matrices(commands)
    command = as_square(relative_windows(commands, convention="exact"))
    np.testing.assert_allclose(command @ theta[:, 0], theta[:, 1], atol=1e-5)


def test_the_official_command_shares_the_linear_part_only() -> None:
    commands = some_commands()
    official = relative_windows(commands, convention="official")
    exact = relative_windows(commands, convention="exact")
    np.testing.assert_allclose(official[..., :2], exact[..., :2], rtol=1e-5)
    assert np.abs(official[..., 2] - exact[..., 2]).max() > 0.1


def slow_colours(rgb: np.ndarray, commands: Commands, n: int, v: int) -> np.ndarray:
    """The colour map executed step by step on pixels [P, 3], without clamping."""
    w = GREY_WEIGHTS
    for step in commands.order[n, v]:
        if step == 0:
            rgb = rgb * commands.brightness[n, v]
        elif step == 1:
            c = commands.contrast[n, v]
            rgb = c * rgb + (1 - c) * (rgb @ w).mean()
        elif step == 2:
            s = commands.saturation[n, v]
            rgb = s * rgb + (1 - s) * (rgb @ w)[:, None]
        else:
            # Rodrigues' formula about the unit grey axis.
            angle, axis = 2 * np.pi * commands.hue_turns[n, v], np.ones(3) / np.sqrt(3)
            rgb = (
                rgb * np.cos(angle)
                + np.cross(axis, rgb) * np.sin(angle)
                + axis * (rgb @ axis)[:, None] * (1 - np.cos(angle))
            )
    if commands.grey[n, v]:
        rgb = np.repeat((rgb @ w)[:, None], 3, axis=1)
    return rgb


def test_colour_map_is_the_product_of_its_steps() -> None:
    commands = some_commands(200, jitter_strength=1.0)
    matrix, mean_weights = colour_maps(commands)
    rgb = np.random.default_rng(0).random((50, 3))
    for n in range(len(commands)):
        for v in range(2):
            ours = rgb @ matrix[n, v].T + mean_weights[n, v] @ rgb.mean(0)
            np.testing.assert_allclose(ours, slow_colours(rgb, commands, n, v), atol=1e-5)
