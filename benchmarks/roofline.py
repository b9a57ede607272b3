"""What views and a training step need of a GPU, counted, and the most images/s that allows. Nothing is measured here.

    python -m benchmarks.roofline

Floating-point operations are counted by PyTorch on the real model, bytes by a rule: in the forward pass each
convolution, batch norm, ReLU and pooling reads its input and writes its output once, and a residual sum reads two and
writes one, all in bf16; the backward pass moves ``BACKWARD_BYTES`` times as much. Weights stay out, as a batch shares
them.

Of views, launches and bytes are counted without decoding, on crop boxes drawn from the recipe's policy.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck

from benchmarks import report, step_model
from benchmarks.step_model import CLASSES, FLOAT, SIMILARITY_PASSES
from pipelines.commands import VIEWS, draw
from pipelines.errors import UserError
from pipelines.executors.gpu_compiler import TILE_HEIGHT, TILE_WIDTH, largest_reach
from stec.console import Console
from stec.loaders import policy_of
from stec.recipes import recipe
from stec.training.initial_model import initial_model

BF16 = 2
"""Bytes of an activation."""
BACKWARD_BYTES = 2
"""Of the forward pass's bytes: what was written is read again, beside gradients read and written."""
LARS_PASSES = 15
"""How often a step of LARS reads or writes a number for each parameter; see ``stec/training/optim.py``."""
SIMILARITY_PRODUCTS = 3
"""Matrix products of NT-Xent: similarities forwards, again backwards, and the gradient from them."""
NODE = 8
"""GPUs of the machine for which batch norm's collectives are counted."""
HALF = 2
"""Bytes of a value of a float16 view."""
PHOTOGRAPH_PX = (375, 500)
"""Height and width that images in files are assumed to have."""
DRAWN = 4096
"""Images whose commands are drawn to find the mean size of a crop box."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A vendor's figures, dense."""

    bf16_tflops: float
    fp32_tflops: float
    memory_tb_per_s: float


