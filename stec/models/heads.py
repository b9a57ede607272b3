"""The heads on top of the encoder: projection, predictor, inverse model, online linear classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

COMMAND_SHAPE = (2, 3)
"""The command from view i to view j: the first two rows of a 3x3 matrix."""


class Projection(nn.Module):
    """Maps features [N, D] to unit vectors [N, F], which NT-Xent compares.

    The last batch norm has no learned bias, as in SimCLR.
    """

    def __init__(self, feature_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(feature_dim, hidden_dim)
        self.bn_hidden = nn.BatchNorm1d(hidden_dim)
        self.output = nn.Linear(hidden_dim, output_dim, bias=False)
        self.bn_output = nn.BatchNorm1d(output_dim)
        self.bn_output.bias.requires_grad = False

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.relu(self.bn_hidden(self.hidden(features)))
        return F.normalize(self.bn_output(self.output(hidden)), dim=1)


class Mlp(nn.Module):
    """Maps vectors [N, D] to vectors [N, F]: linear, batch norm, ReLU, linear without bias (BYOL's MLPs)."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_dim, hidden_dim)
        self.bn_hidden = nn.BatchNorm1d(hidden_dim)
        self.output = nn.Linear(hidden_dim, output_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.output(torch.relu(self.bn_hidden(self.hidden(x))))
        return y


@dataclass(frozen=True, kw_only=True)
class BaseHeads:
    """The heads of a base objective, each made from its input, hidden and output dimensions."""

    projection: Callable[[int, int, int], nn.Module] = Projection
    predictor: Callable[[int, int, int], nn.Module] | None = None
    """Maps projections to predictions of the target network's projections."""
    has_target_network: bool = False


class InverseModel(nn.Module):
    """Maps features of two views, each [N, D], to K outputs [N, K, R, C] for each entry of a target.

    They are logits of bins (``n_bins`` is K) or classes, or with K = 1 the value itself. By default the entries are
    those of the command.
    """

    def __init__(self, feature_dim: int, hidden_dim: int, n_bins: int, shape: tuple[int, int] = COMMAND_SHAPE) -> None:
        super().__init__()
        self.n_bins, self.shape = n_bins, shape
        self.hidden = nn.Linear(2 * feature_dim, hidden_dim)
        self.bn_hidden = nn.BatchNorm1d(hidden_dim)
        self.output = nn.Linear(hidden_dim, n_bins * shape[0] * shape[1])

    def forward(self, features_i: Tensor, features_j: Tensor) -> Tensor:
        hidden = torch.relu(self.bn_hidden(self.hidden(torch.cat([features_i, features_j], dim=1))))
        outputs: Tensor = self.output(hidden)
        return outputs.view(-1, self.n_bins, *self.shape)


def make_classifier(feature_dim: int, classes: int) -> nn.Linear:
    """A linear classifier of features [N, D], with the official initial weights."""
    classifier = nn.Linear(feature_dim, classes)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    return classifier
