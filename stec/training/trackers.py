"""Experiment trackers through Accelerate: what each keeps where, and what is done when one fails."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import queue
import shlex
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from pipelines.errors import UserError
from pipelines.files import atomic_write
from stec.runs.run_folder import RunFolder

PROJECT = "stec"
TRACKIO_ELSEWHERE = ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Environment variables by which a user has trackio keep its log outside the run's folder."""


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError for the first tracker whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            with_us = name in ("tensorboard", "trackio")
            remedy = "pip install -e '.[tracking]'" if with_us else f"pip install {name}"
            raise UserError(f"--log_with {name} needs its package; {remedy}, or leave {name} out.")


def start(
    accelerator: Accelerator,
    names: Sequence[str],
    folder: RunFolder,
    settings: Mapping[str, Any],
    *,
    after_step: int,
    say: Callable[[str], None],
) -> None:
    """From now on ``accelerator.log`` reaches the trackers of these names; for the main process only.

    ``settings`` are flat, as ``TrainConfig.to_json`` makes them. Logs that the folder holds already go on after
    ``after_step``. ``say`` is told how to look at a log, and once of each tracker that fails. Raises UserError for one
    that cannot be started.
    """
    accelerator.log_with = [Guarded(name, folder, after_step, say) for name in names]
    try:
        accelerator.init_trackers(PROJECT, config=dict(settings))
    except UserError:
        finish(accelerator)
        raise


def finish(accelerator: Accelerator) -> None:
    """Have all trackers write what they still hold."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()


@contextmanager
def finished(accelerator: Accelerator) -> Iterator[None]:
    """Finish all trackers at the end, unless the user pressed Ctrl-C twice and wants to wait for nothing."""
    try:
        yield
    except KeyboardInterrupt:
        accelerator.trackers.clear()
        raise
    finally:
        finish(accelerator)


class Guarded(GeneralTracker):  # type: ignore[misc]  # Accelerate has no types
    """A tracker of Accelerate's that training neither waits for nor ends with.

    A failure to start raises UserError. Later a thread of its own hands it what is logged; after its first failure
    there it is left alone.
    """

    name = "guarded"
    requires_logging_directory = False

    def __init__(self, name: str, folder: RunFolder, after_step: int, say: Callable[[str], None]) -> None:
        super().__init__()
        self.name, self._folder, self._after_step, self._say = name, folder, after_step, say
        self._works: GeneralTracker | None = None
        self._lines: queue.SimpleQueue[tuple[dict[str, Any], int | None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def tracker(self) -> object:
        return self._works.tracker if self._works is not None else None

    def start(self) -> None:
        with self._at_start():
            made = MAKERS.get(self.name, _other)(self.name, self._folder, self._after_step)
            made.start()
        self._works = made
        self._thread = threading.Thread(target=self._hand_over, daemon=True)
        self._thread.start()
        if self.name in HOW_TO_LOOK:
            self._say(f"Watch by: {HOW_TO_LOOK[self.name](self._folder)}")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert self._works is not None, "start comes first"
        with self._at_start():
            if isinstance(self._works, TensorBoardTracker):
                # Accelerate would put them into a run of their own, beside the curves that belong to them.
                from torch.utils.tensorboard.summary import hparams

                for summary in hparams(values, {}):
                    self._works.writer.file_writer.add_summary(summary)
            else:
                self._works.store_init_configuration(values)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._lines.put((values, step))

    def _hand_over(self) -> None:
        while (line := self._lines.get()) is not None:
            values, step = line
            with self._later():
                if self._works is not None:
                    self._works.log(values, step=step)

    def finish(self) -> None:
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join()
        with self._later(), _quiet(self.name):
            if isinstance(self._works, TrackioTracker):
                import trackio

                trackio.finish()  # Accelerate would leave it to be finished once more when the program ends.
            elif self._works is not None:
                self._works.finish()

    @contextmanager
    def _at_start(self) -> Iterator[None]:
        try:
            with _quiet(self.name):
                yield
        except Exception as error:
            raise UserError(
                f"--log_with {self.name} cannot be started ({_in_a_line(error)}); mend that or leave {self.name} out, "
                f"and start again with --results_path {self._folder.path} --resume auto."
            ) from error

    @contextmanager
    def _later(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._works = None
            self._say(
                f"warning: {self.name} failed ({_in_a_line(error)}) and gets nothing more; "
                f"training goes on, and {self._folder.metrics} has everything."
            )


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _quiet(name: str) -> AbstractContextManager[object]:
    """trackio prints how to look at its own folder, which is not where the log is."""
    return contextlib.redirect_stdout(io.StringIO()) if name == "trackio" else contextlib.nullcontext()


def _tensorboard(name: str, folder: RunFolder, after_step: int) -> GeneralTracker:
    """TensorBoard hides what earlier starts logged from ``purge_step`` on."""
    return TensorBoardTracker(name, folder.path, purge_step=after_step + 1)


def _trackio(name: str, folder: RunFolder, after_step: int) -> GeneralTracker:
    """A database in the run's folder, without the steps that are to come again; or the one that the user names."""
    here = not any(variable in os.environ for variable in TRACKIO_ELSEWHERE)
    if here:
        path = folder.path / name
        path.mkdir(exist_ok=True)
        os.environ["TRACKIO_DIR"] = str(path.resolve())
        database = path / f"{PROJECT}.db"
        if database.exists():
            with contextlib.closing(sqlite3.connect(database)) as connection, connection:
                connection.execute("DELETE FROM metrics WHERE step > ?", (after_step,))
    # Elsewhere, a run of the same name may be another one.
    resume = "allow" if here or after_step else "never"
    return TrackioTracker(PROJECT, name=folder.path.resolve().name, resume=resume, embed=False)


def _wandb(_name: str, folder: RunFolder, _after_step: int) -> GeneralTracker:
    """A run whose id is kept in the folder; wandb itself passes over steps that it has already."""
    kept = folder.path / "wandb" / "run-id"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        atomic_write(kept, uuid.uuid4().hex.encode())
    return WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        dir=str(folder.path),
        name=folder.path.resolve().name,
        id=os.environ.get("WANDB_RUN_ID", kept.read_text()),
        resume="allow",
    )


def _other(name: str, folder: RunFolder, _after_step: int) -> GeneralTracker:
    """As Accelerate starts it: where its log goes is its own matter."""
    kind = LOGGER_TYPE_TO_CLASS[name]
    return kind(PROJECT, folder.path) if kind.requires_logging_directory else kind(PROJECT)


MAKERS: dict[str, Callable[[str, RunFolder, int], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}
HOW_TO_LOOK: dict[str, Callable[[RunFolder], str]] = {
    "tensorboard": lambda folder: f"tensorboard --logdir {shlex.quote(str(folder.path))}",
    "trackio": lambda _: (
        f"TRACKIO_DIR={shlex.quote(os.environ['TRACKIO_DIR'])} trackio show --project {PROJECT}"
        if "TRACKIO_DIR" in os.environ
        else f"trackio show --project {PROJECT}"
    ),
}
