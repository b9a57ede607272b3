"""Images per second of training, what a step's time goes into, and what the optimizer costs.

    python -m benchmarks.step --dataset cifar10 --data_dir DATA --width 16 --baseline

Contenders take turns in processes of their own: the training loop as ``launch.py`` runs it, on real images and on views
that are there already; the bare forward and backward passes of encoder and heads, with the same casts; and, with
``--baseline``, a plain loop as the official code has it: single precision, contiguous, views made by torchvision's
transforms on Pillow images in a DataLoader, the whole similarity matrix, three optimizers, and every value that is
logged fetched at once.
"""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, RandomSampler

from benchmarks import report
from benchmarks.plain import plain_nt_xent
from benchmarks.report import Figures, Output
from benchmarks.throughput import RandomViews
from pipelines.batch import Batch
from pipelines.cpus import available_cpus
from pipelines.datasets.registry import DataSet, DataSetName, open_data_set
from pipelines.loader import Loader
from pipelines.sampler import Sampler
from stec.architectures import Arch
from stec.config import TargetName, TrainConfig
from stec.console import Console
from stec.loaders import Data, evaluation_loader, policy_of
from stec.models.model import Model
from stec.objectives.inverse import inverse_loss
from stec.profiling import WARM_UP_STEPS
from stec.runs.run_folder import RunFolder
from stec.startup import start
from stec.training.initial_model import initial_model
from stec.training.loop import train
from stec.training.optim import MOMENTUM, learning_rate_at, make_optimizer

