"""A training run from its settings to its files: set-up, training, evaluation, and what is printed meanwhile."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from stec import __version__
from stec.architectures import is_timm
from stec.config import BASE_TITLES, TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pipelines.datasets.registry import DataSet
    from pipelines.loader import Loader
    from stec.console import Console


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that has reached its end."""

    path: Path
    """Its folder."""
    classes: int
    """0 without labels."""
    processes: int
    console: Console


def run_training(config: TrainConfig) -> Finished:
    """Train as configured, evaluate, and write the files of the run.

    Raises UserError for what the user can fix, and Interrupted after a signal.
    """
    from pipelines.datasets.fingerprint import fingerprint
    from stec import gpus
    from stec.distributed import failures, processes
    from stec.loaders import Data, evaluation_loader, training_loader
    from stec.runs.run_folder import open_run_folder
    from stec.startup import start
    from stec.training import loop, trackers
    from stec.training.initial_model import check_encoder, initial_model

    if config.objective.stop_gradient == 2 and config.model.ckpt_path is None and config.model.init == "random":
        raise UserError(
            "--stop_gradient 2 trains the online linear classifier on a trained encoder; name its weights by "
            "--ckpt_path."
        )
    accelerator, console, precision = start(
        config.run.mixed_precision, config.run.process_timeout_s, bool(config.run.deterministic)
    )
    check_processes(config, accelerator.num_processes)
    trackers.check_installed(config.run.trackers)
    check_encoder(config)
    data_set = open_training_data(config, accelerator, console)
    loader = training_loader(
        config,
        data_set,
        device=accelerator.device,
        precision=precision,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    plain_loader = partial(
        evaluation_loader,
        data=config.data,
        traits=config.traits,
        batch_size=config.optimization.batch_size,
        device=accelerator.device,
    )
    data = Data(
        training=loader,
        plain=plain_loader(data_set.train),
        labeled=None if data_set.labeled is None else plain_loader(data_set.labeled),
        test=None if data_set.test is None else plain_loader(data_set.test),
        classes=len(data_set.classes),
    )
    environment = {
        **environment_of(accelerator, precision),
        "backend": loader.backend,
        "training_images": len(data_set.train),
        "data_fingerprint": fingerprint(data_set.train),
    }
    model = initial_model(config, data.classes)
    folder, resumed, notes, held = processes.on_main_process(accelerator, lambda: open_run_folder(config, environment))
    try:
        loader.sampler.bad.list_in(folder.bad_images, report=print_error, main=accelerator.is_main_process)
        console.facts(title(config), facts(config, data_set, loader, environment, str(folder.path.resolve())))
        for note in (*data_set.notes, *notes):
            console.say(note)
        if resumed is not None:
            console.say(f"Resuming after step {resumed['step']}.")
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
        batch_size, accumulate = config.optimization.batch_size, config.optimization.accumulate
        remedy = f"the same loss needs less with --batch_size {max(2, batch_size // 2)} --accumulate {2 * accumulate}"
        with failures.shared(), gpus.memory_errors(batch_size, remedy), trackers.finished(accelerator, console.say):
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
        accelerator.end_training()
    finally:
        if held is not None and accelerator.is_main_process:
            os.close(held)
    return Finished(path=folder.path, classes=data.classes, processes=accelerator.num_processes, console=console)


def check_processes(config: TrainConfig, num_processes: int) -> None:
    """Raise UserError, with the right launch command, if Accelerate did not start the processes that the flags name."""
    if config.run.gpus is None and config.run.num_nodes is None:
        return
    machines, per_machine = config.run.num_nodes or 1, config.run.gpus or 1
    expected = per_machine * machines
    if expected != num_processes:
        flags = ["--multi_gpu"] * (expected > 1) + ["--num_processes", str(expected)]
        flags += ["--num_machines", str(machines)] * (machines > 1)
        raise UserError(
            f"--gpus {per_machine} on {machines} machine(s) means {expected} process(es), but {num_processes} started; "
            f"launch with: accelerate launch {shlex.join([*flags, 'launch.py', *sys.argv[1:]])}"
        )


def open_training_data(config: TrainConfig, accelerator: Accelerator, console: Console) -> DataSet:
    """The data set, downloaded and indexed by the main process first. Raises UserError if it is missing or damaged."""
    from pipelines.datasets.registry import open_data_set
    from stec.distributed import processes

    with console.counting() as progress:
        data_set = processes.main_process_first(
            accelerator,
            lambda: open_data_set(
                config.data.dataset,
                config.data.location,
                limit_train=config.data.limit_train,
                download=bool(config.data.download) and accelerator.is_main_process,
                exif_orientation=bool(config.data.exif_orientation),
                progress=progress,
            ),
        )
    if config.objective.stop_gradient == 2 and not data_set.classes:
        raise UserError(
            f"--stop_gradient 2 trains the online linear classifier, but --dataset {config.data.dataset} has no labels."
        )
    return data_set


def environment_of(accelerator: Accelerator, precision: str) -> dict[str, Any]:
    """Versions, devices and the command line, as ``starts.jsonl`` and checkpoints record them."""
    import torch

    on_gpu = accelerator.device.type == "cuda"
    return {
        "stec": __version__,
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "command": sys.argv,
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(accelerator.device) if on_gpu else "cpu",
        "precision": precision,
    }


def print_error(text: str) -> None:
    """Print to standard error. A module-level function, so that it can be sent to worker processes."""
    print(text, file=sys.stderr)


def title(config: TrainConfig) -> str:
    """The name of the method, with the flag that selects it."""
    if config.objective.stop_gradient == 2:
        return "Linear probing (only the online linear classifier is trained: --stop_gradient is 2)"
    base = BASE_TITLES[config.objective.objective]
    if config.objective.manip_lambda == 0:
        return f"{base} (no inverse model: --manip_lambda is 0)"
    return "S-TEC" if base == "SimCLR" else f"S-TEC with {base}"


def facts(
    config: TrainConfig, data_set: DataSet, loader: Loader, environment: dict[str, Any], folder: str
) -> list[tuple[str, str]]:
    """The table that is printed before training."""
    sampler, first_size_px = loader.sampler, config.view_size_at(0)
    bad = f" ({sampler.bad.count} of them bad)" if sampler.bad.count else ""
    test = f"{len(data_set.test)} test images" if data_set.test is not None else "no labels"
    growing = f", {first_size_px} px at first" if config.augmentation.resolution_schedule is not None else ""
    return [
        ("data", f"{config.data.dataset}: {len(data_set.train)} training images{bad}, {test}"),
        (
            "encoder",
            config.model.arch if is_timm(config.model.arch) else f"{config.model.arch}, width {config.model.width}",
        ),
        (
            "training",
            f"{config.optimization.max_epochs} epochs of {sampler.steps_per_epoch} steps of "
            f"{sampler.global_batch_size} images",
        ),
        (
            "machine",
            f"{environment['processes']} process(es) on {environment['device']}, precision {environment['precision']}",
        ),
        ("views", f"{config.view_size_px} px{growing}"),
        ("pipeline", f"{loader.backend}, {loader.workers} thread(s) or worker(s) per process"),
        ("files", folder),
    ]


def show_results(console: Console, results: dict[str, float]) -> None:
    """Print the final table of a run."""
    from stec.runs.run_folder import INVERSE_RESULTS, RESULTS

    def percent(name: str) -> str:
        return f"{results[name]:.1%}" if name in results else "-"

    rows = [
        *([title, percent(f"{name}_before"), percent(f"{name}_after")] for name, title in RESULTS.items()),
        *([title, "-", percent(name)] for name, title in INVERSE_RESULTS.items()),
        ["images/s", "-", f"{results['images_per_second']:.0f}"],
        ["fraction of time waiting for data", "-", percent("wait_fraction")],
    ]
    measured = [row for row in rows if row[1:] != ["-", "-"]]
    heading = "Results on the test images" if "online_classifier_after" in results else "Results"
    console.table(heading, ["", "before training", "after training"], measured)
