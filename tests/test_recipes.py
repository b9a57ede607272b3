"""Every recipe stands for the flags of the official README."""

from __future__ import annotations

import shlex

import pytest

from stec.cli.train import parse_train
from stec.config import TrainConfig
from stec.recipes import RECIPES, flags, recipe

OFFICIAL = {
    "cifar10-resnet18": "--dataset cifar10 --arch resnet18 --temperature .5 --learning_rate 4. --manip_lambda 1. "
    "--feat_dim 64",
    "cifar10-resnet50": "--dataset cifar10 --arch resnet50 --temperature .5 --learning_rate 4. --manip_lambda 1. "
    "--hidden_mlp 1024 --feat_dim 64",
    "stl10-resnet18": "--dataset stl10 --arch resnet18 --temperature .2 --learning_rate 1.2 --manip_lambda .3 "
    "--use_solarization 1 --use_gaussian_blur 1 --batch_size 512 --gpus 2",
    "stl10-resnet18-linear-probing": "--dataset stl10 --arch resnet18 --batch_size 1024 --max_epochs 100 --optimizer "
    "sgd --learning_rate .04 --stop_gradient 2 --reinitialize_supervised_head 1 --nesterov 1 --p_color_jitter -1 "
    "--p_grayscale -1",
    "imagenet-resnet50": "--dataset imagenet --arch resnet50 --temperature .1 --learning_rate 1.97 --manip_lambda .6 "
    "--use_solarization 1 --use_gaussian_blur 1 --batch_size 210 --gpus 8 --max_epochs 100",
}
for name in ("cifar10-resnet18", "cifar10-resnet50"):
    OFFICIAL[name.replace("cifar10", "cifar100")] = OFFICIAL[name].replace("cifar10", "cifar100")
for name in ("stl10-resnet18", "stl10-resnet18-linear-probing"):
    OFFICIAL[name.replace("resnet18", "resnet50")] = OFFICIAL[name].replace("resnet18", "resnet50")

# Defaults of the official command line (its own and those it inherits from lightning-bolts 0.5) for every flag of ours
# that it also has.
OFFICIAL_DEFAULTS = {
    "batch_size": 1024,
    "max_epochs": 1000,
    "warmup_epochs": 10,
    "optimizer": "lars",
    "lr_scheduler": "cosine",
    "nesterov": 0,
    "weight_decay": 1e-6,
    "learning_rate": 1e-3,
    "temperature": 0.1,
    "feat_dim": 128,
    "hidden_mlp": -1,
    "manip_hidden_mlp": 512,
    "n_bins": 6,
    "discrimination_lambda": 2.0,
    "manip_lambda": 0.0,
    "supervised_lambda": 1.0,
    "stop_gradient": 1,
    "reinitialize_supervised_head": 0,
    "p_color_jitter": 0.8,
    "p_grayscale": 0.2,
    "use_gaussian_blur": 0,
    "use_solarization": 0,
}


def test_every_official_command_has_its_recipe() -> None:
    ours = {name for name in RECIPES if {"demo", "byol", "relic"} & set(name.split("-"))}
    assert RECIPES.keys() - ours == OFFICIAL.keys()


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_recipe_is_the_official_flags(name: str) -> None:
    config, _ = parse_train(shlex.split(OFFICIAL[name]))
    assert config == recipe(name)


@pytest.mark.parametrize("name", RECIPES)
def test_the_flags_shown_for_a_recipe_make_it(name: str) -> None:
    shown, _ = parse_train(shlex.split(flags(recipe(name))))
    assert shown == recipe(name)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid(name: str) -> None:
    recipe(name).validate()


def test_defaults_are_the_official_ones() -> None:
    ours = TrainConfig().to_json()
    assert {name: ours[name] for name in OFFICIAL_DEFAULTS} == OFFICIAL_DEFAULTS
