"""Runs of ``launch.py`` that a benchmark makes once, each in a process and folder of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import launch
from pipelines.errors import UserError
from pipelines.files import read_object
from stec.config import TrainConfig, with_settings
from stec.runs.run_folder import RunFolder


def require_finished(folder: RunFolder, arguments: Sequence[str]) -> None:
    """Raise UserError if the run in ``folder`` was stopped, or has other settings than these arguments result in."""
    if not folder.results.exists():
        raise UserError(f"The run in {folder.path} was stopped; the same command continues it.")
    remedy = f"remove {folder.path} to make the run again"
    made = with_settings(TrainConfig(), read_object(folder.config, remedy), str(folder.config))
    ours, theirs = _config(arguments).identity(), made.identity()
    differing = [f"--{name} {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if differing:
        raise UserError(
            f"{folder.path} holds a run with {', '.join(differing)}; name another folder by --runs, or remove it."
        )


def _config(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that these flags result in."""
    command = [sys.executable, launch.__file__, *arguments, "--print_config"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return with_settings(TrainConfig(), json.loads(printed), "--print_config")


def run_launch(arguments: Sequence[str], *, log: Path | None = None, cores: Sequence[int] = ()) -> None:
    """Run ``launch.py`` in a separate process. Raises UserError if it fails.

    With ``log`` its output is appended to that file, and with ``cores`` it uses these, by a thread each.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))} if cores else None
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    output = None if log is None else log.open("ab")
    try:
        process = subprocess.Popen(
            [sys.executable, launch.__file__, *arguments], stdout=output, stderr=output, env=environment
        )
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, cores)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # It has received Ctrl-C as well, and saves.
            process.wait()
            raise
    finally:
        if output is not None:
            output.close()
    if code:
        where = "above" if log is None else f"in {log}"
        raise UserError(f"launch.py {shlex.join(arguments)} ended with exit code {code}; its output is {where}.")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are aligned to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
