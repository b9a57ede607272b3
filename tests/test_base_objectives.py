"""BYOL and ReLIC: their losses against slow code, the target network, and that BYOL does not collapse."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from pipelines.commands import Policy
from pipelines.datasets.images import ImageArray
from pipelines.loader import Loader
from pipelines.sampler import Sampler
from stec.config import BaseName, ModelSettings, ObjectiveSettings
from stec.models.model import Model
from stec.models.target_network import TargetNetwork, momentum_at
from stec.objectives import relic
from stec.objectives.byol import byol_loss
from stec.objectives.inverse import EfferenceCopy
from stec.objectives.objective import Objective
from stec.objectives.registry import BASE_OBJECTIVES
from stec.objectives.relic import relic_loss
from stec.training.step import Step
from tests.runs import Run


def some_vectors(count: int = 7, dim: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    predictions, targets = torch.randn(2, count, 2, dim, generator=generator, dtype=torch.float64)
    return predictions, targets


def test_byol_is_the_papers() -> None:
    predictions, targets = some_vectors()
    total = 0.0
    for q, z in zip(predictions.numpy(), targets.numpy()):
        for view in (0, 1):
            difference = q[view] / np.linalg.norm(q[view]) - z[1 - view] / np.linalg.norm(z[1 - view])
            total += np.square(difference).sum()
    assert byol_loss(predictions, targets).item() == pytest.approx(total / len(predictions), rel=1e-6)
    assert byol_loss(predictions, predictions.flip(1)).item() == pytest.approx(0, abs=1e-6)
    assert byol_loss(predictions, -3 * predictions.flip(1)).item() == pytest.approx(8, rel=1e-6)


def slow_relic(projections: Tensor, targets: Tensor, temperature: float) -> tuple[float, float]:
    z, t = (x.numpy() / np.linalg.norm(x.numpy(), axis=-1, keepdims=True) for x in (projections, targets))
    count, contrastive, divergence = len(z), 0.0, 0.0
    for n in range(count):
        p = []
        for view in (0, 1):
            weights = [math.exp(z[n, view] @ t[m, 1 - view] / temperature) for m in range(count)]
            p.append([weight / sum(weights) for weight in weights])
            contrastive -= math.log(p[view][n]) / (2 * count)
        for a, b in ((0, 1), (1, 0)):
            divergence += 0.5 * sum(x * math.log(x / y) for x, y in zip(p[a], p[b])) / count
    return contrastive, divergence


def test_relic_is_the_papers() -> None:
    projections, targets = some_vectors()
    contrastive, divergence, _ = relic_loss(projections, targets, 0.3)
    expected = slow_relic(projections, targets, 0.3)
    assert (contrastive.item(), divergence.item()) == pytest.approx(expected, rel=1e-5)


def test_relics_divergence_is_weighted() -> None:
    projections, targets = some_vectors()
    outputs = model_of("relic")(torch.zeros(7, 2, 3, 32, 32))._replace(
        projections=projections, target_projections=targets
    )
    contrastive, divergence = slow_relic(projections, targets, 0.3)
    for alpha in (0.0, 2.5):
        loss, _ = relic.loss(outputs, ObjectiveSettings(objective="relic", temperature=0.3, relic_alpha=alpha))
        assert loss.item() == pytest.approx(contrastive + alpha * divergence, rel=1e-5)


def test_the_target_networks_momentum_is_the_flags(tmp_path: Path) -> None:
    """Without any, it is the online network after the only step."""
    flags = "--objective byol --limit_train 16 --batch_size 16 --max_epochs 1 --width 4 --num_workers 1".split()
    Run(*flags, "--target_momentum", "0", "--results_path", tmp_path / "run").end()
    state = load_file(tmp_path / "run/model.safetensors")
    of_target = {name.removeprefix("target_network."): of for name, of in state.items() if "target_network." in name}
    parameters = [name for name in of_target if "running" not in name and "num_batches" not in name]
    assert len(parameters) > 20 and all(torch.equal(of_target[name], state[name]) for name in parameters)


def test_relic_of_equal_views_does_not_diverge() -> None:
    z = torch.eye(4)[:, None].expand(4, 2, 4)
    contrastive, divergence, accuracy = relic_loss(z, z, 0.5)
    assert contrastive.item() == pytest.approx(math.log(1 + 3 * math.exp(-2)), rel=1e-6)
    assert divergence == 0 and accuracy == 1


@pytest.mark.parametrize("base", ["byol", "relic"])
def test_views_can_be_exchanged(base: BaseName) -> None:
    projections, targets = some_vectors()
    settings = ObjectiveSettings(temperature=0.3)
    outputs = [
        model_of(base)(torch.zeros(7, 2, 3, 32, 32))._replace(projections=p, target_projections=t)
        for p, t in ((projections, targets), (projections.flip(1), targets.flip(1)))
    ]
    one, other = (BASE_OBJECTIVES[base].loss(output, settings) for output in outputs)
    torch.testing.assert_close(one, other)


def model_of(base: BaseName) -> Model:
    torch.manual_seed(0)
    settings = ModelSettings(width=4, hidden_mlp=16, feat_dim=8)
    return Model(settings, stem="cifar", classes=0, base=BASE_OBJECTIVES[base].heads, with_inverse_model=False)


@pytest.mark.parametrize("base", ["byol", "relic"])
def test_no_gradient_reaches_the_target_network(base: BaseName) -> None:
    model = model_of(base)
    outputs = model(torch.rand(8, 2, 3, 16, 16))
    assert outputs.target_projections is not None and not outputs.target_projections.requires_grad
    loss, _ = Objective(ObjectiveSettings(objective=base))(outputs, torch.zeros(8, dtype=torch.int64))
    loss.backward()
    assert model.target_network is not None
    assert all(p.grad is None and not p.requires_grad for p in model.target_network.parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_target_network_follows() -> None:
    model = model_of("byol")
    target = model.target_network
    assert target is not None and model.projection is not None
    online = {
        **dict(model.encoder.named_parameters("encoder")),
        **dict(model.projection.named_parameters("projection")),
    }
    assert all(torch.equal(p, online[name]) for name, p in target.named_parameters())
    with torch.no_grad():
        for p in online.values():
            p.copy_(torch.randn_like(p))
    before = {name: p.clone() for name, p in target.named_parameters()}
    model.update_target_network(0.9)
    for name, p in target.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * online[name], rtol=1e-5, atol=1e-6)
    model.update_target_network(1.0)
    model.reset_target_network()
    assert isinstance(model.target_network, TargetNetwork)
    assert all(torch.equal(p, online[name]) for name, p in model.target_network.named_parameters())


def test_the_momentum_grows_to_one() -> None:
    """The values of the paper's formula at the beginning, in the middle and at the end."""
    assert momentum_at(0, 100, 0.996) == pytest.approx(0.996)
    assert momentum_at(50, 100, 0.996) == pytest.approx(0.998)
    assert momentum_at(100, 100, 0.996) == 1
    values = [momentum_at(step, 100, 0.9) for step in range(101)]
    assert values == sorted(values)


def spread_after_training(images: ImageArray, *, with_predictor: bool) -> float:
    model = model_of("byol")
    if not with_predictor:
        model.predictor = None
    model.train()
    step = Step(model, Objective(ObjectiveSettings(objective="byol")), Accelerator(cpu=True), EfferenceCopy())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    sampler = Sampler(images, Policy(size=16), seed=1, batch_size=32)
    loader = Loader(sampler, backend="torchvision", device=torch.device("cpu"), workers=0)
    for batch in itertools.islice(loader.batches(0), 60):
        metrics = step([batch])
        optimizer.step()
        optimizer.zero_grad()
        model.update_target_network(0.9 if with_predictor else 0.0)
    return metrics["projection_spread"].item()


def test_byol_does_not_collapse(demo_test_images: ImageArray) -> None:
    """On the demo set its projections stay spread; without what prevents it, they soon are all the same."""
    assert spread_after_training(demo_test_images, with_predictor=True) > 0.3
    assert spread_after_training(demo_test_images, with_predictor=False) < 0.2
