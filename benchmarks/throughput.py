"""Images per second (two views each) of the data pipeline, all contenders in one run on the same cores.

    python -m benchmarks.throughput --dataset cifar10 --data_dir DATA

The policy is that of the data set's recipe. Each contender has a process of its own, and they take turns. ``taskset``
limits the cores that all of them share.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args
from unittest.mock import patch

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks import report
from pipelines import feed
from pipelines.commands import Policy
from pipelines.cpus import available_cpus
from pipelines.datasets.images import ImageArray, ImageFiles, Images
from pipelines.datasets.registry import DATA_SETS, DataSetName, open_data_set
from pipelines.errors import UserError
from pipelines.loader import Loader, resolve_backend
from pipelines.sampler import Sampler
from stec.config import TrainConfig
from stec.console import Console
from stec.loaders import policy_of

Contender = Literal["official", "v2", "torchvision", "compiled", "gpu"]
NAMES: dict[Contender, str] = {
    "official": "official-style: torchvision on Pillow images",
    "v2": "official-style: torchvision v2 on tensors",
    "torchvision": "our commands, by torchvision",
    "compiled": "our commands, by compiled operators in DALI",
    "gpu": "our commands, by compiled kernels in DALI on the GPU",
}
MAIN_THREAD_IMAGES = 1024
WARM_UP_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class PipelineOptions(report.Output):
    """What is measured, for all benchmarks of the pipeline."""

    dataset: DataSetName = "demo"
    """Data set to read."""
    data_dir: Path | None = None
    """Folder that holds the data set."""
    batch_size: int | None = None
    """Images per batch; default: 256, and 64 for views of 224 px."""
    workers: int = available_cpus()
    """DALI threads, or worker processes of the others; default: all cores."""
    repeats: int = 5
    """Turns that each contender gets, after one for warming up."""
    seconds: float = 3.0
    """Length of a turn."""

    def check(self) -> None:
        """Raise UserError for what cannot be measured."""
        report.check_positive(self, "batch_size", "workers", "repeats", "seconds")
        report.check(self)

    def sampler(self, batch_size: int | None = None) -> Sampler:
        """The data set's images with the policy of its recipe."""
        config = TrainConfig().updated(dataset=self.dataset)
        if DATA_SETS[self.dataset].blur_and_solarize:
            config = config.updated(use_gaussian_blur=1, use_solarization=1)
        policy = policy_of(config)
        default = 64 if policy.size == 224 else 256
        return Sampler(
            open_data_set(self.dataset, self.data_dir).train,
            policy,
            seed=0,
            batch_size=batch_size or self.batch_size or default,
        )


@dataclass(frozen=True, kw_only=True)
class Options(PipelineOptions):
    """Measure the data pipeline against official-style ones."""

    contenders: tuple[Contender, ...] = tuple(name for name in get_args(Contender) if name != "gpu")
    """Which to measure; ratios are to the first."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where views are wanted. On cuda all but "gpu" are made on the CPU and copied."""

    def check(self) -> None:
        super().check()
        if not self.contenders:
            raise UserError(f"--contenders needs at least one of {', '.join(NAMES)}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda needs a GPU that torch can use, and there is none; use --device cpu.")
        if "gpu" in self.contenders and self.device == "cpu":
            raise UserError("--contenders gpu needs --device cuda.")
        if {"compiled", "gpu"} & set(self.contenders):
            resolve_backend("dali", torch.device(self.device))


