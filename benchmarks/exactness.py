"""How far DALI's views are from torchvision executing the same commands, on real images.

    python -m benchmarks.exactness --cifar10 DATA --stl10 DATA --imagenet DATA/imagenet

Differences in 1/255 of full scale over all pixels of 1,000 views a row, of the compiled function of CPUs and, where
there is a GPU, of its kernels.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms import functional as F

from benchmarks import report
from pipelines.commands import VIEWS, Policy
from pipelines.cpus import available_cpus
from pipelines.datasets.images import Images
from pipelines.datasets.registry import DataSetName, open_data_set
from pipelines.executors import torchvision as reference
from pipelines.files import atomic_write, write_json
from pipelines.loader import Loader
from pipelines.sampler import BatchPlan, Sampler
from stec.config import TrainConfig
from stec.console import Console
from stec.loaders import policy_of

BATCH_SIZE = 50
CPU = torch.device("cpu")
LIMIT = 0.1
"""Of a mean difference in 1/255. Pillow 13 resizes the columns of some crop boxes first, which rounds differently."""
AMPLIFIED = 10
"""Factor of the differences in the picture."""
PERCENTILES = (50, 95, 99)
COLUMNS = ("", "mean", *(f"{share} %" for share in PERCENTILES), "largest", "worst view", "limit")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare DALI's views with torchvision's; give the data sets that you have, without any it is the demo set."""

    cifar10: Path | None = None
    """Folder of CIFAR-10 (32 px, jitter strength 0.5)."""
    stl10: Path | None = None
    """Folder of STL-10 (96 px, jitter strength 1, blur, solarization)."""
    imagenet: Path | None = None
    """Folder of ImageNet (224 px, jitter strength 1, blur, solarization)."""
    views: int = 1000
    """Views compared a row."""
    workers: int = available_cpus()
    """DALI threads; default: all cores."""
    json: Path | None = None
    """Also write the figures here."""
    picture: Path | None = None
    """Save the worst views of the whole policies here, as a PNG: torchvision's, ours, their difference."""

    def check(self) -> None:
        """Raise UserError for what cannot be measured."""
        report.check_positive(self, "views", "workers")
        report.check_writable(self.json, self.picture)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared in a row."""

    policy: Policy
    limit: float = LIMIT
    """What the mean may be, in 1/255."""
    hue: bool = True
    given_input: Callable[[Tensor], Tensor] | None = None
    """Expected views, from our own views of the same policy without this part; None: torchvision's views."""
    largest: float | None = None
    """What no difference may exceed."""


class WithoutHue(Sampler):
    """Commands that leave the hue as it is."""

    def plan(self, step: int) -> BatchPlan:
        plan = super().plan(step)
        still = np.zeros_like(plan.commands.hue_turns)
        return replace(plan, commands=replace(plan.commands, hue_turns=still))


def comparisons(full: Policy) -> dict[str, Comparison]:
    """By name: one part at a time on every view, then everything that the data set's recipe does.

    Gray and solarization "alone" are compared on our own cropped views, the others from the source image on.
    """
    plain = replace(full, p_color_jitter=0.0, p_grayscale=0.0, p_blur=0.0, p_solarize=0.0)
    jitter = replace(plain, p_color_jitter=1.0)
    return {
        "crop and flip": Comparison(policy=plain),
        "jitter 0.5": Comparison(policy=replace(jitter, jitter_strength=0.5)),
        "jitter 1": Comparison(policy=replace(jitter, jitter_strength=1.0)),
        f"jitter {full.jitter_strength:g}, hue off": Comparison(policy=jitter, hue=False),
        "gray alone": Comparison(policy=replace(plain, p_grayscale=1.0), given_input=_gray, limit=0.0, largest=0.0),
        "blur": Comparison(policy=replace(plain, p_blur=1.0)),
        "solarize alone": Comparison(
            policy=replace(plain, p_solarize=1.0), given_input=reference.solarize, limit=0.0, largest=0.0
        ),
        "whole policy": Comparison(policy=full),
    }


def _gray(views: Tensor) -> Tensor:
    """Pillow's gray of views [..., 3, H, W] that hold 8-bit values."""
    pixels = views.mul(255).round().byte().movedim(-3, -1).numpy()
    gray = [np.asarray(F.rgb_to_grayscale(Image.fromarray(view), num_output_channels=3)) for view in pixels]
    return torch.from_numpy(np.stack(gray)).movedim(-1, -3) / 255


