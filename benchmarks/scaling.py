"""The training step on several processes: at a fixed global batch, at a fixed batch per process, and its gathers.

    python -m benchmarks.scaling

Every process sets itself up as ``launch.py`` does, gloo on CPUs and NCCL on GPUs, and trains on synthetic views that
are in memory already. On CPUs the processes share the cores, so that a ratio of 1 is what can be hoped for; on GPUs
each has its own, and it is the number of processes.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import tyro
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from benchmarks import report
from benchmarks.report import Figures, Output
from pipelines.batch import Batch
from pipelines.commands import VIEWS, draw
from pipelines.cpus import available_cpus
from pipelines.errors import UserError
from stec.config import TrainConfig
from stec.console import Console
from stec.distributed.processes import gather
from stec.loaders import policy_of
from stec.objectives import simclr
from stec.objectives.inverse import EfferenceCopy
from stec.objectives.objective import Objective
from stec.objectives.simclr import nt_xent
from stec.recipes import recipe
from stec.startup import start
from stec.training.initial_model import initial_model
from stec.training.optim import make_optimizer
from stec.training.step import Step

CLASSES = 10
TIMEOUT_S = 300
"""After which processes give up one that hangs."""
LEARNING_RATE = 1e-3
"""Small, so that weights stay finite whatever the recipe's batch is."""


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """Measure the training step on several processes."""

    recipe: str = "cifar10-resnet18"
    """Whose model, views and losses."""
    width: int = 16
    """Channels of the encoder's first stage."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """As in training."""
    processes: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes; ratios are to the first."""
    global_batch: int = 256
    """Images of all processes together, where that is fixed."""
    local_batch: int = 64
    """Images of each process, where that is fixed."""
    steps: int = 3
    """Steps in a turn."""
    views: tuple[int, ...] = (4096, 16384, 65536)
    """Views of all processes together, for the gathers and NT-Xent; two per image."""
    shares: tuple[int, ...] = (8, 64)
    """Numbers of processes of which one computes its share of NT-Xent, alone and without the others."""
    repeats: int = 5
    """Turns that each contender gets, after one for warming up."""

    def check(self) -> None:
        """Raise UserError for what cannot be measured."""
        report.check(self)
        counts = ("width", "global_batch", "local_batch", "steps", "repeats", "processes", "shares")
        report.check_positive(self, *counts)
        for count in self.processes:
            if self.global_batch % count:
                raise UserError(f"--global_batch {self.global_batch} must be a multiple of --processes {count}.")
        for count in (*self.processes, *self.shares):
            for views in self.views:
                if views < 1 or views % (VIEWS * count):
                    raise UserError(f"--views {views} must be a multiple of {VIEWS * count}, two for each process.")

    def config(self, local_batch: int) -> TrainConfig:
        return recipe(self.recipe).updated(width=self.width, batch_size=local_batch, learning_rate=LEARNING_RATE)


@dataclass(frozen=True)
class Place:
    """Which process of how many, and where they meet."""

    rank: int
    processes: int
    port: int


@cache
def join(place: Place, mixed_precision: str) -> Accelerator:
    """Become one of the processes, as ``launch.py`` is started by Accelerate's launcher."""
    if place.processes > 1:
        rank, world = str(place.rank), str(place.processes)
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(place.port))
    return start(mixed_precision, TIMEOUT_S)[0]


