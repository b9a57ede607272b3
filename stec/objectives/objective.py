"""The objective: NT-Xent across processes, the inverse model's loss, the online classifier's loss, and their weighted
sum.

Each process computes a loss whose *mean over processes* is the loss of the global batch, since that is what gradient
averaging in data-parallel training makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from stec.distributed.processes import gather, num_processes, process_index
from stec.models.model import Outputs
from stec.profiling import part

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


CHUNK_BYTES = 2**24
"""Of the similarity matrix, so much exists at a time (a few temporary copies aside); a CPU's caches like it small."""


def _similarities(own: Tensor, everyone: Tensor, itself: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """The rows of ``own`` [M, F] against ``everyone`` [A, F], a chunk at a time: which rows, and [m, A] float32 logits.

    ``itself`` [M]: each row's own column, which is -inf.
    """
    rows = max(1, CHUNK_BYTES // (4 * len(everyone)))
    for first in range(0, len(own), rows):
        chunk = slice(first, first + rows)
        # The official code goes on in single precision, also where the features are double.
        logits = (own[chunk] @ everyone.T).float().div_(temperature)
        yield chunk, logits.scatter_(1, itself[chunk, None], -torch.inf)


def _softmax_gradient(gradient: Tensor, log_p: Tensor) -> Tensor:
    """``gradient - exp(log_p) * gradient.sum(1)`` by autograd's own kernel, so that nothing rounds otherwise."""
    return torch.ops.aten._log_softmax_backward_data(gradient, log_p, 1, log_p.dtype)


class _NTXent(torch.autograd.Function):
    """NT-Xent without ever holding the similarity matrix. See ``nt_xent``.

    With s = z z' / temperature over all rows and columns, p_n the softmax of row n, and M rows of each process, the
    processes' losses add up to sum_n -log p_n,partner(n) / M. As s is symmetric, the gradient of row n is

        sum_m (p_nm + p_mn - 2 [m = partner(n)]) z_m / (M temperature)

    so a process finds the gradient of its own rows from its own stretch of s and everyone's softmax normalizers, which
    are gathered going forward; nothing is exchanged going backward. (Every process must weigh its loss alike.)
    """

    @staticmethod
    def forward(ctx: Any, z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        everyone = gather(torch.stack([z_i, z_j], 1)).transpose(0, 1).flatten(0, 1)
        own = torch.stack([z_i, z_j])
        if own.dtype in (torch.float16, torch.bfloat16):
            everyone, own = everyone.float(), own.float()
        count, total = len(z_i), len(everyone) // 2
        at_i = torch.arange(count, device=z_i.device) + process_index() * count
        columns = torch.stack([at_i, at_i + total])

        loss, accuracy, contrast_accuracy, contrast_entropy = torch.zeros(4, device=z_i.device).unbind()
        # A row's normalizer in two parts, subtracted one after the other as softmax does it: the largest entry, and
        # the logarithm of the sum of exponentials after that.
        normalizers = torch.empty(count, 2, 2, device=z_i.device)
        for view in (0, 1):
            itself, partner = columns[view], columns[1 - view]
            for rows, logits in _similarities(own[view], everyone, itself, temperature):
                if view == 0:
                    across = logits[:, total:]
                    probability = across.softmax(1)
                    contrast_accuracy += (across.argmax(1) == itself[rows]).sum()
                    # The offset inside the logarithm is the official code's.
                    contrast_entropy -= (probability * torch.log(probability + 1e-6)).sum()
                    del across, probability
                largest, best = logits.max(1)
                accuracy += (best == partner[rows]).sum()
                log_p = logits.log_softmax(1)
                loss -= log_p.gather(1, partner[rows, None]).sum()
                normalizers[rows, view] = torch.stack([largest, -log_p.gather(1, best[:, None])[:, 0]], 1)

        ctx.save_for_backward(own, everyone, columns, normalizers, gather(normalizers))
        ctx.temperature, ctx.dtype = temperature, z_i.dtype
        results = loss / (2 * count), accuracy / (2 * count), contrast_accuracy / count, contrast_entropy / count
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        own, everyone, columns, normalizers, all_normalizers = ctx.saved_tensors
        of_columns = all_normalizers.movedim(0, 2).transpose(0, 1).flatten(1)  # [2 parts, 2 P N]
        share = gradient / (2 * own.shape[1])
        gradients = torch.empty_like(own)
        for view in (0, 1):
            for rows, logits in _similarities(own[view], everyone, columns[view], ctx.temperature):
                of_rows = normalizers[rows, view].T[:, :, None]
                at_partner = torch.zeros_like(logits)
                at_partner.scatter_(1, columns[1 - view, rows, None], -share.expand(len(logits), 1))
                log_p = (logits - of_rows[0]).sub_(of_rows[1])
                weights = _softmax_gradient(at_partner, log_p).div_(ctx.temperature).to(own.dtype)
                log_p = logits.sub_(of_columns[0]).sub_(of_columns[1])
                weights += _softmax_gradient(at_partner, log_p).div_(ctx.temperature)
                gradients[view, rows] = weights @ everyone
        g_i, g_j = gradients.to(ctx.dtype)
        return g_i, g_j, None


def nt_xent(z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NT-Xent (Chen et al. 2020, "A Simple Framework for Contrastive Learning", eq. 1) over the views of all processes.

    ``z_i``, ``z_j``: unit vectors [N, F] of this process. Returns four scalars: the loss of this process's 2 N rows;
    the share of rows whose partner is the most similar of all others; and, with view i held against all of view j
    only, the share of right partners and the mean entropy in nats. The last three carry no gradient.

    The columns of the similarity matrix, with P processes of N images, rank r::

        columns   i of rank 0 | ... | i of rank P-1 | j of rank 0 | ... | j of rank P-1
        row n of view i: itself at r N + n,        partner at (P + r) N + n
        row n of view j: itself at (P + r) N + n,  partner at r N + n

    The rows are worked through in chunks, so memory grows with P N F and not with its square.
    """
    with torch.autocast(z_i.device.type, enabled=False):
        return _NTXent.apply(z_i, z_j, temperature)


COMMAND_REACH = (2.0, 2.0, 0.5)
"""The entries of a command's columns are binned from minus this to this."""


def command_bins(command: Tensor, n_bins: int) -> Tensor:
    """The bin of each entry of commands [N, 2, 3]: int64 [N, 2, 3], 0 to ``n_bins`` - 1.

    Equal bins over [-2, 2], the translation column over [-0.5, 0.5]; what lies outside falls into the outermost.
    """
    high = command.new_tensor(COMMAND_REACH)
    share = (command + high) / (2 * high)
    return torch.clamp(torch.round(share * n_bins - 0.5), 0, n_bins - 1).long()


def bin_centers(bins: Tensor, n_bins: int) -> Tensor:
    """The middles of bins: commands [N, 2, 3] float32 of int64 [N, 2, 3], as ``command_bins`` counts them."""
    high = torch.tensor(COMMAND_REACH, device=bins.device)
    return ((bins + 0.5) / n_bins * 2 - 1) * high


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
    processes = num_processes()
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
            with part("NT-Xent"):
                discrimination, accuracy, contrast_accuracy, contrast_entropy = nt_xent(z_i, z_j, self.temperature)
        if outputs.command_logits is not None:
            assert command is not None and valid is not None, "an inverse model is asked for commands"
            with part("inverse loss"):
                manipulation, manipulation_accuracy = inverse_loss(outputs.command_logits, command, valid)

        if outputs.class_logits is not None:
            with part("classifier loss"):
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