def make_views(images: Images, policy: Policy, options: Options, *, hue: bool = True, **loader: Any) -> Tensor:
    """[views, 3, H, W] on the CPU, of the same commands whatever ``loader`` says."""
    batch_size = min(BATCH_SIZE, len(images))
    sampler = (Sampler if hue else WithoutHue)(images, policy, seed=1, batch_size=batch_size)
    batches = Loader(sampler, **{"device": CPU, "workers": options.workers, **loader}).batches(0)
    steps = -(-options.views // (batch_size * VIEWS))
    made = [batch.views.flatten(0, 1).cpu().clone() for batch in itertools.islice(batches, steps)]
    return torch.cat(made)[: options.views]


def devices() -> dict[str, torch.device]:
    """Those whose views are compared with torchvision's, by what the table calls them."""
    return {"CPU": CPU, **({"GPU": torch.device("cuda", 0)} if torch.cuda.is_available() else {})}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Differences in 1/255."""

    what: str
    device: str
    mean: float
    percentiles: tuple[float, ...]
    largest: float
    worst_view_mean: float
    limit: float
    kept: bool
    """Whether mean and largest are within what is promised."""

    @classmethod
    def of(cls, what: str, device: str, comparison: Comparison, ours: Tensor, theirs: Tensor) -> Row:
        difference = (ours - theirs).abs().mul(255)
        mean, largest = float(difference.double().mean()), float(difference.max())
        kept = mean <= comparison.limit if comparison.largest is None else largest <= comparison.largest
        return cls(
            what=what,
            device=device,
            mean=mean,
            percentiles=tuple(np.percentile(difference.numpy(), PERCENTILES).tolist()),
            largest=largest,
            worst_view_mean=float(difference.mean(dim=(1, 2, 3)).max()),
            limit=comparison.limit,
            kept=kept,
        )

    def cells(self) -> list[str]:
        return [
            self.what,
            f"{self.mean:.4f}" if self.mean < 0.01 else f"{self.mean:.2f}",
            *(f"{value:.1f}" for value in self.percentiles),
            f"{self.largest:.1f}",
            f"{self.worst_view_mean:.1f}",
            f"{self.limit:g}" if self.kept else f"{self.limit:g} EXCEEDED",
        ]


Pair = tuple[str, Tensor, Tensor]
"""A label, torchvision's view and ours."""


def compare(images: Images, full: Policy, options: Options) -> Iterator[tuple[Row, list[Pair]]]:
    """The rows of a data set, each with its worst views if it is of the whole policy."""
    for what, comparison in comparisons(full).items():
        policy, given_input = comparison.policy, comparison.given_input
        if given_input is None:
            # In this process: forking beside DALI's threads may deadlock.
            theirs = make_views(images, policy, options, hue=comparison.hue, backend="torchvision", workers=0)
        for name, device in devices().items():
            ours = make_views(images, policy, options, hue=comparison.hue, backend="dali", device=device)
            if given_input is not None:
                plain = replace(policy, p_grayscale=0.0, p_solarize=0.0)
                theirs = given_input(make_views(images, plain, options, backend="dali", device=device))
            row = Row.of(what, name, comparison, ours, theirs)
            yield row, worst_views(f"{full.size} px, {name}", ours, theirs) if policy == full else []


def worst_views(label: str, ours: Tensor, theirs: Tensor, count: int = 3) -> list[Pair]:
    by_view = (ours - theirs).abs().mean(dim=(1, 2, 3))
    return [
        (f"{label}, mean {by_view[n] * 255:.1f}/255", theirs[n], ours[n])
        for n in by_view.topk(min(count, len(ours)))[1]
    ]


def save_picture(pairs: Sequence[Pair], path: Path, cell: int = 160, text: int = 14) -> None:
    """A row a pair: torchvision's view, ours, their difference amplified."""
    canvas = Image.new("RGB", (3 * cell, len(pairs) * (cell + text) + text), "white")
    draw = ImageDraw.Draw(canvas)
    for k, heading in enumerate(("torchvision", "ours", f"difference x {AMPLIFIED}")):
        draw.text((k * cell + 4, 1), heading, fill="black")
    for n, (label, theirs, ours) in enumerate(pairs):
        top = text + n * (cell + text)
        draw.text((4, top + 1), label, fill="black")
        for k, view in enumerate((theirs, ours, ((theirs - ours).abs() * AMPLIFIED).clamp(max=1))):
            pixels = Image.fromarray((view * 255).round().byte().permute(1, 2, 0).numpy())
            canvas.paste(pixels.resize((cell, cell), Image.Resampling.NEAREST), (k * cell, top + text))
    atomic_write(path, lambda file: canvas.save(file, format="PNG"))


def measure(options: Options, console: Console) -> None:
    options.check()
    worst: list[Pair] = []
    found: dict[str, list[Row]] = {}
    data_dirs: Mapping[DataSetName, Path | None] = {
        "cifar10": options.cifar10,
        "stl10": options.stl10,
        "imagenet": options.imagenet,
    }
    given: dict[DataSetName, Path | None] = {name: path for name, path in data_dirs.items() if path is not None}
    for name, data_dir in (given or {"demo": None}).items():
        images = open_data_set(name, data_dir).train
        switch: Literal[0, 1] = 0 if name == "cifar10" else 1
        full = policy_of(TrainConfig().updated(dataset=name, use_gaussian_blur=switch, use_solarization=switch))
        found[name] = []
        with console.waiting(f"{name}: comparing"):
            for row, pairs in compare(images, full, options):
                found[name].append(row)
                worst += pairs
        for device in devices():
            title = f"{name}, {full.size} px, {device}, {options.views} views: |ours - torchvision| in 1/255"
            console.table(title, COLUMNS, [row.cells() for row in found[name] if row.device == device])
    console.facts("", list(report.machine().items()))
    if options.json is not None:
        rows = {name: [vars(row) for row in of_data_set] for name, of_data_set in found.items()}
        write_json(options.json, {"machine": report.machine(), "unit": "1/255", "views": options.views, "rows": rows})
    if options.picture is not None:
        save_picture(worst, options.picture)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.exactness", args=arguments, use_underscores=True)
    return report.run(lambda: measure(options, Console(enabled=True)))


if __name__ == "__main__":
    sys.exit(main())
