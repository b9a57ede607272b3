"""Peak memory and time of NT-Xent, forwards and backwards: in chunks, as trained, and with the whole similarity matrix.

    python -m benchmarks.nt_xent

Each version at each size runs in a process of its own, so that its memory is measured alone.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import tyro
from torch.nn import functional as F

from benchmarks import report
from benchmarks.plain import plain_nt_xent
from benchmarks.report import Figures, Output
from pipelines.errors import UserError
from stec.console import Console
from stec.objectives.simclr import nt_xent

VERSIONS: dict[str, Callable[..., Any]] = {"whole matrix": plain_nt_xent, "in chunks": nt_xent}
COPIES = 4
"""Of the similarity matrix, so many are alive at once in the plain version."""


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """Measure NT-Xent."""

    views: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Numbers of views, two per image."""
    feat_dim: int = 128
    """Features of a view."""
    repeats: int = 3
    """Times that each is measured, after one for warming up."""
    memory_gib: float = 16.0
    """The plain version is not tried where it would need more."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""

    def check(self) -> None:
        """Raise UserError for what cannot be measured."""
        report.check(self)
        report.check_positive(self, "views", "feat_dim", "repeats", "memory_gib")
        if any(views % 2 for views in self.views):
            raise UserError(f"--views {' '.join(map(str, self.views))} must be even numbers.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda needs a CUDA GPU and there is none; use cpu.")


def peak_bytes(device: str) -> int:
    """The most memory that this process ever had."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load(device: str, feat_dim: int) -> int:
    """Load what the first call loads, on few views; the peak memory after it."""
    measure("in chunks", 64, device, feat_dim)
    return peak_bytes(device)


def measure(version: str, views: int, device: str, feat_dim: int) -> tuple[float, int]:
    """Seconds of one call forwards and backwards, and the peak memory in bytes."""
    generator = torch.Generator().manual_seed(0)
    z_i, z_j = F.normalize(torch.randn(2, views // 2, feat_dim, generator=generator), dim=-1).to(device)
    leaves = z_i.requires_grad_(), z_j.requires_grad_()
    started = time.perf_counter()
    VERSIONS[version](leaves[0], leaves[1], 0.1)[0].backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, peak_bytes(device)


def benchmark(options: Options) -> None:
    options.check()
    console = Console(enabled=True)
    figures: list[Figures] = []
    remarks: list[str] = []
    with report.processes_apart() as start:
        for views in options.views:
            calls: dict[str, Callable[..., Any]] = {}
            before: dict[str, int] = {}
            peaks: dict[str, int] = {}
            for version in VERSIONS:
                copy_gib = 4 * views**2 / 2**30
                if version == "whole matrix" and COPIES * copy_gib > options.memory_gib:
                    remarks.append(f"{views:,} views, whole matrix: not tried, {COPIES} copies of {copy_gib:.0f} GiB.")
                    continue
                calls[version] = start()
                before[version] = calls[version](load, options.device, options.feat_dim)

            def turn(version: str, calls: dict[str, Any], peaks: dict[str, int], views: int) -> float:
                seconds, peaks[version] = calls[version](measure, version, views, options.device, options.feat_dim)
                return seconds

            contenders = {version: partial(turn, version, calls, peaks, views) for version in calls}
            seconds = report.take_turns(contenders, repeats=options.repeats, console=console)
            figures.append(Figures(title=f"{views:,} views", unit="seconds", turns=seconds))
            memory = {version: [(peaks[version] - before[version]) / 2**20] for version in calls}
            figures.append(Figures(title=f"{views:,} views", unit="MiB above what was there before", turns=memory))
    report.publish(figures, options, console, remarks)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.nt_xent", args=arguments, use_underscores=True)
    return report.run(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
