"""A run's folder: what lies in it, and when it may be written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stec import checkpoint
from stec.config import TrainConfig
from stec.errors import UserError

DEFAULT_PARENT = Path("runs")


class RunFolder:
    """The files of one training run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.model = path / "model.safetensors"
        self.encoder = path / "encoder.safetensors"

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def last_epoch_mean(self, name: str) -> float:
        """The mean of a metric over the steps of the last epoch."""
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        lines = [line for line in lines if line["epoch"] == lines[-1]["epoch"]]
        return float(sum(line["steps"] * line[name] for line in lines) / sum(line["steps"] for line in lines))

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run computes again, and a half-written last line."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                break
        write_text(self.metrics, "".join(kept))


def open_run_folder(config: TrainConfig, environment: Mapping[str, Any]) -> tuple[RunFolder, dict[str, Any] | None]:
    """The folder to write to, and the checkpoint to go on from, if any.

    Raises UserError where the folder holds a run that ``config`` does not ask to resume, belongs to another
    configuration, or cannot be written.
    """
    path = config.results_path
    if path is None:
        path = _newest(config.dataset) if config.resume == "auto" else None
        path = path or _next_free(config.dataset)
    folder = RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        holds_run = folder.config.exists()
        if holds_run and config.resume == "no":
            raise UserError(
                f"{path} already holds a run; go on with it by --resume auto, or name another folder by --results_path."
            )
        found = checkpoint.checkpoints(path)
        state = checkpoint.load(found[-1]) if found else None
        if state is not None:
            _check_same(config, state["identity"], path)
            folder.forget_metrics_after(state["step"])
        elif holds_run:
            folder.forget_metrics_after(0)
        write_json(folder.config, config.to_json())
        write_json(folder.environment, environment)
    except OSError as error:
        raise UserError(
            f"The run folder {path} cannot be written ({error.strerror}); name another one by --results_path."
        ) from error
    return folder, state


def _check_same(config: TrainConfig, saved: Mapping[str, Any], path: Path) -> None:
    ours = config.identity()
    # The batch size per process may change with the number of processes; the engine compares their product.
    differing = [k for k in sorted(ours.keys() | saved.keys()) if k != "batch_size" and ours.get(k) != saved.get(k)]
    if differing:
        changes = ", ".join(f"--{k} was {saved.get(k)} and is now {ours.get(k)}" for k in differing)
        raise UserError(
            f"The run in {path} was started differently: {changes}; go on with its own settings by "
            f"--config {path / 'config.json'}, or name another folder by --results_path."
        )


def _numbered(dataset: str) -> list[int]:
    numbers = (path.name.removeprefix(f"{dataset}-") for path in DEFAULT_PARENT.glob(f"{dataset}-*"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def _newest(dataset: str) -> Path | None:
    numbers = _numbered(dataset)
    return DEFAULT_PARENT / f"{dataset}-{numbers[-1]:03d}" if numbers else None


def _next_free(dataset: str) -> Path:
    return DEFAULT_PARENT / f"{dataset}-{max(_numbered(dataset), default=0) + 1:03d}"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name beside ``path``, then rename: the file is whole at any moment."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
