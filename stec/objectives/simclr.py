"""The contrastive loss of SimCLR, NT-Xent, over the views of all processes.

Each process computes a loss whose *mean over processes* is the loss of the global batch, because data-parallel training
averages gradients over processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stec.config import ObjectiveSettings
from stec.distributed.processes import gather, process_index
from stec.models.heads import BaseHeads
from stec.models.model import Outputs

HEADS = BaseHeads()

CHUNK_BYTES = 2**24
"""Size of the block of the similarity matrix that exists at a time; small, so that a CPU's caches hold it."""


def _similarities(
    local: Tensor, gathered: Tensor, diagonal: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of rows: which rows of ``local`` [M, F], and their float32 logits [m, A] with ``gathered`` [A, F].

    ``diagonal`` [M] is the column of each row's own view, where the logit is -inf.
    """
    rows_per_chunk = max(1, CHUNK_BYTES // (4 * len(gathered)))
    for first in range(0, len(local), rows_per_chunk):
        rows = slice(first, first + rows_per_chunk)
        # The official code continues in single precision, even if the features are double.
        logits = (local[rows] @ gathered.T).float().div_(temperature)
        yield rows, logits.scatter_(1, diagonal[rows, None], -torch.inf)


def _log_softmax_gradient(gradient: Tensor, log_p: Tensor) -> Tensor:
    """``gradient - exp(log_p) * gradient.sum(1)``, computed by autograd's kernel so that it rounds in the same way."""
    return torch.ops.aten._log_softmax_backward_data(gradient, log_p, 1, log_p.dtype)


class _NTXent(torch.autograd.Function):
    """NT-Xent that never holds the whole similarity matrix. See ``nt_xent``.

    Let s = z z' / temperature over all rows and columns, p_n the softmax of row n, and M the number of rows per
    process. The sum of the processes' losses is sum_n -log p_n,partner(n) / M. Since s is symmetric, the gradient of
    row n is

        sum_m (p_nm + p_mn - 2 [m = partner(n)]) z_m / (M temperature)

    so a process computes the gradient of its rows from its rows of s and the softmax normalizers of all rows, which
    are gathered in the forward pass; the backward pass exchanges nothing. (All processes must weight the loss equally.)
    """

    @staticmethod
    def forward(ctx: Any, z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gathered = gather(torch.stack([z_i, z_j], 1)).transpose(0, 1).flatten(0, 1)
        local = torch.stack([z_i, z_j])
        if local.dtype in (torch.float16, torch.bfloat16):
            gathered, local = gathered.float(), local.float()
        count, total = len(z_i), len(gathered) // 2
        columns_i = torch.arange(count, device=z_i.device) + process_index() * count
        columns = torch.stack([columns_i, columns_i + total])

        loss, accuracy, cross_view_accuracy, cross_view_entropy = torch.zeros(4, device=z_i.device).unbind()
        # Each row's normalizer has two parts, subtracted one after the other as softmax does it: the largest logit,
        # and the logarithm of the sum of exponentials after that.
        normalizers = torch.empty(count, 2, 2, device=z_i.device)
        for view in (0, 1):
            diagonal, partner = columns[view], columns[1 - view]
            for rows, logits in _similarities(local[view], gathered, diagonal, temperature):
                if view == 0:
                    across = logits[:, total:]
                    probability = across.softmax(1)
                    cross_view_accuracy += (across.argmax(1) == diagonal[rows]).sum()
                    # The offset inside the logarithm is the official code's.
                    cross_view_entropy -= (probability * torch.log(probability + 1e-6)).sum()
                    del across, probability
                largest, best = logits.max(1)
                accuracy += (best == partner[rows]).sum()
                log_p = logits.log_softmax(1)
                loss -= log_p.gather(1, partner[rows, None]).sum()
                normalizers[rows, view] = torch.stack([largest, -log_p.gather(1, best[:, None])[:, 0]], 1)

        ctx.save_for_backward(local, gathered, columns, normalizers, gather(normalizers))
        ctx.temperature, ctx.dtype = temperature, z_i.dtype
        results = loss / (2 * count), accuracy / (2 * count), cross_view_accuracy / count, cross_view_entropy / count
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        local, gathered, columns, normalizers, all_normalizers = ctx.saved_tensors
        column_normalizers = all_normalizers.movedim(0, 2).transpose(0, 1).flatten(1)  # [2 parts, 2 P N]
        row_gradient = gradient / (2 * local.shape[1])
        gradients = torch.empty_like(local)
        for view in (0, 1):
            for rows, logits in _similarities(local[view], gathered, columns[view], ctx.temperature):
                row_normalizers = normalizers[rows, view].T[:, :, None]
                at_partner = torch.zeros_like(logits)
                at_partner.scatter_(1, columns[1 - view, rows, None], -row_gradient.expand(len(logits), 1))
                log_p = (logits - row_normalizers[0]).sub_(row_normalizers[1])
                weights = _log_softmax_gradient(at_partner, log_p).div_(ctx.temperature).to(local.dtype)
                log_p = logits.sub_(column_normalizers[0]).sub_(column_normalizers[1])
                weights += _log_softmax_gradient(at_partner, log_p).div_(ctx.temperature)
                gradients[view, rows] = weights @ gathered
        g_i, g_j = gradients.to(ctx.dtype)
        return g_i, g_j, None


def nt_xent(z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NT-Xent (Chen et al. 2020, "A Simple Framework for Contrastive Learning", eq. 1) over the views of all processes.

    Args:
        z_i, z_j: Unit vectors [N, F] of this process.
        temperature: Divisor of the similarities.

    Returns:
        Four scalars: the loss of this process's 2 N rows; the fraction of rows whose partner is the most similar of
        all other rows; and, if view i is compared with all of view j only, the fraction of correct partners and the
        mean entropy in nats. The last three carry no gradient.

    The columns of the similarity matrix, with P processes of N images, on process r::

        columns   i of process 0 | ... | i of process P-1 | j of process 0 | ... | j of process P-1
        row n of view i: diagonal at r N + n,        partner at (P + r) N + n
        row n of view j: diagonal at (P + r) N + n,  partner at r N + n

    The rows are processed in chunks, so memory grows with P N F and not with its square.
    """
    with torch.autocast(z_i.device.type, enabled=False):
        return _NTXent.apply(z_i, z_j, temperature)


def loss(outputs: Outputs, settings: ObjectiveSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this process's pairs, and the metrics."""
    assert outputs.projections is not None
    z_i, z_j = outputs.projections.unbind(1)
    contrastive, accuracy, cross_view_accuracy, entropy = nt_xent(z_i, z_j, settings.temperature)
    return contrastive, {
        "contrastive_loss": contrastive,
        "contrastive_accuracy": accuracy,
        "cross_view_accuracy": cross_view_accuracy,
        "cross_view_entropy": entropy,
    }
