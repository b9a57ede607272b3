"""The inverse model's loss: the values of its targets, their bins, and the loss of each target.

Shapes: N pairs of views, K outputs per entry, R x C entries of a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.commands import Commands
from pipelines.devices import to_device
from stec.config import TargetName
from stec.distributed.processes import num_processes, total
from stec.geometry import Convention
from stec.targets import TARGETS, Pairs, Target

WINDOW = TARGETS["window"]


@dataclass(frozen=True, kw_only=True)
class EfferenceCopy:
    """What the inverse model is asked about each pair of views."""

    weights: Mapping[TargetName, float] = field(default_factory=lambda: {"window": 1.0})
    """The predicted targets, each with the weight of its loss."""
    convention: Convention = "official"
    jitter_strength: float = 1.0
    both_ways: bool = False
    """Whether it is also asked from view j to view i."""

    def values(
        self, commands: Sequence[Commands], view_size_px: int, device: torch.device
    ) -> dict[TargetName, tuple[Tensor, Tensor]]:
        """For each target the values float32 [N, R, C] and the valid pairs bool [N] of micro-batches.

        N is the number of images in total; with ``both_ways`` twice that, first all pairs from i to j. All of it is
        copied to ``device`` at once.
        """
        columns = []
        for name in self.weights:
            target, by_direction = TARGETS[name], []
            for from_view, to_view in ((0, 1), (1, 0))[: 1 + self.both_ways]:
                for part in commands:
                    pairs = Pairs(
                        commands=part,
                        view_size_px=view_size_px,
                        jitter_strength=self.jitter_strength,
                        convention=self.convention,
                        from_view=from_view,
                        to_view=to_view,
                    )
                    values = target.values(pairs).reshape(len(part.gray), -1)
                    by_direction.append(np.concatenate([values, target.valid(part)[:, None]], axis=1, dtype=np.float32))
            columns.append(np.concatenate(by_direction))
        packed = to_device(np.concatenate(columns, axis=1), device)
        result, first = {}, 0
        for name, of_target in zip(self.weights, columns, strict=True):
            last = first + of_target.shape[1] - 1
            result[name] = (packed[:, first:last].unflatten(1, TARGETS[name].shape), packed[:, last] != 0)
            first = last + 1
        return result


def value_bins(values: Tensor, n_bins: int, target: Target = WINDOW) -> Tensor:
    """The bin of each value [N, R, C]: int64 [N, R, C], 0 to ``n_bins`` - 1.

    The bins of a column are equal from -limit to limit (for ``window`` 2, and 0.5 for the translation); values outside
    are in the outermost.
    """
    # Column by column: a tensor of the limits would be copied to a GPU, for which the host waits.
    columns = zip(values.unbind(-1), target.limits, strict=True)
    fraction = torch.stack([(column + limit) / (2 * limit) for column, limit in columns], dim=-1)
    return torch.clamp(torch.round(fraction * n_bins - 0.5), 0, n_bins - 1).long()


def bin_centers(bins: Tensor, n_bins: int, target: Target = WINDOW) -> Tensor:
    """The centers of bins: float32 [N, R, C] for int64 [N, R, C], numbered as in ``value_bins``."""
    limits = torch.tensor(target.limits, device=bins.device)
    return ((bins + 0.5) / n_bins * 2 - 1) * limits


def inverse_loss(outputs: Tensor, values: Tensor, valid: Tensor, target: Target = WINDOW) -> tuple[Tensor, Tensor]:
    """The loss of a target, given the inverse model's outputs [N, K, R, C] and the true values [N, R, C].

    The mean is over the pairs of *all* processes for which ``valid`` [N] is true; each process returns its sum times
    the number of processes over their count, and 0 if there are none. Also returns a score without gradient. For bins
    and classes it is the accuracy over all entries of all pairs of this process, valid or not, as in the official code;
    for regression it is R2, the mean over entries, of the valid pairs of all processes.
    """
    outputs = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
    if target.loss == "regression":
        per_pair = (outputs[:, 0] - values).square().mean(dim=(1, 2))
        score = _r2(outputs.detach()[:, 0], values, valid)
    else:
        indices = value_bins(values, outputs.shape[1], target) if target.loss == "bins" else values.long()
        per_pair = F.cross_entropy(outputs, indices, reduction="none").mean(dim=(1, 2))
        score = (outputs.detach().argmax(1) == indices).float().mean()
    valid_pairs = total(valid.sum().to(per_pair.dtype))
    # where, not a product: the loss of an invalid pair must not reach the sum even if it is not finite.
    of_process = torch.where(valid, per_pair, torch.zeros_like(per_pair)).sum()
    return of_process * num_processes() / valid_pairs.clamp(min=1), score


def _r2(predicted: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """The coefficient of determination of each entry, their mean; 0 for an entry that does not vary."""
    true = values.double()
    terms = torch.stack([torch.ones_like(true), true, true.square(), (true - predicted.double()).square()])
    count, first, second, residual = total(torch.where(valid[:, None, None], terms, 0.0).sum(1))
    variance = second - first.square() / count.clamp(min=1)
    return torch.where(variance > 1e-9 * second, 1 - residual / variance.clamp(min=1e-30), 0.0).mean()


def metric_name(kind: str, name: TargetName) -> str:
    """The name of a target's metric: ``inverse_loss`` and ``inverse_accuracy`` of ``window``, otherwise with its name.

    ``kind`` is loss or score, which is the accuracy or, for regression, R2.
    """
    if kind == "score":
        kind = "r2" if TARGETS[name].loss == "regression" else "accuracy"
    return f"inverse_{kind}" if name == "window" else f"inverse_{kind}_{name}"
