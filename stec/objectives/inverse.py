"""The inverse model's loss: its targets, their bins, and the cross-entropy over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from pipelines.commands import Commands
from pipelines.devices import to_device
from stec.distributed.processes import num_processes
from stec.objectives.geometry import Convention
from stec.objectives.targets import TARGETS

TARGET = TARGETS["window"]


def inverse_targets(
    commands: Sequence[Commands], convention: Convention, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The target's values float32 [N, 2, 3] and the valid pairs bool [N] of micro-batches with N images in total."""
    values = [torch.from_numpy(TARGET.values(part, convention)) for part in commands]
    valid = [torch.from_numpy(TARGET.valid(part)) for part in commands]
    return to_device(torch.cat(values), device), to_device(torch.cat(valid), device)


def command_bins(command: Tensor, n_bins: int) -> Tensor:
    """The bin of each entry of commands [N, 2, 3]: int64 [N, 2, 3], 0 to ``n_bins`` - 1.

    The bins are equal over [-2, 2], in the translation column over [-0.5, 0.5]; values outside are in the outermost.
    """
    limits = command.new_tensor(TARGET.limits)
    fraction = (command + limits) / (2 * limits)
    return torch.clamp(torch.round(fraction * n_bins - 0.5), 0, n_bins - 1).long()


def bin_centers(bins: Tensor, n_bins: int) -> Tensor:
    """The centers of bins: commands float32 [N, 2, 3] for int64 [N, 2, 3], numbered as in ``command_bins``."""
    limits = torch.tensor(TARGET.limits, device=bins.device)
    return ((bins + 0.5) / n_bins * 2 - 1) * limits


def inverse_loss(logits: Tensor, command: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the inverse model's logits [N, K, 2, 3] against commands [N, 2, 3].

    The mean is over the pairs of *all* processes for which ``valid`` [N] is true; each process returns its sum times
    the number of processes over their count, and 0 if there are none. Also returns the accuracy over all entries of
    all pairs of this process, valid or not, as in the official code.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    bins = command_bins(command, logits.shape[1])
    per_pair = F.cross_entropy(logits, bins, reduction="none").mean(dim=(1, 2))
    valid_pairs = valid.sum().to(per_pair.dtype)
    processes = num_processes()
    if processes > 1:
        dist.all_reduce(valid_pairs)
    # where, not a product: the loss of an invalid pair must not reach the sum even if it is not finite.
    total = torch.where(valid, per_pair, torch.zeros_like(per_pair)).sum()
    accuracy = (logits.detach().argmax(1) == bins).float().mean()
    return total * processes / valid_pairs.clamp(min=1), accuracy
