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
    """The embedded demo set on a laptop's CPU, in two and a half to four minutes.

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


def demo_byol() -> TrainConfig:
    """BYOL on the demo set.

    accelerate launch launch.py --recipe demo-byol
    """
    return demo().updated(objective="byol", discrimination_lambda=1.0, hidden_mlp=256, target_momentum=0.9)


def demo_relic() -> TrainConfig:
    """ReLIC on the demo set.

    accelerate launch launch.py --recipe demo-relic
    """
    # In so few steps, a slow target network or a large weight of the divergence keeps it from learning.
    return demo().updated(objective="relic", target_momentum=0.5, relic_alpha=0.1)


def byol(config: TrainConfig, batch_size: int, processes: int) -> TrainConfig:
    """``config`` with BYOL alone, as for 1,000 epochs with a ResNet-50 on ImageNet.

    Grill et al. 2020, section 3.3: two MLPs 4096-256, momentum .996, LARS with weight decay 1.5e-6 and the learning
    rate .2 times the global batch size / 256. (The official configurations for fewer epochs are: 300 epochs .3, 1e-6
    and momentum .99; 100 epochs .45, 1e-6 and .99.) The paper blurs all first views and a tenth of the
    second, and solarizes a fifth of the second; here both views are alike.
    """
    return config.updated(
        objective="byol",
        discrimination_lambda=1.0,
        manip_lambda=0.0,
        hidden_mlp=4096,
        feat_dim=256,
        target_momentum=0.996,
        learning_rate=0.2 * batch_size * processes / 256,
        weight_decay=1.5e-6,
        batch_size=batch_size,
        use_gaussian_blur=1,
        use_solarization=1,
        max_epochs=1000,
    )


def cifar10_byol() -> TrainConfig:
    """BYOL on CIFAR-10 with the settings for ImageNet: the paper does not train on CIFAR-10.

    accelerate launch launch.py --recipe cifar10-byol --data_dir DATA
    """
    return byol(TrainConfig().updated(dataset="cifar10", arch="resnet18"), 1024, 1)


def imagenet_byol() -> TrainConfig:
    """BYOL on ImageNet with the paper's global batch of 4,096, for eight processes.

    accelerate launch --num_processes 8 launch.py --recipe imagenet-byol --data_dir DATA
    """
    return byol(TrainConfig().updated(dataset="imagenet", arch="resnet50", gpus=8), 512, 8)


def imagenet_relic() -> TrainConfig:
    """ReLIC on ImageNet, for eight processes.

    Mitrovic et al. 2021 train a ResNet-50 against a target network. What is not known here, the temperature, the weight
    of the divergence, the critic and the optimizer, is SimCLR's temperature, 1, SimCLR's projection, and BYOL's.

    accelerate launch --num_processes 8 launch.py --recipe imagenet-relic --data_dir DATA
    """
    return imagenet_byol().updated(objective="relic", hidden_mlp=-1, feat_dim=128, temperature=0.1, relic_alpha=1.0)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "demo-byol": demo_byol,
    "demo-relic": demo_relic,
    "cifar10-byol": cifar10_byol,
    "imagenet-byol": imagenet_byol,
    "imagenet-relic": imagenet_relic,
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
    words = {name: value if isinstance(value, list) else [value] for name, value in changed.items()}
    return " ".join(f"--{name} {' '.join(map(str, of_setting))}" for name, of_setting in words.items())


def recipe(name: str) -> TrainConfig:
    """The configuration of the recipe ``name``. Raises UserError with the nearest name where there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(RECIPES)}."
        raise UserError(f"--recipe {name} does not exist; {hint}")
    return RECIPES[name]()
