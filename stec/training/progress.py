"""How far a run has come, and how far it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The length of a run."""

    epochs: int
    steps_per_epoch: int
    global_batch_size: int
    """Images per step, over all micro-batches and processes."""

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass(kw_only=True)
class Progress:
    """How far a run has come; checkpoints hold these fields by name."""

    step: int = 0
    """Number of completed steps."""
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    """The part of ``train_seconds`` spent waiting for data."""
    epoch_rows: list[dict[str, float]] = field(default_factory=list)
    """The metrics of each logged step of the current epoch."""
    last_epoch: dict[str, float] = field(default_factory=dict)
    """The means of the metrics over the last complete epoch."""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the fields from a checkpoint, which may hold other keys as well."""
        for name in vars(self):
            setattr(self, name, state[name])
