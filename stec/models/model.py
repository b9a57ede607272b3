"""The model: an encoder and three heads, from two views to everything that the objective needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stec.architectures import ARCHITECTURES
from stec.config import ModelSettings
from stec.models.encoder import Encoder, Stem
from stec.models.heads import InverseModel, Projection, make_classifier


class Outputs(NamedTuple):
    """The outputs of the heads for N pairs of views."""

    projections: Tensor | None
    """Unit vectors [N, 2, F]; None if only the online linear classifier is trained."""
    command_logits: Tensor | None
    """Logits [N, K, 2, 3] over K bins of the command from view i to view j; None without an inverse model (SimCLR)."""
    class_logits: Tensor | None
    """Logits [N, V, C] of the online linear classifier; None without labels."""


def encode(encoder: nn.Module, views: Tensor, *, trained: bool) -> Tensor:
    """Features [N, V, D] of views [N, V, 3, H, W], without gradient unless ``trained``.

    The encoder processes all views as one batch, so that batch norm computes statistics over both (as officially).
    """
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        features: Tensor = encoder(views.flatten(0, 1))
    return features.view(*views.shape[:2], -1)


class Heads(nn.Module):
    """A model's heads as one module: from features to everything the objective needs.

    ``pairs`` are the features [N, 2, D] of both views (or [N, V, D] if only the online classifier is trained),
    ``classified`` the features [N, V, D] that the online classifier classifies; they are detached unless
    ``classifier_trains_encoder``.
    """

    def __init__(
        self,
        projection: Projection | None,
        inverse_model: InverseModel | None,
        classifier: nn.Linear | None,
        *,
        classifier_trains_encoder: bool,
    ) -> None:
        super().__init__()
        self.projection, self.inverse_model, self.classifier = projection, inverse_model, classifier
        self.classifier_trains_encoder = classifier_trains_encoder

    def forward(self, pairs: Tensor, classified: Tensor) -> Outputs:
        projections = command_logits = class_logits = None
        if self.projection is not None:
            projections = self.projection(pairs.flatten(0, 1)).view(len(pairs), 2, -1)
        if self.inverse_model is not None:
            command_logits = self.inverse_model(pairs[:, 0], pairs[:, 1])
        if self.classifier is not None:
            class_logits = self.classifier(classified if self.classifier_trains_encoder else classified.detach())
        return Outputs(projections, command_logits, class_logits)


class Model(nn.Module):
    """S-TEC's model; without the inverse model it is SimCLR's.

    ``classes`` 0 means that there are no labels and therefore no online classifier. With ``stop_gradient`` 1 the
    gradient of the online classifier stops at the features, with 0 it also trains the encoder, and with 2 the online
    classifier is the only head, on a frozen encoder in evaluation mode.
    """

    def __init__(
        self,
        settings: ModelSettings,
        *,
        stem: Stem,
        classes: int,
        with_inverse_model: bool = True,
        stop_gradient: int = 1,
    ) -> None:
        super().__init__()
        self.stop_gradient = stop_gradient
        self.projection: Projection | None
        self.inverse_model: InverseModel | None
        self.classifier: nn.Linear | None
        self.encoder = Encoder(settings.arch, stem, settings.width, settings.normalize or "none")
        feature_dim = self.encoder.feature_dim
        default_dim = ARCHITECTURES[settings.arch].hidden_mlp
        hidden_dim = default_dim if settings.hidden_mlp == -1 else settings.hidden_mlp
        self.classifier = make_classifier(feature_dim, classes) if classes else None
        self.projection = self.inverse_model = None
        if stop_gradient == 2:
            self.encoder.requires_grad_(False)
            return
        self.projection = Projection(feature_dim, hidden_dim, settings.feat_dim)
        if with_inverse_model:
            self.inverse_model = InverseModel(feature_dim, settings.manip_hidden_mlp, settings.n_bins)

    def train(self, mode: bool = True) -> Model:
        """Set the mode of all modules, except that a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.stop_gradient == 2:
            self.encoder.eval()
        return self

    def forward(self, views: Tensor, labeled_views: Tensor | None = None) -> Outputs:
        """Compute the outputs for ``views`` [N, V, 3, H, W] in [0, 1].

        V is 2, or any number if only the online classifier is trained. The online classifier classifies
        ``labeled_views`` [N, 1, 3, H, W] if they are given, and otherwise ``views``.
        """
        pairs = encode(self.encoder, views, trained=self.views_train_encoder)
        classified = pairs
        if labeled_views is not None:
            classified = encode(self.encoder, labeled_views, trained=self.classifier_trains_encoder)
        return self.heads(pairs, classified)

    @property
    def heads(self) -> Heads:
        """The heads as one module, which shares this model's parameters."""
        return Heads(
            self.projection,
            self.inverse_model,
            self.classifier,
            classifier_trains_encoder=self.classifier_trains_encoder,
        )

    @property
    def views_train_encoder(self) -> bool:
        return self.stop_gradient != 2

    @property
    def classifier_trains_encoder(self) -> bool:
        return self.stop_gradient == 0
