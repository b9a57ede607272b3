"""What a run's folder tells of the run, whether it is finished, going on, or damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.files import read_object
from stec.compatibility import RENAMED_METRICS, RENAMED_RESULTS, RENAMED_SETTINGS, with_current_names
from stec.config import TrainConfig, group_of_settings, with_settings
from stec.runs import checkpoint
from stec.runs.run_folder import RunFolder


@dataclass(kw_only=True)
class RunRecord:
    """What was read; what could not be read is empty, and ``remarks`` say why."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """``config.json`` as it stands."""
    config: TrainConfig | None = None
    """The same, where this version understands all of it."""
    environment: dict[str, Any] = field(default_factory=dict)
    """The last line of ``starts.jsonl``: versions, device, number of processes."""
    starts: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    """The lines of ``metrics.jsonl``, steps ascending."""
    results: dict[str, float] = field(default_factory=dict)
    weights: Path | None = None
    """The trained weights, or the newest checkpoint."""
    remarks: list[str] = field(default_factory=list)
    """What is missing or damaged, a sentence each."""

    @property
    def global_batch_size(self) -> int | None:
        """Images per step; None where it is not known."""
        processes = self.environment.get("processes")
        if self.config is None or not isinstance(processes, int) or processes < 1:
            return None
        return self.config.optimization.accumulate * self.config.optimization.batch_size * processes

    @property
    def steps_per_epoch(self) -> int | None:
        """None where it is not known."""
        images, batch = self.environment.get("training_images"), self.global_batch_size
        return images // batch or None if isinstance(images, int) and batch else None

    @property
    def progress(self) -> str:
        """How far the run has come, for a person."""
        if not self.metrics:
            return "nothing logged yet"
        step = int(self.metrics[-1]["step"])
        if self.config is None or self.steps_per_epoch is None:
            return f"step {step}"
        total = self.config.optimization.max_epochs * self.steps_per_epoch
        return f"{'finished, ' if self.results else ''}step {step} of {total}"


def read_run(path: Path) -> RunRecord:
    """What the folder of a run tells. Raises UserError where it is none."""
    folder = RunFolder(path)
    if not folder.config.is_file() and not folder.metrics.is_file():
        raise UserError(
            f"{path} is no run: it holds neither config.json nor metrics.jsonl; name a folder that training wrote to, "
            f"such as runs/demo-001."
        )
    record = RunRecord(path=path)
    say = record.remarks.append
    record.settings = _read_object(folder.config, say)
    if record.settings:
        unknown = sorted(with_current_names(record.settings, RENAMED_SETTINGS).keys() - group_of_settings().keys())
        try:
            record.config = with_settings(TrainConfig(), record.settings, folder.config.name)
            record.config.validate()
        except UserError as error:
            record.config = None
            say(
                f"config.json has settings that this version does not know ({', '.join(unknown)}), as a newer one "
                f"writes them; what depends on them is left out."
                if unknown
                else f"{error} What depends on the settings is left out."
            )
    starts = list(_read_lines(folder.starts, say))
    record.starts, record.environment = len(starts), starts[-1] if starts else {}
    for values in _read_lines(folder.metrics, say, needed="step"):
        # What a killed process left behind after its last checkpoint stands twice once the run goes on.
        while record.metrics and record.metrics[-1]["step"] >= values["step"]:
            record.metrics.pop()
        record.metrics.append(with_current_names(values, RENAMED_METRICS))
    if folder.results.exists():
        results = _read_object(folder.results, say)
        record.results = with_current_names(
            {name: value for name, value in results.items() if _is_number(value)}, RENAMED_RESULTS
        )
    else:
        say("There is no results.json: the run is not finished.")
    checkpoints = list(checkpoint.checkpoints(path).values())
    record.weights = folder.model if folder.model.is_file() else checkpoints[-1] if checkpoints else None
    return record


def _read_object(file: Path, say: Callable[[str], None]) -> dict[str, Any]:
    if not file.exists():
        say(f"There is no {file.name}.")
        return {}
    try:
        return read_object(file, "what depends on it is left out", name=file.name)
    except UserError as error:
        say(str(error))
        return {}


def _read_lines(file: Path, say: Callable[[str], None], needed: str | None = None) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines; with ``needed``, those of numbers alone that have this positive one."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError as error:
        say(f"{file.name} cannot be read ({error.strerror}).")
        return
    if not lines:
        say(f"{file.name} is empty.")
    damaged = 0
    for line in lines:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or (needed is not None and not _are_metrics(values, needed)):
            damaged += 1
        else:
            yield values
    if damaged:
        say(f"{damaged} of {len(lines)} lines of {file.name} are damaged and left out.")


def _are_metrics(values: dict[str, Any], needed: str) -> bool:
    return all(map(_is_number, values.values())) and values.get(needed, 0) >= 1


def _is_number(value: Any) -> bool:
    """As training writes them; whole numbers beyond what a float holds are none of its."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > 2**53
