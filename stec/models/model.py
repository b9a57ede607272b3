"""The model: an encoder and its heads, from two views to everything that the objective needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stec.architectures import ARCHITECTURES, is_timm
from stec.config import ModelSettings
from stec.models.encoder import Encoder, ImageEncoder, Stem
from stec.models.heads import BaseHeads, InverseModel, make_classifier
from stec.models.target_network import TargetNetwork
from stec.models.timm_encoder import TimmEncoder
from stec.targets import TARGETS


class Outputs(NamedTuple):
    """The outputs of the heads for N pairs of views."""

    projections: Tensor | None
    """What the base objective compares [N, 2, F]: projections, or predictions where there is a predictor; None if only
    the online linear classifier is trained."""
    inverse: Mapping[str, Tensor]
    """For each predicted target the outputs [M, K, R, C] of its inverse model from view i to view j; M is N, or 2 N
    with those from view j to view i behind. Empty without an inverse model."""
    class_logits: Tensor | None
    """Logits [N, V, C] of the online linear classifier; None without labels."""
    target_projections: Tensor | None = None
    """The target network's projections [N, 2, F], without gradient; None without such a network."""


def make_encoder(settings: ModelSettings, stem: Stem | None, view_size_px: int | None) -> ImageEncoder:
    """The encoder with new weights: a ResNet with a stem, or timm's network for views of a size.

    Raises UserError if timm is missing, has no such network, or the network does not encode such views.
    """
    normalize = settings.normalize or "none"
    if is_timm(settings.arch):
        assert view_size_px is not None
        return TimmEncoder(settings.arch, view_size_px, normalize)
    assert stem is not None
    return Encoder(settings.arch, stem, settings.width, normalize)


def encode(encoder: nn.Module, views: Tensor, *, trained: bool, with_layer3: bool = False) -> Tensor:
    """Features [N, V, D] of views [N, V, 3, H, W], without gradient unless ``trained``.

    The encoder processes all views as one batch, so that batch norm computes statistics over both (as officially).
    """
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        images = views.flatten(0, 1)
        features: Tensor = encoder(images, with_layer3=True) if with_layer3 else encoder(images)
    return features.view(*views.shape[:2], -1)


class Heads(nn.Module):
    """A model's heads as one module: from features to everything the objective needs.

    ``pairs`` are the features [N, 2, D] of both views (or [N, V, D] if only the online classifier is trained), followed
    by those of the third stage if ``inverse_from_layer3``. ``classified`` are the features [N, V, D] that the online
    classifier classifies; they are detached unless ``classifier_trains_encoder``.
    """

    def __init__(
        self,
        projection: nn.Module | None,
        predictor: nn.Module | None,
        inverse_models: nn.ModuleDict,
        classifier: nn.Linear | None,
        *,
        feature_dim: int,
        classifier_trains_encoder: bool,
        inverse_from_layer3: bool,
        predict_both_ways: bool,
    ) -> None:
        super().__init__()
        self.projection, self.predictor, self.classifier = projection, predictor, classifier
        self.inverse_models = inverse_models
        self.feature_dim, self.classifier_trains_encoder = feature_dim, classifier_trains_encoder
        self.inverse_from_layer3, self.predict_both_ways = inverse_from_layer3, predict_both_ways

    def forward(self, pairs: Tensor, classified: Tensor) -> Outputs:
        projections = class_logits = None
        features = pairs[..., : self.feature_dim]
        if self.projection is not None:
            projections = self.projection(features.flatten(0, 1))
            if self.predictor is not None:
                projections = self.predictor(projections)
            projections = projections.view(len(pairs), 2, -1)
        inverse = {}
        if self.inverse_models:
            h_i, h_j = (pairs[..., self.feature_dim :] if self.inverse_from_layer3 else features).unbind(1)
            if self.predict_both_ways:
                h_i, h_j = torch.cat([h_i, h_j]), torch.cat([h_j, h_i])
            inverse = {name: inverse_model(h_i, h_j) for name, inverse_model in self.inverse_models.items()}
        if self.classifier is not None:
            classified = classified[..., : self.feature_dim]
            class_logits = self.classifier(classified if self.classifier_trains_encoder else classified.detach())
        return Outputs(projections, inverse, class_logits)


