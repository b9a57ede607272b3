"""Files that are whole at any moment, whatever happens while they are written, JSON objects in them, and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from pipelines.errors import UserError


def atomic_write(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
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


def write_text(path: Path, text: str) -> None:
    """``atomic_write`` of text."""
    atomic_write(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """``atomic_write`` of JSON that people read, too."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def atomic_write_folder(path: Path, fill: Callable[[Path], object]) -> None:
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


def read_object(path: Path, remedy: str, *, name: str | None = None) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where there is none.

    Its sentence calls the file by ``name``, or else by its path, and ends with the remedy.
    """
    name = name or str(path)
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); {remedy}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON ({error}); {remedy}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} holds no JSON object; {remedy}.")
    return content


def lock(path: Path, in_use: Callable[[str], str]) -> int | None:
    """Keep other processes out of what a file stands for, until it is closed or this process ends, however it dies.

    Returns the open file, for ``sign``, or None where the file system has no locks. A POSIX lock belongs to the
    process: forked workers do not inherit it, and over NFS it holds between machines. Raises UserError, with the
    sentence that ``in_use`` makes of the holder's name, where another process has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        raise UserError(in_use(holder)) from error
    return descriptor


def sign(held: int) -> None:
    """Write into a locked file whose it is: this process's."""
    os.ftruncate(held, 0)
    os.pwrite(held, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def unwritable(path: Path, error: OSError) -> UserError:
    """What the user reads where a file cannot be written."""
    return UserError(f"{path} cannot be written ({error.strerror}); free the disk or mend the folder.")


def remove_leftovers(folder: Path) -> None:
    """Drop what ``atomic_write`` left behind where it was killed. Nothing else may be writing to the folder."""
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