class RandomViews(Dataset[tuple[Tensor, Tensor]]):
    """Two views of an image by torchvision's own random transforms."""

    def __init__(self, images: Images, policy: Policy, kind: Literal["official", "v2"]) -> None:
        self.images, self.open = images, images.open if kind == "official" else partial(_open_tensor, images)
        # Both namespaces have the same names.
        t: Any = transforms if kind == "official" else v2
        s = policy.jitter_strength
        antialias = {"antialias": True} if kind == "v2" else {}
        steps: list[Any] = [
            t.RandomResizedCrop(policy.size, policy.area, policy.aspect_ratio, **antialias),
            t.RandomHorizontalFlip(policy.p_flip),
            t.RandomApply([t.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], policy.p_color_jitter),
            t.RandomGrayscale(policy.p_grayscale),
            t.ToTensor() if kind == "official" else v2.ToDtype(torch.float32, scale=True),
        ]
        if policy.p_blur > 0:
            steps.append(t.RandomApply([t.GaussianBlur(policy.blur_window_px, policy.sigma_px)], policy.p_blur))
        if policy.p_solarize > 0:
            steps.append(t.RandomSolarize(0.5, policy.p_solarize))
        self.transform = t.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        image = self.open(n)
        return self.transform(image), self.transform(image)


def _open_tensor(images: Images, n: int) -> Tensor:
    """[3, H, W] uint8."""
    if isinstance(images, ImageArray):
        return torch.from_numpy(np.array(images.upright(slice(n, n + 1))[0].transpose(2, 0, 1), order="C"))
    return decode_image(torch.from_numpy(images.encoded(n).copy()), mode=ImageReadMode.RGB)


# --- What runs in a contender's process, which keeps the data set from turn to turn ---


@cache
def sampler_of(options: Options, batch_size: int | None = None) -> Sampler:
    return options.sampler(batch_size)


def views_of(contender: Contender, options: Options) -> Iterator[Sequence[Tensor]]:
    """Endless batches of views, [N, V, 3, H, W] or V times [N, 3, H, W], float32 on the device."""
    sampler, device = sampler_of(options), torch.device(options.device)
    if contender in ("official", "v2"):
        images = sampler.images
        batches: Any = DataLoader(
            RandomViews(images, sampler.policy, contender),
            batch_size=sampler.batch_size,
            sampler=RandomSampler(range(len(images)), replacement=True, num_samples=sys.maxsize),
            num_workers=options.workers,
            pin_memory=device.type == "cuda",
        )
    else:
        backend: Any = "torchvision" if contender == "torchvision" else "dali"
        # Compiled operators leave the GPU to others.
        on = device if contender == "gpu" else torch.device("cpu")
        ours = Loader(sampler, backend=backend, device=on, workers=options.workers)
        batches = ([batch.views] for batch in ours.batches(0))
    return ([views.to(device, non_blocking=True) for views in batch] for batch in batches)


def images_per_second(start: Callable[[], Iterator[Any]], options: PipelineOptions) -> float:
    """One turn of a pipeline that lives as long as this takes: nothing works ahead in other contenders' turns.

    Time is counted in rounds of as many batches as there are workers: worker processes tend to finish theirs together.
    """
    batches = start()
    for _ in range(options.workers + 2):
        next(batches)
    report.wait_for_gpu()
    count, elapsed, started = 0, 0.0, time.perf_counter()
    while elapsed < options.seconds:
        count += sum(len(next(batches)[0]) for _ in range(options.workers))
        report.wait_for_gpu()
        elapsed = time.perf_counter() - started
    del batches
    gc.collect()
    return count / elapsed


def views_turn(contender: Contender, options: Options) -> float:
    return images_per_second(partial(views_of, contender, options), options)


def dali_decoding_turn(part: Any, options: Options) -> float:
    from benchmarks import decoding

    sampler, threads = sampler_of(options), options.workers
    return images_per_second(partial(decoding.batches, sampler, part, threads=threads, execute=False), options)


def pillow_decoding_turn(options: Options) -> float:
    images = sampler_of(options).images
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < options.seconds or count == 0:
        images.open(count % len(images))
        count += 1
    return count / elapsed


