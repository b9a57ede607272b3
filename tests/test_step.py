"""The gradient of a global batch in micro-batches is that of the whole batch."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.batch import Batch
from pipelines.commands import Policy
from pipelines.datasets.images import ImageArray
from pipelines.loader import Loader
from pipelines.sampler import Sampler
from stec.config import BaseName, ModelSettings, ObjectiveSettings, OptimizationSettings, TargetName
from stec.models.model import Model
from stec.objectives.inverse import EfferenceCopy
from stec.objectives.objective import Objective
from stec.objectives.registry import BASE_OBJECTIVES
from stec.training.optim import make_optimizer
from stec.training.step import Step
from tests.host_syncs import HostSyncs
from tests.runs import Run

GLOBAL_BATCH = 24


def sampler(images: ImageArray, *, processes: int = 1, process: int = 0, accumulate: int = 1) -> Sampler:
    return Sampler(
        images,
        Policy(p_solarize=0.2),
        seed=1,
        batch_size=GLOBAL_BATCH // processes // accumulate,
        num_processes=processes,
        process_index=process,
        accumulate=accumulate,
    )


def micro_batches(images: ImageArray, *, accumulate: int, labeled_views: bool = False) -> list[Batch]:
    """The first global batch, in double precision; with ``labeled_views``, the online classifier gets other views."""
    loader = Loader(
        sampler(images, accumulate=accumulate), backend="torchvision", device=torch.device("cpu"), workers=0
    )
    batches: Iterator[Batch] = itertools.islice(loader.batches(0), accumulate)
    return [
        dataclasses.replace(
            batch,
            views=batch.views.double(),
            labeled_views=batch.views[:, :1].flip(-1).double() if labeled_views else None,
        )
        for batch in batches
    ]


EVERYTHING: tuple[TargetName, ...] = ("window", "color", "blur", "solarize", "gray")


def a_model(stop_gradient: int = 1, base: BaseName = "simclr", **settings: Any) -> Model:
    """With the full efference copy, both ways and from the third stage, if it is not SimCLR's."""
    torch.manual_seed(0)
    full = base != "simclr"
    if full:
        settings |= {"predict": EVERYTHING, "inverse_from": "layer3"}
    return Model(
        ModelSettings(width=4, hidden_mlp=16, **settings),
        stem="cifar",
        classes=10,
        base=BASE_OBJECTIVES[base].heads,
        stop_gradient=stop_gradient,
        predict_both_ways=full,
    )


def step_of(model: Model, base: BaseName = "simclr") -> Step:
    objective = Objective(ObjectiveSettings(objective=base, manip_lambda=1.0, temperature=0.5))
    weights: dict[TargetName, float] = {name: 1.0 for name in EVERYTHING if name in model.inverse_models}
    copy = EfferenceCopy(weights=weights, both_ways=model.predict_both_ways)
    return Step(model, objective, Accelerator(cpu=True), copy)


@pytest.mark.parametrize(
    ("base", "stop_gradient"), [("simclr", 0), ("simclr", 1), ("simclr", 2), ("byol", 0), ("relic", 1)]
)
@pytest.mark.parametrize("labeled_views", [False, True])
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    demo_test_images: ImageArray, base: BaseName, stop_gradient: int, labeled_views: bool
) -> None:
    """With batch norm in evaluation mode, as its statistics depend on the micro-batch.

    To 1e-6, the error of NT-Xent's similarities in single precision.
    """
    gradients, metrics = [], []
    for accumulate in (1, 3):
        model = a_model(stop_gradient, base).double()
        step = step_of(model, base)
        model.train()
        model.encoder.eval()
        if model.target_network is not None:
            model.target_network.encoder.eval()
        metrics.append(step(micro_batches(demo_test_images, accumulate=accumulate, labeled_views=labeled_views)))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(metrics[1], metrics[0], rtol=1e-6, atol=1e-6)
    whole, cached = gradients
    assert whole.keys() == cached.keys()
    assert ("encoder.conv1.weight" in whole) == (stop_gradient != 2)
    for name in whole:
        # The gradient of a bias before a batch norm is a rounding error.
        assert (cached[name] - whole[name]).norm() < 1e-6 * whole[name].norm() + 1e-9, name


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.repeat_interleave((x > 0).long()),
    ],
)
def test_what_waits_for_a_gpu_is_found(wait: Callable[[Tensor], object]) -> None:
    with HostSyncs() as syncs:
        wait(torch.randn(5))
    assert syncs.found


