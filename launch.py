"""Command line of the S-TEC trainer: ``accelerate launch launch.py [train] [flags]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from stec import __version__
from stec.config import TrainConfig, read_config_file, with_settings
from stec.errors import Interrupted, UserError
from stec.recipes import RECIPES, recipe

if TYPE_CHECKING:
    from stec.console import Console


def parse_train(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """The configuration that the flags ask for, and whether it is only to be printed.

    Later beats earlier: defaults, recipe, config file, flags.
    """
    # These three decide what the other flags' defaults are, so they are read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config", type=Path)
    first.add_argument("--print_config", action="store_true")
    first.add_argument("--dataset")
    chosen, rest = first.parse_known_args(arguments)
    if chosen.dataset is not None:
        rest += ["--dataset", chosen.dataset]

    settings = read_config_file(chosen.config) if chosen.config else {}
    name = chosen.recipe
    if name is None and chosen.config is None and chosen.dataset in (None, "demo"):
        name = "demo"
    base = recipe(name) if name else TrainConfig()
    base = with_settings(base, settings, str(chosen.config))
    config = tyro.cli(
        TrainConfig,
        prog="launch.py",
        description=(TrainConfig.__doc__ or "")
        + f"\n\nBesides the options below: --recipe NAME ({', '.join(RECIPES)}), --config FILE (a run's config.json) "
        "give defaults that options override; --print_config shows the outcome and stops.",
        args=rest,
        default=base,
        use_underscores=True,
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
    config.validate()
    return config, chosen.print_config


def train(arguments: list[str]) -> None:
    config, only_print = parse_train(arguments)
    if only_print:
        print(json.dumps(config.to_json(), indent=2))
        return

    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from pipelines.index import open_data_set
    from pipelines.loader import ArrayPlainLoader, Loader
    from pipelines.order import Order
    from stec import engine
    from stec.commands import Policy
    from stec.console import Console
    from stec.run_folder import open_run_folder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = engine.resolve_precision(config.mixed_precision, device)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    device = accelerator.device
    console = Console(enabled=accelerator.is_main_process)

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own_cpus = max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cpu":
        # accelerate launch allows each process one thread unless told otherwise.
        torch.set_num_threads(own_cpus)

    data_set = open_data_set(config.dataset, config.data_dir, config.limit_train)
    policy = Policy(
        size=config.traits.view_size_px,
        jitter_strength=config.traits.jitter_strength,
        p_color_jitter=config.p_color_jitter,
        p_grayscale=config.p_grayscale,
        p_blur=0.5 if config.use_gaussian_blur else 0.0,
        p_solarize=0.2 if config.use_solarization else 0.0,
    )
    order = Order(
        data_set.train,
        policy,
        seed=config.seed,
        batch_size=config.batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    workers = config.num_workers if config.num_workers is not None else own_cpus
    loader = Loader(order, backend=config.backend, device=device, workers=workers)
    data = engine.Data(
        training=loader,
        plain_train=ArrayPlainLoader(data_set.train, batch_size=config.batch_size, device=device),
        plain_test=ArrayPlainLoader(data_set.test, batch_size=config.batch_size, device=device),
        classes=len(data_set.classes),
    )
    environment = {
        "stec": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "command": sys.argv,
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "backend": loader.backend,
    }
    folder, resumed = engine.on_main_process(accelerator, lambda: open_run_folder(config, environment))
    console.facts(
        "S-TEC" if config.manip_lambda > 0 else "SimCLR (no inverse model: --manip_lambda is 0)",
        [
            ("data", f"{config.dataset}: {len(data_set.train)} training images, {len(data_set.test)} test images"),
            ("encoder", f"{config.arch}, width {config.width}"),
            (
                "training",
                f"{config.max_epochs} epochs of {order.steps_per_epoch} steps of {order.global_batch_size} images",
            ),
            ("machine", f"{accelerator.num_processes} process(es) on {environment['device']}, precision {precision}"),
            ("pipeline", f"{loader.backend}, {workers} thread(s) or worker(s) per process"),
            ("files", str(folder.path.resolve())),
        ],
    )
    if resumed is not None:
        console.say(f"Going on after step {resumed['step']}.")
    results = engine.train(config, data, accelerator=accelerator, console=console, folder=folder, resumed=resumed)
    show_results(console, results)
    console.say(f"The run's files are in {folder.path.resolve()}")
    accelerator.end_training()


def show_results(console: Console, results: dict[str, float]) -> None:
    """The closing table of a run."""

    def percent(name: str) -> str:
        return f"{results[name]:.1%}" if name in results else "-"

    console.table(
        "Results on the test images",
        ["", "before training", "after training"],
        [
            ["kNN (k = 20) top-1", percent("knn20_before"), percent("knn20_after")],
            ["probe top-1, fitted afresh", percent("linear_fit_before"), percent("linear_fit_after")],
            ["probe top-1, trained online", "-", percent("probe_after")],
            ["inverse model, accuracy per entry", "-", percent("inverse_model_accuracy")],
            ["images/s", "-", f"{results['images_per_second']:.0f}"],
            ["share of time waiting for data", "-", percent("wait_share")],
        ],
    )


COMMANDS = {"train": train}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names (default: train); returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    is_main_process = os.environ.get("RANK", "0") == "0"
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "train"
    try:
        if name not in COMMANDS:
            raise UserError(f"{name} is no command; known are {', '.join(COMMANDS)}, and without one launch.py trains.")
        COMMANDS[name](arguments)
    except UserError as error:
        if is_main_process:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        if is_main_process:
            print(str(stop) or "Stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
