"""Matrices of commands, compared with pixels and with compositions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pipelines.commands import Commands, Policy, draw
from pipelines.executors import torchvision as reference
from stec.geometry import (
    relative_factors,
    relative_windows,
    window_matrices,
)
from tests.conftest import smooth_image


def some_commands(count: int = 200, **policy: float) -> Commands:
    image_hw = np.tile([[96, 128]], (count, 1))
    return draw(Policy(**policy), seed=7, epoch=0, first_position=0, image_hw=image_hw)


def test_window_matrix_describes_the_pixels() -> None:
    """Sampling the source at the coordinates of the matrix gives the view that torchvision crops."""
    image = smooth_image(96, 128, seed=0)
    policy = Policy(size=64, p_color_jitter=-1, p_grayscale=-1)
    commands = some_commands(12, size=64, p_color_jitter=-1, p_grayscale=-1)
    source = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    for n in range(len(commands)):
        theta = torch.from_numpy(window_matrices(commands)[n, 0])
        # grid_sample's y axis points down, so both sides are mirrored.
        down = torch.diag(torch.tensor([1.0, -1, 1], dtype=torch.float64))
        grid = F.affine_grid((down @ theta @ down)[None, :2].float(), [1, 3, 64, 64], align_corners=False)
        sampled = F.grid_sample(source, grid, align_corners=False, padding_mode="border")
        view = reference.execute(Image.fromarray(image), commands, policy, n, 0)
        # Sampling uses pixels beyond the crop box at its border, cropping does not.
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


def test_the_change_of_factors() -> None:
    commands = some_commands(200, jitter_strength=1.0, p_blur=0.5, p_solarize=0.2)
    there = relative_factors(commands)
    np.testing.assert_array_equal(there, -relative_factors(commands, from_view=1, to_view=0))
    assert there.shape == (200, 6)
    np.testing.assert_allclose(commands.contrast[:, 0] + there[:, 1], commands.contrast[:, 1], atol=1e-6)
    np.testing.assert_allclose(commands.sigma_px[:, 0] + there[:, 4], commands.sigma_px[:, 1], atol=1e-6)
    assert set(there[:, 5].tolist()) == {-1.0, 0.0, 1.0}
    turned = (commands.hue_turns[:, 0] + there[:, 3] - commands.hue_turns[:, 1]) % 1
    np.testing.assert_allclose(np.minimum(turned, 1 - turned), 0, atol=1e-6)
    far = dataclasses.replace(commands, hue_turns=np.tile(np.array([[0.45, -0.45]], np.float32), (200, 1)))
    np.testing.assert_allclose(relative_factors(far)[:, 3], 0.1, atol=1e-6)
