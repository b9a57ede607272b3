"""Checkpoints during training: what they hold, when they are written, and what happens if that fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply

from pipelines.errors import UserError
from stec.config import TrainConfig
from stec.console import Console
from stec.distributed.processes import on_main_process
from stec.models.model import Model
from stec.runs import checkpoint
from stec.runs.background import Background
from stec.runs.run_folder import RunFolder
from stec.training.progress import Progress, Schedule


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that training changes; its state dict continues training where it stopped."""

    model: Model
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    progress: Progress

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "rng": torch.get_rng_state(),
            **self.progress.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises RuntimeError if the model's parameters are not those of ``state``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        # Nothing in training draws from it (see commands.py); a layer that does will continue as without a stop.
        torch.set_rng_state(state["rng"])
        self.progress.load_state_dict(state)


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Writes checkpoints in a background thread; at its end, it waits for the last one.

    ``request_stop`` is called in that thread if a checkpoint cannot be written and ``--on_save_error`` is stop.
    """

    def __init__(
        self,
        config: TrainConfig,
        schedule: Schedule,
        state: TrainingState,
        *,
        accelerator: Accelerator,
        console: Console,
        folder: RunFolder,
        environment: Mapping[str, Any],
        request_stop: Callable[[], None],
    ) -> None:
        self._run, self._schedule, self._state = config.run, schedule, state
        self._accelerator, self._console, self._folder = accelerator, console, folder
        self._constants = {
            "identity": config.identity(),
            "environment": environment,
            "global_batch_size": schedule.global_batch_size,
        }
        self._background = Background(request_stop if config.run.on_save_error == "stop" else lambda: None)

    def __exit__(self, *exception: Any) -> None:
        self._background.__exit__(*exception)

    def due(self) -> bool:
        step = self._state.progress.step
        epoch, step_in_epoch = divmod(step, self._schedule.steps_per_epoch)
        if step_in_epoch > 0:
            return step_in_epoch % self._run.checkpoint_every_steps == 0
        kept = self._run.keep_every is not None and epoch % self._run.keep_every == 0
        return epoch % self._run.checkpoint_every == 0 or kept or step == self._schedule.total_steps

    def save(self, *, stopping: bool) -> None:
        """Start writing a checkpoint; if ``stopping`` or after the last step, wait until it is complete.

        Call it on all processes. Raises UserError if this or the previous checkpoint cannot be written, unless
        ``--on_save_error`` is continue and the run goes on.
        """
        self._finish()
        step = self._state.progress.step
        if self._accelerator.is_main_process:
            # A copy, because training continues while it is written.
            state = recursively_apply(
                lambda tensor: tensor.detach().to("cpu", copy=True), {**self._state.state_dict(), **self._constants}
            )
            self._background.start(partial(self._write, step, state))
        if stopping or step == self._schedule.total_steps:
            self._finish(stopping=stopping)

    def _write(self, step: int, state: dict[str, Any]) -> None:
        self._folder.flush_metrics()
        keep_every = self._run.keep_every
        checkpoint.save(
            self._folder.path,
            step,
            state,
            keep=self._run.keep_checkpoints,
            keep_every_steps=keep_every * self._schedule.steps_per_epoch if keep_every is not None else None,
        )

    def _finish(self, *, stopping: bool = False) -> None:
        """Wait for the checkpoint that is being written; all processes get its error."""

        def outcome() -> str:
            try:
                self._background.finish()
            except UserError as error:
                if self._run.on_save_error == "continue" and not stopping:
                    return f"warning: {error} Training goes on without this checkpoint."
                raise UserError(
                    f"{error} Training stopped after step {self._state.progress.step}; the earlier checkpoints are "
                    f"complete, so resume by adding --results_path {self._folder.path} --resume auto."
                ) from error
            return ""

        if warning := on_main_process(self._accelerator, outcome):
            self._console.say(warning)
