"""The predictions of an inverse model for pairs of views, with the true values, and the crop boxes that follow.

Shapes: N pairs of views, K bins or classes, R x C entries of a target.
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
from stec.config import TargetName
from stec.geometry import Convention, following_windows, window_matrices, windows_of
from stec.models.model import Model, encode
from stec.objectives.inverse import EfferenceCopy, bin_centers, value_bins
from stec.targets import TARGETS


@dataclass(frozen=True, kw_only=True)
class TargetPredictions:
    """True and predicted entries of one target."""

    true: NDArray[np.float32]
    """[N, R, C]."""
    predicted: NDArray[np.float32]
    """[N, R, C]: the centers of predicted bins, the indices of predicted classes, or the predicted values."""
    valid: NDArray[np.bool_]
    """[N]: the pairs that training includes."""
    n_bins: int
    """K; 1 for regression."""
    true_bins: NDArray[np.int64]
    """[N, R, C]: true bins or classes; 0 for regression."""
    predicted_bins: NDArray[np.int64]
    """[N, R, C]: those with the largest logits; 0 for regression."""


@dataclass(frozen=True, kw_only=True)
class CropBoxes:
    """The crop boxes of view j that follow from commands from view i to view j."""

    windows: NDArray[np.float64]
    """[N, 4]: left, top, width and height, as fractions of the image; they may reach beyond it."""
    flips: NDArray[np.bool_]
    """[N]: whether they are flipped."""


def efference_copy(model: Model, convention: Convention, jitter_strength: float) -> EfferenceCopy:
    """What a trained model predicts, of views whose jitter has this strength."""
    names: list[TargetName] = [name for name in TARGETS if name in model.inverse_models]
    return EfferenceCopy(weights=dict.fromkeys(names, 1.0), convention=convention, jitter_strength=jitter_strength)


@torch.no_grad()
def predictions(
    model: Model, views: Tensor, commands: Commands, copy: EfferenceCopy
) -> dict[TargetName, TargetPredictions]:
    """Predictions for the pairs ``views`` [N, 2, 3, H, W] of ``commands``, by a model in evaluation mode.

    From view i to view j, also if the model was trained both ways.
    """
    pairs = encode(model.encoder, views.float(), trained=False, with_layer3=model.inverse_from_layer3)
    # With both ways, those from view j to view i follow.
    all_outputs = {name: outputs[: len(pairs)].cpu() for name, outputs in model.heads(pairs, pairs).inverse.items()}
    by_target = {}
    for name, (true, valid) in copy.values([commands], views.shape[-1], torch.device("cpu")).items():
        target, outputs = TARGETS[name], all_outputs[name]
        n_bins, bins = outputs.shape[1], outputs.argmax(1)
        if target.loss == "bins":
            true_bins, predicted = value_bins(true, n_bins, target), bin_centers(bins, n_bins, target)
        elif target.loss == "classes":
            true_bins, predicted = true.long(), bins.float()
        else:
            true_bins, predicted = torch.zeros_like(bins), outputs[:, 0].float()
        by_target[name] = TargetPredictions(
            true=true.numpy(),
            predicted=predicted.numpy(),
            valid=valid.numpy(),
            n_bins=n_bins,
            true_bins=true_bins.numpy(),
            predicted_bins=bins.numpy(),
        )
    return by_target


def crop_boxes(bins: NDArray[np.int64], n_bins: int, commands: Commands, convention: Convention) -> CropBoxes:
    """The crop boxes of view j for bins [N, 2, 3] of ``window``, given view i."""
    command = bin_centers(torch.from_numpy(bins), n_bins).numpy()
    # Crop boxes have no shear, but the center of its bin may differ from 0, which would displace them.
    command[:, 0, 1] = command[:, 1, 0] = 0
    windows, flips = windows_of(following_windows(window_matrices(commands)[:, 0], command, convention))
    return CropBoxes(windows=windows, flips=flips)


def overlap(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Intersection over union, 0 to 1, of two crop boxes (left, top, width, height)."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[:2] + first[2:], second[:2] + second[2:])
    common = float(np.prod(np.maximum(high - low, 0)))
    return common / (float(np.prod(first[2:])) + float(np.prod(second[2:])) - common)


def predictions_of_batches(
    model: Model, batches: Iterable[Batch], copy: EfferenceCopy
) -> dict[TargetName, TargetPredictions]:
    """The predictions for all pairs of some batches that training includes."""
    parts = [predictions(model, batch.views, batch.commands, copy) for batch in batches]
    names = ("true", "predicted", "true_bins", "predicted_bins")
    collected = {}
    for target in copy.weights:
        of_target = [part[target] for part in parts]
        valid = np.concatenate([part.valid for part in of_target])
        values = {name: np.concatenate([getattr(part, name) for part in of_target])[valid] for name in names}
        collected[target] = TargetPredictions(valid=valid[valid], n_bins=of_target[0].n_bins, **values)
    return collected


def confusion(predicted: TargetPredictions) -> NDArray[np.int64]:
    """[R, C, K, K]: for each entry, the number of pairs with a true bin (row) and a predicted bin (column)."""
    shape, n_bins = predicted.true.shape[1:], predicted.n_bins
    counts = np.zeros((*shape, n_bins, n_bins), np.int64)
    row, column = np.indices(shape)
    np.add.at(counts, (row, column, predicted.true_bins, predicted.predicted_bins), 1)
    return counts


def r2(predicted: TargetPredictions) -> NDArray[np.float64]:
    """[R, C]: the coefficient of determination of each entry; NaN for one that does not vary."""
    variance = (predicted.true - predicted.true.mean(axis=0)).astype(np.float64)
    residual = (predicted.true - predicted.predicted).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: NDArray[np.float64] = 1 - np.square(residual).sum(axis=0) / np.square(variance).sum(axis=0)
    return result
