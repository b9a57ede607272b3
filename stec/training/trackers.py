"""Experiment trackers through Accelerate."""

from __future__ import annotations

import importlib.util
import os
import shlex
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from pipelines.errors import UserError
from pipelines.files import atomic_write
from stec.runs.run_folder import RunFolder

PROJECT = "stec"

Report = Callable[[str], None]


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError for the first tracker whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            remedy = "pip install -e '.[tracking]'" if name in ("tensorboard", "trackio") else f"pip install {name}"
            raise UserError(f"--log_with {name} needs its package; {remedy}, or leave {name} out.")


def start(
    accelerator: Accelerator,
    names: Sequence[str],
    folder: RunFolder,
    settings: Mapping[str, Any],
    *,
    after_step: int,
    report: Report,
) -> None:
    """Start the trackers with these names, on the main process only.

    ``settings`` are those of ``TrainConfig.to_json``; ``after_step`` is the step from which the run resumes, or 0.
    Raises UserError if a tracker cannot be started.
    """
    for name in names:
        try:
            tracker = _make(name, folder, after_step)
            tracker.start()
            # Not all of them store lists.
            values = {name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in settings.items()}
            tracker.store_init_configuration(values)
        except Exception as error:
            finish(accelerator, report)
            raise UserError(
                f"--log_with {name} cannot be started ({_in_a_line(error)}); fix that or leave {name} out, and start "
                f"again with --results_path {folder.path} --resume auto."
            ) from error
        accelerator.trackers.append(tracker)
        if name == "tensorboard":
            report(f"Watch by: tensorboard --logdir {shlex.quote(str(folder.path))}")


def _make(name: str, folder: RunFolder, after_step: int) -> GeneralTracker:
    """Accelerate's tracker, set to continue a resumed run's log if it can."""
    run_name = folder.path.resolve().name
    if name == "tensorboard":
        return TensorBoardTracker(name, folder.path, purge_step=after_step + 1)
    if name == "trackio":
        return TrackioTracker(PROJECT, name=run_name, resume="allow" if after_step else "never")
    if name == "wandb":
        run_id = folder.path / name / "run-id"
        if not run_id.exists():
            run_id.parent.mkdir(exist_ok=True)
            atomic_write(run_id, uuid.uuid4().hex.encode())
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return WandBTracker(project, dir=str(folder.path), name=run_name, id=run_id.read_text(), resume="allow")
    kind = LOGGER_TYPE_TO_CLASS[name]
    return kind(PROJECT, folder.path) if kind.requires_logging_directory else kind(PROJECT)


def log(accelerator: Accelerator, values: Mapping[str, float], *, step: int, report: Report) -> None:
    """Send values to all trackers; one that fails gets no more, and ``report`` gets a warning."""
    for tracker in list(accelerator.trackers):
        try:
            tracker.log(dict(values), step=step)
        except Exception as error:
            accelerator.trackers.remove(tracker)
            report(f"warning: {tracker.name} failed ({_in_a_line(error)}) and gets no more metrics; training goes on.")


def finish(accelerator: Accelerator, report: Report) -> None:
    """Have all trackers write the rest of their logs."""
    while accelerator.trackers:
        tracker = accelerator.trackers.pop()
        try:
            tracker.finish()
        except Exception as error:
            report(f"warning: {tracker.name} failed ({_in_a_line(error)}); its log may be incomplete.")


@contextmanager
def finished(accelerator: Accelerator, report: Report) -> Iterator[None]:
    """Finish all trackers at the end, except after a KeyboardInterrupt, by which the user refuses to wait."""
    try:
        yield
    except KeyboardInterrupt:
        accelerator.trackers.clear()
        raise
    finally:
        finish(accelerator, report)


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