Contender = Literal["baseline", "real", "synthetic", "copy", "bare"]
NAMES: dict[Contender, str] = {
    "baseline": "plain loop, official style",
    "real": "training loop, real images",
    "synthetic": "training loop, views in memory",
    "copy": "the same, predicting the full efference copy",
    "bare": "forward and backward alone",
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRUST = 0.001
WORKERS_MIB = [0.0]
"""The most that this process's workers had."""
CLASSES = 10
"""Of the online linear classifier, where it makes no difference."""


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """Measure the training step."""

    dataset: DataSetName = "demo"
    """Whose images to train on."""
    data_dir: Path | None = None
    """Folder that holds the data set."""
    arch: Arch = "resnet18"
    """Encoder."""
    width: int = 64
    """Channels of its first stage."""
    batch_size: int = 128
    """Images per step."""
    steps: int = 5
    """Steps of a turn, after as many for warming up."""
    repeats: int = 3
    """Turns, after one for warming up."""
    baseline: bool = False
    """Measure the official-style loop as well; ratios are to it."""
    copy: bool = False
    """Measure a model that predicts the full efference copy as well, on views that are there already."""
    optimizers: bool = True
    """Measure LARS against SGD on ResNet-50's parameters as well."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """As in training; the baseline is single precision always."""
    workers: int = available_cpus()
    """DALI's threads, and the baseline's worker processes."""

    def config(self, **more: Any) -> TrainConfig:
        """The run that is measured."""
        return TrainConfig().updated(
            dataset=self.dataset,
            data_dir=self.data_dir,
            arch=self.arch,
            width=self.width,
            batch_size=self.batch_size,
            mixed_precision=self.mixed_precision,
            manip_lambda=0.3,
            num_workers=self.workers,
            warmup_epochs=0,
            max_epochs=1,
            log_every=self.steps,
            **more,
        )


# --- What runs in a contender's process ---


class Some:
    """The first ``steps`` steps of a loader as an epoch, or, ``repeated``, its first two batches again and again."""

    def __init__(self, loader: Loader, steps: int, *, repeated: bool) -> None:
        self.loader, self.steps_per_epoch, self.repeated = loader, steps, repeated

    def batches(self, first_step: int) -> Iterator[Batch]:
        batches = self.loader.batches(first_step)
        if not self.repeated:
            return batches
        # Copies: what a pipeline gives is overwritten by later batches.
        two = [replace(batch, views=batch.views.clone()) for batch in itertools.islice(batches, 2)]
        del batches
        return itertools.cycle(two)


@cache
def data_set_of(name: Any, data_dir: Path | None) -> DataSet:
    """Loaded once in a process."""
    return open_data_set(name, data_dir)


def training_turn(contender: Contender, options: Options, profile: int = 0) -> dict[str, float]:
    """Metrics of the second half of a short training run; with ``profile``, milliseconds of the parts of a step."""
    config = options.config(profile=profile)
    if contender == "copy":
        config = config.updated(predict=get_args(TargetName), use_gaussian_blur=1, use_solarization=1)
    accelerator, _, precision = start(options.mixed_precision)
    data_set = data_set_of(options.dataset, options.data_dir)
    # The online linear classifier of a data set whose training images have no labels would need images of its own.
    classes = len(data_set.classes) if data_set.labeled is data_set.train else 0
    loader = Loader(
        Sampler(data_set.train, policy_of(config), seed=0, batch_size=options.batch_size),
        backend="auto",
        device=accelerator.device,
        workers=options.workers,
        half=torch.cuda.is_available() and precision != "no",
    )
    # A profile ends before the last step, which saves.
    steps = max(2 * options.steps, profile + WARM_UP_STEPS + 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary))
        train(
            config,
            Data(
                training=Some(loader, steps, repeated=contender in ("synthetic", "copy")),
                plain=evaluation_loader(
                    data_set.train,
                    config.data,
                    traits=config.traits,
                    batch_size=options.batch_size,
                    device=accelerator.device,
                ),
                labeled=None,
                test=None,
                classes=classes,
            ),
            initial_model(config, classes),
            accelerator=accelerator,
            console=Console(enabled=False),
            folder=folder,
            environment={},
            resumed=None,
        )
        line = folder.profile if profile else folder.metrics
        values: dict[str, float] = json.loads(line.read_text().splitlines()[-1])
    del loader
    gc.collect()
    return values


def loop_turn(contender: Contender, options: Options) -> float:
    """Images per second of a training loop."""
    return training_turn(contender, options)["images_per_second"]


def timed_steps(step: Callable[[], object], options: Options) -> float:
    """Images per second of as many steps, after as many for warming up."""
    for _ in range(options.steps):
        step()
    report.wait_for_gpu()
    started = time.perf_counter()
    for _ in range(options.steps):
        step()
    report.wait_for_gpu()
    return options.steps * options.batch_size / (time.perf_counter() - started)


def bare_turn(options: Options) -> float:
    """Encoder and heads forwards, and backwards from the sum of what they give."""
    config = options.config()
    accelerator, *_ = start(options.mixed_precision)
    model = initial_model(config, CLASSES).to(accelerator.device).train()
    views = torch.rand(options.batch_size, 2, 3, config.view_size_px, config.view_size_px, device=accelerator.device)

    def step() -> None:
        with accelerator.autocast():
            outputs = model(views)
        sum(output.float().sum() for output in tree_leaves(outputs) if output is not None).backward()
        model.zero_grad()

    return timed_steps(step, options)


class OfficialLars(torch.optim.Optimizer):
    """LARS, a parameter after the other."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            decay = group["weight_decay"]
            for p in group["params"]:
                weight_norm, grad_norm = p.norm(), p.grad.norm()
                update = p.grad + decay * p
                if weight_norm != 0 and grad_norm != 0:
                    update *= TRUST * weight_norm / (grad_norm + decay * weight_norm + 1e-8)
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(MOMENTUM).add_(update)
                p.sub_(group["lr"] * buffer)


def plain_optimizers(model: Model, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """One for the weights, one for biases and batch norms, one for the online linear classifier."""
    assert model.classifier is not None
    classifier = list(model.classifier.parameters())
    others = [(name, p) for name, p in model.named_parameters() if "online_classifier" not in name and p.requires_grad]
    small = [p for name, p in others if "bias" in name or "bn" in name]
    weights = [p for name, p in others if not ("bias" in name or "bn" in name)]
    return [
        OfficialLars(weights, config.optimization.learning_rate, config.optimization.weight_decay),
        torch.optim.SGD(small, config.optimization.learning_rate, MOMENTUM, foreach=False),
        torch.optim.SGD(classifier, config.optimization.learning_rate, MOMENTUM, foreach=False),
    ]


def baseline_turn(options: Options) -> float:
    """A plain loop on real images. The inverse model's targets are made up, which costs the loop nothing."""
    config, device = options.config(), DEVICE
    data_set = data_set_of(options.dataset, options.data_dir)
    model = initial_model(config, CLASSES)
    model.encoder.memory_format = torch.contiguous_format
    model.to(device, memory_format=torch.contiguous_format).train()  # type: ignore[call-overload]
    optimizers = plain_optimizers(model, config)
    batches = iter(
        DataLoader(
            RandomViews(data_set.train, policy_of(config), "official"),
            batch_size=options.batch_size,
            sampler=RandomSampler(range(len(data_set.train)), replacement=True, num_samples=sys.maxsize),
            num_workers=options.workers,
            pin_memory=device.type == "cuda",
        )
    )
    labels = torch.zeros(options.batch_size, dtype=torch.long, device=device)
    command = torch.zeros(options.batch_size, 2, 3, device=device)
    valid = torch.ones(options.batch_size, dtype=torch.bool, device=device)
    steps = itertools.count()
    logged: dict[str, float] = {}

    def step() -> None:
        outputs = model(torch.stack([views.to(device) for views in next(batches)], 1))
        assert outputs.projections is not None and outputs.class_logits is not None
        z_i, z_j = outputs.projections.unbind(1)
        contrast, accuracy, contrast_accuracy, entropy = plain_nt_xent(z_i, z_j, config.objective.temperature)
        inverse, inverse_accuracy = inverse_loss(outputs.inverse["window"], command, valid)
        logits, targets = outputs.class_logits.flatten(0, 1), labels.repeat_interleave(2)
        classifier = F.cross_entropy(logits, targets)
        loss = config.objective.discrimination_lambda * contrast + config.objective.manip_lambda * inverse + classifier
        rate = learning_rate_at(next(steps), config.optimization, steps_per_epoch=10**6)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        values = {
            "loss": loss,
            "contrast": contrast,
            "accuracy": accuracy,
            "contrast accuracy": contrast_accuracy,
            "entropy": entropy,
            "inverse": inverse,
            "inverse accuracy": inverse_accuracy,
            "online_classifier": classifier,
            "online linear classifier accuracy": (logits.argmax(1) == targets).float().mean(),
        }
        logged.update({name: value.item() for name, value in values.items()})

    images_per_second = timed_steps(step, options)
    WORKERS_MIB[0] = max(WORKERS_MIB[0], workers_mib())
    return images_per_second


def peak_mib() -> float:
    """The most memory that this process ever had, and what its worker processes had to themselves."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 + WORKERS_MIB[0]


def workers_mib() -> float:
    """Memory of the worker processes that they do not share with this one; 0 where the system does not tell."""
    kib = 0
    for process in multiprocessing.active_children():
        file = Path(f"/proc/{process.pid}/smaps_rollup")
        lines = file.read_text().splitlines() if file.exists() else []
        kib += sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return kib / 1024


def optimizer_turn(kind: Literal["sgd", "lars"], options: Options) -> float:
    """Milliseconds of an optimizer's step on the parameters of ResNet-50 and its heads; the median of some."""
    config = options.config(optimizer=kind, weight_decay=1e-4, learning_rate=0.1).updated(arch="resnet50", width=64)
    model = initial_model(config, CLASSES).to(DEVICE)
    optimizer = make_optimizer(model, config.optimization)
    for p in model.parameters():
        p.grad = torch.randn_like(p)

    def once() -> float:
        report.wait_for_gpu()
        started = time.perf_counter()
        optimizer.step()
        report.wait_for_gpu()
        return 1000 * (time.perf_counter() - started)

    for _ in range(3):
        once()
    return statistics.median(once() for _ in range(10))


# --- All of them ---


def measure(options: Options, console: Console) -> None:
    report.check(options)
    report.check_positive(options, "steps", "repeats")
    options.config().validate()
    open_data_set(options.dataset, options.data_dir)
    turns: dict[Contender, Callable[..., float]] = {
        "real": partial(loop_turn, "real"),
        "synthetic": partial(loop_turn, "synthetic"),
        "copy": partial(loop_turn, "copy"),
        "bare": bare_turn,
    }
    if not options.copy:
        del turns["copy"]
    if options.baseline:
        turns = {"baseline": baseline_turn, **turns}
    title = f"{options.arch}, width {options.width}, {options.dataset}, batch {options.batch_size}, {DEVICE}"
    with report.processes_apart() as start_process:
        calls = {contender: start_process() for contender in turns}
        taken = report.take_turns(
            {NAMES[contender]: partial(calls[contender], turn, options) for contender, turn in turns.items()},
            repeats=options.repeats,
            console=console,
        )
        memory = {NAMES[contender]: [call(peak_mib)] for contender, call in calls.items()}
        with console.waiting("profile"):
            profile = start_process()(training_turn, "real", options, options.steps)
        figures = [
            Figures(title=title, unit="images/s", turns=taken),
            Figures(title="Peak memory", unit="MiB, with worker processes", turns=memory),
            Figures(
                title=f"Where a step's time goes, {options.steps} steps",
                unit="ms (ratio: share of the step)",
                turns={name: [ms] for name, ms in sorted(profile.items(), key=lambda part: -part[1])},
            ),
        ]
        if options.optimizers:
            call = start_process()
            optimizers = {
                "SGD, torch, foreach": partial(call, optimizer_turn, "sgd", options),
                "LARS": partial(call, optimizer_turn, "lars", options),
            }
            taken = report.take_turns(optimizers, repeats=options.repeats, console=console)
            figures.append(Figures(title="Optimizer's step, ResNet-50 and heads", unit="ms", turns=taken))
    report.publish(figures, options, console)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.step", args=arguments, use_underscores=True)
    return report.run(lambda: measure(options, Console(enabled=True)))


if __name__ == "__main__":
    sys.exit(main())
