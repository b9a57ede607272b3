"""What a step's time goes into: names for its parts, and a profile of some steps."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pipelines.files import atomic_write

PARTS = (
    "wait for data",
    "commands and masks",
    "encoder",
    "heads",
    "NT-Xent",
    "inverse loss",
    "classifier loss",
    "backward",
    "optimizer",
    "logging",
    "agreeing on stops",
    "saving",
)
"""The parts of a step, in their order. What the backward pass of several processes exchanges is within ``backward``."""
EXCHANGES = ("gloo:", "nccl:")
"""How names of collectives begin in a profile."""
WARM_UP_STEPS = 3


def part(name: str) -> contextlib.AbstractContextManager[Any]:
    """While open, time counts for one of ``PARTS``. It costs some microseconds where nobody profiles."""
    assert name in PARTS
    return record_function(name)


class StepProfile:
    """Profiles ``steps`` steps after some for warming up. Call ``after_step`` after each step."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps, self.device = steps, device
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile = profile(activities=activities)
        self._taken = -WARM_UP_STEPS
        self._started_s = self._seconds = 0.0

    def after_step(self) -> bool:
        """Whether the profile is complete by now, which is said once."""
        self._taken += 1
        if self._taken == 0:
            self._profile.start()
            self._started_s = self._now()
        if self._taken != self.steps:
            return False
        self._seconds = self._now() - self._started_s
        self._profile.stop()
        return True

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def write(self, trace: Path, summary: Path) -> None:
        """A trace that https://ui.perfetto.dev opens, gzipped, and the milliseconds as JSON.

        Raises UserError where the disk refuses.
        """
        # PyTorch writes only to a name, and tells nobody where that fails.
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
        """Of a step: each part as the thread that trains sees it, the processes' exchange within them, and all."""
        of_thread = {event.key: event.cpu_time_total / 1000 / self.steps for event in self._profile.key_averages()}
        parts = {name: of_thread.get(name, 0.0) for name in PARTS}
        exchange = sum(ms for key, ms in of_thread.items() if key.startswith(EXCHANGES))
        step = 1000 * self._seconds / self.steps
        return {**parts, "other": step - sum(parts.values()), "exchange, within others": exchange, "step": step}


def table(milliseconds: Mapping[str, float]) -> list[list[str]]:
    """Rows of name, milliseconds and share of a step, parts that take no time left out."""
    step = milliseconds["step"]
    return [[name, f"{ms:,.2f}", f"{ms / step:.1%}"] for name, ms in milliseconds.items() if ms >= 0.005]
