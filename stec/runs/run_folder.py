"""The folder of a run: its files, and which process may write to it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.errors import UserError
from pipelines.files import lock, remove_leftovers, sign, unwritable, write_json, write_text
from stec.config import TrainConfig, rule_on_resume
from stec.runs import checkpoint

DEFAULT_PARENT = Path("runs")
RESULTS = {
    "knn20": "kNN (k = 20) top-1",
    "linear_probing": "linear probing top-1",
    "online_classifier": "online linear classifier top-1",
}
"""The accuracies on the test images in ``results.json`` (before and after training), with their titles."""
INVERSE_RESULTS = {
    "inverse_model_accuracy": "inverse model, accuracy per entry",
    "inverse_model_r2_color": "inverse model, R2 of colors",
    "inverse_model_r2_blur": "inverse model, R2 of the blur's sigma",
    "inverse_model_accuracy_solarize": "inverse model, accuracy of solarization",
    "inverse_model_accuracy_gray": "inverse model, accuracy of gray",
}
"""The metrics of the inverse model in the last epoch, in ``results.json`` as well, with their titles."""
WRITING_METRICS = threading.Lock()
"""Training appends lines while a background thread flushes them to disk."""


class RunFolder:
    """The files of one training run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.starts = path / "starts.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.bad_images = path / "bad-images.tsv"
        self.results = path / "results.json"
        self.model = path / "model.safetensors"
        self.encoder = path / "encoder.safetensors"
        self.profile = path / "profile.json"
        self.trace = path / "trace.json.gz"
        self.lock = path / ".lock"
        self._unwritten = b""

    def written(self) -> list[Path]:
        """The existing files that training wrote; empty if the folder is not that of a run."""
        if not any(file.exists() for file in (self.starts, self.metrics)) and not checkpoint.checkpoints(self.path):
            return []
        named = (self.config, self.starts, self.metrics, self.bad_images, self.results, self.model, self.encoder,
                 self.profile, self.trace)  # fmt: skip
        return [*filter(Path.exists, named), *checkpoint.checkpoints(self.path).values()]

    def last_step(self) -> int:
        """The last step in ``metrics.jsonl``, or 0."""
        return max((values["step"] for _, values in self._lines()), default=0)

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append a line; if it cannot be written, it is kept for the next call or ``flush_metrics``."""
        with contextlib.suppress(OSError):
            self._write_metrics(json.dumps(values).encode() + b"\n")

    def flush_metrics(self) -> None:
        """Flush all lines to disk; thread-safe. Raises UserError if they cannot be written."""
        try:
            self._write_metrics()
            if self.metrics.exists():
                with self.metrics.open("rb") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.metrics, error) from error

    def _write_metrics(self, line: bytes = b"") -> None:
        with WRITING_METRICS:
            self._unwritten += line
            if not self._unwritten:
                return
            with self.metrics.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    written = file.write(self._unwritten)
                    if written < len(self._unwritten):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(before)  # no partial lines
                    raise
            self._unwritten = b""

    def forget_metrics_after(self, step: int) -> None:
        """Delete the lines of steps that a resumed run repeats, and damaged lines."""
        if self.metrics.exists():
            write_text(self.metrics, "".join(line + "\n" for line, values in self._lines() if values["step"] <= step))

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The undamaged lines of ``metrics.jsonl``, each with its values."""
        if not self.metrics.exists():
            return
        for line in self.metrics.read_text(errors="replace").splitlines():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                yield line, values

    def add_start(self, values: Mapping[str, Any]) -> None:
        """Append a line to ``starts.jsonl``."""
        before = self.starts.read_text(errors="replace") if self.starts.exists() else ""
        write_text(self.starts, before + json.dumps(values) + "\n")


class Opened(NamedTuple):
    """A run folder that this process has locked."""

    folder: RunFolder
    resumed: dict[str, Any] | None
    """The checkpoint to resume from, if any."""
    notes: list[str]
    """Notes for the user, one sentence each."""
    held: int | None
    """The descriptor that holds the lock, on the process that opened the folder; None if its file system has none."""


