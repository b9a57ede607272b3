"""The metrics of training: from the device to metrics.jsonl, the trackers and the console."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.errors import UserError
from stec.console import Console
from stec.profiling import part
from stec.runs.run_folder import RunFolder
from stec.training import trackers
from stec.training.progress import Progress, Schedule


class MetricsLog:
    """Keeps the metrics of steps on the device until ``write``, which updates ``progress`` as well."""

    def __init__(
        self,
        schedule: Schedule,
        progress: Progress,
        *,
        log_every: int,
        accelerator: Accelerator,
        console: Console,
        folder: RunFolder,
    ) -> None:
        self._schedule, self._progress, self._log_every = schedule, progress, log_every
        self._accelerator, self._console, self._folder = accelerator, console, folder
        self._names: tuple[str, ...] = ()
        self._unlogged: list[Tensor] = []
        self._learning_rate = 0.0
        self._measured: dict[str, float] = {}
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measure time from here on."""
        self._started, self._wait_seconds = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While open, time counts as waiting for data."""
        started = time.perf_counter()
        with part("wait for data"):
            yield
        self._wait_seconds += _seconds_since(started)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, time does not count as training."""
        started = time.perf_counter()
        yield
        self._started += _seconds_since(started)

    def add_measured(self, measured: Mapping[str, float]) -> None:
        """Add values to the next line that are measured once, not at every step."""
        self._measured.update(measured)

    def add(self, metrics: Mapping[str, Tensor], learning_rate: float) -> None:
        """Add the metrics of a step, scalars on the device; all steps have the same names."""
        self._names = tuple(metrics)
        self._unlogged.append(torch.stack(list(metrics.values())))
        self._learning_rate = learning_rate

    def due(self) -> bool:
        step = self._progress.step
        return step % self._log_every == 0 or step % self._schedule.steps_per_epoch == 0

    def write(self) -> None:
        """Log the mean of the metrics since the last call. The loop's only host sync; call it on all processes.

        Raises UserError if a loss is not finite.
        """
        if not self._unlogged:
            return
        values = self._accelerator.reduce(torch.stack(self._unlogged), "mean").tolist()  # host sync
        self._unlogged.clear()
        rows = [dict(zip(self._names, row, strict=True)) for row in values]
        self._check_finite([row["loss"] for row in rows])
        progress, schedule = self._progress, self._schedule
        seconds = _seconds_since(self._started)
        wait_seconds = min(self._wait_seconds, seconds)
        self.restart_clock()
        progress.train_seconds += seconds
        progress.wait_seconds += wait_seconds
        line: dict[str, float] = {
            "step": progress.step,
            "epoch": (progress.step - 1) // schedule.steps_per_epoch,
            "steps": len(rows),
            **_means(rows),
            **self._measured,
            "learning_rate": self._learning_rate,
            "images_per_second": len(rows) * schedule.global_batch_size / seconds,
            "wait_fraction": wait_seconds / seconds,
        }
        self._measured.clear()
        if self._accelerator.is_main_process:
            self._folder.append_metrics(line)
        self.track({name: value for name, value in line.items() if name != "step"})
        progress.epoch_rows.extend(rows)
        end_of_epoch = progress.step % schedule.steps_per_epoch == 0
        if end_of_epoch:
            progress.last_epoch = _means(progress.epoch_rows)
            progress.epoch_rows.clear()
        self._console.report(
            {**line, **progress.last_epoch} if end_of_epoch else line,
            epochs=schedule.epochs,
            eta_seconds=(schedule.total_steps - progress.step) * progress.train_seconds / progress.step,
            end_of_epoch=end_of_epoch,
        )

    def track(self, values: Mapping[str, float]) -> None:
        """Send values of the current step to the trackers."""
        trackers.log(self._accelerator, values, step=self._progress.step, report=self._console.say)

    def _check_finite(self, losses: Sequence[float]) -> None:
        finite = np.isfinite(losses)
        if finite.all():
            return
        bad = int(np.argmin(finite))
        step, batch = self._progress.step - len(losses) + bad, self._schedule.global_batch_size
        epoch, step_in_epoch = divmod(step, self._schedule.steps_per_epoch)
        raise UserError(
            f"The loss became {losses[bad]} at step {step + 1} (epoch {epoch + 1}, positions {step_in_epoch * batch} "
            f"to {(step_in_epoch + 1) * batch - 1}), which no checkpoint includes; lower --learning_rate or use "
            f"--mixed_precision no, and resume by --results_path {self._folder.path} --resume auto or start again."
        )


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over steps."""
    # Rows from a checkpoint of 0.1.0 may hold metrics of heads that the model does not have.
    names = list(rows[-1])
    return dict(zip(names, np.mean([[row[name] for name in names] for row in rows], axis=0).tolist(), strict=True))


def _seconds_since(start: float) -> float:
    """Always positive, even if the clock jumps, as rates are divided by it."""
    return max(time.perf_counter() - start, 1e-6)
