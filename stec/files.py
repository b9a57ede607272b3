"""Files that are whole at any moment, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import shutil
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
        _flush(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def write_folder_whole(path: Path, fill: Callable[[Path], object]) -> None:
    """Have ``fill`` write files to a folder of a temporary name beside ``path``, flush them, then rename it.

    Whatever happens meanwhile, ``path`` is not there or whole. Raises UserError where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by one that was killed
        temporary.mkdir()
        fill(temporary)
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        temporary.rename(path)
        _flush(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unwritable(path: Path, error: OSError) -> UserError:
    """What the user reads where a file cannot be written."""
    return UserError(f"{path} cannot be written ({error.strerror}); free the disk or mend the folder.")


def remove_leftovers(folder: Path) -> None:
    """Drop what ``write_whole`` left behind where it was killed. Nothing else may be writing to the folder."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Bring a file, or a folder's names, to the disk: after a power cut, a renamed file is there only then."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
