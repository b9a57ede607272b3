"""Reads the folder of a run that is finished, in progress or damaged."""

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
    """The contents of a run's folder; what cannot be read is empty, with the reason in ``remarks``."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """``config.json`` as written."""
    config: TrainConfig | None = None
    """The same, or None if this version does not know all of the settings."""
    environment: dict[str, Any] = field(default_factory=dict)
    """The last line of ``starts.jsonl``: versions, device, number of processes."""
    starts: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    """The lines of ``metrics.jsonl``, steps ascending."""
    results: dict[str, float] = field(default_factory=dict)
    weights: Path | None = None
    """The trained weights, or the newest checkpoint."""
    remarks: list[str] = field(default_factory=list)
    """What is missing or damaged, one sentence each."""

    @property
    def global_batch_size(self) -> int | None:
        """Images per step, or None if unknown."""
        processes = self.environment.get("processes")
        if self.config is None or not isinstance(processes, int) or processes < 1:
            return None
        return self.config.optimization.accumulate * self.config.optimization.batch_size * processes

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps per epoch, or None if unknown."""
        images, batch = self.environment.get("training_images"), self.global_batch_size
        return images // batch or None if isinstance(images, int) and batch else None

    @property
    def progress(self) -> str:
        """The progress of the run, for display."""
        if not self.metrics:
            return "nothing logged yet"
        step = int(self.metrics[-1]["step"])
        if self.config is None or self.steps_per_epoch is None:
            return f"step {step}"
        total = self.config.optimization.max_epochs * self.steps_per_epoch
        return f"{'finished, ' if self.results else ''}step {step} of {total}"


def read_run(path: Path) -> RunRecord:
    """Read the folder of a run. Raises UserError if it is not the folder of a run."""
    folder = RunFolder(path)
    if not folder.config.is_file() and not folder.metrics.is_file():
        raise UserError(
            f"{path} is no run: it holds neither config.json nor metrics.jsonl; give a folder that training wrote, "
            f"such as runs/demo-001."
        )
    record = RunRecord(path=path)
    remark = record.remarks.append
    record.settings = _read_object(folder.config, remark)
    if record.settings:
        unknown = sorted(with_current_names(record.settings, RENAMED_SETTINGS).keys() - group_of_settings().keys())
        try:
            record.config = with_settings(TrainConfig(), record.settings, folder.config.name)
            record.config.validate()
        except UserError as error:
            record.config = None
            remark(
                f"config.json has settings that this version does not know ({', '.join(unknown)}), probably "
                f"written by a newer one; what depends on them is omitted."
                if unknown
                else f"{error} What depends on the settings is omitted."
            )
    starts = list(_read_lines(folder.starts, remark))
    record.starts, record.environment = len(starts), starts[-1] if starts else {}
    for values in _read_lines(folder.metrics, remark, needed="step"):
        # Steps that a killed process logged after its last checkpoint are repeated by the resumed run.
        while record.metrics and record.metrics[-1]["step"] >= values["step"]:
            record.metrics.pop()
        record.metrics.append(with_current_names(values, RENAMED_METRICS))
    if folder.results.exists():
        results = _read_object(folder.results, remark)
        record.results = with_current_names(
            {name: value for name, value in results.items() if _is_number(value)}, RENAMED_RESULTS
        )
    else:
        remark("There is no results.json: the run is not finished.")
    checkpoints = list(checkpoint.checkpoints(path).values())
    record.weights = folder.model if folder.model.is_file() else checkpoints[-1] if checkpoints else None
    return record


def _read_object(file: Path, remark: Callable[[str], None]) -> dict[str, Any]:
    if not file.exists():
        remark(f"There is no {file.name}.")
        return {}
    try:
        return read_object(file, "what depends on it is omitted", name=file.name)
    except UserError as error:
        remark(str(error))
        return {}


def _read_lines(file: Path, remark: Callable[[str], None], needed: str | None = None) -> Iterator[dict[str, Any]]:
    """The objects in a JSON Lines file; with ``needed``, only those of numbers of which that one is positive."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError as error:
        remark(f"{file.name} cannot be read ({error.strerror}).")
        return
    if not lines:
        remark(f"{file.name} is empty.")
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
        remark(f"{damaged} of {len(lines)} lines of {file.name} are damaged and ignored.")


def _are_metrics(values: dict[str, Any], needed: str) -> bool:
    return all(map(_is_number, values.values())) and values.get(needed, 0) >= 1


def _is_number(value: Any) -> bool:
    """Whether training could have written the value; integers that a float cannot represent are excluded."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > 2**53
