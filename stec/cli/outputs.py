"""Where commands may write their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import UserError


def check_place(path: Path, flag: str = "", *, inputs: Sequence[Path | None] = ()) -> None:
    """Raise UserError if no file can be written to ``path`` (the value of ``flag``), or it would overwrite an input.

    ``inputs`` are files, and folders with all that they contain; of a run's folder, only the files that training wrote.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{flag} {path} cannot be written; name a file in an existing folder.".lstrip())
    if not path.exists():
        return
    from stec.runs.run_folder import RunFolder

    for source in inputs:
        if source is None or not source.exists():
            continue
        inside = source.is_dir() and path.resolve().is_relative_to(source.resolve())
        if path.samefile(source) or (inside and not RunFolder(source).written()):
            raise UserError(f"{flag} {path} would overwrite a file of {source}; name another file.".lstrip())
    if path.name in {file.name for file in RunFolder(path.parent).written()}:
        raise UserError(f"{flag} {path} would overwrite a file of a run; name another file.".lstrip())
