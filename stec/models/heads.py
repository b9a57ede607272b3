"""The heads on top of the encoder: projection, inverse model, online linear classifier."""

from __future__ import annotations

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


class InverseModel(nn.Module):
    """Maps features of views i and j, each [N, D], to logits [N, K, 2, 3] over K bins of the command's entries."""

    def __init__(self, feature_dim: int, hidden_dim: int, n_bins: int) -> None:
        super().__init__()
        self.n_bins = n_bins
        self.hidden = nn.Linear(2 * feature_dim, hidden_dim)
        self.bn_hidden = nn.BatchNorm1d(hidden_dim)
        self.output = nn.Linear(hidden_dim, n_bins * COMMAND_SHAPE[0] * COMMAND_SHAPE[1])

    def forward(self, features_i: Tensor, features_j: Tensor) -> Tensor:
        hidden = torch.relu(self.bn_hidden(self.hidden(torch.cat([features_i, features_j], dim=1))))
        logits: Tensor = self.output(hidden)
        return logits.view(-1, self.n_bins, *COMMAND_SHAPE)


def make_classifier(feature_dim: int, classes: int) -> nn.Linear:
    """A linear classifier of features [N, D], with the official initial weights."""
    classifier = nn.Linear(feature_dim, classes)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    return classifier
