"""The weighted sum of the base objective, the inverse model's losses and the online classifier's loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from stec.config import ObjectiveSettings, TargetName
from stec.models.model import Outputs
from stec.objectives.inverse import inverse_loss, metric_name
from stec.objectives.registry import BASE_OBJECTIVES
from stec.profiling import part
from stec.targets import TARGETS


class Objective:
    """The weighted sum of the losses.

    Its arguments are the model's outputs for N images, their labels int64 [N] and, for each target that is predicted,
    its values [M, R, C] and the pairs that its loss includes (bool [M]), as ``EfferenceCopy.values`` computes them. It
    returns the loss and the metrics: names with float32 scalars, on the device and without gradient. A head that the
    model does not have contributes neither loss nor metrics. ``target_weights`` are the weights of the targets within
    the inverse model's loss; those of the table by default.
    """

    def __init__(self, settings: ObjectiveSettings, target_weights: Mapping[TargetName, float] | None = None) -> None:
        self.settings, self.base = settings, BASE_OBJECTIVES[settings.objective]
        self.target_weights = target_weights or {name: target.weight for name, target in TARGETS.items()}

    def __call__(
        self,
        outputs: Outputs,
        labels: Tensor,
        values: Mapping[TargetName, tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = torch.zeros((), device=labels.device)
        metrics: dict[str, Tensor] = {}
        if outputs.projections is not None:
            with part("base objective"):
                base, metrics = self.base.loss(outputs, self.settings)
            loss = loss + self.settings.discrimination_lambda * base
        if outputs.inverse:
            assert values is not None, "the inverse model needs commands"
            with part("inverse loss"):
                inverse = torch.zeros((), device=labels.device)
                for name, (true, valid) in values.items():
                    of_target, score = inverse_loss(outputs.inverse[name], true, valid, TARGETS[name])
                    inverse = inverse + self.target_weights[name] * of_target
                    metrics |= {metric_name("loss", name): of_target, metric_name("score", name): score}
            loss = loss + self.settings.manip_lambda * inverse
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
