"""Images per second (two views each) of the data pipeline, all contenders in one run on the same cores.

    python -m benchmarks.throughput --dataset cifar10 --data_dir DATA

Contenders take turns, so that a machine whose speed drifts treats them alike. Printed are the median and the range over
the turns, and the ratio to the official-style baseline.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pipelines.images import Images
from pipelines.index import open_data_set
from pipelines.loader import Loader
from pipelines.order import Order
from stec.commands import Policy
from stec.config import DataSetName, TrainConfig
from stec.console import Console
from stec.errors import UserError
from stec.run_folder import write_json


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the data pipeline."""

    dataset: DataSetName = "demo"
    """Data set to read."""
    data_dir: Path | None = None
    """Folder that holds the data set."""
    batch_size: int = 256
    """Images per batch."""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """DALI threads, or worker processes of the others."""
    blur_and_solarize: bool = False
    """Add the blur and solarization of the STL-10 and ImageNet recipes."""
    repeats: int = 5
    """Turns that each contender gets."""
    seconds: float = 3.0
    """Length of a turn."""
    json: Path | None = None
    """Also write the figures here."""


class OfficialStyle(Dataset[tuple[Tensor, Tensor, int]]):
    """Two views by torchvision's own random transforms on Pillow images, an image at a time."""

    def __init__(self, images: Images, policy: Policy) -> None:
        s = policy.jitter_strength
        steps: list[Any] = [
            transforms.RandomResizedCrop(policy.size, policy.area, policy.aspect_ratio),
            transforms.RandomHorizontalFlip(policy.p_flip),
            transforms.RandomApply([transforms.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], policy.p_color_jitter),
            transforms.RandomGrayscale(policy.p_grayscale),
            transforms.ToTensor(),
        ]
        if policy.p_blur > 0:
            blur = transforms.GaussianBlur(policy.blur_window_px, policy.sigma_px)
            steps.append(transforms.RandomApply([blur], policy.p_blur))
        if policy.p_solarize > 0:
            steps.append(transforms.RandomSolarize(0.5, policy.p_solarize))
        self.images, self.transform = images, transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, int]:
        image = self.images.open(n)
        return self.transform(image), self.transform(image), int(self.images.labels[n])


def contenders(options: Options) -> dict[str, Callable[[], Iterator[Any]]]:
    """Endless sources of batches by name; the first is the baseline."""
    data_set = open_data_set(options.dataset, options.data_dir)
    switch: Literal[0, 1] = 1 if options.blur_and_solarize else 0
    policy = Policy.of(TrainConfig(dataset=options.dataset, use_gaussian_blur=switch, use_solarization=switch))
    order = Order(data_set.train, policy, seed=0, batch_size=options.batch_size)

    def official() -> Iterator[Any]:
        while True:
            yield from DataLoader(
                OfficialStyle(data_set.train, policy),
                batch_size=options.batch_size,
                shuffle=True,
                drop_last=True,
                num_workers=options.workers,
            )

    def ours(backend: Any) -> Callable[[], Iterator[Any]]:
        loader = Loader(order, backend=backend, device=torch.device("cpu"), workers=options.workers)
        return lambda: loader.batches(0)

    return {
        "official-style transforms": official,
        "commands, torchvision": ours("torchvision"),
        "commands, DALI": ours("dali"),
    }


def images_per_second(batches: Iterator[Any], options: Options) -> float:
    """One turn: as many batches as fit into ``options.seconds``, after some that fill the queues."""
    for _ in range(4):
        next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < options.seconds:
        next(batches)
        count += 1
    return count * options.batch_size / (time.perf_counter() - started)


def processor() -> str:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if (cpuinfo.exists())
        else []
    )
    return names[0] if names else platform.processor()


def main() -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.throughput", use_underscores=True)
    try:
        sources = contenders(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    turns: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(options.repeats):
        for name, start in sources.items():
            batches = start()
            turns[name].append(images_per_second(batches, options))
            del batches

    import nvidia.dali as dali

    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, DALI {dali.__version__}"
    console = Console(enabled=True)
    console.say(f"{processor()}, {options.workers} core(s); {versions}, NumPy {np.__version__}")
    console.say(f"python -m benchmarks.throughput {' '.join(sys.argv[1:])}")
    baseline = statistics.median(next(iter(turns.values())))
    console.table(
        f"{options.dataset}, batch {options.batch_size}: images/s, two views each",
        ["", "median", "lowest", "highest", "ratio"],
        [
            [
                name,
                f"{statistics.median(v):,.0f}",
                f"{min(v):,.0f}",
                f"{max(v):,.0f}",
                f"{statistics.median(v) / baseline:.1f}",
            ]
            for name, v in turns.items()
        ],
    )
    if options.json is not None:
        write_json(
            options.json,
            {"command": sys.argv, "processor": processor(), "versions": versions, "images_per_second": turns},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
