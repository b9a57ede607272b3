"""The predictions of an inverse model for pairs of views: bins and crop boxes, with the true ones.

Shapes: N pairs of views, K bins.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch
from pipelines.commands import Commands
from stec.models.heads import COMMAND_SHAPE
from stec.models.model import Model, encode
from stec.objectives.geometry import Convention, following_windows, relative_windows, window_matrices, windows_of
from stec.objectives.inverse import bin_centers, command_bins


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predicted commands from view i to view j, and the crop boxes of view j that follow from them."""

    true_bins: NDArray[np.int64]
    """[N, 2, 3]: the bins of the executed commands."""
    predicted_bins: NDArray[np.int64]
    """[N, 2, 3]: the bins with the largest logits."""
    windows: NDArray[np.float64]
    """[N, 4]: left, top, width and height of the predicted windows, as shares of the image; they may reach beyond
    it."""
    flips: NDArray[np.bool_]
    """[N]: whether the predicted crop boxes are flipped."""
    best_windows: NDArray[np.float64]
    """[N, 4]: the crop boxes that follow from the true bins, the best possible prediction."""


@torch.no_grad()
def predictions(model: Model, views: Tensor, commands: Commands, convention: Convention) -> Predictions:
    """Predictions for the pairs ``views`` [N, 2, 3, H, W] of ``commands``, by a model in evaluation mode."""
    assert model.inverse_model is not None, "the model has no inverse model"
    n_bins = model.inverse_model.n_bins
    pairs = encode(model.encoder, views.float(), trained=False)
    predicted = model.inverse_model(pairs[:, 0], pairs[:, 1]).argmax(1).cpu()
    true = command_bins(torch.from_numpy(relative_windows(commands, convention=convention)), n_bins)
    windows, flips = _windows(predicted, n_bins, commands, convention)
    return Predictions(
        true_bins=true.numpy(),
        predicted_bins=predicted.numpy(),
        windows=windows,
        flips=flips,
        best_windows=_windows(true, n_bins, commands, convention)[0],
    )


def _windows(
    bins: Tensor, n_bins: int, commands: Commands, convention: Convention
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    command = bin_centers(bins, n_bins).numpy()
    # Crop boxes have no shear, but the center of its bin may differ from 0, which would displace them.
    command[:, 0, 1] = command[:, 1, 0] = 0
    return windows_of(following_windows(window_matrices(commands)[:, 0], command, convention))


def overlap(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Intersection over union, 0 to 1, of two crop boxes (left, top, width, height)."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[:2] + first[2:], second[:2] + second[2:])
    common = float(np.prod(np.maximum(high - low, 0)))
    return common / (float(np.prod(first[2:])) + float(np.prod(second[2:])) - common)


def confusion(model: Model, batches: Iterable[Batch], convention: Convention) -> NDArray[np.int64]:
    """[2, 3, K, K]: for each entry, the number of pairs with a true bin (row) and a predicted bin (column).

    Pairs with a solarized view are excluded, as in training.
    """
    assert model.inverse_model is not None, "the model has no inverse model"
    n_bins = model.inverse_model.n_bins
    counts = np.zeros((*COMMAND_SHAPE, n_bins, n_bins), np.int64)
    row, column = np.indices(COMMAND_SHAPE)
    for batch in batches:
        predicted = predictions(model, batch.views, batch.commands, convention)
        plain = ~batch.commands.solarize.any(axis=1)
        np.add.at(counts, (row, column, predicted.true_bins[plain], predicted.predicted_bins[plain]), 1)
    return counts