GPUS = {
    "A100 80 GB SXM": Gpu(bf16_tflops=312, fp32_tflops=19.5, memory_tb_per_s=2.0),
    "H100 80 GB SXM": Gpu(bf16_tflops=989, fp32_tflops=67, memory_tb_per_s=3.35),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Count what a step needs."""

    recipes: tuple[str, ...] = ("cifar10-resnet18", "imagenet-resnet50")
    """Whose models and whose batches per GPU."""
    batch_size: int | None = None
    """Images per GPU, if not the recipe's."""
    launch_us: float = 3.0
    """Host time of a launch in microseconds, an assumption."""
    decoded_images_per_s: float = 19_000.0
    """Images/s that the decoders of a GPU reach alone; the default is what DALI's own tests require of a Hopper GPU."""


@dataclass(kw_only=True)
class Layer:
    """What one call of a layer, or of a sum of residuals, needs."""

    forward_flops: int = 0
    """A multiplication and an addition are two."""
    backward_flops: int = 0
    forward_bytes: int = 0

    @property
    def backward_bytes(self) -> int:
        return BACKWARD_BYTES * self.forward_bytes


def count(module: nn.Module, *inputs: Tensor) -> dict[str, Layer]:
    """The layers of ``module`` by name, counted on tensors of the ``meta`` device, which have shapes only.

    A layer that multiplies does as much again for the gradient of its weight, and again for that of its input if it has
    one; PyTorch's own count of the whole backward pass must agree.
    """
    layers: dict[str, Layer] = defaultdict(Layer)
    products: dict[str, int] = {}

    def moves(name: str, tensors: Sequence[Tensor]) -> None:
        layers[name].forward_bytes += BF16 * sum(tensor.numel() for tensor in tensors)

    def after_layer(name: str, _module: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> None:
        products[name] = 2 if arguments[0].requires_grad else 1
        moves(name, [*arguments, result])

    def after_block(name: str, _module: nn.Module, _arguments: tuple[Tensor, ...], result: Tensor) -> None:
        moves(f"{name}, sum", [result, result, result])

    for name, child in module.named_modules():
        if isinstance(child, (BasicBlock, Bottleneck)):
            child.register_forward_hook(partial(after_block, name))
        elif not list(child.children()) and not isinstance(child, nn.Identity):
            child.register_forward_hook(partial(after_layer, name))
    with FlopCounterMode(display=False) as forwards:
        result: Any = module(*inputs)
    for name, products_backward in products.items():
        flops = sum(forwards.get_flop_counts().get(f"{type(module).__name__}.{name}", {}).values())
        layers[name].forward_flops = flops
        layers[name].backward_flops = products_backward * flops
    with FlopCounterMode(display=False) as backwards:
        torch.autograd.backward([t.sum() for t in tree_leaves(result) if isinstance(t, Tensor)])
    assert forwards.get_total_flops() == sum(layer.forward_flops for layer in layers.values())
    assert backwards.get_total_flops() == sum(layer.backward_flops for layer in layers.values())
    return dict(layers)


def encoder_layers(name: str) -> dict[str, Layer]:
    """Of the recipe's encoder, on the two views of one image."""
    config = recipe(name)
    with torch.device("meta"):
        encoder = initial_model(config, CLASSES).encoder
        return count(encoder, torch.empty(VIEWS, 3, config.view_size_px, config.view_size_px))


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a part of the step needs."""

    flops: float
    moved: float
    fp32: bool = False

    def seconds(self, gpu: Gpu) -> float:
        """At the vendor's peak of what limits it."""
        tflops = gpu.fp32_tflops if self.fp32 else gpu.bf16_tflops
        return max(self.flops / (1e12 * tflops), self.moved / (1e12 * gpu.memory_tb_per_s))


def encoder_parts(layers: Mapping[str, Layer], images: int) -> dict[str, list[Part]]:
    """Each layer of both passes, by what it is."""
    parts: dict[str, list[Part]] = {}
    for way in ("forward", "backward"):
        for kind, multiplies in (("convolutions", True), ("batch norm, ReLU, sums, pooling", False)):
            parts[f"{kind}, {way}"] = [
                Part(flops=images * getattr(layer, f"{way}_flops"), moved=images * getattr(layer, f"{way}_bytes"))
                for layer in layers.values()
                if (layer.forward_flops > 0) == multiplies
            ]
    return parts


def other_parts(name: str, batch_size: int) -> dict[str, list[Part]]:
    """Heads, NT-Xent of one process and the optimizer."""
    config = recipe(name)
    with torch.device("meta"):
        model = initial_model(config, CLASSES)
        features = torch.empty(batch_size, VIEWS, model.encoder.feature_dim, requires_grad=True)
        heads = count(model.heads, features, features).values()
    entries = (VIEWS * batch_size) ** 2
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "heads": [
            Part(
                flops=layer.forward_flops + layer.backward_flops,
                moved=layer.forward_bytes + layer.backward_bytes,
            )
            for layer in heads
        ],
        "NT-Xent": [
            Part(
                flops=SIMILARITY_PRODUCTS * 2 * entries * config.model.feat_dim,
                moved=SIMILARITY_PASSES * FLOAT * entries,
                fp32=True,
            )
        ],
        "LARS": [Part(flops=LARS_PASSES * weights, moved=LARS_PASSES * FLOAT * weights, fp32=True)],
    }


@dataclass(frozen=True, kw_only=True)
class ViewCost:
    """What the views of a batch need."""

    launches: int
    moved: float
    """Bytes read and written."""

    def images_per_s(self, images: int, gpu: Gpu, launch_us: float) -> float:
        """At most, by memory or by launches."""
        return images / max(self.moved / (1e12 * gpu.memory_tb_per_s), 1e-6 * launch_us * self.launches)


def view_cost(name: str, batch_size: int) -> ViewCost:
    """What the kernels on a GPU need for the float16 views of a batch."""
    config = recipe(name)
    policy, in_files = policy_of(config), config.traits.resize_px is not None
    source_hw = PHOTOGRAPH_PX if in_files else (policy.size, policy.size)
    image_hw = np.broadcast_to(np.array(source_hw), (DRAWN, 2))
    commands = draw(policy, image_hw=image_hw, seed=0, epoch=0, first_position=0)
    crop = 3 * float((commands.height * commands.width).mean())
    view = 3 * policy.size**2
    # A tile of a blurred view is read with its surroundings.
    reach = largest_reach(policy)
    tile = (TILE_WIDTH + 2 * reach) * (TILE_HEIGHT + 2 * reach) / (TILE_WIDTH * TILE_HEIGHT)
    read_again = view * (1 + max(policy.p_blur, 0) * (tile - 1))
    moved = batch_size * VIEWS * (crop + view + read_again + HALF * view)
    return ViewCost(launches=2 * batch_size if in_files else 2, moved=moved)


def batch_norm_collectives_ms(name: str, batch_size: int, step_ms: float) -> float:
    """What batch norm over the GPUs of one node adds, by the model of ``step_model`` and the rates it assumes."""
    options = step_model.Options(compute_ms=step_ms, recipe=name)
    return step_model.step_ms(options, step_model.sizes_of(options), batch_size, NODE)["batch norm"]


def show(options: Options, console: Console) -> None:
    report.check_positive(options, "batch_size", "launch_us", "decoded_images_per_s")
    for name in options.recipes:
        if recipe(name).objective.stop_gradient == 2:
            raise UserError(f"--recipes {name} does not train its encoder; name recipes that do.")
    console.say("Counted, and divided by the vendors' peaks: upper bounds, which nobody measured.")
    for name in options.recipes:
        batch_size = options.batch_size or recipe(name).optimization.batch_size
        show_views(name, batch_size, options, console)
        show_recipe(name, batch_size, console)


def show_views(name: str, batch_size: int, options: Options, console: Console) -> None:
    cost = view_cost(name, batch_size)
    speeds = [f"{cost.images_per_s(batch_size, gpu, options.launch_us):,.0f}" for gpu in GPUS.values()]
    rows = [["kernels", f"{cost.launches:,}", f"{cost.moved / batch_size / 1e6:,.3f}", *speeds]]
    if recipe(name).traits.resize_px is not None:
        decoding = f"{options.decoded_images_per_s:,.0f}"
        rows.append(["decoding alone, as given", "", "", *(decoding for _ in GPUS)])
    columns = ["", "launches a batch", "MB an image", *(f"images/s, {gpu}" for gpu in GPUS)]
    console.table(f"{name}: the two views of {batch_size:,} images, at most", columns, rows)


def show_recipe(name: str, batch_size: int, console: Console) -> None:
    config, layers = recipe(name), encoder_layers(name)
    forward, backward = (
        [sum(getattr(layer, f"{way}_{what}") for layer in layers.values()) for what in ("flops", "bytes")]
        for way in ("forward", "backward")
    )
    flops, moved = (forward[k] + backward[k] for k in (0, 1))
    console.facts(
        f"{config.model.arch}, {config.view_size_px} px: the encoder, for the two views of an image",
        [
            ("forward", f"{forward[0] / 1e9:,.2f} GFLOP, {forward[1] / 1e6:,.1f} MB"),
            ("backward", f"{backward[0] / 1e9:,.2f} GFLOP, {backward[1] / 1e6:,.1f} MB"),
            ("intensity", f"{flops / moved:,.0f} FLOP a byte"),
        ],
    )
    encoder = encoder_parts(layers, batch_size)
    parts = {**encoder, **other_parts(name, batch_size)}
    bounds = []
    seconds: dict[str, dict[str, float]] = {}
    for gpu_name, gpu in GPUS.items():
        seconds[gpu_name] = {part: sum(piece.seconds(gpu) for piece in pieces) for part, pieces in parts.items()}
        rates = (
            gpu.bf16_tflops / gpu.memory_tb_per_s,
            1e12 * gpu.bf16_tflops / flops,
            1e12 * gpu.memory_tb_per_s / moved,
            batch_size / sum(seconds[gpu_name][part] for part in encoder),
        )
        bounds.append([gpu_name, *(f"{rate:,.0f}" for rate in rates)])
    columns = ["", "peak intensity, FLOP a byte", "by arithmetic", "by memory", "layer after layer"]
    console.table("At most so many images/s through the encoder", columns, bounds)
    totals = {gpu_name: sum(of_parts.values()) for gpu_name, of_parts in seconds.items()}
    rows = [
        [part, *(f"{1000 * seconds[gpu][part]:,.2f} ({seconds[gpu][part] / totals[gpu]:.1%})" for gpu in GPUS)]
        for part in parts
    ]
    rows.append(["together", *(f"{1000 * total:,.1f}" for total in totals.values())])
    collectives = (batch_norm_collectives_ms(name, batch_size, 1000 * total) for total in totals.values())
    rows.append([f"batch norm's collectives on {NODE} GPUs add", *(f"{ms:,.1f}" for ms in collectives)])
    console.table(f"At least so many ms for a step of {batch_size:,} images (and shares)", ["", *GPUS], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.roofline", args=arguments, use_underscores=True)
    return report.run(lambda: show(options, Console(enabled=True)))


if __name__ == "__main__":
    sys.exit(main())
