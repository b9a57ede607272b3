"""The parts of a training step, and a profile of how much time they take."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import time
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, record_function

from pipelines.errors import UserError
from pipelines.files import atomic_write

PARTS = (
    "wait for data",
    "commands and masks",
    "encoder",
    "heads",
    "target network",
    "base objective",
    "inverse loss",
    "classifier loss",
    "backward",
    "optimizer",
    "logging",
    "agreeing on stops",
    "saving",
)
"""The parts of a step, in order. ``backward`` includes the exchange of gradients between processes."""
EXCHANGES = ("gloo:", "nccl:")
"""Prefixes of the names of collectives in a profile."""
WARM_UP_STEPS = 3


def part(name: str) -> contextlib.AbstractContextManager[Any]:
    """While open, time counts for one of ``PARTS``; without a profile this costs a few microseconds."""
    assert name in PARTS
    return record_function(name)


class StepProfile:
    """A profile of ``steps`` steps after ``WARM_UP_STEPS``; call ``after_step`` after each step."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps, self.device = steps, device
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile = profile(activities=activities)
        self._steps_done = -WARM_UP_STEPS
        self._started_s = self._seconds = 0.0

    def after_step(self) -> bool:
        """Return whether this step completed the profile."""
        self._steps_done += 1
        if self._steps_done == 0:
            self._profile.start()
            self._started_s = self._now()
        if self._steps_done != self.steps:
            return False
        self._seconds = self._now() - self._started_s
        self._profile.stop()
        return True

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def write(self, trace: Path, summary: Path) -> None:
        """Write a gzipped trace for https://ui.perfetto.dev, and the milliseconds as JSON.

        Raises UserError if a file cannot be written.
        """
        # PyTorch writes only to a path, and does not report errors.
        plain = trace.with_name(".profile.json.tmp")

        def compress(file: IO[bytes]) -> None:
            self._profile.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(file, "wb", compresslevel=3) as target:
                shutil.copyfileobj(source, target)

        try:
            atomic_write(trace, compress)
        finally:
            plain.unlink(missing_ok=True)
        atomic_write(summary, (json.dumps(self.milliseconds()) + "\n").encode())

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds per step: of each part in the training thread, of the exchange within them, and of the step."""
        by_key = {event.key: event.cpu_time_total / 1000 / self.steps for event in self._profile.key_averages()}
        parts = {name: by_key.get(name, 0.0) for name in PARTS}
        exchange = sum(ms for key, ms in by_key.items() if key.startswith(EXCHANGES))
        step = 1000 * self._seconds / self.steps
        return {**parts, "other": step - sum(parts.values()), "exchange, within others": exchange, "step": step}

    def table(self) -> list[list[str]]:
        """Rows of name, milliseconds and fraction of a step, without parts that take no time."""
        milliseconds = self.milliseconds()
        step = milliseconds["step"]
        return [[name, f"{ms:,.2f}", f"{ms / step:.1%}"] for name, ms in milliseconds.items() if ms >= 0.005]


def start_profile(steps: int, steps_left: int, accelerator: Accelerator) -> StepProfile | None:
    """The profile of ``--profile``; None if that is 0 and on all but the main process.

    Raises UserError if training ends before the profile is complete.
    """
    if steps and steps_left < steps + WARM_UP_STEPS:
        raise UserError(
            f"--profile {steps} needs {steps + WARM_UP_STEPS} steps with its warm-up, but there are only {steps_left}; "
            f"profile fewer or train longer."
        )
    return StepProfile(steps, accelerator.device) if steps and accelerator.is_main_process else None
