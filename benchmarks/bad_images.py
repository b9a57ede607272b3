"""What bad images cost: images per second of the loader in the first and in the second epoch, by how many are bad.

    python -m benchmarks.bad_images

The images are JPEG files of 500 x 375 px that are made for this. Bad ones are cut off, either before the folder is
indexed, so that the index finds them, or afterwards, so that batches fail on them. Each turn begins without a cache,
and its first epoch with building the pipeline.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from benchmarks import report
from benchmarks.report import Figures, Output
from pipelines.bad_images import BadImages
from pipelines.commands import Policy
from pipelines.cpus import available_cpus
from pipelines.datasets.registry import open_data_set
from pipelines.decoder_messages import decoder_messages_dropped
from pipelines.errors import UserError
from pipelines.loader import Loader
from pipelines.sampler import Sampler
from stec.console import Console

HEIGHT, WIDTH, KINDS = 375, 500, 20
EPOCHS = ("first epoch", "second epoch")


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """Measure what bad images cost."""

    images: int = 2048
    """Images in the folder."""
    percent: tuple[float, ...] = (0.5, 2.0)
    """Percentages of bad images, each compared with none."""
    batch_size: int = 256
    """Images in a batch."""
    view_size: int = 224
    """Height and width of a view in px."""
    repeats: int = 3
    """Times that each is measured, after one for warming up."""

    def check(self) -> None:
        """Raise UserError for what cannot be measured."""
        report.check(self)
        report.check_positive(self, "images", "percent", "batch_size", "view_size", "repeats")
        if max(self.percent) > 50:
            raise UserError(f"--percent {max(self.percent)} is too large; give 50 or less.")
        if self.batch_size > self.images:
            raise UserError(f"--batch_size {self.batch_size} is more than --images {self.images}; give fewer.")


def photographs() -> list[bytes]:
    """Encoded images, each with as much detail as a photograph has."""
    random = np.random.default_rng(0)
    encoded = []
    for _ in range(KINDS):
        coarse = Image.fromarray(random.integers(0, 256, (15, 20, 3), np.uint8)).resize((WIDTH, HEIGHT))
        noisy = np.asarray(coarse).astype(int) + random.integers(-12, 13, (HEIGHT, WIDTH, 1))
        content = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=85)
        encoded.append(content.getvalue())
    return encoded


def measure(options: Options, encoded: list[bytes], percent: float, cut_off: str) -> dict[str, float]:
    """Seconds of indexing, and images per second in each epoch."""
    count = round(options.images * percent / 100)
    bad = np.random.default_rng(1).choice(options.images, count, replace=False).tolist()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        root.mkdir()
        files = [root / f"{n:06d}.jpg" for n in range(options.images)]
        for n, file in enumerate(files):
            file.write_bytes(encoded[n % KINDS])

        def damage() -> None:
            for n in bad:
                os.truncate(files[n], len(encoded[n % KINDS]) * 6 // 10)

        if cut_off == "before":
            damage()
        os.environ["XDG_CACHE_HOME"] = folder
        started = time.perf_counter()
        images = open_data_set("folder", root).train
        figures = {"indexing": time.perf_counter() - started}
        if cut_off == "after":
            damage()
        sampler = Sampler(
            images,
            Policy(size=options.view_size, jitter_strength=1.0),
            seed=0,
            batch_size=options.batch_size,
            bad=BadImages(images, max_fraction=1.0),
        )
        sampler.bad.list_in(Path(folder) / "bad-images.tsv", report=lambda _: None)
        loader = Loader(sampler, backend="dali", device=torch.device("cpu"), workers=available_cpus())
        batches = loader.batches(0)
        for epoch in EPOCHS:
            started = time.perf_counter()
            for _ in itertools.islice(batches, sampler.steps_per_epoch):
                pass
            seconds = time.perf_counter() - started
            figures[epoch] = sampler.steps_per_epoch * options.batch_size / seconds
    return figures


def benchmark(options: Options) -> None:
    options.check()
    console = Console(enabled=True)
    encoded = photographs()
    cases = {"no bad images": (0.0, "before")} | {
        f"{percent:g} %, cut off {when} indexing": (percent, when)
        for percent in options.percent
        for when in ("before", "after")
    }
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in cases}

    def turn(name: str) -> float:
        measured[name].append(measure(options, encoded, *cases[name]))
        return measured[name][-1]["indexing"]

    with decoder_messages_dropped():
        turns = {
            "indexing": report.take_turns(
                {name: partial(turn, name) for name in cases}, repeats=options.repeats, console=console
            )
        }
    for epoch in EPOCHS:
        turns[epoch] = {name: [figures[epoch] for figures in of_case[1:]] for name, of_case in measured.items()}
    figures = [Figures(title=epoch, unit="images/s", turns=turns[epoch]) for epoch in EPOCHS]
    report.publish([*figures, Figures(title="indexing", unit="seconds", turns=turns["indexing"])], options, console)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.bad_images", args=arguments, use_underscores=True)
    return report.run(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
