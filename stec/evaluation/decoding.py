"""R2 of values decoded from frozen features, by ridge regression and by a small MLP.

The protocol is that of Garrido et al. 2023, "Self-supervised learning of Split Invariant Equivariant representations",
who decode what differs between two views from their concatenated features, by a linear and a nonlinear regression. Here
the MLP is smaller, and what regularizes the decoders is chosen on a validation split: for each value, the penalty of
ridge regression and the number of epochs of the MLP.

Double precision on the host: the result depends on device and number of processes through the features alone.
Shapes: N samples, D features, E values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SEED = 0
"""Of the validation split, of the MLP and of the shuffled control."""
VALIDATION_FRACTION = 0.2
"""Fraction of the samples for fitting that validate instead."""
PENALTIES = 10.0 ** np.arange(-5, 3)
"""Ridge regression: candidates for the L2 penalty of the weights, beside the mean squared error of the samples, both of
standardized features and values."""
HIDDEN, EPOCHS, PATIENCE, BATCH_SIZE, LEARNING_RATE = 256, 50, 4, 256, 1e-3
"""The MLP: width of its hidden layer, and its training by Adam, which ends early if no value improves for ``PATIENCE``
epochs."""


@dataclass(frozen=True, kw_only=True)
class R2:
    """Coefficients of determination on test samples: 1 is exact, 0 as good as their mean; it may be negative."""

    ridge: float
    mlp: float
    ridge_shuffled: float
    """Control, about 0: fitted and tested on features of other samples."""
    mlp_shuffled: float


class Samples(NamedTuple):
    """N samples."""

    features: Tensor
    """[N, D]."""
    values: Tensor
    """[N, E] float64; NaN where a sample does not have the value and is not used for it."""


def decode(
    fit_features: Tensor,
    fit_values: Mapping[str, NDArray[np.float32]],
    test_features: Tensor,
    test_values: Mapping[str, NDArray[np.float32]],
) -> dict[str, R2]:
    """R2 on the test samples of decoders that are fitted on others, by the name of the value.

    Features are [N, D]; values [N] by name, NaN where a sample has none. What does not vary is omitted. Deterministic.
    """
    random = torch.Generator().manual_seed(SEED)
    fit, test = _samples(fit_features, fit_values), _samples(test_features, test_values)
    order = torch.randperm(len(fit.features), generator=random)
    validating = int(len(order) * VALIDATION_FRACTION)
    split = [Samples(*(x[rows] for x in fit)) for rows in (order[validating:], order[:validating])] + [test]
    # An empty part, of a handful of samples, varies in nothing.
    varies = torch.stack([_varies(samples.values) for samples in split]).all(0)
    if not varies.any():
        return {}
    split = [Samples(samples.features, samples.values[:, varies]) for samples in split]
    shuffled = [
        Samples(samples.features[torch.randperm(len(samples.features), generator=random)], samples.values)
        for samples in split
    ]
    results = [
        r2(predict(*standardized), standardized[-1].values).tolist()
        for standardized in (_standardized(split), _standardized(shuffled))
        for predict in (ridge_predictions, mlp_predictions)
    ]
    names = [name for name, used in zip(fit_values, varies.tolist(), strict=True) if used]
    return {
        name: R2(ridge=ridge, mlp=mlp, ridge_shuffled=ridge_shuffled, mlp_shuffled=mlp_shuffled)
        for name, ridge, mlp, ridge_shuffled, mlp_shuffled in zip(names, *results, strict=True)
    }


def ridge_predictions(train: Samples, validation: Samples, test: Samples) -> Tensor:
    """The values [N, E] that ridge regression predicts for the test samples.

    Minimizes the mean squared error plus the penalty times the sum of squared weights; the intercept is free.
    """
    predictions, penalties = torch.empty_like(test.values), torch.from_numpy(PENALTIES)
    known = ~train.values.isnan()
    for rows in known.unique(dim=1).T:  # values that the same samples have
        columns = (known == rows[:, None]).all(0)
        mean = train.features[rows].mean(0)
        x, y = train.features[rows] - mean, train.values[rows][:, columns]
        eigenvalues, vectors = torch.linalg.eigh(x.T @ x / len(x))
        projected = vectors.T @ (x.T @ y / len(x))
        weights = vectors @ (projected / (eigenvalues + penalties[:, None])[..., None])  # [P, D, E]
        errors = ((validation.features - mean) @ weights - validation.values[:, columns]).square().nanmean(1)
        best = weights[errors.argmin(0), :, torch.arange(y.shape[1])].T
        predictions[:, columns] = (test.features - mean) @ best
    return predictions


def mlp_predictions(train: Samples, validation: Samples, test: Samples) -> Tensor:
    """The values [N, E] that an MLP with one hidden layer predicts for the test samples.

    The values share the hidden layer; each is predicted by the MLP of the epoch that is best at it in validation, or by
    its mean if none is better.
    """
    predictions = torch.zeros_like(test.values)
    lowest, epochs_since = validation.values.square().nanmean(0), 0
    known, values = ~train.values.isnan(), train.values.nan_to_num()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        mlp = nn.Sequential(
            nn.Linear(train.features.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, values.shape[1])
        ).double()
        optimizer = torch.optim.Adam(mlp.parameters(), lr=LEARNING_RATE)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(values)).split(BATCH_SIZE):
                optimizer.zero_grad()
                ((mlp(train.features[rows]) - values[rows]) * known[rows]).square().mean().backward()
                optimizer.step()
            with torch.no_grad():
                errors = (mlp(validation.features) - validation.values).square().nanmean(0)
                better = errors < lowest
                lowest = torch.where(better, errors, lowest)
                predictions[:, better] = mlp(test.features)[:, better]
            epochs_since = 0 if better.any() else epochs_since + 1
            if epochs_since == PATIENCE:
                break
    return predictions


def r2(predictions: Tensor, values: Tensor) -> Tensor:
    """Coefficients of determination [E] of predictions for values [N, E], without those that are NaN."""
    residual = (values - predictions).square().nansum(0)
    return 1 - residual / (values - values.nanmean(0)).square().nansum(0)


def _samples(features: Tensor, values: Mapping[str, NDArray[np.float32]]) -> Samples:
    return Samples(features.double().cpu(), torch.from_numpy(np.stack(list(values.values()), axis=1)).double())


def _varies(values: Tensor) -> Tensor:
    """Which of the values differ between samples, [E]."""
    if not len(values):
        return torch.zeros(values.shape[1], dtype=torch.bool)
    return values.nan_to_num(-torch.inf).amax(0) > values.nan_to_num(torch.inf).amin(0)


def _standardized(split: list[Samples]) -> list[Samples]:
    """The samples in units in which the features and values of the first ones have mean 0 and variance 1.

    R2 does not depend on the units.
    """
    features, values = split[0]
    mean, deviation = features.mean(0), features.std(0, correction=0) + 1e-6
    center = values.nanmean(0)
    scale = (values - center).square().nanmean(0).sqrt()
    return [Samples((x - mean) / deviation, (y - center) / scale) for x, y in split]
