"""BYOL (Grill et al. 2020, "Bootstrap Your Own Latent", https://arxiv.org/abs/2006.07733).

Each view's prediction has to equal the target network's projection of the other view. Nothing is compared with other
images, so the loss is a mean over pairs, and no process needs another's features.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stec.config import ObjectiveSettings
from stec.distributed.processes import num_processes, total
from stec.models.heads import BaseHeads, Mlp
from stec.models.model import Outputs

HEADS = BaseHeads(projection=Mlp, predictor=Mlp, has_target_network=True)


def byol_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """The squared distance of normalized vectors, ``2 - 2 cos``, summed over both directions; 0 to 8.

    ``predictions`` and ``targets``, of the same views, are [N, 2, F]. The prediction of view i is compared with the
    target of view j, and the other way around (eq. 2 and its symmetrized sum). The mean is over the N pairs.
    """
    cosine = F.cosine_similarity(predictions.float(), targets.float().flip(1), dim=-1)
    return (2 - 2 * cosine).sum(1).mean()


def loss(outputs: Outputs, settings: ObjectiveSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this process's pairs, and the metrics.

    ``projection_spread`` is the root of the variance of the normalized target projections of all processes, which is 1
    less the squared length of their mean: about 1 if they point in all directions, 0 if they have collapsed.
    """
    assert outputs.projections is not None and outputs.target_projections is not None
    value = byol_loss(outputs.projections, outputs.target_projections)
    mean = total(F.normalize(outputs.target_projections.float(), dim=-1).mean(dim=(0, 1))) / num_processes()
    spread = (1 - mean.square().sum()).clamp(min=0).sqrt()
    return value, {"byol_loss": value, "projection_spread": spread}
