"""Alternatives within our CPU pipeline, each against what it does: threads, prefetching, hand-over, decoding, feeding.

python -m benchmarks.ablations --dataset cifar10 --data_dir DATA
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks import decoding, report
from benchmarks.throughput import PipelineOptions, images_per_second
from pipelines import feed, loader
from pipelines.commands import Policy
from pipelines.datasets.images import ImageArray
from pipelines.executors.cpu import CompiledViews, CpuExecutor
from pipelines.executors.graph import training_pipeline
from pipelines.sampler import BatchPlan, Sampler
from stec.console import Console

CPU = torch.device("cpu")
COUNTS = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Options(PipelineOptions):
    """Measure alternatives within the pipeline."""


class GatheringExecutor(CpuExecutor):
    """Gets pixels, gathered from the data set, instead of their addresses."""

    def __init__(self, images: ImageArray, policy: Policy, views: int) -> None:
        super().__init__(images, policy, views, CPU)
        self.array = images
        self.input_names = ("pixels", "placement")

    def inputs(self, plan: BatchPlan) -> dict[str, Any]:
        placement = np.zeros((len(plan.image_ids), 3), np.int64)
        placement[:, 2] = self.policy.blur_window_px
        return {"pixels": self.array.pixels[plan.image_ids], "placement": placement}

    def views(self, nodes: Mapping[str, Any], commands: Any) -> tuple[Any, ...]:
        execute = CompiledViews(self.num_views, self.policy.size, in_memory=False)
        return (execute(nodes["pixels"], nodes["placement"], commands),)


def by_loader(sampler: Sampler, threads: int) -> Iterator[Tensor]:
    ours = loader.Loader(sampler, backend="dali", device=CPU, workers=threads)
    return (batch.views for batch in ours.batches(0))


def by_gathering(sampler: Sampler, threads: int) -> Iterator[Tensor]:
    assert isinstance(sampler.images, ImageArray)
    executor = GatheringExecutor(sampler.images, sampler.policy, sampler.views)
    source = feed.TrainingFeed(sampler, executor, 0)
    options = loader.pipeline_options(sampler.batch_size, threads, CPU)
    pipeline = training_pipeline(executor, source.next_inputs, **options)
    pipeline.build()
    while True:
        views, *_ = pipeline.run()
        yield torch.from_dlpack(views.as_tensor())


def by_decoding(sampler: Sampler, part: decoding.Part, threads: int) -> Iterator[Tensor]:
    made = decoding.batches(sampler, part, threads=threads, execute=True)
    return (torch.from_dlpack(views.as_tensor()) for views, *_ in made)


def turn(start: Callable[[], Iterator[Tensor]], options: PipelineOptions, depth: int = feed.PREFETCH_DEPTH) -> float:
    with patch.object(feed, "PREFETCH_DEPTH", depth):
        return images_per_second(lambda: ([views] for views in start()), options)


def measure(options: Options, console: Console) -> None:
    options.check()
    sampler, threads = options.sampler(), options.workers
    ours = partial(by_loader, sampler, threads)
    groups: dict[str, dict[str, Callable[[], float]]] = {
        "Threads": {
            f"{count} thread(s)": partial(turn, partial(by_loader, sampler, count), replace(options, workers=count))
            for count in COUNTS
        },
        "Batches that DALI prepares ahead": {
            f"{depth} batch(es)": partial(turn, ours, options, depth) for depth in COUNTS
        },
        "Hand-over of views to torch": {
            "without a copy": partial(turn, ours, options),
            "copied": partial(turn, lambda: (views.clone() for views in ours()), options),
        },
    }
    if isinstance(sampler.images, ImageArray):
        groups["Feeding pixels"] = {
            "by their addresses": partial(turn, ours, options),
            "gathered into a batch": partial(turn, partial(by_gathering, sampler, threads), options),
        }
    else:
        groups["Decoding"] = {
            part: partial(turn, partial(by_decoding, sampler, part, threads), options)
            for part in get_args(decoding.Part)
        }
    title = f"{options.dataset}, {sampler.policy.size} px, batch {sampler.batch_size}, {threads} thread(s) unless noted"
    figures = [
        report.Figures(
            title=f"{name} ({title})",
            unit="images/s, two views each",
            turns=report.take_turns(turns, repeats=options.repeats, console=console),
        )
        for name, turns in groups.items()
    ]
    report.publish(figures, options, console)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.ablations", args=arguments, use_underscores=True)
    return report.run(lambda: measure(options, Console(enabled=True)))


if __name__ == "__main__":
    sys.exit(main())
