"""Checkpoints: written whole or not at all, and found again."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from stec.errors import UserError

FORMAT_VERSION = 1
KEYS = frozenset(
    "step model optimizer scaler identity environment global_batch_size train_seconds wait_seconds epoch_rows "
    "last_epoch".split()
)
"""What a checkpoint holds besides its format."""
KEPT = 2
"""How many of the newest checkpoints stay on disk."""


def checkpoint_path(run_folder: Path, step: int) -> Path:
    return run_folder / f"checkpoint-{step:08d}.pt"


def checkpoints(run_folder: Path) -> list[Path]:
    """Complete checkpoints in the run folder, oldest first; files that only look like one are not counted."""
    found = ((re.fullmatch(r"checkpoint-(\d+)\.pt", path.name), path) for path in run_folder.glob("checkpoint-*.pt"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def save(run_folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the checkpoint of ``step`` under a temporary name, flush it to disk, rename it, drop the oldest ones.

    Raises UserError where the disk refuses; the older checkpoints are then untouched.
    """
    path = checkpoint_path(run_folder, step)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format_version": FORMAT_VERSION, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"The checkpoint {path} cannot be written ({error}); free the disk and go on with --resume auto."
        ) from error
    for old in checkpoints(run_folder)[:-KEPT]:
        old.unlink()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without executing anything that is in the file.

    Raises UserError where it is truncated, foreign or of a newer version.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"The checkpoint {path} cannot be read ({error.strerror}).") from error
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(
            f"The checkpoint {path} is damaged or no checkpoint of this program; delete it, "
            f"and --resume auto goes on from the one before."
        ) from error
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        raise UserError(f"The checkpoint {path} is not of format {FORMAT_VERSION}; use the version that wrote it.")
    missing = KEYS - state.keys()
    if missing:
        raise UserError(
            f"The checkpoint {path} lacks {', '.join(sorted(missing))}; delete it, and try --resume auto again."
        )
    return state
