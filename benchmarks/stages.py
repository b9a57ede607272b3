"""CPU time of a view, stage by stage: through the whole pipeline, and of the compiled functions alone.

    python -m benchmarks.stages --dataset cifar10 --data_dir DATA

Through the pipeline, a stage's time is what a policy with that stage on every view costs more than one without it. So
all that a stage causes is in it, waiting for memory included. Alone, a compiled function runs again and again on the
same views, which stay in the processor's cache.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import tyro
from numba import njit
from numpy.typing import NDArray

from benchmarks import decoding, report
from benchmarks.throughput import PipelineOptions
from pipelines.commands import Policy
from pipelines.datasets.images import ImageArray, ImageFiles
from pipelines.executors import cpu_kernels
from pipelines.executors.image_arrays import addresses
from pipelines.loader import Loader
from pipelines.sampler import BatchPlan, Sampler
from stec.console import Console

CPU = torch.device("cpu")
WARM_UP_BATCHES = 4
JITTER = ("brightness", "contrast", "saturation", "hue")
"""The steps by their numbers in a command's order."""
VIEWS_ALONE = 32
CALLS_ALONE = 20
"""In a row on a view, so that the way from Python into a compiled function does not count."""


class OneStepFourTimes(Sampler):
    """Commands whose jitter is one of its steps, four times over."""

    jitter_step = 0

    def plan(self, step: int) -> BatchPlan:
        plan = super().plan(step)
        jitter_order = np.full_like(plan.commands.order, self.jitter_step)
        return replace(plan, commands=replace(plan.commands, order=jitter_order))


def cpu_us_per_view(
    batches: Iterator[Any], views_per_batch: int, seconds: float, clock: Callable[[], float] = time.process_time
) -> float:
    """CPU time of all threads of this process, or what else ``clock`` counts."""
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    count, wall, cpu = 0, time.perf_counter(), clock()
    while count == 0 or time.perf_counter() - wall < seconds:
        next(batches)
        count += views_per_batch
    spent = clock() - cpu
    del batches
    gc.collect()
    return 1e6 * spent / count


def pipeline_turn(sampler: Sampler, options: PipelineOptions, clock: Callable[[], float] = time.process_time) -> float:
    loader = Loader(sampler, backend="dali", device=CPU, workers=options.workers)
    return cpu_us_per_view(loader.batches(0), sampler.batch_size * sampler.views, options.seconds, clock)


def decoding_turn(sampler: Sampler, options: PipelineOptions) -> float:
    batches = decoding.batches(sampler, "the union of both crop boxes", threads=options.workers, execute=False)
    return cpu_us_per_view(batches, sampler.batch_size * sampler.views, options.seconds)


def through_the_pipeline(sampler: Sampler, options: PipelineOptions, console: Console) -> tuple[report.Figures, str]:
    """Time per view of each stage where it happens, and how their sum compares with the time of the whole policy."""
    full = sampler.policy
    plain = replace(full, p_color_jitter=0.0, p_grayscale=0.0, p_blur=0.0, p_solarize=0.0)
    settings: dict[str, Any] = {"seed": 0, "batch_size": sampler.batch_size}

    def with_policy(kind: type[Sampler] = Sampler, **changes: Any) -> Sampler:
        return kind(sampler.images, replace(plain, **changes), **settings)

    # Orders, and how often their stage comes about in the whole policy.
    stages: dict[str, tuple[Sampler, float]] = {}
    for number, name in enumerate(JITTER):
        one_step = with_policy(OneStepFourTimes, p_color_jitter=1.0)
        assert isinstance(one_step, OneStepFourTimes)
        one_step.jitter_step = number
        stages[name] = one_step, full.p_color_jitter
    stages["gray"] = with_policy(p_grayscale=1.0), full.p_grayscale
    stages["blur"] = with_policy(p_blur=1.0), full.p_blur
    stages["solarize"] = with_policy(p_solarize=1.0), full.p_solarize
    stages = {name: (stage, probability) for name, (stage, probability) in stages.items() if probability > 0}

    turns: dict[str, Callable[[], float]] = {"whole policy": partial(pipeline_turn, sampler, options)}
    if isinstance(sampler.images, ImageFiles):
        turns["reading and decoding"] = partial(decoding_turn, sampler, options)
    else:
        turns["main thread"] = partial(pipeline_turn, sampler, options, time.thread_time)
    turns["crop, resize and output"] = partial(pipeline_turn, with_policy(), options)
    turns |= {name: partial(pipeline_turn, stage, options) for name, (stage, _) in stages.items()}
    taken = {
        name: np.array(values)
        for name, values in report.take_turns(turns, repeats=options.repeats, console=console).items()
    }
    without = taken["crop, resize and output"]
    for name in stages:
        taken[name] = (taken[name] - without) / (len(JITTER) if name in JITTER else 1)
    explained = float(np.median(without))
    # Decoding is measured with all that its main thread does.
    taken["crop, resize and output"] = without - taken.get("reading and decoding", taken.get("main thread", 0.0))
    explained += sum(probability * float(np.median(taken[name])) for name, (_, probability) in stages.items())
    figures = report.Figures(
        title=f"{options.dataset}, {full.size} px, {options.workers} thread(s)",
        unit="CPU us per view that has the stage",
        turns={name: values.tolist() for name, values in taken.items()},
    )
    whole = float(np.median(taken["whole policy"]))
    return figures, f"Stages at their probabilities: {explained:.1f} of the whole policy's {whole:.1f} us per view."


