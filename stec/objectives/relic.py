"""ReLIC (Mitrovic et al. 2021, "Representation Learning via Invariant Causal Mechanisms", https://arxiv.org/abs/2010.07922).

A contrastive loss against a target network, and a divergence that makes the distribution over instances the same for
both views.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stec.config import ObjectiveSettings
from stec.distributed.processes import gather, process_index
from stec.models.heads import BaseHeads
from stec.models.model import Outputs

HEADS = BaseHeads(has_target_network=True)
"""The paper says of the critic only that it is fully connected; here it is SimCLR's projection."""


def relic_loss(projections: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The contrastive term, the divergence, and the fraction of rows to which the same image is the most similar.

    ``projections`` and ``targets`` are [N, 2, F]. With z the normalized ``projections`` and t the normalized
    ``targets`` of all images of all processes, the distribution over instances of row n is

        p_ij = softmax over m of z_i[n] t_j[m] / temperature

    and p_ji the same with the views exchanged. The contrastive term is the mean of -log p[n] over rows and both
    directions; the divergence is the mean over rows and both orders, ``(KL(p_ij, p_ji) + KL(p_ji, p_ij)) / 2``.
    Gradients flow through both distributions (the paper's objective, for two views).
    Each process returns its mean; the mean over processes is the loss of the global batch.
    """
    z_i, z_j = F.normalize(projections.float(), dim=-1).unbind(1)
    t_i, t_j = gather(F.normalize(targets.float(), dim=-1)).unbind(1)
    own = torch.arange(len(z_i), device=z_i.device) + process_index() * len(z_i)
    logits = torch.stack([z_i @ t_j.T, z_j @ t_i.T]) / temperature
    log_ij, log_ji = log_p = logits.log_softmax(-1)
    contrastive = -log_p[:, torch.arange(len(own), device=own.device), own].mean()
    divergence = 0.5 * ((log_ij.exp() - log_ji.exp()) * (log_ij - log_ji)).sum(1).mean()
    accuracy = (logits.detach().argmax(-1) == own).float().mean()
    return contrastive, divergence, accuracy


def loss(outputs: Outputs, settings: ObjectiveSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this process's pairs, ``contrastive + relic_alpha * divergence``, and the metrics."""
    assert outputs.projections is not None and outputs.target_projections is not None
    contrastive, divergence, accuracy = relic_loss(
        outputs.projections, outputs.target_projections, settings.temperature
    )
    metrics = {"contrastive_loss": contrastive, "contrastive_accuracy": accuracy, "divergence": divergence}
    return contrastive + settings.relic_alpha * divergence, metrics
