"""The processes that train together, and a gather that gradients flow through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from pipelines.errors import UserError

T = TypeVar("T")


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


def on_main_process(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something on the main process only; its result, or its UserError, reaches all processes."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    result: T = outcome[0]
    return result


def main_process_first(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something on every process, on the main one before the others: what it leaves on disk is there for them."""
    results: list[T] = []
    on_main_process(accelerator, lambda: results.append(action()))
    if not accelerator.is_main_process:
        results.append(action())
    return results[0]