def settled() -> None:
    """Return when this process's device has done what it was asked to, and so have all others'."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def synthetic_batch(config: TrainConfig, device: torch.device) -> Batch:
    """Noise, with commands and labels as if it came from images."""
    count, size = config.optimization.batch_size, config.view_size_px
    generator = torch.Generator().manual_seed(0)
    views = torch.rand(count * VIEWS, 3, size, size, generator=generator).to(device, memory_format=torch.channels_last)
    return Batch(
        views=views.unflatten(0, (count, VIEWS)),
        commands=draw(policy_of(config), seed=0, epoch=0, first_position=0, image_hw=np.full((count, 2), size)),
        labels=torch.randint(CLASSES, (count,), generator=generator).to(device),
        epoch=0,
        positions=np.arange(count),
        image_ids=np.arange(count),
    )


@cache
def trainer(place: Place, local_batch: int, options: Options) -> Callable[[], None]:
    """A function that makes one step of training."""
    accelerator, config = join(place, options.mixed_precision), options.config(local_batch)
    model = initial_model(config, CLASSES)
    step = Step(model, Objective(config.objective), accelerator, EfferenceCopy())
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config.optimization))
    batch = synthetic_batch(config, accelerator.device)
    model.train()

    def train() -> None:
        step([batch])
        optimizer.step()
        optimizer.zero_grad()

    return train


def steps_turn(place: Place, local_batch: int, options: Options) -> float:
    """Images of all processes together per second."""
    train = trainer(place, local_batch, options)
    settled()
    started = time.perf_counter()
    for _ in range(options.steps):
        train()
    settled()
    return options.steps * local_batch * place.processes / (time.perf_counter() - started)


def features(rows: int, options: Options, device: torch.device) -> Tensor:
    """Unit vectors [rows, F] float32."""
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(rows, options.config(1).model.feat_dim, generator=generator), dim=1).to(device)


def gather_turn(place: Place, views: int, options: Options) -> float:
    """Milliseconds of NT-Xent's two gathers."""
    device = join(place, options.mixed_precision).device
    projections = features(views // place.processes, options, device).unflatten(0, (-1, VIEWS))
    normalizers = torch.rand(len(projections), VIEWS, 2, device=device)
    settled()
    started = time.perf_counter()
    gather(projections)
    gather(normalizers)
    settled()
    return 1000 * (time.perf_counter() - started)


@contextmanager
def copies_as_others(processes: int) -> Iterator[None]:
    """While open, NT-Xent sees so many processes, the others being copies of this one, which cost what they would."""

    def copied(own: Tensor) -> Tensor:
        return own.repeat(processes, *[1] * (own.dim() - 1))

    with patch.object(simclr, "gather", copied):
        yield


def share_turn(place: Place, views: int, processes: int, options: Options) -> float:
    """Milliseconds of one process's rows of NT-Xent against all columns, forwards and backwards."""
    device = join(place, options.mixed_precision).device
    z_i, z_j = features(views // processes, options, device).unflatten(0, (VIEWS, -1)).requires_grad_()
    settled()
    started = time.perf_counter()
    with copies_as_others(processes):
        nt_xent(z_i, z_j, options.config(1).objective.temperature)[0].backward()
    settled()
    return 1000 * (time.perf_counter() - started)


class Group:
    """Processes that train together."""

    def __init__(self, start: Callable[[], Callable[..., Any]], processes: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.calls = {Place(rank, processes, port): start() for rank in range(processes)}

    def __call__(self, turn: Callable[..., float], *arguments: Any) -> float:
        """Have all processes take the same turn; the mean of what they say."""
        pool = ThreadPoolExecutor(len(self.calls))
        waiting = [pool.submit(call, turn, place, *arguments) for place, call in self.calls.items()]
        # Where one fails, the others wait for it.
        done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=False)
        return float(np.mean([future.result() for future in done]))


def measure(options: Options, console: Console) -> None:
    options.check()
    remarks = []
    # Asked of the driver: this process does not start CUDA.
    gpus = torch.cuda.device_count()
    counts = [count for count in options.processes if not gpus or count <= gpus]
    if len(counts) < len(options.processes):
        remarks.append(f"On {gpus} GPU(s) no more processes than that were measured.")
    if not counts:
        raise UserError(f"--processes {options.processes[0]} needs as many GPUs, and there are {gpus}.")
    repeats, title = options.repeats, f"{options.recipe}, width {options.width}"
    threads = {count: max(1, available_cpus() // count) for count in counts}
    names = {count: f"{count} process(es) of {threads[count]} thread(s)" for count in counts}
    figures = []
    with report.processes_apart() as start:
        groups = {count: Group(start, count) for count in counts}
        batches: dict[str, dict[int, int]] = {
            f"{options.global_batch} images in all": {count: options.global_batch // count for count in counts},
            f"{options.local_batch} images per process": dict.fromkeys(counts, options.local_batch),
        }
        for what, sizes in batches.items():
            turns = {names[count]: partial(groups[count], steps_turn, sizes[count], options) for count in counts}
            taken = report.take_turns(turns, repeats=repeats, console=console)
            figures.append(Figures(title=f"{title}, {what}", unit="images/s", turns=taken))
        for count in counts:
            if count > 1 and options.views:
                turns = {f"{v:,} views": partial(groups[count], gather_turn, v, options) for v in options.views}
                taken = report.take_turns(turns, repeats=repeats, console=console)
                figures.append(Figures(title=f"NT-Xent's gathers, {names[count]}", unit="ms", turns=taken))
        alone = Group(start, 1)
        for count in options.shares:
            if options.views:
                turns = {
                    f"{v // count:,} of {v:,} views": partial(alone, share_turn, v, count, options)
                    for v in options.views
                }
                taken = report.take_turns(turns, repeats=repeats, console=console)
                name = f"NT-Xent, the share of one of {count} processes, alone with {available_cpus()} thread(s)"
                figures.append(Figures(title=name, unit="ms", turns=taken))
    cores = f"All processes share {available_cpus()} core(s)" if not gpus else "Each process has a GPU of its own"
    remarks.append(f"{cores}; the shares of NT-Xent are computed by one process alone.")
    report.publish(figures, options, console, remarks)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.scaling", args=arguments, use_underscores=True)
    return report.run(lambda: measure(options, Console(enabled=True)))


if __name__ == "__main__":
    sys.exit(main())