def main_thread_ms(options: Options) -> dict[str, float]:
    """CPU time that the thread that trains spends on its batches, in ms per 1,024 images: medians of some steps."""
    sampler = sampler_of(options, min(MAIN_THREAD_IMAGES, len(sampler_of(options).images)))
    spent: dict[str, list[float]] = {name: [] for name in ("source", "run", "step")}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.thread_time()
            result = function(*arguments)
            spent[name].append(time.thread_time() - started)
            return result

        return call

    def timed_run(*arguments: Any) -> Iterator[Any]:
        step = timed("run", partial(next, untimed_run(*arguments)))
        while True:
            yield step()

    def inputs(source: feed.TrainingFeed) -> Sequence[Any]:
        values: Sequence[Any] = timed_inputs(source)
        return values

    untimed_run, timed_inputs = feed.run_pipeline, timed("source", feed.TrainingFeed.next_inputs)
    with patch.object(feed, "run_pipeline", timed_run), patch.object(feed.TrainingFeed, "next_inputs", inputs):
        ours = Loader(sampler, backend="dali", device=torch.device(options.device), workers=options.workers)
        step = timed("step", partial(next, ours.batches(0)))
        started = time.perf_counter()
        while len(spent["step"]) < WARM_UP_STEPS + 3 or time.perf_counter() - started < options.seconds:
            step()
    per_1024 = 1000 * MAIN_THREAD_IMAGES / sampler.batch_size
    source_ms, run_ms, step_ms = (per_1024 * float(np.median(values[WARM_UP_STEPS:])) for values in spent.values())
    return {
        "sum": step_ms,
        "drawing commands and feeding DALI": source_ms,
        "DALI's own part": run_ms - source_ms,
        "outputs to a batch": step_ms - run_ms,
    }


def measure(options: Options, console: Console) -> None:
    options.check()
    sampler = options.sampler()
    in_files = isinstance(sampler.images, ImageFiles)
    with report.processes_apart() as start:
        turns: dict[str, Callable[[], float]] = {}

        def add(name: str, turn: Callable[..., float], *arguments: Any) -> None:
            turns[name] = partial(start(), turn, *arguments, options)

        for contender in options.contenders:
            add(NAMES[contender], views_turn, contender)
        ours = "compiled" in options.contenders
        decoding = ("whole images, Pillow, one core", "whole images, DALI", "the needed part, DALI")
        if in_files:
            add(decoding[0], pillow_decoding_turn)
            if ours:
                add(decoding[1], dali_decoding_turn, "the whole image")
                add(decoding[2], dali_decoding_turn, "the union of both crop boxes")
        taken = report.take_turns(turns, repeats=options.repeats, console=console)
        title = f"{options.dataset}, {sampler.policy.size} px, batch {sampler.batch_size}, {options.workers} worker(s)"
        figures = [
            report.Figures(
                title=f"{title}, two views each on {options.device}",
                unit="images/s",
                turns={name: values for name, values in taken.items() if name not in decoding},
            )
        ]
        remarks = []
        if in_files:
            alone = {name: values for name, values in taken.items() if name in decoding}
            figures.append(report.Figures(title=f"{title}, decoding alone", unit="images/s", turns=alone))
            if ours and options.device == "cpu":
                share = np.median(taken[NAMES["compiled"]]) / np.median(taken[decoding[2]])
                remarks.append(f"Decoding's share of the time of {NAMES['compiled']}: {share:.0%}.")
        if ours:
            call = start()
            with console.waiting("main thread"):
                costs = [call(main_thread_ms, options) for _ in range(options.repeats)]
            figures.append(
                report.Figures(
                    title="CPU time of the main thread",
                    unit=f"ms per {MAIN_THREAD_IMAGES:,} images",
                    turns={name: [cost[name] for cost in costs] for name in costs[0]},
                )
            )
    report.publish(figures, options, console, remarks)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.throughput", args=arguments, use_underscores=True)
    return report.run(lambda: measure(options, Console(enabled=True)))


if __name__ == "__main__":
    sys.exit(main())
