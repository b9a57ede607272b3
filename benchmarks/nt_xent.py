"""Peak memory and time of NT-Xent, forwards and backwards: in chunks, as trained, and with the whole similarity matrix.

    python -m benchmarks.nt_xent

Each version at each size runs in a process of its own, so that its memory can be told from others'. Printed are the
median and the range over the repeats.
"""

from __future__ import annotations

import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn import functional as F

from benchmarks.throughput import processor
from stec.console import Console
from stec.objective import nt_xent
from stec.run_folder import write_json
from tests.plain import plain_nt_xent

COPIES = 4
"""Of the similarity matrix, so many are alive at once in the plain version."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure NT-Xent."""

    views: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Numbers of views, two per image."""
    feat_dim: int = 128
    """Features of a view."""
    repeats: int = 3
    """Times that each is measured."""
    memory_gib: float = 16.0
    """The plain version is not tried where it would need more."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""
    json: Path | None = None
    """Also write the figures here."""


def measure(version: str, views: int, options: Options, answers: Any) -> None:
    """Put (seconds of each repeat, peak bytes above what was there before) into ``answers``."""
    function: Callable[..., Any] = {"chunked": nt_xent, "plain": plain_nt_xent}[version]
    device = torch.device(options.device)
    z_i, z_j = F.normalize(torch.randn(2, views // 2, options.feat_dim, device=device), dim=-1)
    leaves = z_i.requires_grad_(), z_j.requires_grad_()

    def once() -> float:
        started = time.perf_counter()
        function(*leaves, 0.1)[0].backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def peak_bytes() -> int:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    # What the first call loads is not the loss's.
    nt_xent(*(z[:64] for z in leaves), 0.1)[0].backward()
    before = peak_bytes()
    first = once()
    # Where a call takes long, warming up is no part of it.
    seconds = [first] if first > 20 else []
    seconds += [once() for _ in range(options.repeats - len(seconds))]
    answers.put((seconds, peak_bytes() - before))


def main() -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.nt_xent", use_underscores=True)
    spawn = multiprocessing.get_context("spawn")
    rows, figures = [], []
    for views in options.views:
        for version in ("plain", "chunked"):
            needed = COPIES * 4 * views**2
            if version == "plain" and needed > options.memory_gib * 2**30:
                rows.append([f"{views:,}", version, f"does not fit ({4 * views**2 / 2**30:.0f} GiB a copy)", "", ""])
                continue
            answers = spawn.Queue()
            process = spawn.Process(target=measure, args=(version, views, options, answers))
            process.start()
            seconds, peak = answers.get()
            process.join()
            figures.append({"views": views, "version": version, "seconds": seconds, "peak_bytes": peak})
            spread = f"{min(seconds):.3f}-{max(seconds):.3f}"
            memory = f"{peak / 2**20:,.0f}"
            rows.append([f"{views:,}", version, memory, f"{statistics.median(seconds):.3f}", spread])

    name = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    console = Console(enabled=True)
    console.say(f"{name}, {torch.get_num_threads()} thread(s); {versions}")
    console.say(f"python -m benchmarks.nt_xent {' '.join(sys.argv[1:])}".rstrip())
    console.table(
        f"NT-Xent, forwards and backwards, {options.feat_dim} features",
        ["views", "", "peak memory, MiB", "median s", "range s"],
        rows,
    )
    if options.json is not None:
        write_json(options.json, {"command": sys.argv, "device": name, "versions": versions, "figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
