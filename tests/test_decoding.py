"""Decoded parameters and RankMe, against scikit-learn, closed forms and known spectra."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from pipelines.commands import Policy, draw
from pipelines.datasets.images import ImageArray
from pipelines.loader import Loader
from pipelines.sampler import Sampler
from stec.evaluation import parameters
from stec.evaluation.decoding import (
    PENALTIES,
    R2,
    SEED,
    VALIDATION_FRACTION,
    decode,
)
from stec.evaluation.evaluate import rankme
from stec.geometry import relative_factors, relative_windows
from stec.models.encoder import Encoder

FIT, TEST = 600, 400


@pytest.fixture(scope="module")
def samples() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Features [1000, 12], some of them rescaled, and values that depend on them in several ways."""
    rng = np.random.default_rng(0)
    features = (rng.normal(0, 1, (FIT + TEST, 12)) @ rng.normal(0, 1, (12, 12))).astype(np.float32) * 3 + 5
    linear = features @ rng.normal(0, 1, 12)
    half = np.where(features[:, 1] < 5, np.nan, linear)
    curve = (features[:, 0] - 5) ** 2
    noise = rng.normal(0, 1, FIT + TEST)
    values = {"linear": linear, "half": half, "noisy": linear + 20 * noise, "curve": curve, "noise": noise}
    return features, {name: of_name.astype(np.float32) for name, of_name in values.items()}


def decoded(features: np.ndarray, values: dict[str, np.ndarray]) -> dict[str, R2]:
    parts: list[Any] = []
    for rows in (slice(FIT), slice(FIT, None)):
        parts += [torch.from_numpy(features[rows]), {name: of_name[rows] for name, of_name in values.items()}]
    return decode(*parts)


def test_ridge_regression_is_scikit_learns(samples: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    """With the penalty that a loop over all finds on the same validation split."""
    features, values = samples
    order = torch.randperm(FIT, generator=torch.Generator().manual_seed(SEED)).numpy()
    validation, train = np.split(order, [int(FIT * VALIDATION_FRACTION)])
    x = features.astype(float)
    x = (x - x[train].mean(0)) / x[train].std(0)
    ours = decoded(features, values)
    for name, y in values.items():
        fitted, validated, tested = (
            rows[~np.isnan(y[rows])] for rows in (train, validation, np.arange(FIT, FIT + TEST))
        )
        models = [Ridge(alpha=penalty * len(fitted)).fit(x[fitted], y[fitted].astype(float)) for penalty in PENALTIES]
        best = min(models, key=lambda model: np.mean((model.predict(x[validated]) - y[validated]) ** 2))
        assert ours[name].ridge == pytest.approx(r2_score(y[tested], best.predict(x[tested])), abs=1e-6)


def test_what_is_decodable_and_what_is_not(samples: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    """Linear values by both decoders, curved ones by the MLP, noise and shuffled features by none."""
    features, values = samples
    found = decoded(features, values)
    for name in ("linear", "half"):
        assert found[name].ridge > 0.999 and found[name].mlp > 0.8
    assert found["curve"].ridge < 0.2 and found["curve"].mlp > found["curve"].ridge + 0.2
    for value in (found["noise"].ridge, found["noise"].mlp):
        assert abs(value) < 0.05
    for of_name in found.values():
        assert abs(of_name.ridge_shuffled) < 0.05 and abs(of_name.mlp_shuffled) < 0.05


def test_decoding_is_deterministic_and_leaves_the_random_state(
    samples: tuple[np.ndarray, dict[str, np.ndarray]],
) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = decoded(*samples)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert decoded(*samples) == first


def test_the_unit_of_a_value_does_not_matter(samples: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    features, values = samples
    expected = dataclasses.astuple(decoded(features, {"a": values["noisy"]})["a"])
    assert dataclasses.astuple(decoded(features, {"a": values["noisy"] * 8 - 64})["a"]) == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_handful_of_samples_decodes_nothing(count: int) -> None:
    values = {"a": np.arange(count, dtype=np.float32)}
    assert decode(torch.zeros(count, 2), values, torch.zeros(count, 2), values) == {}


# --- Commands ---


def test_entries_are_those_of_the_commands() -> None:
    policy = Policy(p_blur=0.5, p_solarize=0.2)
    commands = draw(policy, seed=1, epoch=0, first_position=0, image_hw=np.full((200, 2), 32))
    entries = parameters.command_entries(commands, "exact")
    assert len(entries) == 13 and all(values.shape == (200,) for values in entries.values())
    gray = commands.gray.any(axis=1)
    for n in range(200):
        a, b, _, c, d, e = relative_windows(commands, convention="exact")[n].ravel()
        assert (entries["x scale"][n], entries["x shear"][n], entries["y scale"][n]) == (a, b, d) and c == 0
        assert entries["y shift"][n] == e
        for name, field in (("brightness", "brightness"), ("hue", "hue_turns"), ("blur", "sigma_px")):
            expected = getattr(commands, field)[n, 1] - getattr(commands, field)[n, 0]
            if gray[n] and name != "blur":
                assert np.isnan(entries[name][n])
            else:
                assert entries[name][n] == pytest.approx(expected, abs=1e-6)
        assert entries["gray"][n] == int(commands.gray[n, 1]) - int(commands.gray[n, 0])
        assert entries["solarize"][n] == relative_factors(commands)[n, 5]


def test_pairs_are_encoded_with_their_commands() -> None:
    """Features of both views of the image at each position, in the order of the positions."""
    rng = np.random.default_rng(0)
    images = ImageArray(pixels=rng.integers(0, 256, (40, 16, 16, 3), np.uint8), labels=np.full(40, -1))
    sampler = Sampler(images, Policy(size=16), seed=3, batch_size=12)
    loader = Loader(sampler, backend="torchvision", device=torch.device("cpu"), workers=0)
    encoder = Encoder("resnet18", "cifar", 4)
    features, commands = parameters.encode_pairs(encoder, loader, 30, Accelerator(cpu=True))
    assert encoder.training and features.shape == (24, 64)
    expected = draw(sampler.policy, seed=3, epoch=0, first_position=0, image_hw=np.full((24, 2), 16))
    assert np.array_equal(commands.pack(), expected.pack())
    second = next(loader.batches(1))
    with torch.no_grad():
        views_j = encoder.eval()(second.views[:, 1])
    torch.testing.assert_close(features[12:, 32:], views_j)


# --- RankMe ---


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_of_orthogonal_features_is_their_number(rank: int) -> None:
    """At any scale, and rotated."""
    random = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(50, rank, generator=random, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(8, rank, generator=random, dtype=torch.float64))
    assert rankme(100 * left @ right.T) == pytest.approx(rank, rel=2e-5)


def test_rankme_of_a_known_spectrum() -> None:
    spectrum = np.array([8.0, 4.0, 2.0, 1.0, 0.0])
    features = np.zeros((20, 5))
    np.fill_diagonal(features, spectrum)
    p = spectrum / spectrum.sum() + 1e-7
    assert rankme(torch.from_numpy(features).float()) == pytest.approx(np.prod(p**-p), rel=1e-6)
    assert np.isnan(rankme(torch.tensor([[1.0, np.inf]])))
