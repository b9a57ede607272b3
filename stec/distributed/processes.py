"""The processes of a run, and a gather that propagates gradients."""

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

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""PyTorch 2.14 has renamed it."""


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if num_processes() > 1 else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.count = len(local)
        gathered = local.new_empty(num_processes() * len(local), *local.shape[1:])
        all_gather(gathered, local.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A copy, as all_reduce works in place and the gradient may be shared with other branches of the graph.
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        first = process_index() * ctx.count
        return summed[first : first + ctx.count]


def gather(local: Tensor) -> Tensor:
    """Gather [N, ...] of P processes to [P N, ...], in the order of the processes; N must be the same on all of them.

    The gradient of a row is summed over the processes.
    """
    return _Gather.apply(local) if num_processes() > 1 else local


@torch.no_grad()
def total(local: Tensor) -> Tensor:
    """The sum of a tensor over the processes, without gradient."""
    if num_processes() == 1:
        return local
    summed = local.clone()
    dist.all_reduce(summed)
    return summed


def on_main_process(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Call ``action`` on the main process only; all processes return its result or raise its UserError."""
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
    """Call ``action`` on all processes, first on the main one, whose files the others then find."""
    results: list[T] = []
    on_main_process(accelerator, lambda: results.append(action()))
    if not accelerator.is_main_process:
        results.append(action())
    return results[0]
