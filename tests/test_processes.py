"""Several processes compute the same as one. Run by Accelerate's launcher, this file is one of the processes."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from pipelines.commands import Policy
from pipelines.datasets import demo
from pipelines.datasets.images import ImageArray
from pipelines.loader import Loader
from pipelines.sampler import Sampler
from stec.config import BaseName, ModelSettings, ObjectiveSettings, TargetName
from stec.models.batch_norm import SyncBatchNorm
from stec.models.model import Model
from stec.objectives.inverse import EfferenceCopy
from stec.objectives.objective import Objective
from stec.objectives.registry import BASE_OBJECTIVES
from stec.training.step import Step

GLOBAL_BATCH, STEPS, SIZE_PX = 32, 20, 16
LOSSES = ("loss", "contrastive_loss", "inverse_loss", "classifier_loss")


def train(
    accelerator: Accelerator,
    images: ImageArray,
    *,
    dtype: torch.dtype = torch.float32,
    steps: int,
    learning_rate: float,
    accumulate: int = 1,
    stop_gradient: int = 1,
    labeled_views: bool = False,
    base: BaseName = "simclr",
    predict: tuple[TargetName, ...] = ("window",),
    arch: str = "resnet18",
) -> dict[str, Any]:
    """Steps of SGD: the metrics of all steps, the gradients of the first step, and the state at the end."""
    # The number of pairs that the inverse loss includes differs between the processes.
    sampler = Sampler(
        images,
        Policy(size=SIZE_PX, p_solarize=0.3, p_blur=0.5),
        seed=1,
        batch_size=GLOBAL_BATCH // accelerator.num_processes // accumulate,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        accumulate=accumulate,
    )
    batches = Loader(sampler, backend="torchvision", device=torch.device("cpu"), workers=0).batches(0)
    torch.manual_seed(0)
    settings = ModelSettings(arch=arch, width=4, hidden_mlp=16, feat_dim=8, predict=predict)
    model = Model(
        settings,
        stem="cifar",
        view_size_px=SIZE_PX,
        classes=10,
        base=BASE_OBJECTIVES[base].heads,
        stop_gradient=stop_gradient,
    ).to(dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate, momentum=0.9)
    objective = Objective(ObjectiveSettings(objective=base, manip_lambda=1.0, temperature=0.5))
    step = Step(model, objective, accelerator, EfferenceCopy(weights=dict.fromkeys(predict, 1.0)))
    metrics: list[dict[str, Tensor]] = []
    gradients: dict[str, Tensor] = {}
    for _ in range(steps):
        batch = [dataclasses.replace(b, views=b.views.to(dtype)) for b in itertools.islice(batches, accumulate)]
        if labeled_views:
            batch = [dataclasses.replace(b, labeled_views=b.views[:, :1].flip(-1)) for b in batch]
        metrics.append(accelerator.reduce(step(batch), "mean"))
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        model.update_target_network(0.9)
    return {
        "metrics": {name: torch.stack([values[name] for values in metrics]) for name in metrics[0]},
        "gradients": gradients,
        "state": model.state_dict(),
        "batch_norms": sorted(
            {type(m).__name__ for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        ),
    }


def normalize(accelerator: Accelerator, dtype: torch.dtype) -> dict[str, Any]:
    """One batch norm on 4 images of all processes: outputs, gradients and running statistics."""
    generator = torch.Generator().manual_seed(0)
    x, weights = (5 + 3 * torch.randn(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64)).to(dtype)
    rows = slice(*(4 * (accelerator.process_index + end) // accelerator.num_processes for end in (0, 1)))
    kind = nn.BatchNorm2d if accelerator.num_processes == 1 else SyncBatchNorm
    norm = kind(3).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    norm.weight.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    leaf = x[rows].clone().requires_grad_()
    y = norm(leaf)
    (y * weights[rows]).sum().backward()
    parameters = [accelerator.reduce(p.grad, "sum") for p in norm.parameters()]
    return {
        "dtype": y.dtype,
        "values": [accelerator.gather(y.detach()), accelerator.gather(leaf.grad), *parameters, *norm.buffers()],
    }


def everything(accelerator: Accelerator, *, exactly: bool = False) -> dict[str, Any]:
    """What is compared; ``exactly`` adds the steps of "float32" in double precision."""
    data = demo.load(split="test")
    exact: dict[str, Any] = {"dtype": torch.float64, "steps": 1, "learning_rate": 0.01}
    several: dict[str, Any] = {"steps": STEPS, "learning_rate": 1e-7}
    return {
        "float32": train(accelerator, data, **several),
        "float64": train(accelerator, data, **exact),
        "accumulate": train(accelerator, data, accumulate=2, **exact),
        "online classifier": train(accelerator, data, stop_gradient=0, labeled_views=True, **exact),
        "online classifier, accumulate": train(
            accelerator, data, stop_gradient=0, labeled_views=True, accumulate=2, **exact
        ),
        "frozen": train(accelerator, data, stop_gradient=2, accumulate=2, **exact),
        "BYOL": train(accelerator, data, base="byol", predict=("window", "color", "gray"), **exact | {"steps": 3}),
        "ReLIC": train(accelerator, data, base="relic", predict=("blur", "solarize"), accumulate=2, **exact),
        # Its batch norm has an activation in it.
        "timm": train(accelerator, data, arch="timm/mobilenetv3_small_050", accumulate=2, **exact),
        "batch norm": [normalize(accelerator, dtype) for dtype in (torch.float64, torch.bfloat16)],
        "float32, exact": train(accelerator, data, dtype=torch.float64, **several) if exactly else None,
    }


def accelerate() -> Accelerator:
    return Accelerator(
        cpu=True,
        mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """``everything`` on 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("processes")
    results = {1: everything(accelerate(), exactly=True)}
    for processes in (2, 4):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        command += [
            "--num_processes",
            str(processes),
            "--main_process_port",
            "0",
            "--module",
            "tests.test_processes",
            str(folder / str(processes)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stdout + done.stderr
        results[processes] = torch.load(folder / str(processes))
    return results


@pytest.mark.parametrize("processes", [2, 4])
def test_twenty_steps_in_single_precision(outcomes: dict[int, dict[str, Any]], processes: int) -> None:
    """Losses, parameters and running statistics differ from double precision only by rounding errors.

    Sums over several processes round differently from one sum, and twenty steps amplify that: up to 31 eps have been
    measured. The tests in double precision below detect smaller errors.
    """
    reference = outcomes[1]["float32, exact"]
    errors = []
    for outcome in (outcomes[1]["float32"], outcomes[processes]["float32"]):
        losses = [torch.stack([run["metrics"][name] for name in LOSSES]).double() for run in (outcome, reference)]
        state = [
            torch.cat([v.double().flatten() for v in run["state"].values() if v.is_floating_point()])
            for run in (outcome, reference)
        ]
        errors.append([float(((value - exact) / exact.abs().max()).abs().max()) for value, exact in (losses, state)])
    for one, several in zip(*errors, strict=True):
        assert several < 4 * one + 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "case",
    ["float64", "accumulate", "online classifier", "online classifier, accumulate", "frozen", "BYOL", "ReLIC", "timm"],
)
@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_in_double_precision(outcomes: dict[int, dict[str, Any]], processes: int, case: str) -> None:
    """To 1e-6, the error of NT-Xent's similarities in single precision."""
    one, several = outcomes[1][case], outcomes[processes][case]
    torch.testing.assert_close(several["metrics"], one["metrics"], rtol=1e-6, atol=1e-6)
    assert several["gradients"].keys() == one["gradients"].keys()
    for name, gradient in one["gradients"].items():
        difference = (several["gradients"][name] - gradient).norm().item()
        # The gradient of a bias before a batch norm is a rounding error.
        assert difference < 1e-6 * gradient.norm().item() + 1e-9, name
    for name, value in one["state"].items():
        torch.testing.assert_close(several["state"][name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("processes", [2, 4])
def test_batch_norm_on_few_images(outcomes: dict[int, dict[str, Any]], processes: int) -> None:
    """Outputs, gradients and running statistics are those of ``nn.BatchNorm2d``, also with one image per process."""
    for one, several, tolerance in zip(outcomes[1]["batch norm"], outcomes[processes]["batch norm"], (1e-12, 2e-2)):
        assert several["dtype"] == one["dtype"]
        for expected, value in zip(one["values"], several["values"], strict=True):
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


def test_batch_norm_is_synchronized_between_processes_only(outcomes: dict[int, dict[str, Any]]) -> None:
    assert outcomes[1]["float32"]["batch_norms"] == ["BatchNorm1d", "BatchNorm2d"]
    assert outcomes[2]["float32"]["batch_norms"] == ["SyncBatchNorm"]


if __name__ == "__main__":
    accelerator = accelerate()
    outcome = everything(accelerator)
    if accelerator.is_main_process:
        torch.save(outcome, sys.argv[1])
    accelerator.end_training()
