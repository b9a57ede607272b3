"""The gradient of one global batch, computed at once or in micro-batches if the batch does not fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipelines.batch import Batch
from stec.models.batch_norm import synchronize, untracked
from stec.models.model import Model, encode
from stec.objectives.inverse import EfferenceCopy
from stec.objectives.objective import Objective
from stec.profiling import part


class Step:
    """Called with the micro-batches of a global batch, computes the gradient of the parameters of ``model``.

    A contrastive loss is not a sum over micro-batches, so several micro-batches need gradient caching (Gao et al. 2021,
    "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): the features of all micro-batches are
    computed without a graph, then the loss of all of them and its gradient with respect to the features, then the
    features of each micro-batch again with a graph, through which that gradient is propagated to the encoder. Only the
    encoder works in micro-batches: the heads get all features at once.

    Encoder and heads are wrapped separately, as their gradients are complete, and averaged over processes, at different
    moments.
    """

    def __init__(self, model: Model, objective: Objective, accelerator: Accelerator, copy: EfferenceCopy) -> None:
        synchronize(model)
        self.model, self.objective, self.accelerator, self.copy = model, objective, accelerator, copy
        # A module without trainable parameters must not be wrapped for training.
        self.encoder: nn.Module = accelerator.prepare_model(
            model.encoder, evaluation_mode=not model.views_train_encoder
        )
        self.heads: nn.Module = accelerator.prepare_model(model.heads)
        if model.target_network is not None:
            # In mixed precision as well.
            for module in (model.target_network.encoder, model.target_network.projection):
                accelerator.prepare_model(module, evaluation_mode=True)

    def __call__(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Compute the gradient; returns the metrics of the images of this process."""
        inputs = [(batch.views, self.model.views_train_encoder) for batch in micro_batches]
        inputs += [
            (batch.labeled_views, self.model.classifier_trains_encoder)
            for batch in micro_batches
            if batch.labeled_views is not None
        ]
        cached = len(micro_batches) > 1
        with torch.set_grad_enabled(not cached), part("encoder"):
            features = [self._encode(views, trained) for views, trained in inputs]
        if cached:
            features = [f.requires_grad_(trained) for f, (_, trained) in zip(features, inputs, strict=True)]

        pairs, labeled = features[: len(micro_batches)], features[len(micro_batches) :]
        with part("heads"):
            outputs = self.heads(torch.cat(pairs), torch.cat(labeled or pairs))
        if self.model.target_network is not None:
            with part("target network"):
                projections = self.model.target_network([batch.views for batch in micro_batches])
                outputs = outputs._replace(target_projections=projections)
        values = None
        with part("commands and masks"):
            if outputs.inverse:
                views = micro_batches[0].views
                values = self.copy.values([batch.commands for batch in micro_batches], views.shape[-1], views.device)
        loss, metrics = self.objective(outputs, torch.cat([batch.labels for batch in micro_batches]), values)
        with part("backward"):
            self.accelerator.backward(loss)
            if cached:
                self._backward_through_encoder(
                    [(views, f.grad) for f, (views, trained) in zip(features, inputs, strict=True) if trained]
                )
        return metrics

    def _encode(self, views: Tensor, trained: bool) -> Tensor:
        return encode(self.encoder, views, trained=trained, with_layer3=self.model.inverse_from_layer3)

    def _backward_through_encoder(self, gradients: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Propagate the gradients of features to the encoder's parameters, for one group of views after another."""
        # The first forward pass has updated the running statistics.
        with untracked(self.encoder):
            for n, (views, gradient) in enumerate(gradients):
                last = n == len(gradients) - 1
                with nullcontext() if last else self.accelerator.no_sync(self.encoder):
                    self._encode(views, True).backward(gradient)
