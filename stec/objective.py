"""The objective: NT-Xent across processes, the inverse model's loss, the probe's loss, and their weighted sum.

Each process computes a loss whose *mean over processes* is the loss of the global batch, since that is what gradient
averaging in data-parallel training makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from stec.model import Outputs

METRICS = (
    "loss",
    "discrimination",
    "discrimination_accuracy",
    "contrast_accuracy",
    "contrast_entropy",
    "manipulation",
    "manipulation_accuracy",
    "supervised",
    "supervised_accuracy",
)
"""Names of the values that a step reports, in the order of ``Objective``'s second result."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of the three losses; the defaults are the official ones, and those of SimCLR."""

    discrimination: float = 2.0
    manipulation: float = 0.0
    supervised: float = 1.0


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _GatherProcesses(torch.autograd.Function):
    """All processes' rows on every process; the gradient of a row is summed over the processes that used it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.count = len(own)
        gathered = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.contiguous()
        dist.all_reduce(summed)
        first = dist.get_rank() * ctx.count
        return summed[first : first + ctx.count]


def _gather(values: Tensor) -> Tensor:
    """[N, ...] of each process to [P N, ...], in the order of the processes; gradients flow to where they came from."""
    return _GatherProcesses.apply(values) if _num_processes() > 1 else values


def nt_xent(z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NT-Xent (Chen et al. 2020, "A Simple Framework for Contrastive Learning", eq. 1) over the views of all processes.

    ``z_i``, ``z_j``: unit vectors [N, F] of this process. Returns four scalars: the loss of this process's 2 N rows;
    the share of rows whose partner is the most similar of all others; and, with view i held against all of view j
    only, the share of right partners and the mean entropy in nats. The last three carry no gradient.

    The columns of the similarity matrix, with P processes of N images, rank r::

        columns   i of rank 0 | ... | i of rank P-1 | j of rank 0 | ... | j of rank P-1
        row n of view i: itself at r N + n,        partner at (P + r) N + n
        row n of view j: itself at (P + r) N + n,  partner at r N + n
    """
    count, rank = len(z_i), dist.get_rank() if _num_processes() > 1 else 0
    if z_i.dtype in (torch.float16, torch.bfloat16):
        z_i, z_j = z_i.float(), z_j.float()
    with torch.autocast(z_i.device.type, enabled=False):
        all_i, all_j = _gather(z_i), _gather(z_j)
        similarity = torch.cat([z_i, z_j]) @ torch.cat([all_i, all_j]).T
        # The official code goes on in single precision, also where the features are double.
        logits = similarity.float() / temperature
        at_i = torch.arange(count, device=z_i.device) + rank * count
        at_j = at_i + len(all_i)
        itself, partner = torch.cat([at_i, at_j]), torch.cat([at_j, at_i])
        logits = logits.scatter(1, itself[:, None], -torch.inf)
        loss = F.cross_entropy(logits, partner)
        with torch.no_grad():
            accuracy = (logits.argmax(1) == partner).float().mean()
            across = logits[:count, len(all_i) :]
            probability = across.softmax(1)
            contrast_accuracy = (across.argmax(1) == at_i).float().mean()
            # The offset inside the logarithm is the official code's.
            contrast_entropy = -(probability * torch.log(probability + 1e-6)).sum(1).mean()
    return loss, accuracy, contrast_accuracy, contrast_entropy


def command_bins(command: Tensor, n_bins: int) -> Tensor:
    """The bin of each entry of commands [N, 2, 3]: int64 [N, 2, 3], 0 to ``n_bins`` - 1.

    Equal bins over [-2, 2], the translation column over [-0.5, 0.5]; what lies outside falls into the outermost.
    """
    high = command.new_tensor([2, 2, 0.5])
    share = (command + high) / (2 * high)
    return torch.clamp(torch.round(share * n_bins - 0.5), 0, n_bins - 1).long()


def inverse_loss(logits: Tensor, command: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the inverse model's logits [N, K, 2, 3] against commands [N, 2, 3].

    ``valid`` [N] bool leaves out pairs with a solarized view. The mean is over the valid pairs of *all* processes
    (each process returns its own sum times P over that count); with none it is 0. Also returns the accuracy
    over all entries of all pairs of this process, masked or not, as the official code reports it.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    target = command_bins(command, logits.shape[1])
    per_pair = F.cross_entropy(logits, target, reduction="none").mean(dim=(1, 2))
    valid_pairs = valid.sum().to(per_pair.dtype)
    processes = _num_processes()
    if processes > 1:
        dist.all_reduce(valid_pairs)
    # where, not a product: a masked pair's loss must not reach the sum even if it is not finite.
    total = torch.where(valid, per_pair, torch.zeros_like(per_pair)).sum()
    accuracy = (logits.detach().argmax(1) == target).float().mean()
    return total * processes / valid_pairs.clamp(min=1), accuracy


class Objective:
    """The weighted sum of the three losses.

    Called with the model's outputs for N images, their labels [N] int64 and, for an inverse model, the commands from i
    to j [N, 2, 3] and which pairs it is asked about (``valid`` [N] bool), it returns the loss and a float32 vector of
    the values named in ``METRICS``, on the device and without gradient. A loss whose head gave nothing is 0.
    """

    def __init__(self, weights: Weights, *, temperature: float) -> None:
        self.weights, self.temperature = weights, temperature

    def __call__(
        self, outputs: Outputs, labels: Tensor, command: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        none = torch.zeros((), device=labels.device)
        discrimination, accuracy, contrast_accuracy, contrast_entropy = none, none, none, none
        manipulation, manipulation_accuracy = none, none
        supervised, supervised_accuracy = none, none
        if outputs.projections is not None:
            z_i, z_j = outputs.projections.unbind(1)
            discrimination, accuracy, contrast_accuracy, contrast_entropy = nt_xent(z_i, z_j, self.temperature)
        if outputs.command_logits is not None:
            assert command is not None and valid is not None, "an inverse model is asked for commands"
            manipulation, manipulation_accuracy = inverse_loss(outputs.command_logits, command, valid)

        if outputs.class_logits is not None:
            logits = outputs.class_logits.flatten(0, 1)
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            targets = labels.repeat_interleave(outputs.class_logits.shape[1])
            supervised = F.cross_entropy(logits, targets)
            supervised_accuracy = (logits.detach().argmax(1) == targets).float().mean()

        loss = (
            self.weights.discrimination * discrimination
            + self.weights.manipulation * manipulation
            + self.weights.supervised * supervised
        )
        values = {
            "loss": loss,
            "discrimination": discrimination,
            "discrimination_accuracy": accuracy,
            "contrast_accuracy": contrast_accuracy,
            "contrast_entropy": contrast_entropy,
            "manipulation": manipulation,
            "manipulation_accuracy": manipulation_accuracy,
            "supervised": supervised,
            "supervised_accuracy": supervised_accuracy,
        }
        return loss, torch.stack([values[name].detach().float() for name in METRICS])
