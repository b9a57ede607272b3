"""The weighted sum of the contrastive loss, the inverse model's loss and the online classifier's loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stec.config import ObjectiveSettings
from stec.models.model import Outputs
from stec.objectives.inverse import inverse_loss
from stec.objectives.simclr import nt_xent
from stec.profiling import part


class Objective:
    """The weighted sum of the losses.

    Its arguments are the model's outputs for N images, their labels int64 [N] and, if there is an inverse model, the
    commands from view i to view j [N, 2, 3] and the pairs that its loss includes (``valid`` bool [N]). It returns the
    loss and the metrics: names with float32 scalars, on the device and without gradient. A head that the model does
    not have contributes neither loss nor metrics.
    """

    def __init__(self, settings: ObjectiveSettings) -> None:
        self.settings = settings

    def __call__(
        self, outputs: Outputs, labels: Tensor, command: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = torch.zeros((), device=labels.device), {}
        if outputs.projections is not None:
            z_i, z_j = outputs.projections.unbind(1)
            with part("NT-Xent"):
                contrastive, accuracy, cross_view_accuracy, entropy = nt_xent(z_i, z_j, self.settings.temperature)
            loss = loss + self.settings.discrimination_lambda * contrastive
            metrics["contrastive_loss"], metrics["contrastive_accuracy"] = contrastive, accuracy
            metrics["cross_view_accuracy"], metrics["cross_view_entropy"] = cross_view_accuracy, entropy
        if outputs.command_logits is not None:
            assert command is not None and valid is not None, "the inverse model needs commands"
            with part("inverse loss"):
                inverse, accuracy = inverse_loss(outputs.command_logits, command, valid)
            loss = loss + self.settings.manip_lambda * inverse
            metrics["inverse_loss"], metrics["inverse_accuracy"] = inverse, accuracy
        if outputs.class_logits is not None:
            with part("classifier loss"):
                logits = outputs.class_logits.flatten(0, 1)
                logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
                classes = labels.repeat_interleave(outputs.class_logits.shape[1])
                classifier = F.cross_entropy(logits, classes)
                accuracy = (logits.detach().argmax(1) == classes).float().mean()
            loss = loss + self.settings.supervised_lambda * classifier
            metrics["classifier_loss"], metrics["classifier_accuracy"] = classifier, accuracy
        return loss, {name: value.detach().float() for name, value in {"loss": loss, **metrics}.items()}
