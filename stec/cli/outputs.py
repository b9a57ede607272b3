"""What the commands share about the files that they write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelines.datasets.urls import RemoteFolder
from pipelines.errors import UserError
from pipelines.files import atomic_write


def check_output(
    path: Path,
    flag: str = "",
    *,
    suffixes: Sequence[str] = (),
    inputs: Sequence[Path | RemoteFolder | None] = (),
    may_exist: bool = True,
) -> None:
    """Raise UserError if ``path`` (the value of ``flag``) cannot be written or would overwrite an input.

    ``suffixes`` are the allowed ones, if not all. ``inputs`` are files, and folders with all that they contain; of a
    run's folder, only the files that training wrote.
    """
    name = f"{flag} {path}".lstrip()
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{name} must end in {' or '.join(suffixes)}.")
    if not may_exist and os.path.lexists(path):  # also a broken link
        raise UserError(f"{name} already exists; choose another path, or remove it.")
    # The functions of os.path do not raise if a name is too long; writing does.
    if os.path.isdir(path) or not os.path.isdir(path.parent):  # noqa: PTH112
        raise UserError(f"{name} cannot be written; give a path in an existing folder.")
    if not os.path.exists(path):  # noqa: PTH110
        return
    from stec.runs.run_folder import RunFolder

    for source in inputs:
        if not isinstance(source, Path) or not source.exists():
            continue
        inside = source.is_dir() and path.resolve().is_relative_to(source.resolve())
        if path.samefile(source) or (inside and not RunFolder(source).written()):
            raise UserError(f"{name} would overwrite a file of {source}; choose another file.")
    if path.name in {file.name for file in RunFolder(path.parent).written()}:
        raise UserError(f"{name} would overwrite a file of a run; choose another file.")


def write_bad_list(file: Path, bad: Iterable[tuple[str, str]]) -> None:
    """Write names of bad images with the reasons, a line with name, tab and reason for each."""
    # A name may hold line breaks; the list has one line per name.
    lines = (f"{name}\t{why}".translate({10: " ", 13: " "}) + "\n" for name, why in bad)
    atomic_write(file, "".join(lines).encode(errors="surrogateescape"))
