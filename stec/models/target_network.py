"""The target network of BYOL and ReLIC: an exponential moving average of the encoder and its projection."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stec.models.encoder import ImageEncoder


class TargetNetwork(nn.Module):
    """A copy of an encoder and a projection that follows their parameters.

    It has no gradient. Its batch norm uses the statistics of its own batches, as BYOL's does.
    """

    def __init__(self, encoder: ImageEncoder, projection: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projection = copy.deepcopy(encoder), copy.deepcopy(projection)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """The projections [N, 2, F] of micro-batches of views [n, 2, 3, H, W] with N images in total.

        Only the encoder works in micro-batches.
        """
        features = torch.cat([self.encoder(of_batch.flatten(0, 1)) for of_batch in views])
        projections: Tensor = self.projection(features)
        return projections.unflatten(0, (-1, 2))

    @torch.no_grad()
    def update(self, encoder: nn.Module, projection: nn.Module, momentum: float) -> None:
        """Move the parameters toward the online networks': ``momentum`` times old plus the rest times new ones."""
        ours: list[Tensor] = [*self.encoder.parameters(), *self.projection.parameters()]
        theirs: list[Tensor] = [*encoder.parameters(), *projection.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - momentum)


def momentum_at(step: int, total_steps: int, base: float) -> float:
    """The momentum after a step, counted from 0: from ``base`` to 1 by half a cosine.

    Grill et al. 2020, "Bootstrap Your Own Latent", section 3.3: ``1 - (1 - base) (cos(pi k / K) + 1) / 2``.
    """
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2
