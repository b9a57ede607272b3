"""``launch.py`` without the name of a command, or ``launch.py train``: train, evaluate and export."""

from __future__ import annotations

import argparse
import json

from pipelines.errors import UserError
from pipelines.files import read_object
from stec.cli.flags import parse
from stec.cli.next_steps import next_steps
from stec.config import TrainConfig, with_settings
from stec.recipes import RECIPES, recipe
from stec.settings import as_path


def parse_train(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """The configuration from the flags, and whether to print it instead of training.

    Later ones override earlier ones: defaults, recipe, config file, flags.
    """
    # These determine the defaults of the other flags, so they are parsed first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config")
    first.add_argument("--print_config", action="store_true")
    first.add_argument("--dataset")
    first.add_argument("--arch")
    known, rest = first.parse_known_args(arguments)
    if known.dataset is not None:
        rest += ["--dataset", known.dataset]
    if known.arch is not None:
        rest += ["--arch", known.arch]

    settings = {}
    if known.config is not None:
        try:
            file = as_path(known.config)
        except ValueError as error:
            raise UserError(f"--config '{known.config}' names no file: {error}") from error
        settings = read_object(file, "give a run's config.json", name=f"--config {known.config}")
    name = known.recipe
    if name is None and known.config is None and known.dataset in (None, "demo"):
        name = "demo"
    base = with_settings(recipe(name) if name else TrainConfig(), settings, str(known.config))
    if known.arch is not None:
        base = with_settings(base, {"arch": known.arch}, "--arch")
    epilogue = (
        f"\n\nBesides the options below: --recipe NAME ({', '.join(RECIPES)}) and --config FILE (a run's config.json) "
        "set defaults that options override; --print_config prints the resulting configuration and exits."
    )
    config = parse(TrainConfig, rest, name="", default=base, epilogue=epilogue)
    config.validate()
    return config, known.print_config


def run(arguments: list[str]) -> None:
    """Train, evaluate and export."""
    config, only_print = parse_train(arguments)
    if only_print:
        print(json.dumps(config.to_json(), indent=2))
        return

    from stec.training import stops
    from stec.training.run import run_training

    with stops.immediately(config.run.stop_exit_code):
        finished = run_training(config)
        finished.console.next_steps(
            "Next steps",
            next_steps(config, finished.path, classes=finished.classes, processes=finished.processes),
        )
