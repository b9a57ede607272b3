"""Batch norm over the images of all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stec.distributed.processes import gather, num_processes

HALF = (torch.float16, torch.bfloat16)

_CHECKED: set[tuple[int, torch.Size]] = set()
"""The numbers of processes and shapes of inputs that have been compared between the processes."""


@torch.library.custom_op("stec::sync_batch_norm", mutates_args=())
def _normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize [N, C, ...] by the statistics of all processes, which have the same N.

    Returns the result, and the mean and the reciprocal standard deviation [C].

    An operator of its own: ``torch.compile`` takes it as it is, and nothing in it waits for the GPU, while PyTorch's
    ``SyncBatchNorm`` selects the processes with images by a mask, whose size the host must know.
    """
    values = x.float() if x.dtype in HALF and x.device.type == "cpu" else x
    if x.device.type == "cuda":
        mean, invstd = torch.batch_norm_stats(values, eps)
    else:
        reduced = [d for d in range(x.dim()) if d != 1]
        mean, invstd = values.mean(reduced), torch.rsqrt(values.var(reduced, correction=0) + eps)
    means, invstds = _gather_equal(torch.stack([mean, invstd]), x.shape).unbind(1)
    if x.device.type == "cuda":
        counts = torch.full((len(means),), x.numel() // x.shape[1], dtype=means.dtype, device=x.device)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            values, means.contiguous(), invstds.contiguous(), None, None, 0.0, eps, counts
        )
        return torch.batch_norm_elemt(values, weight, bias, mean, invstd, eps), mean, invstd
    mean = means.mean(0)
    # All processes have the same weight: the variance within them plus the variance of their means.
    variance = (invstds.pow(-2) - eps).mean(0) + means.var(0, correction=0)
    invstd = torch.rsqrt(variance + eps)
    # Centered first: with the mean folded into the bias, the result would be a difference of large numbers.
    y = (values - _along_channels(mean, x)).mul_(_along_channels(invstd * weight, x)).add_(_along_channels(bias, x))
    return y.to(x.dtype), mean, invstd


@_normalize.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    of_statistics = torch.float32 if x.dtype in HALF else x.dtype
    mean, invstd = (x.new_empty(x.shape[1], dtype=of_statistics) for _ in range(2))
    return torch.empty_like(x), mean, invstd


@torch.library.custom_op("stec::sync_batch_norm_backward", mutates_args=())
def _normalize_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the input, and of weight and bias for the images of this process."""
    if x.device.type == "cuda":
        memory_format = _memory_format(x)
        gradient = gradient.contiguous(memory_format=memory_format)
        sum_g, sum_gx, weight_gradient, bias_gradient = torch.batch_norm_backward_reduce(
            gradient, x, mean, invstd, weight, True, True, True
        )
        sums = _sum_over_processes(torch.stack([sum_g, sum_gx]))
        counts = torch.full((num_processes(),), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
        x_gradient = torch.batch_norm_backward_elemt(
            gradient, x, mean, invstd, weight.to(mean.dtype), sums[0], sums[1], counts
        )
        return x_gradient, weight_gradient, bias_gradient
    reduced = [d for d in range(x.dim()) if d != 1]
    centered, g = x.to(mean.dtype) - _along_channels(mean, x), gradient.to(mean.dtype)
    sums = torch.stack([g.sum(reduced), (g * centered).sum(reduced)])
    weight_gradient, bias_gradient = sums[1] * invstd, sums[0].clone()
    means = _sum_over_processes(sums) / (x.numel() // x.shape[1] * num_processes())
    x_gradient = g - _along_channels(means[0], x)
    x_gradient -= centered.mul_(_along_channels(invstd.square() * means[1], x))
    x_gradient *= _along_channels(invstd * weight, x)
    return x_gradient.to(x.dtype), weight_gradient.to(weight.dtype), bias_gradient.to(weight.dtype)


@_normalize_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, *output[1:])


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, weight, mean, invstd = ctx.saved_tensors
    return *_normalize_backward(gradient, x, weight, mean, invstd), None


_normalize.register_autograd(_backward, setup_context=_save)


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view([-1 if d == 1 else 1 for d in range(x.dim())])


def _memory_format(x: Tensor) -> torch.memory_format:
    is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


def _gather_equal(statistics: Tensor, shape: torch.Size) -> Tensor:
    """The statistics [P, ...] of all processes, whose inputs must have the same ``shape``, as is checked once."""
    if (num_processes(), shape) not in _CHECKED:
        images = gather(torch.tensor([shape[0]], device=statistics.device))
        assert (images == shape[0]).all(), f"the processes have batches of {images.tolist()} images"
        _CHECKED.add((num_processes(), shape))
    return gather(statistics[None])


def _sum_over_processes(values: Tensor) -> Tensor:
    if num_processes() > 1:
        dist.all_reduce(values)
    return values


class SyncBatchNorm(_BatchNorm):
    """``nn.SyncBatchNorm`` for CPUs and GPUs: statistics over the images of all processes.

    Input and output are [N, C, ...], with the same N on all processes; half precision is computed in single. Submodules
    are applied to the output, in their order: timm's ``BatchNormAct2d`` has its dropout and its activation as such.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, ...], got {input.dim()} dimension(s)")

    def forward(self, x: Tensor) -> Tensor:
        y = self._normalized(x)
        for module in self.children():
            y = module(y)
        return y

    def _normalized(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, invstd = _normalize(x.contiguous(memory_format=_memory_format(x)), self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._track(mean.detach(), invstd.detach().pow(-2) - self.eps, x.numel() // x.shape[1] * num_processes())
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), self.momentum)


def synchronize(model: nn.Module) -> None:
    """Synchronize the statistics of every batch norm of ``model`` over processes; its parameters stay the same objects.

    A single process keeps its batch norms.
    """
    if num_processes() == 1:
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                synced = SyncBatchNorm(child.num_features, child.eps, child.momentum)
                synced.weight, synced.bias = child.weight, child.bias
                synced.running_mean, synced.running_var = child.running_mean, child.running_var
                synced.num_batches_tracked, synced.training = child.num_batches_tracked, child.training
                for name_below, following in child.named_children():
                    synced.add_module(name_below, following)
                setattr(parent, name, synced)


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """While open, batch norm in training mode does not update its running statistics."""
    tracking = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