@cache
def in_a_loop(function: Any) -> Any:
    """A function that calls one of ``executors.cpu_kernels``, which compiled code alone can do, so many times."""

    @njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def loop(times: int, *arguments: Any) -> None:
        for _ in range(times):
            function(*arguments)

    return loop


def calls_by_stage(sampler: Sampler) -> dict[str, tuple[Any, list[tuple[Any, ...]]]]:
    """A compiled function and the arguments of its calls, one a view, for each stage."""
    full, images = sampler.policy, sampler.images
    policy = replace(full, p_color_jitter=1.0, p_grayscale=1.0, p_blur=1.0, p_solarize=1.0)
    plan = Sampler(images, policy, seed=0, batch_size=VIEWS_ALONE).plan(0)
    c, size, ids = plan.commands, full.size, plan.image_ids
    plain = Policy(size=size, p_color_jitter=0.0, p_grayscale=0.0)
    loader = Loader(Sampler(images, plain, seed=0, batch_size=VIEWS_ALONE), backend="dali", device=CPU, workers=1)
    views = np.ascontiguousarray(next(loader.batches(0)).views[:, 0].movedim(1, -1).numpy())
    planes = np.ascontiguousarray(np.rint(views * 255).astype(np.uint8).transpose(0, 3, 1, 2)).reshape(len(ids), 3, -1)

    def source(n: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        if isinstance(images, ImageArray):
            return np.array(images.pixels[ids[n]]).reshape(-1), addresses(images, ids[n : n + 1], CPU)[0, 1:]
        pixels = np.array(images.open(int(ids[n])))
        return pixels.reshape(-1), np.array(pixels.strides)

    def crop_box(n: int) -> tuple[Any, ...]:
        flat, strides = source(n)
        start = int(c.top[n, 0] * strides[0] + c.left[n, 0] * strides[1])
        return flat, start, strides, int(c.height[n, 0]), int(c.width[n, 0]), size, bool(c.flip[n, 0])

    every = range(len(ids))
    stages: dict[str, tuple[Any, list[tuple[Any, ...]]]] = {
        "crop, resize": (cpu_kernels._resize, [crop_box(n) for n in every])
    }
    factors = (c.brightness, c.contrast, c.saturation, c.hue_turns)
    functions = (cpu_kernels._brightness, cpu_kernels._contrast, cpu_kernels._saturation, cpu_kernels._hue)
    for name, function, factor in zip(JITTER, functions, factors, strict=True):
        stages[name] = function, [(planes[n].copy(), factor[n, 0]) for n in every]
    stages["gray"] = cpu_kernels._gray, [(planes[n].copy(),) for n in every]
    if full.p_blur > 0:
        blurs = [(planes[n].copy(), float(c.sigma_px[n, 0]), full.blur_window_px, views[n].copy()) for n in every]
        stages["blur to output"] = cpu_kernels._blurred, blurs
    stages["output"] = cpu_kernels._interleave, [(planes[n].copy(), views[n].copy()) for n in every]
    if full.p_solarize > 0:
        stages["solarize"] = cpu_kernels._solarize, [(views[n].copy(),) for n in every]
    return stages


def alone_turn(loop: Any, calls: Sequence[tuple[Any, ...]], seconds: float) -> float:
    """CPU time in us per call."""
    for arguments in calls:
        loop(1, *arguments)
    count, wall, cpu = 0, time.perf_counter(), time.thread_time()
    while count == 0 or time.perf_counter() - wall < seconds:
        for arguments in calls:
            loop(CALLS_ALONE, *arguments)
        count += CALLS_ALONE * len(calls)
    return 1e6 * (time.thread_time() - cpu) / count


def alone(sampler: Sampler, options: PipelineOptions, console: Console) -> report.Figures:
    """Time of each compiled function, in a thread of its own."""
    turns = {
        name: partial(alone_turn, in_a_loop(function), calls, options.seconds / 4)
        for name, (function, calls) in calls_by_stage(sampler).items()
    }
    return report.Figures(
        title=f"{options.dataset}, {sampler.policy.size} px, compiled functions alone",
        unit="CPU us per view that has the stage",
        turns=report.take_turns(turns, repeats=options.repeats, console=console),
    )


def measure(options: PipelineOptions, console: Console) -> None:
    options.check()
    sampler = options.sampler()
    through, remark = through_the_pipeline(sampler, options, console)
    report.publish([through, alone(sampler, options, console)], options, console, [remark])


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(PipelineOptions, prog="python -m benchmarks.stages", args=arguments, use_underscores=True)
    return report.run(lambda: measure(options, Console(enabled=True)))


if __name__ == "__main__":
    sys.exit(main())
