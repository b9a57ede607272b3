"""The whole model: one encoder and three heads, from two views to everything the objective needs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from stec.encoder import Encoder, Stem
from stec.heads import InverseModel, Projection, make_probe

DEFAULT_HIDDEN_MLP = {"resnet18": 512, "resnet50": 2048}
"""Width of the projection's hidden layer where ``hidden_mlp`` is -1, by architecture, as in the official code."""


class Outputs(NamedTuple):
    """What the model makes of N pairs of views."""

    projections: Tensor
    """[N, 2, F]: unit vectors."""
    command_logits: Tensor | None
    """[N, K, 2, 3]: of the command from view i to view j; None without an inverse model (SimCLR)."""
    class_logits: Tensor
    """[N, 2, C]: of the probe, whose gradient stops at the features."""


class Model(nn.Module):
    """S-TEC's model; without the inverse model it is SimCLR's.

    ``hidden_mlp`` -1 stands for the architecture's own width.
    """

    def __init__(
        self,
        *,
        arch: str,
        stem: Stem,
        classes: int,
        width: int = 64,
        hidden_mlp: int = -1,
        feat_dim: int = 128,
        manip_hidden_mlp: int = 512,
        n_bins: int = 6,
        with_inverse_model: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(arch, stem, width)
        feature_dim = self.encoder.feature_dim
        hidden_dim = DEFAULT_HIDDEN_MLP[arch] if hidden_mlp == -1 else hidden_mlp
        self.projection = Projection(feature_dim, hidden_dim, feat_dim)
        self.inverse_model = InverseModel(feature_dim, manip_hidden_mlp, n_bins) if with_inverse_model else None
        self.probe = make_probe(feature_dim, classes)

    def forward(self, views: Tensor) -> Outputs:
        """``views`` [N, 2, 3, H, W] in [0, 1].

        All views pass the encoder as one batch, so that batch norm sees i and j together (official behaviour).
        """
        features = self.encoder(views.flatten(0, 1))
        pairs = features.view(len(views), 2, -1)
        return Outputs(
            projections=self.projection(features).view(len(views), 2, -1),
            command_logits=self.inverse_model(pairs[:, 0], pairs[:, 1]) if self.inverse_model is not None else None,
            class_logits=self.probe(pairs.detach()),
        )
