"""How far DALI's views are from torchvision executing the same commands, on real images.

    python -m benchmarks.exactness --cifar10 DATA --stl10 DATA --imagenet DATA/imagenet

Prints a table in 1/255 of full scale, over all pixels of 1,000 views a row, and saves a picture of the worst views.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from pipelines import reference
from pipelines.images import Images
from pipelines.index import open_data_set
from pipelines.loader import Backend, Loader
from pipelines.order import Order
from stec.commands import VIEWS, Policy
from stec.config import DataSetName, TrainConfig
from stec.console import Console
from stec.errors import UserError

BATCH_SIZE = 50


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the two executors; give the data sets that you have."""

    cifar10: Path | None = None
    """Folder of CIFAR-10 (32 px, jitter strength 0.5)."""
    stl10: Path | None = None
    """Folder of STL-10 (96 px, jitter strength 1)."""
    imagenet: Path | None = None
    """Folder of ImageNet (224 px, jitter strength 1)."""
    views: int = 1000
    """Views compared a row."""
    picture: Path | None = None
    """Save the worst views of the whole policies here, as a PNG: torchvision, DALI, their difference."""


def policies(full: Policy) -> dict[str, Policy]:
    """What is compared, by name: one part at a time, then everything that the data set's recipe does."""
    window = replace(full, p_color_jitter=0.0, p_grayscale=0.0, p_blur=0.0, p_solarize=0.0)
    rows = {
        "window and flip": window,
        f"jitter {full.jitter_strength}": replace(window, p_color_jitter=1.0),
    }
    rows["grey"] = replace(window, p_grayscale=1.0)
    if full.p_blur > 0:
        rows["blur"] = replace(window, p_blur=1.0)
        rows["solarize"] = replace(window, p_solarize=1.0)
    return {**rows, "whole policy": full}


def compare(images: Images, policy: Policy, views: int) -> tuple[Tensor, Tensor]:
    """[views, 3, H, W] by DALI and by torchvision."""
    order = Order(images, policy, seed=1, batch_size=BATCH_SIZE)
    steps = -(-views // (BATCH_SIZE * VIEWS))
    made = []
    backends: tuple[Backend, ...] = ("dali", "torchvision")
    for backend in backends:
        loader = Loader(order, backend=backend, device=torch.device("cpu"), workers=2)
        batches = itertools.islice(loader.batches(0), steps)
        made.append(torch.cat([batch.views.flatten(0, 1).clone() for batch in batches])[:views])
    return made[0], made[1]


def row(name: str, ours: Tensor, theirs: Tensor) -> list[str]:
    difference = (ours - theirs).abs().mul(255).flatten()
    by_view = (ours - theirs).abs().mul(255).mean(dim=(1, 2, 3)).numpy()
    shares = np.percentile(difference.numpy(), [50, 95, 99])
    return [
        name,
        f"{difference.mean():.2f}",
        *(f"{share:.1f}" for share in shares),
        f"{difference.max():.0f}",
        f"{by_view.max():.1f}",
    ]


def main() -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.exactness", use_underscores=True)
    console, worst = Console(enabled=True), []
    columns = ["", "mean", "median", "95 %", "99 %", "largest", "worst view's mean"]
    try:
        names: tuple[DataSetName, ...] = ("cifar10", "stl10", "imagenet")
        for name in names:
            data_dir = getattr(options, name)
            if data_dir is None:
                continue
            images = open_data_set(name, data_dir).train
            switch: Literal[0, 1] = 0 if name == "cifar10" else 1
            full = Policy.of(TrainConfig(dataset=name, use_gaussian_blur=switch, use_solarization=switch))
            rows = []
            for what, policy in policies(full).items():
                ours, theirs = compare(images, policy, options.views)
                rows.append(row(what, ours, theirs))
                if what == "solarize":
                    plain, _ = compare(images, replace(policy, p_solarize=0.0), options.views)
                    rows.append(row("solarize, given its input", ours, reference.solarize(plain)))
                if what == "whole policy":
                    worst += worst_views(ours, theirs)
            title = f"{name}, {full.size} px, {options.views} views: |DALI - torchvision| in 1/255"
            console.table(title, columns, rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.picture is not None and worst:
        save_picture(worst, options.picture)
        console.say(f"{options.picture}: columns are torchvision, DALI, their difference")
    return 0


def worst_views(ours: Tensor, theirs: Tensor, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    by_view = (ours - theirs).abs().mean(dim=(1, 2, 3))
    return [(theirs[n], ours[n]) for n in by_view.topk(count).indices]


def save_picture(pairs: list[tuple[Tensor, Tensor]], path: Path, cell: int = 128) -> None:
    """A row a pair: torchvision's view, DALI's, their difference."""
    canvas = Image.new("RGB", (3 * cell, len(pairs) * cell))
    for n, (theirs, ours) in enumerate(pairs):
        for k, view in enumerate((theirs, ours, (theirs - ours).abs())):
            pixels = (view * 255).round().byte().permute(1, 2, 0).numpy()
            canvas.paste(Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST), (k * cell, n * cell))
    canvas.save(path)


if __name__ == "__main__":
    sys.exit(main())
