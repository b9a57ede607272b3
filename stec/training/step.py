"""The gradient of one global batch: at once, or chunk by chunk where that does not fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipelines.batch import Batch
from stec.models.batch_norm import synchronize, untracked
from stec.models.model import Model, encode
from stec.objectives.geometry import Convention, relative_windows
from stec.objectives.objective import Objective
from stec.profiling import part


class Step:
    """Called with the chunks of a global batch, it leaves the gradient in the parameters of ``model``.

    A contrastive loss is no sum over chunks, so several chunks take gradient caching (Gao et al. 2021, "Scaling Deep
    Contrastive Learning Batch Size under Memory Limited Setup"): the features of all chunks, without a graph; the loss
    of all of them, and its gradient down to the features; then each chunk's features once more, now with a graph, to
    carry that gradient on to the encoder. Only the encoder works in chunks: the heads see all features at once.

    Encoder and heads are wrapped apart, as their gradients are complete, and averaged over processes, at different
    moments.
    """

    def __init__(self, model: Model, objective: Objective, accelerator: Accelerator, *, affine: Convention) -> None:
        synchronize(model, accelerator.device)
        self.model, self.objective, self.accelerator, self.affine = model, objective, accelerator, affine
        # A module without anything to train must not be wrapped for training.
        self.encoder: nn.Module = accelerator.prepare_model(
            model.encoder, evaluation_mode=not model.views_train_encoder
        )
        self.heads: nn.Module = accelerator.prepare_model(model.heads)

    def __call__(self, chunks: Sequence[Batch]) -> Tensor:
        """The values of ``METRICS`` for this process's share."""
        passes = [(chunk.views, self.model.views_train_encoder) for chunk in chunks]
        passes += [
            (chunk.labeled_views, self.model.classifier_trains_encoder)
            for chunk in chunks
            if chunk.labeled_views is not None
        ]
        cached = len(chunks) > 1
        with torch.set_grad_enabled(not cached), part("encoder"):
            features = [encode(self.encoder, views, trained=trained) for views, trained in passes]
        if cached:
            features = [f.requires_grad_(trained) for f, (_, trained) in zip(features, passes, strict=True)]

        with part("heads"):
            outputs = self.heads(
                torch.cat(features[: len(chunks)]), torch.cat(features[len(chunks) :] or features[: len(chunks)])
            )
        with part("commands and masks"):
            targets = _targets(chunks, self.affine) if outputs.command_logits is not None else ()
        loss, metrics = self.objective(outputs, torch.cat([chunk.labels for chunk in chunks]), *targets)
        with part("backward"):
            self.accelerator.backward(loss)
            if cached:
                self._backward_through_encoder(
                    [(views, f.grad) for f, (views, trained) in zip(features, passes, strict=True) if trained]
                )
        return metrics

    def _backward_through_encoder(self, gradients: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Carry the gradients of features on to the encoder's parameters, a pass at a time."""
        # The first time counted for the running statistics.
        with untracked(self.encoder):
            for n, (views, gradient) in enumerate(gradients):
                last = n == len(gradients) - 1
                with nullcontext() if last else self.accelerator.no_sync(self.encoder):
                    encode(self.encoder, views, trained=True).backward(gradient)


def _targets(chunks: Sequence[Batch], affine: Convention) -> tuple[Tensor, Tensor]:
    """The commands from view i to view j [N, 2, 3], and which pairs the inverse model is asked about [N] bool."""
    device = chunks[0].views.device
    commands = [torch.from_numpy(relative_windows(chunk.commands, convention=affine)) for chunk in chunks]
    valid = [torch.from_numpy(~chunk.commands.solarize.any(axis=1)) for chunk in chunks]
    return torch.cat(commands).to(device, non_blocking=True), torch.cat(valid).to(device, non_blocking=True)
