"""Train, evaluate and export: what ``launch.py`` does without the name of a command."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.files import read_object
from stec import __version__
from stec.cli.common import evaluation_loader, parse, start, training_loader
from stec.cli.next_steps import next_steps
from stec.config import TrainConfig, with_settings
from stec.recipes import RECIPES, recipe
from stec.settings import as_path

if TYPE_CHECKING:
    from stec.console import Console


def parse_train(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """The configuration that the flags ask for, and whether it is only to be printed.

    Later beats earlier: defaults, recipe, config file, flags.
    """
    # These three decide what the other flags' defaults are, so they are read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config")
    first.add_argument("--print_config", action="store_true")
    first.add_argument("--dataset")
    chosen, rest = first.parse_known_args(arguments)
    if chosen.dataset is not None:
        rest += ["--dataset", chosen.dataset]

    settings = {}
    if chosen.config is not None:
        try:
            file = as_path(chosen.config)
        except ValueError as error:
            raise UserError(f"--config '{chosen.config}' names no file: {error}") from error
        settings = read_object(file, "give a run's config.json", name=f"--config {chosen.config}")
    name = chosen.recipe
    if name is None and chosen.config is None and chosen.dataset in (None, "demo"):
        name = "demo"
    base = with_settings(recipe(name) if name else TrainConfig(), settings, str(chosen.config))
    epilogue = (
        f"\n\nBesides the options below: --recipe NAME ({', '.join(RECIPES)}) and --config FILE (a run's config.json) "
        "give defaults that options override; --print_config shows the outcome and stops."
    )
    config = parse(TrainConfig, rest, name="", default=base, epilogue=epilogue)
    config.validate()
    return config, chosen.print_config


def check_processes(config: TrainConfig, processes: int) -> None:
    """Raise UserError with the right launch line where Accelerate started other processes than the flags say."""
    if config.run.gpus is None and config.run.num_nodes is None:
        return
    nodes = config.run.num_nodes or 1
    wanted = (config.run.gpus or 1) * nodes
    if wanted != processes:
        machines = f" --num_machines {nodes}" if nodes > 1 else ""
        several = " --multi_gpu" if wanted > 1 else ""
        flags_given = shlex.join(sys.argv[1:])
        raise UserError(
            f"--gpus {config.run.gpus or 1} on {nodes} machine(s) means {wanted} process(es), but {processes} started; "
            f"launch with: accelerate launch{several} --num_processes {wanted}{machines} launch.py {flags_given}"
        )


def run(arguments: list[str]) -> None:
    """Train, evaluate and export."""
    config, only_print = parse_train(arguments)
    if only_print:
        print(json.dumps(config.to_json(), indent=2))
        return
    if config.objective.stop_gradient == 2 and config.model.ckpt_path is None:
        raise UserError(
            "--stop_gradient 2 trains the online classifier of a trained encoder; name its weights by --ckpt_path."
        )

    from stec.training import stops

    with stops.immediately(config.run.stop_exit_code):
        run_training(config)


def warn(text: str) -> None:
    """A function of the module, as worker processes may be sent a copy."""
    print(text, file=sys.stderr)


def run_training(config: TrainConfig) -> None:
    """From a configuration to a run's files."""
    accelerator, console, precision = start(
        config.run.mixed_precision, config.run.process_timeout_s, bool(config.run.deterministic)
    )
    check_processes(config, accelerator.num_processes)

    import torch

    from stec.training import trackers

    trackers.check_installed(config.run.trackers)

    from pipelines.datasets.fingerprint import fingerprint
    from pipelines.datasets.index import open_data_set
    from stec.distributed import failures, processes
    from stec.runs.run_folder import open_run_folder
    from stec.training import loop
    from stec.training.data import Data
    from stec.training.initial_model import initial_model

    device = accelerator.device
    with console.counting() as progress:
        data_set = processes.main_process_first(
            accelerator,
            lambda: open_data_set(
                config.data.dataset,
                config.data.data_dir,
                limit_train=config.data.limit_train,
                download=bool(config.data.download) and accelerator.is_main_process,
                exif_orientation=bool(config.data.exif_orientation),
                progress=progress,
            ),
        )
    if config.objective.stop_gradient == 2 and not data_set.classes:
        raise UserError(
            f"--stop_gradient 2 trains an online linear classifier, but --dataset {config.data.dataset} has no labels."
        )
    loader = training_loader(
        config,
        data_set,
        device=device,
        precision=precision,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    sampler, bad = loader.sampler, loader.sampler.bad
    labeled, test = (
        None
        if images is None
        else evaluation_loader(
            images, config.data, traits=config.traits, batch_size=config.optimization.batch_size, device=device
        )
        for images in (data_set.labeled, data_set.test)
    )
    data = Data(
        training=loader,
        labeled=labeled,
        test=test,
        classes=len(data_set.classes),
    )
    environment = {
        "stec": __version__,
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "command": sys.argv,
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "backend": loader.backend,
        "training_images": len(data_set.train),
        "data_fingerprint": fingerprint(data_set.train),
    }
    model = initial_model(config, data.classes)
    folder, resumed, notes = processes.on_main_process(accelerator, lambda: open_run_folder(config, environment))
    bad.list_in(folder.bad_images, say=warn, main=accelerator.is_main_process)
    console.facts(
        title(config),
        [
            (
                "data",
                f"{config.data.dataset}: {len(data_set.train)} training images"
                + (f" ({bad.count} of them bad)" if bad.count else "")
                + (f", {len(data_set.test)} test images" if data_set.test is not None else ", no labels"),
            ),
            ("encoder", f"{config.model.arch}, width {config.model.width}"),
            (
                "training",
                f"{config.optimization.max_epochs} epochs of {sampler.steps_per_epoch} steps of "
                f"{sampler.global_batch_size} images",
            ),
            ("machine", f"{accelerator.num_processes} process(es) on {environment['device']}, precision {precision}"),
            (
                "views",
                f"{config.view_size_px} px"
                + (
                    f", {config.view_size_at(0)} px at first"
                    if config.augmentation.resolution_schedule is not None
                    else ""
                ),
            ),
            ("pipeline", f"{loader.backend}, {loader.workers} thread(s) or worker(s) per process"),
            ("files", str(folder.path.resolve())),
        ],
    )
    for note in (*data_set.remarks, *notes):
        console.say(note)
    if resumed is not None:
        console.say(f"Going on after step {resumed['step']}.")
    processes.on_main_process(
        accelerator,
        lambda: trackers.start(
            accelerator,
            config.run.trackers,
            folder,
            config.to_json(),
            after_step=resumed["step"] if resumed is not None else 0,
            report=console.say,
        ),
    )
    with failures.shared(), trackers.finished(accelerator, console.say):
        results = loop.train(
            config,
            data,
            model,
            accelerator=accelerator,
            console=console,
            folder=folder,
            environment=environment,
            resumed=resumed,
        )
    show_results(console, results)
    console.say(f"The run's files are in {folder.path.resolve()}")
    console.next_steps(
        "What to do next",
        next_steps(config, folder.path, classes=data.classes, processes=accelerator.num_processes),
    )
    accelerator.end_training()


def title(config: TrainConfig) -> str:
    """What a run is called."""
    if config.objective.stop_gradient == 2:
        return "Linear probing (only the online linear classifier is trained: --stop_gradient is 2)"
    return "S-TEC" if config.objective.manip_lambda > 0 else "SimCLR (no inverse model: --manip_lambda is 0)"


def show_results(console: Console, results: dict[str, float]) -> None:
    """The closing table of a run."""
    from stec.runs.run_folder import RESULTS

    def percent(name: str) -> str:
        return f"{results[name]:.1%}" if name in results else "-"

    rows = [
        *([title, percent(f"{name}_before"), percent(f"{name}_after")] for name, title in RESULTS.items()),
        ["inverse model, accuracy per entry", "-", percent("inverse_model_accuracy")],
        ["images/s", "-", f"{results['images_per_second']:.0f}"],
        ["share of time waiting for data", "-", percent("wait_fraction")],
    ]
    measured = [row for row in rows if row[1:] != ["-", "-"]]
    heading = "Results on the test images" if "online_classifier_after" in results else "Results"
    console.table(heading, ["", "before training", "after training"], measured)
