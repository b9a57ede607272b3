"""Checkpoints: written whole or not at all, and checked before they are used."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import IO, Any

import torch

from pipelines.errors import UserError
from pipelines.files import atomic_write, unwritable
from stec.compatibility import checkpoint_with_current_names

FORMAT_VERSION = 2
KEYS = frozenset(
    "step model optimizer scaler rng identity environment global_batch_size train_seconds wait_seconds epoch_rows "
    "last_epoch".split()
)
"""What a checkpoint holds besides its format.

``step`` is the position in training: epoch, position in the epoch, learning rate and every random draw of the pipeline
follow from it and from the settings in ``identity``, the seed among them.
"""
MARK = b"stec sha256:"
"""A checkpoint is what ``torch.save`` writes, then this mark, then the 32 bytes of the SHA-256 of what came before.

``torch.load`` does not mind the ending.
"""


class DamagedCheckpoint(Exception):
    """The file cannot be read, or is not what was written; the message says which."""


class _Hashing:
    """What ``torch.save`` writes to, from the beginning to the end: nothing is held in memory or read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def checkpoint_path(run_folder: Path, step: int) -> Path:
    return run_folder / f"checkpoint-{step:08d}.pt"


def checkpoints(run_folder: Path) -> dict[int, Path]:
    """The checkpoints in the run folder by step, oldest first; files that only look like one are not counted."""
    found = ((re.fullmatch(r"checkpoint-(\d+)\.pt", path.name), path) for path in run_folder.glob("checkpoint-*.pt"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def save(run_folder: Path, step: int, state: dict[str, Any], *, keep: int, keep_every_steps: int | None) -> None:
    """Write the checkpoint of ``step``, then drop the older ones but the ``keep`` newest and, where
    ``keep_every_steps`` is given, those of its multiples.

    Raises UserError where the disk refuses; the older checkpoints are then untouched.
    """

    def write(file: IO[bytes]) -> None:
        hashing = _Hashing(file)
        try:
            torch.save({"format_version": FORMAT_VERSION, "step": step, **state}, hashing)  # type: ignore[arg-type]
        except RuntimeError:
            # PyTorch tells of a file that ended early, not of why.
            if hashing.error is not None:
                raise hashing.error from None
            raise
        file.write(MARK + hashing.sha256.digest())

    atomic_write(checkpoint_path(run_folder, step), write)
    for old, path in list(checkpoints(run_folder).items())[:-keep]:
        if keep_every_steps is None or old % keep_every_steps != 0:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise unwritable(path, error) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without executing anything that is in the file.

    Raises DamagedCheckpoint where it is not, to the bit, what was written, and UserError where another version of this
    program wrote it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"it cannot be read: {error.strerror}") from error
    body, ending = content[: -len(MARK) - 32], content[-len(MARK) - 32 :]
    if not ending.startswith(MARK):
        raise DamagedCheckpoint("its end is missing")
    if hashlib.sha256(body).digest() != ending[len(MARK) :]:
        raise DamagedCheckpoint("its checksum does not fit its content")
    state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION or KEYS - state.keys():
        raise UserError(f"The checkpoint {path} is not of format {FORMAT_VERSION}; use the version that wrote it.")
    return checkpoint_with_current_names(state)


def load_newest(run_folder: Path) -> tuple[dict[str, Any] | None, dict[Path, str]]:
    """The newest checkpoint that is undamaged, None where there is none at all; and the newer ones, each with what is
    wrong with it.

    Raises UserError where all of them are damaged.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(run_folder).values()):
        try:
            return load(path), damaged
        except DamagedCheckpoint as damage:
            damaged[path] = str(damage)
    if damaged:
        listed = "; ".join(f"{path.name}: {what}" for path, what in damaged.items())
        raise UserError(
            f"No checkpoint in {run_folder} is undamaged ({listed}); bring one back from a copy, or delete them to "
            f"start from the beginning."
        )
    return None, damaged
