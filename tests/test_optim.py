"""LARS, compared with a slow reference and PyTorch's SGD; the official parameter groups; the ends of the schedule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stec.config import ModelSettings, OptimizationSettings
from stec.models.model import Model
from stec.objectives.registry import BASE_OBJECTIVES
from stec.training.optim import Lars, learning_rate_at, make_optimizer


def slow_lars(
    weights: list[Tensor], gradients: list[list[Tensor]], *, lr: float, decay: float, nesterov: bool
) -> list[Tensor]:
    """One parameter at a time, as in lightning-bolts 0.5: without decay it does not adapt."""
    weights = [w.clone() for w in weights]
    momenta = [torch.zeros_like(w) for w in weights]
    for step in gradients:
        for w, m, g in zip(weights, momenta, step):
            update = g.clone()
            if decay != 0 and w.norm() > 0 and g.norm() > 0:
                update = update + decay * w
                update = update * (0.001 * w.norm() / (g.norm() + decay * w.norm() + 1e-8))
            m.mul_(0.9).add_(update)
            w.sub_(lr * (update + 0.9 * m if nesterov else m))
    return weights


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_lars_is_its_definition(nesterov: bool, decay: float) -> None:
    """Also if a weight or a gradient is zero."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 2, 3), (4,), (6,)]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    start[3].zero_()
    gradients = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(4)]
    for step in gradients:
        step[4].zero_()
    parameters = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = Lars(parameters, lr=0.5, weight_decay=decay, nesterov=nesterov)
    for step in gradients:
        for parameter, gradient in zip(parameters, step):
            parameter.grad = gradient.clone()
        optimizer.step()
    expected = slow_lars(start, gradients, lr=0.5, decay=decay, nesterov=nesterov)
    for parameter, weight in zip(parameters, expected):
        torch.testing.assert_close(parameter.data, weight, rtol=1e-12, atol=1e-14)


def test_scaling_in_few_launches_is_scaling_one_by_one() -> None:
    """In any memory format, bit by bit."""
    tensors = [torch.randn(3), torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.randn(2, 5)]
    scales = torch.randn(3)
    scaled = Lars(tensors, lr=1.0)._scaled(tensors, scales)
    for ours, tensor, scale in zip(scaled, tensors, scales, strict=True):
        assert torch.equal(ours, tensor * scale) and ours.stride() == tensor.stride()


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_adaptation_it_is_sgd(nesterov: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12)) for _ in range(2))
    optimizers = [
        Lars([{"params": [ours], "adapt": False}], lr=0.1, weight_decay=0.01, nesterov=nesterov),
        torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov),
    ]
    for _ in range(5):
        gradient = torch.randn(12)
        for parameter, optimizer in zip((ours, theirs), optimizers):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_official_groups() -> None:
    model = Model(ModelSettings(width=4, feat_dim=8), stem="cifar", classes=3)
    optimizer = make_optimizer(model, OptimizationSettings(learning_rate=1.0, weight_decay=1e-6))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    adapted, plain, classifier = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert classifier == {"classifier.weight"}
    assert {
        "encoder.bn1.weight",
        "classifier.bias",
        "projection.bn_output.weight",
        "inverse_models.window.output.bias",
    } <= plain
    assert {"encoder.conv1.weight", "encoder.layer2.0.downsample.1.weight", "projection.output.weight"} <= adapted
    assert not adapted & plain
    assert adapted | plain | classifier == set(names.values()) - {"projection.bn_output.bias"}
    settings = [(group["adapt"], group["weight_decay"]) for group in optimizer.param_groups]
    assert settings == [(True, 1e-6), (False, 0.0), (False, 1e-6)]


def test_schedule_ends() -> None:
    settings = OptimizationSettings(learning_rate=2.0, warmup_epochs=2, max_epochs=10)
    rates = [learning_rate_at(step, settings, steps_per_epoch=5) for step in range(51)]
    assert rates[0] == 0 and rates[5] == 1 and rates[10] == 2
    assert rates[30] == pytest.approx(1) and rates[50] == pytest.approx(0)
    without = OptimizationSettings(learning_rate=2.0, warmup_epochs=0, lr_scheduler="none")
    assert learning_rate_at(0, without, steps_per_epoch=5) == learning_rate_at(999, without, steps_per_epoch=5) == 2


def test_with_a_target_network_no_bias_or_norm_is_adapted_or_decayed() -> None:
    """Also the shortcut's, which the official groups adapt; the target network is in no group."""
    model = Model(ModelSettings(width=4), stem="cifar", classes=10, base=BASE_OBJECTIVES["byol"].heads)
    optimizer = make_optimizer(model, OptimizationSettings(weight_decay=1e-6))
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if name.startswith("target_network."):
            assert id(p) not in by_id
        elif p.requires_grad:
            adapted = by_id[id(p)]["adapt"] and by_id[id(p)]["weight_decay"] > 0
            assert adapted == (p.ndim > 1 and name != "classifier.weight"), name


def test_adamw_decays_matrices_and_kernels_alone() -> None:
    """Without gradient a step multiplies what decays by 1 - rate * decay, and leaves the rest."""
    model = Model(ModelSettings(width=4), stem="cifar", classes=10)
    settings = OptimizationSettings(optimizer="adamw", learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(model, settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 if p.ndim > 1 else 1), msg=name)
