"""The optimizers with their parameter groups, LARS among them, and the learning-rate schedule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stec.config import OptimizationSettings
from stec.models.timm_encoder import TimmEncoder

MOMENTUM = 0.9
Tensors = list[Tensor] | tuple[Tensor, ...]


class Lars(torch.optim.Optimizer):
    """LARS (You et al. 2017, "Large Batch Training of Convolutional Networks") as lightning-bolts 0.5 computes it.

    In groups with ``adapt``, the gradient including weight decay is scaled by
    ``trust |w| / (|g| + weight_decay |w| + eps)``; if either norm or the weight decay is 0, the gradient is not scaled.
    Other groups get SGD with momentum. A step needs a few launches per group and no host sync.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        momentum: float = MOMENTUM,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "adapt": True,
        }
        super().__init__(params, defaults)
        self._repeats: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        decay = group["weight_decay"]
        grads = [p.grad for p in params if p.grad is not None]
        updates: Tensors = torch._foreach_add(grads, params, alpha=decay)
        if group["adapt"] and decay:
            weight_norm = torch.stack(torch._foreach_norm(params))
            grad_norm = torch.stack(torch._foreach_norm(grads))
            scale = group["trust_coefficient"] * weight_norm / (grad_norm + decay * weight_norm + group["eps"])
            # A zero gradient stays zero (no decay alone); the gradient of a zero weight is not scaled.
            scale = torch.where(weight_norm > 0, scale, 1.0) * (grad_norm > 0)
            if scale.is_cuda:
                updates = self._scaled(updates, scale)
            else:
                torch._foreach_mul_(updates, list(scale.unbind()))

        buffers = []
        for p in params:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        if group["nesterov"]:
            torch._foreach_add_(updates, buffers, alpha=group["momentum"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
        else:
            torch._foreach_add_(params, buffers, alpha=-group["lr"])

    def _scaled(self, tensors: Tensors, scales: Tensor) -> list[Tensor]:
        """Each tensor times its scale [K], in few launches.

        A multi-tensor operation takes one launch per tensor for scalars that are on a GPU. On a CPU, this takes three
        times as long as that.
        """
        counts = tuple(tensor.numel() for tensor in tensors)
        if (counts, scales.device) not in self._repeats:
            self._repeats[counts, scales.device] = torch.tensor(counts, device=scales.device)
        # In the order in memory, which need not be that of the dimensions (channels-last).
        flat = torch.cat([tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors])
        flat *= scales.repeat_interleave(self._repeats[counts, scales.device], output_size=len(flat))
        starts = itertools.accumulate(counts, initial=0)
        return [flat.as_strided(t.shape, t.stride(), start) for t, start in zip(tensors, starts)]


def make_optimizer(model: nn.Module, settings: OptimizationSettings) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters of a ``stec.models.model.Model``.

    LARS has the official groups: names that contain ``bias`` or ``bn`` get SGD without decay, the online classifier's
    weight SGD with decay, everything else LARS. (The scale of a shortcut's batch norm, ``downsample.1.weight``, is
    therefore under LARS, as in the official code.) With a target network, all biases and batch norms get SGD without
    decay, as BYOL does it, and so they do with an encoder of timm, whose parameters have other names: they are known by
    their shape. SGD and Adam treat all parameters equally, as the official code does; AdamW decays neither biases nor
    norms.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    learning_rate, weight_decay = settings.learning_rate, settings.weight_decay
    groups: list[dict[str, Any]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            [p for _, p in named],
            lr=learning_rate,
            momentum=MOMENTUM,
            weight_decay=weight_decay,
            nesterov=bool(settings.nesterov),
            foreach=True,
        )
    if settings.optimizer == "adam":
        return torch.optim.Adam([p for _, p in named], lr=learning_rate, weight_decay=weight_decay, foreach=True)
    of_timm = isinstance(getattr(model, "encoder", None), TimmEncoder)
    by_shape = of_timm or getattr(model, "target_network", None) is not None
    if settings.optimizer == "adamw":
        groups = [
            {"params": [p for _, p in named if p.ndim > 1]},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, foreach=True)
    plain = [p for name, p in named if (p.ndim <= 1 if by_shape else "bias" in name or "bn" in name)]
    classifier = [p for name, p in named if name == "classifier.weight"]
    others = {id(p) for p in plain + classifier}
    groups = [
        {"params": [p for _, p in named if id(p) not in others]},
        {"params": plain, "adapt": False, "weight_decay": 0.0},
        {"params": classifier, "adapt": False},
    ]
    return Lars(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        weight_decay=weight_decay,
        nesterov=bool(settings.nesterov),
    )


def learning_rate_at(step: int, settings: OptimizationSettings, *, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0.

    With ``lr_scheduler`` cosine it grows linearly from 0 over the warm-up and then decreases as half a cosine to 0.
    """
    if settings.lr_scheduler == "none":
        return settings.learning_rate
    warmup_steps, total_steps = settings.warmup_epochs * steps_per_epoch, settings.max_epochs * steps_per_epoch
    if step < warmup_steps:
        return settings.learning_rate * (step / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return settings.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
