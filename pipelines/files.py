"""Files and folders written atomically, JSON files, and locks."""

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
    """Write ``content``, or call it with a file to write to, under a temporary name, flush, then rename.

    A crash or a power failure leaves the old file or the new one. Raises UserError if the file cannot be written; the
    old file is then unchanged.
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
    """``atomic_write`` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def atomic_write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Call ``fill`` with a folder of a temporary name to write files to, flush them, then rename the folder.

    ``path`` must not exist, and is complete once it does. Raises UserError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # Left by a process that was killed.
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
    """The JSON object in a file.

    Raises UserError with ``name`` (default: the path) and ``remedy`` if the file holds none.
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
    """Lock a file against other processes until it is closed or this process ends.

    Returns its descriptor, for ``sign``, or None if the file system has no locks. This is a POSIX lock: forked workers
    do not inherit it, and it works between machines over NFS. Raises UserError with the message ``in_use(holder)`` if
    another process holds the lock.
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


def sign(descriptor: int) -> None:
    """Write this process's id and machine into a file that it has locked."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for a file that cannot be written."""
    return UserError(f"{path} cannot be written ({error.strerror}); free disk space or fix the folder.")


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of an ``atomic_write`` that was killed. No other process may write to the folder."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file, or a folder's names, to the disk, so that a renamed file survives a power failure."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
