"""What the efference copy adds to each base objective: runs with and without it, measured on the test images.

    python -m benchmarks.learning --seeds 3
    python -m benchmarks.learning --dataset cifar10 --data_dir DATA --objectives simclr --seeds 2

Each run is a ``launch.py`` of its own with the data set's recipe, followed by ``launch.py eval``. Runs that have ended
are read and not made again, others go on from their last checkpoint, so this can be stopped at any time and started
again by the same command.
"""

from __future__ import annotations

import io
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import tyro

from benchmarks import report
from benchmarks.runs import markdown_table, require_finished, run_launch
from pipelines.cpus import available_cpus
from pipelines.errors import UserError
from pipelines.files import atomic_write, read_object, write_json, write_text
from stec.config import BASE_TITLES, BaseName
from stec.console import Console
from stec.runs.run_folder import RunFolder

Copy = Literal["alone", "window", "full"]
COPIES: dict[Copy, str] = {"alone": "alone", "window": "+ window", "full": "+ full copy"}
RECIPES: dict[BaseName, str] = {"simclr": "demo", "byol": "demo-byol", "relic": "demo-relic"}
CIFAR10 = (
    "--dataset cifar10 --view_size 16 --width 16 --temperature 0.2 --feat_dim 64 --optimizer adam --learning_rate 3e-3 "
    "--batch_size 64 --warmup_epochs 1 --max_epochs 4 --limit_train 20000 --manip_lambda 1"
)
"""The demo's recipe with real images: like it, a small encoder on small views."""
FULL = "--predict window color blur solarize gray --use_gaussian_blur 1 --use_solarization 1"
AUGMENTED = "--use_gaussian_blur 1 --use_solarization 1"
"""For all runs: the full copy includes blur and solarization, so all see them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train base objectives alone, with the window and with the full efference copy, and compare what was learned."""

    dataset: Literal["demo", "cifar10"] = "demo"
    """Data set of the runs."""
    data_dir: Path | None = None
    """Folder that holds it."""
    runs: Path = Path("runs/learning")
    """Where the runs' folders are."""
    seeds: int = 3
    """Runs of each kind."""
    objectives: tuple[BaseName, ...] = ("simclr", "byol", "relic")
    """Base objectives."""
    copies: tuple[Copy, ...] = ("alone", "window", "full")
    """What the inverse model predicts."""
    flags: str = ""
    """Further flags of launch.py for all runs; write --flags="--max_epochs 12"."""
    jobs: int = available_cpus()
    """Runs at a time, each on its part of the cores: a small encoder is not much faster on several."""
    json: Path | None = None
    """Also write the measures here."""
    markdown: Path | None = None
    """Also write the table here."""
    chart: Path | None = None
    """Also draw kNN and linear probing here, as a PNG."""

    def check(self) -> None:
        """Raise UserError for what cannot be measured."""
        report.check_writable(self.json, self.markdown, self.chart)
        report.check_positive(self, "seeds", "jobs")
        if not self.objectives or not self.copies:
            raise UserError("--objectives and --copies need at least one each.")
        if self.dataset == "cifar10" and set(self.objectives) != {"simclr"}:
            raise UserError("--dataset cifar10 has settings for SimCLR alone; add --objectives simclr.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One of the runs."""

    objective: BaseName
    copy: Copy
    seed: int

    def folder(self, options: Options) -> RunFolder:
        return RunFolder(options.runs / options.dataset / f"{self.objective}-{self.copy}-{self.seed}")

    def arguments(self, options: Options) -> list[str]:
        """Of ``launch.py``."""
        of_data_set = CIFAR10.split() if options.dataset == "cifar10" else ["--recipe", RECIPES[self.objective]]
        of_copy = {"alone": f"{AUGMENTED} --manip_lambda 0", "window": AUGMENTED, "full": FULL}
        where = [] if options.data_dir is None else ["--data_dir", str(options.data_dir)]
        of_run = ["--seed", str(self.seed), "--results_path", str(self.folder(options).path), "--resume", "auto"]
        return [*of_data_set, *shlex.split(options.flags), *of_copy[self.copy].split(), *where, *of_run]

    def measures(self, options: Options, cores: Sequence[int]) -> dict[str, float]:
        """By name; the run is made, or continued, if it has not ended.

        Raises UserError if it fails, or its folder holds a run with other settings.
        """
        folder = self.folder(options)
        evaluation, log = folder.path / "eval.json", folder.path.with_suffix(".log")
        arguments = self.arguments(options)
        if not folder.results.exists():
            run_launch(arguments, log=log, cores=cores)
        require_finished(folder, arguments)
        if not evaluation.exists():
            where = [] if options.data_dir is None else ["--data_dir", str(options.data_dir)]
            names = ["--measures", "knn", "linear_probing", "rankme", "parameters"]
            command = ["eval", "--dataset", options.dataset, *where, "--ckpt_path", str(folder.path), *names]
            command += ["--mixed_precision", "auto", "--json", str(evaluation)]
            run_launch(command, log=log, cores=cores)
        return measures_of(read_object(evaluation, f"remove {evaluation} to measure again"))


def measures_of(evaluation: dict[str, Any]) -> dict[str, float]:
    """The rows of the table, from what ``launch.py eval --json`` wrote. R2 are means over entries, by an MLP."""
    measures = evaluation["measures"]
    found = {
        "kNN": measures["knn20"]["accuracy"],
        "linear probing": measures["linear_probing"]["accuracy"],
        "RankMe": measures["rankme"]["rankme"],
    }
    groups = {
        "R2 of crop box": ("x scale", "x shift", "y scale", "y shift"),
        "R2 of colors": ("brightness", "contrast", "saturation", "hue"),
        "R2 of blur": ("blur",),
        "R2 of gray": ("gray",),
        "R2 of solarization": ("solarize",),
    }
    by_entry = measures["parameters"]["commands"]
    for title, entries in groups.items():
        known = [by_entry[entry]["mlp"] for entry in entries if entry in by_entry]
        if known:
            found[title] = statistics.mean(known)
    factors = measures["parameters"].get("factors", {})
    if factors:
        found["R2 of factors"] = statistics.mean(values["mlp"] for values in factors.values())
    return found


Kind = tuple[BaseName, Copy]


def table(found: dict[Kind, list[dict[str, float]]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: mean and standard deviation over seeds; accuracies in %, R2 and RankMe as they are."""
    names = list(dict.fromkeys(name for of_kind in found.values() for name in of_kind[0]))

    def cell(values: list[float], percent: bool) -> str:
        scaled = [100 * value if percent else value for value in values]
        digits = 1 if percent else 2
        deviation = f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
        return f"{statistics.mean(scaled):.{digits}f}{deviation}"

    rows = []
    for (objective, copy), of_kind in found.items():
        cells = [
            cell([one[name] for one in of_kind], name in ("kNN", "linear probing")) if name in of_kind[0] else "-"
            for name in names
        ]
        rows.append([f"{BASE_TITLES[objective]} {COPIES[copy]}", *cells])
    return ["", *names], rows


def draw(found: dict[Kind, list[dict[str, float]]], title: str, file: Path) -> None:
    """kNN and linear probing of each kind, every seed as a point beside the mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 * len(found) + 1.8), sharey=True, layout="constrained")
    labels = [f"{BASE_TITLES[objective]} {COPIES[copy]}" for objective, copy in found]
    for axis, name in zip(axes, ("kNN", "linear probing"), strict=True):
        for row, of_kind in enumerate(found.values()):
            values = [100 * one[name] for one in of_kind]
            axis.barh(row, statistics.mean(values), color="#9db8d9")
            axis.plot(values, [row] * len(values), "o", color="#1b3a5c", markersize=4)
        axis.set_xlabel(f"{name}, top-1 in %")
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    plt.close(figure)
    atomic_write(file, content.getvalue())


def measure(options: Options, console: Console) -> None:
    options.check()
    # All kinds of one seed first: what there is when this is stopped can be compared.
    runs = [
        Run(objective=objective, copy=copy, seed=seed)
        for seed in range(options.seeds)
        for objective in options.objectives
        for copy in options.copies
    ]

    free: SimpleQueue[list[int]] = SimpleQueue()
    every = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for job in range(options.jobs):
        free.put(every[job :: options.jobs])

    def made(run: Run) -> dict[str, float]:
        cores = free.get()
        console.say(f"{run.folder(options).path}")
        try:
            return run.measures(options, cores)
        finally:
            free.put(cores)

    with ThreadPoolExecutor(options.jobs) as pool:
        measures = list(pool.map(made, runs))
    found: dict[Kind, list[dict[str, float]]] = {}
    for run, of_run in zip(runs, measures, strict=True):
        found.setdefault((run.objective, run.copy), []).append(of_run)

    columns, rows = table(found)
    about = report.machine()
    title = f"{options.dataset}, mean and standard deviation of {options.seeds} seed(s)"
    console.table(title, columns, rows)
    console.facts("", list(about.items()))
    if options.json is not None:
        values = {f"{objective}, {copy}": of_kind for (objective, copy), of_kind in found.items()}
        write_json(options.json, {"machine": about, "measures": values})
    if options.markdown is not None:
        content = markdown_table(columns, rows)
        write_text(options.markdown, f"{title}:\n\n{content}\n" + "".join(f"- {k}: {v}\n" for k, v in about.items()))
    if options.chart is not None:
        draw(found, title, options.chart)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.learning", args=arguments, use_underscores=True)
    return report.run(partial(measure, options, Console(enabled=True)))


if __name__ == "__main__":
    sys.exit(main())