@pytest.mark.parametrize("base", ["simclr", "byol", "relic"])
@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_host_does_not_wait_in_a_step(
    demo_test_images: ImageArray, accumulate: int, optimizer: Any, base: BaseName
) -> None:
    """Neither for the gradient, with solarized pairs and an online classifier, nor for the optimizer.

    (Adam of PyTorch counts its steps in tensors of the host.)
    """
    model = a_model(base=base).double()
    step = step_of(model, base)
    update = make_optimizer(model, OptimizationSettings(optimizer=optimizer))
    batches = micro_batches(demo_test_images, accumulate=accumulate)
    assert any(batch.commands.solarize.any() for batch in batches)
    with HostSyncs() as syncs:
        metrics = step(batches)
        update.step()
        update.zero_grad()
        model.update_target_network(0.9)
    assert syncs.found == []
    assert metrics["inverse_loss"] > 0


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_gpu_in_a_step(demo_test_images: ImageArray) -> None:
    """With DALI and LARS; the first steps start libraries."""
    accelerator = Accelerator(mixed_precision="bf16")
    model = a_model().to(accelerator.device)
    step = Step(model, Objective(ObjectiveSettings(manip_lambda=1.0, temperature=0.5)), accelerator, EfferenceCopy())
    update = make_optimizer(model, OptimizationSettings())
    batches = Loader(sampler(demo_test_images), backend="dali", device=accelerator.device, workers=2).batches(0)
    for n in range(6):
        batch = next(batches)
        torch.cuda.set_sync_debug_mode("error" if n > 2 else "default")
        try:
            step([batch])
            update.step()
            update.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_running_statistics_count_each_micro_batch_once(demo_test_images: ImageArray) -> None:
    """Although the encoder processes each micro-batch twice."""
    batches = micro_batches(demo_test_images, accumulate=3)
    expected = a_model().double().encoder.train()
    with torch.no_grad():
        for batch in batches:
            expected(batch.views.flatten(0, 1))
    model = a_model().double()
    step_of(model)(batches)
    assert model.encoder.bn1.num_batches_tracked == 3
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(model.encoder.get_buffer(name), buffer)
    # The heads process the whole batch once.
    assert model.projection.bn_hidden.num_batches_tracked == 1
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_one_process_has_plain_batch_norm(demo_test_images: ImageArray) -> None:
    model = a_model()
    step_of(model)
    kinds = {type(module) for module in model.modules() if "BatchNorm" in type(module).__name__}
    assert kinds == {torch.nn.BatchNorm1d, torch.nn.BatchNorm2d}


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 4), (2, 2), (4, 1), (3, 2)])
def test_micro_batches_and_processes_divide_the_same_global_batches(
    demo_test_images: ImageArray, processes: int, accumulate: int
) -> None:
    """Each step has the same positions, images and commands, in the order of micro-batches and processes."""
    whole = sampler(demo_test_images)
    parts = [sampler(demo_test_images, processes=processes, process=p, accumulate=accumulate) for p in range(processes)]
    assert {part.steps_per_epoch for part in parts} == {whole.steps_per_epoch}
    assert {part.global_batch_size for part in parts} == {GLOBAL_BATCH}
    # The second step, the last step of the epoch, and the first step of the next one.
    for step in (1, whole.steps_per_epoch - 1, whole.steps_per_epoch):
        expected = whole.plan(step)
        plans = [part.plan(step * accumulate + k) for k in range(accumulate) for part in parts]
        assert {plan.epoch for plan in plans} == {expected.epoch}
        for name in ("positions", "image_ids"):
            np.testing.assert_array_equal(np.concatenate([getattr(s, name) for s in plans]), getattr(expected, name))
        packed = np.concatenate([plan.commands.pack() for plan in plans])
        np.testing.assert_array_equal(packed, expected.commands.pack())


FLAGS = (
    "--limit_train 96 --batch_size 8 --accumulate 3 --width 4 --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 "
    "--max_epochs 2 --num_workers 1 --deterministic 1"
).split()


def train(folder: Path, *more: str) -> str:
    return Run(*FLAGS, "--results_path", folder, *more).end()


def test_a_run_in_micro_batches_resumes_where_it_stopped(tmp_path: Path) -> None:
    """Its steps are those of the global batch, and the second epoch is bit-equal after a resume."""
    out = train(tmp_path / "whole")
    assert "2 epochs of 4 steps of 24 images" in out
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed" / "checkpoint-00000008.pt").unlink()
    assert "after step 4" in train(tmp_path / "resumed", "--resume", "auto")
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "resumed")]
    assert weights[0] == weights[1]


@pytest.mark.gpu
def test_deterministic_runs_are_equal_to_the_bit_on_a_gpu(tmp_path: Path) -> None:
    for run in ("first", "second"):
        train(tmp_path / run)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("first", "second")]
    assert weights[0] == weights[1]