class Model(nn.Module):
    """S-TEC's model; without inverse models it is that of the base objective.

    ``classes`` 0 means that there are no labels and therefore no online classifier. With ``stop_gradient`` 1 the
    gradient of the online classifier stops at the features, with 0 it also trains the encoder, and with 2 the online
    classifier is the only head, on a frozen encoder in evaluation mode. ``base`` are the heads of the base objective,
    SimCLR's by default. ResNets need a ``stem``, encoders of timm the size of the views.
    """

    def __init__(
        self,
        settings: ModelSettings,
        *,
        stem: Stem | None,
        view_size_px: int | None = None,
        classes: int,
        base: BaseHeads | None = None,
        with_inverse_model: bool = True,
        stop_gradient: int = 1,
        predict_both_ways: bool = False,
    ) -> None:
        super().__init__()
        base = base or BaseHeads()
        self.stop_gradient, self.predict_both_ways = stop_gradient, predict_both_ways
        self.projection: nn.Module | None
        self.predictor: nn.Module | None
        self.classifier: nn.Linear | None
        self.target_network: TargetNetwork | None
        self.encoder = make_encoder(settings, stem, view_size_px)
        feature_dim = self.encoder.feature_dim
        default_dim = feature_dim if is_timm(settings.arch) else ARCHITECTURES[settings.arch].hidden_mlp
        hidden_dim = default_dim if settings.hidden_mlp == -1 else settings.hidden_mlp
        self.classifier = make_classifier(feature_dim, classes) if classes else None
        self.projection = self.predictor = self.target_network = None
        self.inverse_from_layer3 = False
        if stop_gradient == 2:
            self.inverse_models = nn.ModuleDict()
            self.encoder.requires_grad_(False)
            return
        self.projection = base.projection(feature_dim, hidden_dim, settings.feat_dim)
        if base.predictor is not None:
            self.predictor = base.predictor(settings.feat_dim, hidden_dim, settings.feat_dim)
        # Here, as the state of an optimizer has the order of the parameters.
        self.inverse_models = nn.ModuleDict()
        if with_inverse_model:
            self.inverse_from_layer3 = settings.inverse_from == "layer3"
            inverse_dim = self.encoder.layer3_dim if self.inverse_from_layer3 else feature_dim
            for name in settings.predict:
                target = TARGETS[name]
                self.inverse_models[name] = InverseModel(
                    inverse_dim, settings.manip_hidden_mlp, target.outputs(settings.n_bins), target.shape
                )
        if base.has_target_network:
            self.target_network = TargetNetwork(self.encoder, self.projection)

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
        pairs = encode(self.encoder, views, trained=self.views_train_encoder, with_layer3=self.inverse_from_layer3)
        classified = pairs
        if labeled_views is not None:
            classified = encode(self.encoder, labeled_views, trained=self.classifier_trains_encoder)
        outputs: Outputs = self.heads(pairs, classified)
        if self.target_network is not None:
            outputs = outputs._replace(target_projections=self.target_network([views]))
        return outputs

    @property
    def heads(self) -> Heads:
        """The heads as one module, which shares this model's parameters."""
        return Heads(
            self.projection,
            self.predictor,
            self.inverse_models,
            self.classifier,
            feature_dim=self.encoder.feature_dim,
            classifier_trains_encoder=self.classifier_trains_encoder,
            inverse_from_layer3=self.inverse_from_layer3,
            predict_both_ways=self.predict_both_ways,
        )

    def update_target_network(self, momentum: float) -> None:
        """After a step of the optimizer, move the target network, if there is one, toward the online networks."""
        if self.target_network is not None:
            assert self.projection is not None
            self.target_network.update(self.encoder, self.projection, momentum)

    def reset_target_network(self) -> None:
        """Make the target network, if there is one, a copy of the online networks."""
        if self.target_network is not None:
            assert self.projection is not None
            self.target_network = TargetNetwork(self.encoder, self.projection)

    @property
    def views_train_encoder(self) -> bool:
        return self.stop_gradient != 2

    @property
    def classifier_trains_encoder(self) -> bool:
        return self.stop_gradient == 0
