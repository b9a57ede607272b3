"""The processes that train together, and a gather that gradients flow through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if num_processes() > 1 else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.count = len(own)
        gathered = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(num_processes())]
        dist.all_gather(gathered, own.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A copy: what comes in may be shared with other branches of the graph, and all_reduce works in place.
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        first = process_index() * ctx.count
        return summed[first : first + ctx.count]


def gather(own: Tensor) -> Tensor:
    """[N, ...] of each process to [P N, ...], in the order of the processes; N is the same on all of them.

    The gradient of a row is summed over the processes that used it.
    """
    return _Gather.apply(own) if num_processes() > 1 else own
