"""What a training step's collectives cost on many GPUs: bytes counted, milliseconds modeled. Nothing is measured here.

    python -m benchmarks.step_model --compute_ms 69

The model takes rings for all-gathers and trees for small all-reduces, and each link at the rate that is given.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import tyro
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks import report
from stec.console import Console
from stec.recipes import recipe
from stec.training.initial_model import initial_model

FLOAT = 4
"""Bytes of the numbers that are exchanged, whatever the precision of the forward pass."""
LAST_BUCKET = 25e6
"""Bytes of gradients that are complete only when the backward pass is (DistributedDataParallel's bucket)."""
BACKWARD_SHARE = 2 / 3
"""Of a step's arithmetic, beside which gradients are exchanged."""
CLASSES = 1000
"""Of the online linear classifier, whose gradients are few of all."""
SIMILARITY_PASSES = 25
"""How often NT-Xent reads or writes each entry of its stretch of the similarity matrix, forwards and backwards."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Model the step time."""

    compute_ms: float
    """Milliseconds of a step on a single GPU: measure it."""
    recipe: str = "imagenet-resnet50"
    """Whose model and whose batch per GPU."""
    batch_size: int | None = None
    """Images per GPU, if not the recipe's."""
    gpus: tuple[int, ...] = (1, 8, 16, 64, 256, 1024)
    """Numbers of GPUs."""
    gpus_per_node: int = 8
    """GPUs that are linked directly."""
    node_gb_per_s: float = 200.0
    """Rate of a GPU's link within a node."""
    network_gb_per_s: float = 25.0
    """Rate of a GPU's link to other nodes."""
    node_us: float = 4.0
    """Latency of a hop within a node."""
    network_us: float = 8.0
    """Latency of a hop between nodes."""
    memory_gb_per_s: float = 1500.0
    """Rate of a GPU's memory."""

    def check(self) -> None:
        """Raise UserError for what makes no sense."""
        counts = ("batch_size", "gpus", "gpus_per_node")
        rates = ("compute_ms", "node_gb_per_s", "network_gb_per_s", "node_us", "network_us", "memory_gb_per_s")
        report.check_positive(self, *counts, *rates)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model exchanges in a step."""

    gradients: int
    """Bytes of all gradients."""
    channels: list[int]
    """Of each batch norm."""
    feat_dim: int


class Cluster:
    """Seconds that a collective takes on ``gpus`` GPUs."""

    def __init__(self, options: Options, gpus: int) -> None:
        self.gpus = gpus
        one_node = gpus <= options.gpus_per_node
        self.bytes_per_s = 1e9 * (options.node_gb_per_s if one_node else options.network_gb_per_s)
        nodes = math.ceil(gpus / options.gpus_per_node)
        between = 0 if one_node else nodes
        self.around_s = 1e-6 * ((gpus - nodes) * options.node_us + between * options.network_us)
        self.up_and_down_s = 2e-6 * math.log2(gpus) * (options.node_us if one_node else options.network_us)

    def all_gather(self, own_bytes: float) -> float:
        """A ring, in which each GPU passes on what all others have."""
        return (self.gpus - 1) * own_bytes / self.bytes_per_s + self.around_s

    def all_reduce(self, size: float) -> float:
        """A tree for its latency; at the rate of a ring, in which each byte is sent about twice."""
        return 2 * (self.gpus - 1) / self.gpus * size / self.bytes_per_s + self.up_and_down_s


def sizes_of(options: Options) -> Sizes:
    config = recipe(options.recipe)
    with torch.device("meta"):
        model = initial_model(config, CLASSES)
    return Sizes(
        gradients=FLOAT * sum(p.numel() for p in model.parameters() if p.requires_grad),
        channels=[m.num_features for m in model.modules() if isinstance(m, _BatchNorm)],
        feat_dim=config.model.feat_dim,
    )


def step_ms(options: Options, sizes: Sizes, batch_size: int, gpus: int) -> dict[str, float]:
    """Milliseconds that each part adds to a single GPU's step, as far as nothing else goes on at the same time."""
    cluster = Cluster(options, gpus)
    compute = options.compute_ms / 1000
    gradients = max(
        cluster.all_reduce(sizes.gradients) - BACKWARD_SHARE * compute,
        cluster.all_reduce(min(LAST_BUCKET, sizes.gradients)),
    )
    # Forwards means and deviations are gathered; backwards two sums are reduced.
    norms = sum(cluster.all_gather(FLOAT * 2 * c) + cluster.all_reduce(FLOAT * 2 * c) for c in sizes.channels)
    gathers = cluster.all_gather(gathered_bytes(sizes, batch_size)) + cluster.around_s
    others = SIMILARITY_PASSES * FLOAT * (2 * batch_size) ** 2 * (gpus - 1) / (1e9 * options.memory_gb_per_s)
    seconds = {"gradients": gradients, "batch norm": norms, "gathers": gathers, "similarities": others}
    parts = {name: 1000 * value if gpus > 1 else 0.0 for name, value in seconds.items()}
    return {**parts, "step": options.compute_ms + sum(parts.values())}


def gathered_bytes(sizes: Sizes, batch_size: int) -> int:
    """What a GPU adds to NT-Xent's gathers: its features, and the normalizers of its rows."""
    return FLOAT * 2 * batch_size * (sizes.feat_dim + 2)


def model(options: Options) -> None:
    options.check()
    sizes = sizes_of(options)
    batch_size = options.batch_size or recipe(options.recipe).optimization.batch_size
    console = Console(enabled=True)
    console.say(f"{options.recipe}, {batch_size} images per GPU; modeled, with the rates given:")
    console.facts(
        "",
        [
            ("gradients", f"{sizes.gradients / 1e6:,.1f} MB a step"),
            ("batch norm", f"{FLOAT * 4 * sum(sizes.channels) / 1e6:,.2f} MB in {2 * len(sizes.channels)} collectives"),
            ("gathers", f"{gathered_bytes(sizes, batch_size) / 1e6:,.3f} MB of each GPU to every other"),
        ],
    )
    rows = []
    first = step_ms(options, sizes, batch_size, 1)["step"]
    for gpus in options.gpus:
        parts = step_ms(options, sizes, batch_size, gpus)
        received = (gpus - 1) * gathered_bytes(sizes, batch_size) / 1e6
        values = [f"{value:,.1f}" for value in parts.values()]
        rows.append(
            [f"{gpus:,}", f"{gpus * batch_size:,}", f"{received:,.1f}", *values, f"{first / parts['step']:.0%}"]
        )
    columns = ["GPUs", "global batch", "gathered, MB", *(f"{name}, ms" for name in parts), "of one GPU's speed"]
    console.table("A step, beside its arithmetic", columns, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.step_model", args=arguments, use_underscores=True)
    return report.run(lambda: model(options))


if __name__ == "__main__":
    sys.exit(main())
