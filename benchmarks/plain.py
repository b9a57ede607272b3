"""The loss in its plain form, for comparison with the memory-saving one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def plain_nt_xent(z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``stec.nt_xent`` on one process, with the whole similarity matrix and autograd's own gradient."""
    count = len(z_i)
    z = torch.cat([z_i, z_j])
    logits = (z @ z.T).float() / temperature
    logits = logits.masked_fill(torch.eye(2 * count, dtype=torch.bool, device=z.device), -torch.inf)
    partner = torch.arange(2 * count, device=z.device).roll(count)
    loss = F.cross_entropy(logits, partner)
    with torch.no_grad():
        accuracy = (logits.argmax(1) == partner).float().mean()
        across = logits[:count, count:]
        probability = across.softmax(1)
        contrast_accuracy = (across.argmax(1) == partner[count:]).float().mean()
        contrast_entropy = -(probability * torch.log(probability + 1e-6)).sum(1).mean()
    return loss, accuracy, contrast_accuracy, contrast_entropy
