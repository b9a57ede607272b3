"""Recipes: whole configurations by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from stec.config import TrainConfig
from stec.errors import UserError


def demo() -> TrainConfig:
    """The embedded demo set on a laptop's CPU, in minutes.

    accelerate launch launch.py
    """
    return TrainConfig(
        dataset="demo",
        width=16,
        feat_dim=64,
        temperature=0.2,
        manip_lambda=1.0,
        # Few steps are trained, too few for LARS's small ones.
        optimizer="adam",
        learning_rate=3e-3,
        batch_size=128,
        warmup_epochs=1,
        max_epochs=12,
    )


def cifar10_resnet18() -> TrainConfig:
    """CIFAR-10, ResNet-18, as in the official repository.

    accelerate launch launch.py --recipe cifar10-resnet18 --data_dir DATA
    """
    return TrainConfig(
        dataset="cifar10", arch="resnet18", temperature=0.5, learning_rate=4.0, manip_lambda=1.0, feat_dim=64
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "cifar10-resnet18": cifar10_resnet18,
}


def recipe(name: str) -> TrainConfig:
    """The configuration of the recipe ``name``. Raises UserError with the nearest name where there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(RECIPES)}."
        raise UserError(f"--recipe {name} does not exist; {hint}")
    return RECIPES[name]()
