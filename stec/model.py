"""The whole model: one encoder and three heads, from two views to everything the objective needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stec.encoder import Encoder, Stem
from stec.heads import InverseModel, Projection, make_probe

DEFAULT_HIDDEN_MLP = {"resnet18": 512, "resnet50": 2048}
"""Width of the projection's hidden layer where ``hidden_mlp`` is -1, by architecture, as in the official code."""


class Outputs(NamedTuple):
    """What the model makes of N pairs of views."""

    projections: Tensor | None
    """[N, 2, F]: unit vectors; None where only the probe is trained."""
    command_logits: Tensor | None
    """[N, K, 2, 3]: of the command from view i to view j; None without an inverse model (SimCLR)."""
    class_logits: Tensor | None
    """[N, V, C]: of the probe; None without labels."""


class Model(nn.Module):
    """S-TEC's model; without the inverse model it is SimCLR's.

    ``classes`` 0 means that there are no labels and so no probe. ``hidden_mlp`` -1 stands for the architecture's own
    width. ``stop_gradient`` 1: the probe's gradient stops at the features; 0: it reaches the encoder; 2: there is only
    the probe to train, on a frozen encoder in evaluation mode.
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
        stop_gradient: int = 1,
    ) -> None:
        super().__init__()
        self.stop_gradient = stop_gradient
        self.projection: Projection | None
        self.inverse_model: InverseModel | None
        self.probe: nn.Linear | None
        self.encoder = Encoder(arch, stem, width)
        feature_dim = self.encoder.feature_dim
        hidden_dim = DEFAULT_HIDDEN_MLP[arch] if hidden_mlp == -1 else hidden_mlp
        self.probe = make_probe(feature_dim, classes) if classes else None
        self.projection = self.inverse_model = None
        if stop_gradient == 2:
            self.encoder.requires_grad_(False)
            return
        self.projection = Projection(feature_dim, hidden_dim, feat_dim)
        if with_inverse_model:
            self.inverse_model = InverseModel(feature_dim, manip_hidden_mlp, n_bins)

    def train(self, mode: bool = True) -> Model:
        """As in any module, but a frozen encoder always stays in evaluation mode."""
        super().train(mode)
        if self.stop_gradient == 2:
            self.encoder.eval()
        return self

    def forward(self, views: Tensor, probe_views: Tensor | None = None) -> Outputs:
        """``views`` [N, V, 3, H, W] in [0, 1]; V = 2, or any number where only the probe is trained.

        All views pass the encoder as one batch, so that batch norm sees i and j together (official behaviour).
        ``probe_views`` [N, 1, 3, H, W] are what the probe sees instead of ``views``.
        """
        if self.projection is None:
            with torch.no_grad():
                pairs = self._features(views)
            return Outputs(projections=None, command_logits=None, class_logits=self._probed(pairs))
        pairs = self._features(views)
        probed = pairs
        if probe_views is not None:
            # Without gradients from the start, unless the probe is to train the encoder.
            with torch.set_grad_enabled(self.stop_gradient == 0):
                probed = self._features(probe_views)
        return Outputs(
            projections=self.projection(pairs.flatten(0, 1)).view(len(views), 2, -1),
            command_logits=self.inverse_model(pairs[:, 0], pairs[:, 1]) if self.inverse_model is not None else None,
            class_logits=self._probed(probed if self.stop_gradient == 0 else probed.detach()),
        )

    def _probed(self, features: Tensor) -> Tensor | None:
        return self.probe(features) if self.probe is not None else None

    def _features(self, views: Tensor) -> Tensor:
        """[N, V, D] of views [N, V, 3, H, W]."""
        features: Tensor = self.encoder(views.flatten(0, 1))
        return features.view(*views.shape[:2], -1)
