"""Files that are whole at any moment, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from stec.errors import UserError


def write_whole(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write ``content``, or have it write to a file, under a temporary name beside ``path``, flush, then rename.

    A crash or a power cut at any moment leaves the old file or the new one. Raises UserError where the disk refuses;
    the old file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_names(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> UserError:
    """What the user reads where a file cannot be written."""
    return UserError(f"{path} cannot be written ({error.strerror}); free the disk or mend the folder.")


def remove_leftovers(folder: Path) -> None:
    """Drop what ``write_whole`` left behind where it was killed. Nothing else may be writing to the folder."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def _flush_names(folder: Path) -> None:
    """A renamed file is there after a power cut only once its folder is on the disk, too."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
