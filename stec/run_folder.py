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
        self.bad_images = path / "bad-images.tsv"
        self.results = path / "results.json"
        self.model = path / "model.safetensors"
        self.encoder = path / "encoder.safetensors"

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Add a line. Raises UserError where the disk refuses."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise _unwritable(self.metrics, error) from error

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run computes again, and whatever is no line of metrics."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(errors="replace").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if isinstance(values, dict) and isinstance(values.get("step"), int) and values["step"] <= step:
                kept.append(line + "\n")
        write_text(self.metrics, "".join(kept))


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written ({error.strerror}); check folder and disk.")


def open_run_folder(config: TrainConfig, environment: Mapping[str, Any]) -> tuple[RunFolder, dict[str, Any] | None]:
    """The folder to write to, and the checkpoint to go on from, if any.

    Raises UserError where the folder holds a run that ``config`` does not ask to resume, belongs to another
    configuration, or cannot be written.
    """
    try:
        path = config.results_path or _default_path(config)
        path.mkdir(parents=True, exist_ok=True)
        folder = RunFolder(path)
        found = checkpoint.checkpoints(path)
        holds_run = folder.config.exists() or bool(found)
        if holds_run and config.resume == "no":
            raise UserError(
                f"{path} already holds a run; go on with it by --resume auto, or name another folder by --results_path."
            )
        state = checkpoint.load(found[-1]) if found else None
        if state is not None:
            _check_same(config, environment, state, path)
        folder.forget_metrics_after(state["step"] if state is not None else 0)
        write_json(folder.config, config.to_json())
        write_json(folder.environment, environment)
    except OSError as error:
        raise UserError(
            f"The run folder {config.results_path or DEFAULT_PARENT} cannot be written ({error.strerror}); "
            f"name another one by --results_path."
        ) from error
    return folder, state


def _default_path(config: TrainConfig) -> Path:
    """The newest numbered folder of the data set to resume, else the next free one, which is made."""
    numbers = (path.name.removeprefix(f"{config.dataset}-") for path in DEFAULT_PARENT.glob(f"{config.dataset}-*"))
    newest = max((int(number) for number in numbers if number.isdecimal()), default=0)
    if config.resume == "auto" and newest:
        return DEFAULT_PARENT / f"{config.dataset}-{newest:03d}"
    DEFAULT_PARENT.mkdir(exist_ok=True)
    while True:
        newest += 1
        path = DEFAULT_PARENT / f"{config.dataset}-{newest:03d}"
        try:
            path.mkdir()
        except FileExistsError:  # another run was faster
            continue
        return path


def _check_same(config: TrainConfig, environment: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> None:
    """Raise UserError where the run would go on with other settings, precision or pipeline than it began with."""
    # The batch size per process may change with the number of processes, as long as their product does not.
    processes = environment["processes"]
    if state["global_batch_size"] != config.batch_size * processes:
        raise UserError(
            f"The run in {path} has a global batch of {state['global_batch_size']}, but --batch_size "
            f"{config.batch_size} on {processes} process(es) makes {config.batch_size * processes}; "
            f"choose the two so that their product stays the same."
        )
    ours, saved = config.identity(), state["identity"]
    differing = [k for k in sorted(ours.keys() | saved.keys()) if k != "batch_size" and ours.get(k) != saved.get(k)]
    changes = [f"--{k} was {saved.get(k)} and is now {ours.get(k)}" for k in differing]
    for flag, name in (("mixed_precision", "precision"), ("backend", "backend")):
        before, now = state["environment"].get(name), environment[name]
        if before != now and flag not in differing:
            changes.append(f"--{flag} came out as {before} and now comes out as {now}")
    if changes:
        raise UserError(
            f"The run in {path} was started differently: {', '.join(changes)}; go on with its own settings by "
            f"--config {path / 'config.json'}, or name another folder by --results_path."
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name beside ``path``, then rename: the file is whole at any moment.

    Raises UserError where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error
