"""Whether what makes training fast leaves what it learns unchanged: S-TEC and SimCLR, in fp32 and by the fast path.

    python -m benchmarks.quality --data_dir DATA --images 10000 --fast_flags="--compile 1"

Each run is a ``launch.py`` of its own on CIFAR-10. Runs that have ended are read and not made again, others go on from
their last checkpoint, so this can be stopped at any time and started again by the same command.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import report
from benchmarks.runs import markdown_table, require_finished, run_launch
from pipelines.errors import UserError
from pipelines.files import read_object, write_json, write_text
from stec.console import Console
from stec.runs.run_folder import RunFolder

Objective = Literal["stec", "simclr"]
NAMES: dict[Objective, str] = {"stec": "S-TEC", "simclr": "SimCLR"}
PATHS = ("fp32", "fast")
METRICS = {
    "linear_probing_after": "linear probing",
    "online_classifier_after": "online linear classifier, online",
    "knn20_after": "kNN (k = 20)",
    "inverse_model_accuracy": "inverse model",
}
"""Of a run's ``results.json``: accuracies on the test images, the last on the training views of the last epoch."""
FIXED = "--dataset cifar10 --temperature 0.5 --feat_dim 64"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train by the fast path and in fp32, and compare what was learned."""

    data_dir: Path
    """Folder that holds CIFAR-10."""
    runs: Path = Path("runs/quality")
    """Where the runs' folders are."""
    images: int = 10_000
    """The first so many training images."""
    seeds: int = 3
    """Runs of each kind; those of both paths start from the same weights and see the same views."""
    objectives: tuple[Objective, ...] = ("stec", "simclr")
    """What is trained."""
    fast_flags: str = ""
    """Flags of launch.py that make the fast path, beside --mixed_precision auto; write --fast_flags="--compile 1"."""
    max_epochs: int = 10
    """Epochs of each run, one of them for warming up."""
    arch: Literal["resnet18", "resnet50"] = "resnet18"
    """Architecture of the encoder."""
    width: int = 16
    """Channels of the encoder's first stage."""
    batch_size: int = 256
    """Images per step."""
    learning_rate: float = 1.0
    """Peak learning rate of LARS."""
    manip_lambda: float = 0.3
    """Weight of S-TEC's inverse model."""
    json: Path | None = None
    """Also write the accuracies here."""
    markdown: Path | None = None
    """Also write the tables here."""

    def check(self) -> None:
        """Raise UserError for what cannot be measured."""
        report.check_writable(self.json, self.markdown)
        report.check_positive(self, "seeds")
        if not self.objectives:
            raise UserError(f"--objectives needs at least one of {', '.join(NAMES)}.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One of the runs."""

    objective: Objective
    path: str
    seed: int

    def folder(self, options: Options) -> RunFolder:
        return RunFolder(options.runs / f"{options.images}-images" / f"{self.objective}-{self.path}-{self.seed}")

    def arguments(self, options: Options) -> list[str]:
        """Of ``launch.py``."""
        settings = {
            "data_dir": options.data_dir,
            "limit_train": options.images,
            "arch": options.arch,
            "width": options.width,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "manip_lambda": options.manip_lambda if self.objective == "stec" else 0,
            "max_epochs": options.max_epochs,
            "warmup_epochs": 1,
            "mixed_precision": "no" if self.path == "fp32" else "auto",
            "seed": self.seed,
            "results_path": self.folder(options).path,
            "resume": "auto",
        }
        given = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return [*FIXED.split(), *given, *(shlex.split(options.fast_flags) if self.path == "fast" else [])]

    def results(self, options: Options) -> dict[str, Any]:
        """What it came to, and in which precision; it is made, or gone on with, where it has not ended.

        Raises UserError where it fails, or its folder holds a run with other settings.
        """
        folder = self.folder(options)
        arguments = self.arguments(options)
        if not folder.results.exists():
            run_launch(arguments)
        require_finished(folder, arguments)
        start = json.loads(folder.starts.read_text().splitlines()[-1])
        return {
            "precision": start["precision"],
            **read_object(folder.results, f"remove {folder.path} to make the run again"),
        }


Accuracies = dict[str, list[float]]
"""By metric, one of each seed."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of the fast path with fp32, in one objective and metric."""

    objective: str
    metric: str
    difference: float
    """Of the means, fast less fp32."""
    deviation: float | None
    """Standard deviation over seeds, of both paths together; None with a single seed."""

    @property
    def agrees(self) -> bool | None:
        return None if self.deviation is None else abs(self.difference) <= self.deviation

    @classmethod
    def of(cls, objective: str, metric: str, fp32: Sequence[float], fast: Sequence[float]) -> Comparison:
        deviation = None
        if len(fp32) > 1:
            deviation = ((statistics.variance(fp32) + statistics.variance(fast)) / 2) ** 0.5
        difference = statistics.mean(fast) - statistics.mean(fp32)
        return cls(objective=objective, metric=metric, difference=difference, deviation=deviation)

    def cells(self) -> list[str]:
        if self.deviation is None:
            return [self.objective, self.metric, f"{100 * self.difference:+.2f}", "-", "one seed tells nothing"]
        verdict = "yes" if self.agrees else "NO"
        return [self.objective, self.metric, f"{100 * self.difference:+.2f}", f"{100 * self.deviation:.2f}", verdict]


def mean_and_deviation(values: Sequence[float]) -> str:
    """In per cent."""
    percent = [100 * value for value in values]
    return f"{statistics.mean(percent):.2f}" + (f" ± {statistics.stdev(percent):.2f}" if len(percent) > 1 else "")


def measure(options: Options, console: Console) -> None:
    options.check()
    # All of one seed first: what is there when this is stopped can be compared.
    runs = [Run(objective=o, path=p, seed=s) for s in range(options.seeds) for o in options.objectives for p in PATHS]
    found: dict[tuple[Objective, str], list[dict[str, Any]]] = {}
    for n, run in enumerate(runs, start=1):
        console.say(f"Run {n} of {len(runs)}: {run.folder(options).path}")
        found.setdefault((run.objective, run.path), []).append(run.results(options))

    accuracies: dict[tuple[Objective, str], Accuracies] = {
        kind: {name: [r[metric] for r in results] for metric, name in METRICS.items() if metric in results[0]}
        for kind, results in found.items()
    }
    rows = []
    for (objective, path), results in found.items():
        of_kind = accuracies[objective, path]
        precision = ", ".join(sorted({str(r["precision"]) for r in results}))
        cells = [mean_and_deviation(of_kind[name]) if name in of_kind else "-" for name in METRICS.values()]
        rows.append([f"{NAMES[objective]}, {path} ({precision})", *cells])
    comparisons = [
        Comparison.of(NAMES[objective], name, values, accuracies[objective, "fast"][name])
        for objective in options.objectives
        for name, values in accuracies[objective, "fp32"].items()
    ]
    about = report.machine()
    columns = ["objective, path (precision)", *METRICS.values()]
    of_comparison = ["objective", "accuracy", "fast - fp32", "deviation", "within it"]
    compared = [comparison.cells() for comparison in comparisons]
    title = (
        f"Accuracy in %, first {options.images:,} images of CIFAR-10, {options.max_epochs} epochs, {options.arch}, "
        f"width {options.width}, mean and standard deviation of {options.seeds} seed(s)"
    )
    against = "Fast path against fp32, in points"
    console.table(title, columns, rows)
    console.table(against, of_comparison, compared)
    console.facts("", list(about.items()))
    if options.json is not None:
        values = {f"{objective}, {path}": of_kind for (objective, path), of_kind in accuracies.items()}
        write_json(
            options.json, {"machine": about, "accuracies": values, "comparisons": list(map(asdict, comparisons))}
        )
    if options.markdown is not None:
        tables = f"{title}:\n\n{markdown_table(columns, rows)}\n{against}:\n\n{markdown_table(of_comparison, compared)}"
        write_text(options.markdown, f"{tables}\n" + "".join(f"- {name}: {value}\n" for name, value in about.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.quality", args=arguments, use_underscores=True)
    return report.run(lambda: measure(options, Console(enabled=True)))


if __name__ == "__main__":
    sys.exit(main())
