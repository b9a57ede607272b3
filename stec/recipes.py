"""Recipes: whole configurations by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Literal

from pipelines.errors import UserError
from stec.architectures import Arch
from stec.config import TrainConfig


def demo() -> TrainConfig:
    """The embedded demo set on a laptop's CPU, in less than three minutes.

    accelerate launch launch.py
    """
    return TrainConfig().updated(
        dataset="demo",
        # A quarter of the cost of 32 px. Windows are smaller than images, so objects keep about the size that they
        # have in evaluation, which sees the images as they are.
        view_size=16,
        width=16,
        feat_dim=64,
        temperature=0.2,
        manip_lambda=6.0,
        # Few steps are trained, too few for LARS's small ones.
        optimizer="adam",
        learning_rate=3e-3,
        batch_size=32,
        warmup_epochs=1,
        max_epochs=9,
    )


def cifar(dataset: Literal["cifar10", "cifar100"], arch: Arch) -> TrainConfig:
    """CIFAR-10 or CIFAR-100 as in the official repository.

    accelerate launch launch.py --recipe cifar10-resnet18 --data_dir DATA
    """
    return TrainConfig().updated(
        dataset=dataset,
        arch=arch,
        temperature=0.5,
        learning_rate=4.0,
        manip_lambda=1.0,
        feat_dim=64,
        hidden_mlp=1024 if arch == "resnet50" else -1,
    )


def stl10(arch: Arch) -> TrainConfig:
    """Pre-training on STL-10's unlabeled images, for two processes.

    accelerate launch --num_processes 2 launch.py --recipe stl10-resnet18 --data_dir DATA
    """
    return TrainConfig().updated(
        dataset="stl10",
        arch=arch,
        temperature=0.2,
        learning_rate=1.2,
        manip_lambda=0.3,
        use_solarization=1,
        use_gaussian_blur=1,
        batch_size=512,
        gpus=2,
    )


def stl10_linear_probing(arch: Arch) -> TrainConfig:
    """The linear classifier on top of a pre-trained STL-10 encoder.

    accelerate launch launch.py --recipe stl10-resnet18-linear-probing --data_dir DATA --ckpt_path RUN/model.safetensors
    """
    return TrainConfig().updated(
        dataset="stl10",
        arch=arch,
        batch_size=1024,
        max_epochs=100,
        optimizer="sgd",
        learning_rate=0.04,
        stop_gradient=2,
        reinitialize_supervised_head=1,
        nesterov=1,
        p_color_jitter=-1.0,
        p_grayscale=-1.0,
    )


def imagenet_resnet50() -> TrainConfig:
    """ImageNet, for eight processes.

    accelerate launch --num_processes 8 launch.py --recipe imagenet-resnet50 --data_dir DATA
    """
    return TrainConfig().updated(
        dataset="imagenet",
        arch="resnet50",
        temperature=0.1,
        learning_rate=1.97,
        manip_lambda=0.6,
        use_solarization=1,
        use_gaussian_blur=1,
        batch_size=210,
        gpus=8,
        max_epochs=100,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "cifar10-resnet18": partial(cifar, "cifar10", "resnet18"),
    "cifar10-resnet50": partial(cifar, "cifar10", "resnet50"),
    "cifar100-resnet18": partial(cifar, "cifar100", "resnet18"),
    "cifar100-resnet50": partial(cifar, "cifar100", "resnet50"),
    "stl10-resnet18": partial(stl10, "resnet18"),
    "stl10-resnet50": partial(stl10, "resnet50"),
    "stl10-resnet18-linear-probing": partial(stl10_linear_probing, "resnet18"),
    "stl10-resnet50-linear-probing": partial(stl10_linear_probing, "resnet50"),
    "imagenet-resnet50": imagenet_resnet50,
}


def flags(config: TrainConfig) -> str:
    """The flags that turn the defaults into ``config``, as one types them."""
    settings, defaults = config.to_json(), TrainConfig().to_json()
    changed = {
        name: value for name, value in settings.items() if value != defaults[name] or name in ("dataset", "arch")
    }
    return " ".join(f"--{name} {value}" for name, value in changed.items())


def recipe(name: str) -> TrainConfig:
    """The configuration of the recipe ``name``. Raises UserError with the nearest name where there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(RECIPES)}."
        raise UserError(f"--recipe {name} does not exist; {hint}")
    return RECIPES[name]()
