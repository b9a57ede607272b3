"""Batch norm over the images of all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stec.distributed.processes import gather, num_processes


class CpuSyncBatchNorm(_BatchNorm):
    """``nn.SyncBatchNorm`` for CPUs, which PyTorch's does not support: statistics over the images of all processes.

    Input and output are [N, C, ...], with the same N on all processes; half precision is computed in single.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, ...], got {input.dim()} dimension(s)")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        reduced = [d for d in range(x.dim()) if d != 1]
        local = torch.stack([values.mean(reduced), values.var(reduced, correction=0)])
        means, variances = gather(local[None]).unbind(1)
        mean = means.mean(0)
        # All processes have the same weight: the variance within them plus the variance of their means.
        variance = variances.mean(0) + means.var(0, correction=0)
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach(), x.numel() // x.shape[1] * num_processes())
        along_channels = [-1 if d == 1 else 1 for d in range(x.dim())]
        scale = torch.rsqrt(variance + self.eps) * self.weight
        # Centered first: with the mean folded into the bias, the gradient would be a difference of large numbers.
        centered = values - mean.view(along_channels)
        return (centered * scale.view(along_channels) + self.bias.view(along_channels)).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), self.momentum)


def synchronize(model: nn.Module, device: torch.device) -> None:
    """Synchronize the statistics of every batch norm of ``model`` over processes; its parameters stay the same objects.

    A single process keeps its batch norms; several processes with GPUs get PyTorch's ``SyncBatchNorm``.
    """
    if num_processes() == 1:
        return
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                synced = CpuSyncBatchNorm(child.num_features, child.eps, child.momentum)
                synced.weight, synced.bias = child.weight, child.bias
                synced.running_mean, synced.running_var = child.running_mean, child.running_var
                synced.num_batches_tracked, synced.training = child.num_batches_tracked, child.training
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
