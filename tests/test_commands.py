"""Commands: a pure function of (seed, epoch, position) with torchvision's distribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.transforms as torchvision_transforms

from pipelines.commands import UNIFORMS_PER_VIEW, VIEWS, Commands, Policy, commands_from_uniforms, draw

SEVERAL_SIZES = np.array([[32, 32], [375, 500], [500, 375], [20, 400], [400, 20], [1, 1], [2, 97]])


def draw_many(policy: Policy, count: int = 4000, seed: int = 1, epoch: int = 0) -> Commands:
    image_hw = np.tile([[375, 500]], (count, 1))
    return draw(policy, seed=seed, epoch=epoch, first_position=0, image_hw=image_hw)


class ScriptedTorch:
    """Replaces torch in torchvision's RandomResizedCrop, and returns given uniforms."""

    log, exp, tensor = staticmethod(torch.log), staticmethod(torch.exp), staticmethod(torch.tensor)

    def __init__(self, tries: Iterator[float], corner: Iterator[float]) -> None:
        self.tries, self.corner = tries, corner

    def empty(self, _: int) -> Any:
        scripted = self

        class Uniform:
            def uniform_(self, low: Any, high: Any) -> torch.Tensor:
                return torch.tensor(float(low) + next(scripted.tries) * (float(high) - float(low)), dtype=torch.float64)

        return Uniform()

    def randint(self, low: int, high: int, size: tuple[int]) -> torch.Tensor:
        return torch.tensor([low + int(next(self.corner) * (high - low))])


def test_crop_boxes_equal_those_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the same uniforms, including rejected tries, rounding and the fallback."""
    rng = np.random.default_rng(0)
    image_hw = SEVERAL_SIZES[rng.integers(len(SEVERAL_SIZES), size=300)]
    uniforms = rng.random((300, VIEWS, UNIFORMS_PER_VIEW))
    policy = Policy()
    ours = commands_from_uniforms(policy, uniforms, image_hw)
    fallbacks = 0
    for n, (height, width) in enumerate(image_hw):
        for v in range(VIEWS):
            u = uniforms[n, v]
            tries = (u[10 * which + attempt] for attempt in range(10) for which in (0, 1))
            scripted = ScriptedTorch(tries, iter(u[20:22]))
            monkeypatch.setattr(torchvision_transforms, "torch", scripted)
            image = torch.empty(3, height, width)
            theirs = torchvision_transforms.RandomResizedCrop.get_params(
                image, list(policy.area), list(policy.aspect_ratio)
            )
            assert (ours.top[n, v], ours.left[n, v], ours.height[n, v], ours.width[n, v]) == theirs
            fallbacks += next(scripted.tries, None) is None
    assert fallbacks > 20, "the fallback is tested"


def test_crop_boxes_lie_within_the_image() -> None:
    image_hw = SEVERAL_SIZES[np.random.default_rng(1).integers(len(SEVERAL_SIZES), size=2000)]
    c = draw(Policy(), seed=3, epoch=0, first_position=0, image_hw=image_hw)
    assert (c.top >= 0).all() and (c.left >= 0).all() and (c.height > 0).all() and (c.width > 0).all()
    assert (c.top + c.height <= c.source_height).all() and (c.left + c.width <= c.source_width).all()


def test_a_command_depends_on_its_position_and_not_on_the_batch() -> None:
    image_hw = np.tile([[32, 32]], (100, 1))
    whole = draw(Policy(p_blur=0.5), seed=5, epoch=2, first_position=40, image_hw=image_hw)
    part = draw(Policy(p_blur=0.5), seed=5, epoch=2, first_position=90, image_hw=image_hw[:20])
    np.testing.assert_array_equal(whole[50:70].pack(), part.pack())


@pytest.mark.parametrize("other", [{"seed": 6, "epoch": 2}, {"seed": 5, "epoch": 3}])
def test_seed_and_epoch_change_everything(other: dict[str, int]) -> None:
    one, two = draw_many(Policy(), seed=5, epoch=2), draw_many(Policy(), **other)
    assert np.mean(one.top == two.top) < 0.1
    assert np.mean(one.flip == two.flip) == pytest.approx(0.5, abs=0.05)


def test_probabilities_and_ranges() -> None:
    """Frequencies are within five standard deviations of the probabilities; values are uniform in SimCLR's ranges."""
    policy = Policy(jitter_strength=1.0, p_blur=0.5, p_solarize=0.2)
    c = draw_many(policy)
    expected = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.5, "solarize": 0.2}
    for name, p in expected.items():
        values = getattr(c, name)
        assert values.mean() == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / values.size)), name
    for name, low, high in [
        ("brightness", 0.2, 1.8), ("contrast", 0.2, 1.8), ("saturation", 0.2, 1.8), ("hue_turns", -0.2, 0.2),
    ]:  # fmt: skip
        fraction = (getattr(c, name)[c.jitter] - low) / (high - low)
        np.testing.assert_allclose(np.histogram(fraction, 10, (0, 1))[0] / fraction.size, 0.1, atol=0.02)
    fraction = (c.sigma_px[c.blur] - 0.1 * 32 / 224) / (1.9 * 32 / 224)
    np.testing.assert_allclose(np.histogram(fraction, 10, (0, 1))[0] / fraction.size, 0.1, atol=0.02)
    orders, counts = np.unique(c.order.reshape(-1, 4), axis=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 0.7 * counts.mean()


def test_switched_off_parts_are_neutral() -> None:
    c = draw_many(Policy(p_color_jitter=-1, p_grayscale=-1))
    for values, neutral in [
        (c.jitter, 0), (c.brightness, 1), (c.contrast, 1), (c.saturation, 1), (c.hue_turns, 0), (c.gray, 0),
        (c.blur, 0), (c.sigma_px, 0), (c.solarize, 0),
    ]:  # fmt: skip
        assert (values == neutral).all()


def test_pack_is_exact() -> None:
    commands = draw_many(Policy(p_blur=0.5, p_solarize=0.2), count=50)
    again = Commands.unpack(commands.pack())
    for field in dataclasses.fields(Commands):
        one, two = getattr(commands, field.name), getattr(again, field.name)
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype, field.name
