"""Checkpoints: written atomically, and verified by a checksum when they are read."""

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
"""The keys of a checkpoint, besides ``format_version``.

``step`` is the position in training: epoch, position in the epoch, learning rate and all random draws of the pipeline
are functions of it and of the settings in ``identity``, which include the seed.
"""
MARK = b"stec sha256:"
"""A checkpoint is the output of ``torch.save``, this mark, and the 32 bytes of the SHA-256 of that output.

``torch.load`` ignores what follows the archive.
"""


class DamagedCheckpoint(Exception):
    """The file cannot be read, or is not as it was written; the message is the reason."""


class _Hashing:
    """A sequential file for ``torch.save`` that computes the SHA-256 of what is written."""

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
    """The checkpoints in the run folder by step, oldest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)\.pt", path.name), path) for path in run_folder.glob("checkpoint-*.pt"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def save(run_folder: Path, step: int, state: dict[str, Any], *, keep: int, keep_every_steps: int | None) -> None:
    """Write the checkpoint of ``step``, then delete older ones, except the ``keep`` newest and those of multiples of
    ``keep_every_steps``.

    Raises UserError if it cannot be written; older checkpoints are then kept.
    """

    def write(file: IO[bytes]) -> None:
        hashing = _Hashing(file)
        try:
            torch.save({"format_version": FORMAT_VERSION, "step": step, **state}, hashing)  # type: ignore[arg-type]
        except RuntimeError:
            # PyTorch reports that the file ended early, but not why.
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
    """Read a checkpoint onto the CPU, without executing code from the file.

    Raises DamagedCheckpoint if it is not bit for bit as it was written, and UserError if its format is another one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"it cannot be read: {error.strerror}") from error
    body, ending = content[: -len(MARK) - 32], content[-len(MARK) - 32 :]
    if not ending.startswith(MARK):
        raise DamagedCheckpoint("its end is missing")
    if hashlib.sha256(body).digest() != ending[len(MARK) :]:
        raise DamagedCheckpoint("its checksum does not match its content")
    state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION or KEYS - state.keys():
        raise UserError(f"The checkpoint {path} is not of format {FORMAT_VERSION}; use the version that wrote it.")
    return checkpoint_with_current_names(state)


def load_newest(run_folder: Path) -> tuple[dict[str, Any] | None, dict[Path, str]]:
    """The newest undamaged checkpoint, or None if there is no checkpoint; and the newer, damaged ones with the reasons.

    Raises UserError if all checkpoints are damaged.
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
            f"All checkpoints in {run_folder} are damaged ({listed}); restore one from a copy, or delete them to start "
            f"from the beginning."
        )
    return None, damaged