def open_run_folder(config: TrainConfig, environment: Mapping[str, Any]) -> Opened:
    """Find or create the folder, lock it until ``held`` is closed, and load the checkpoint to resume from.

    Raises UserError, leaving the folder unchanged, if another process has locked it, it holds a run that ``config``
    does not resume or a run with other settings, all its checkpoints are damaged, it holds results but no checkpoint,
    or it cannot be written.
    """
    held = None
    try:
        path = config.run.results_path or _default_path(config)
        path.mkdir(parents=True, exist_ok=True)
        folder = RunFolder(path)
        held = lock(
            folder.lock,
            lambda holder: (
                f"The run in {path} is being trained by {holder}; wait for it or stop it, or choose another folder "
                f"with --results_path."
            ),
        )
        if config.run.resume == "no" and (folder.config.exists() or folder.model.exists() or folder.written()):
            raise UserError(
                f"{path} already holds a run; resume it by --resume auto, or choose another folder with --results_path."
            )
        resumed, damaged = checkpoint.load_newest(path)
        if resumed is None:
            _check_results(folder)
        changes = _changes(config, environment, resumed, path) if resumed is not None else []

        # From here on, the folder is modified.
        notes = []
        if held is None:
            notes.append(f"The file system of {path} has no locks; make sure that no other run writes there.")
        else:
            sign(held)
        remove_leftovers(path)
        for file, what in damaged.items():
            renamed = file.replace(file.with_name(f"{file.name}.damaged"))
            notes.append(f"{file.name} is damaged ({what}); renamed to {renamed.name}, and the one before it is used.")
        notes += [f"Changed, as --allow_changes 1 allows: {change}." for change in changes]
        step = resumed["step"] if resumed is not None else 0
        if resumed is None and folder.last_step():
            notes.append(
                f"{path} holds metrics up to step {folder.last_step()}, but no checkpoint; training starts from the "
                f"beginning."
            )
        folder.forget_metrics_after(step)
        # The permission is for this start only.
        write_json(folder.config, {**config.to_json(), "allow_changes": 0})
        folder.add_start({"after_step": step, **environment, "notes": notes})
    except (OSError, UserError) as error:
        if held is not None:
            os.close(held)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"The run folder {config.run.results_path or DEFAULT_PARENT} cannot be written ({error.strerror}); "
            f"choose another one with --results_path."
        ) from error
    return Opened(folder, resumed, notes, held)


def _default_path(config: TrainConfig) -> Path:
    """The newest numbered folder of the data set to resume, otherwise a new one with the next number."""
    numbers = (
        path.name.removeprefix(f"{config.data.dataset}-") for path in DEFAULT_PARENT.glob(f"{config.data.dataset}-*")
    )
    newest = max((int(number) for number in numbers if number.isdecimal()), default=0)
    if config.run.resume == "auto" and newest:
        return DEFAULT_PARENT / f"{config.data.dataset}-{newest:03d}"
    DEFAULT_PARENT.mkdir(exist_ok=True)
    while True:
        newest += 1
        path = DEFAULT_PARENT / f"{config.data.dataset}-{newest:03d}"
        try:
            path.mkdir()
        except FileExistsError:  # another run has just created it
            continue
        return path


def _check_results(folder: RunFolder) -> None:
    """Raise UserError if training from the beginning would replace the results of a finished run."""
    results = [file.name for file in (folder.model, folder.encoder, folder.results) if file.exists()]
    if results:
        names = ", ".join(results)
        raise UserError(
            f"{folder.path} holds {names} of a finished run, but no checkpoint to resume from; restore its checkpoint, "
            f"move {names} elsewhere, or choose another folder with --results_path."
        )


def _changes(config: TrainConfig, environment: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> list[str]:
    """The differences from when the checkpoint was written: settings, values of ``auto``, and the images.

    Raises UserError if they are not allowed.
    """
    # Batch size per process and number of processes may change if their product does not.
    processes = environment["processes"]
    global_batch_size = config.optimization.accumulate * config.optimization.batch_size * processes
    if state["global_batch_size"] != global_batch_size:
        raise UserError(
            f"The run in {path} has a global batch of {state['global_batch_size']}, but --batch_size "
            f"{config.optimization.batch_size} on {processes} process(es) makes {global_batch_size}; "
            f"choose the two so that their product stays the same."
        )
    # A setting that did not exist when the checkpoint was written had the effect of its default.
    ours, saved = config.identity(), {**TrainConfig().identity(), **state["identity"]}
    differing = [k for k in sorted(ours.keys() | saved.keys()) if k != "batch_size" and ours.get(k) != saved.get(k)]
    changes = [f"--{k} was {saved.get(k)} and is now {ours.get(k)}" for k in differing]
    for flag, name in (("mixed_precision", "precision"), ("backend", "backend")):
        before, now = state["environment"].get(name), environment[name]
        if before != now and flag not in differing:
            changes.append(f"--{flag} was resolved to {before} and is now resolved to {now}")
    if not {"dataset", "limit_train", "exif_orientation"} & {*differing}:
        images_before, images_now = state["environment"].get("training_images"), environment["training_images"]
        data_before, data_now = state["environment"].get("data_fingerprint"), environment["data_fingerprint"]
        if images_before != images_now:
            changes.append(f"--data_dir held {images_before} training images and now holds {images_now}")
        elif data_before not in (None, data_now):
            changes.append("--data_dir held other training images (names, sizes or labels differ)")
    fixed = [f"--{k}" for k in differing if rule_on_resume().get(k) == "never"]
    if fixed:
        raise UserError(
            f"The run in {path} was started differently: {', '.join(changes)}; even --allow_changes 1 does not allow "
            f"that of {', '.join(fixed)}, so resume with its settings by --config {path / 'config.json'}, or choose "
            f"another folder with --results_path."
        )
    if changes and not config.run.allow_changes:
        raise UserError(
            f"The run in {path} was started differently: {', '.join(changes)}; resume with its settings by "
            f"--config {path / 'config.json'}, accept the changes with --allow_changes 1, or choose another folder "
            f"with --results_path."
        )
    return changes
