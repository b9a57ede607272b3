"""What the readers of unpacked archives share: finding the folder, reading a file, checking labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.urls import RemoteFolder
from pipelines.errors import UserError


def find_folder(data_dir: Path | RemoteFolder, *names: str) -> Path:
    """The first of the folders ``names`` that ``data_dir`` holds.

    Raises UserError if there is none, with the right --data_dir if it is one level up or down.
    """
    assert isinstance(data_dir, Path), "no data set in archives is remote"
    for name in names:
        if (data_dir / name).is_dir():
            return data_dir / name
    candidates = [data_dir.resolve().parent] if data_dir.resolve().name in names else []
    if data_dir.is_dir():
        candidates += [path.parent for name in names for path in sorted(data_dir.glob(f"*/{name}"))]
    if candidates:
        raise UserError(
            f"--data_dir {data_dir} does not hold {names[0]}, but {candidates[0]} does; use --data_dir {candidates[0]}."
        )
    missing = f"neither {' nor '.join(names)}" if len(names) > 1 else f"no {names[0]}"
    raise UserError(
        f"--data_dir {data_dir} holds {missing}; unpack the data set's archive there, name the folder that contains "
        f"it, or fetch it by --download 1."
    )


def read_bytes(file: Path) -> bytes:
    """The content of a file. Raises UserError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); unpack the data set's archive again.") from error


def check_labels(labels: NDArray[np.int64], classes: int, file: Path, *, first: int = 0) -> None:
    """Raise UserError if a label is not in 0 to ``classes`` - 1; ``first`` is the smallest label in the file."""
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        n = int(np.argmax(wrong))
        raise UserError(
            f"{file} gives image {n} the label {labels[n] + first}, but labels are {first} to {classes - 1 + first}; "
            f"unpack the data set's archive again."
        )
