"""What the launcher (Accelerate, torchrun or SLURM) passed to this process, and what happens when the launcher exits.

This module does not import PyTorch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from pipelines.cpus import available_cpus
from pipelines.errors import UserError

REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that each of several processes needs to find the others."""
MINIMA = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
"""The numeric ones, each with its smallest value."""
PRECISIONS = ("no", "fp16", "bf16")
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun")
"""Scripts that start processes; started as modules, their names begin with ``LAUNCHER_MODULES``."""
LAUNCHER_MODULES = ("accelerate.commands.", "torch.distributed.")
PR_SET_PDEATHSIG = 1


def is_main_process() -> bool:
    """Whether this is the process that prints; for use before Accelerate is imported."""
    return os.environ.get("RANK", "0") in ("0", "")


def cpus_of_process() -> int:
    """The CPUs of this machine that may be used, divided by its number of processes; at least 1."""
    return max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise UserError if the variables that identify one of several processes are incomplete or invalid."""
    values = {name: environment[name] for name in (*REQUIRED, *MINIMA) if name in environment}
    for name, smallest in MINIMA.items():
        value = values.get(name)
        if value is not None and not (value.isascii() and value.isdigit() and int(value) >= smallest):
            raise UserError(
                f"The environment variable {name} is '{value}', but must be a number of {smallest} or more; unset it, "
                f"or start several processes with accelerate launch.",
                local=True,
            )
    alone = values.get("WORLD_SIZE") == "1" and values.get("RANK", "0") == "0" and "LOCAL_RANK" not in values
    if alone or not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & values.keys():
        return
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        present = ", ".join(name for name in REQUIRED if name in values)
        raise UserError(
            f"The environment sets {present}, but not {', '.join(missing)}, which several processes need; unset "
            f"{present} to run one process, or start several with accelerate launch.",
            local=True,
        )
    for index, count in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if count in values and int(values[index]) >= int(values[count]):
            raise UserError(
                f"The environment variable {index} is {values[index]}, but {count} is {values[count]}; unset them, or "
                f"start several processes with accelerate launch.",
                local=True,
            )


def exit_with_launcher() -> None:
    """Make the system send SIGTERM to this process when its launcher exits (Linux only).

    The launcher of a single process does not forward signals. Without a launcher, for example below a shell, this does
    nothing.
    """
    parent = os.getppid()
    if sys.platform != "linux" or not _is_launcher(parent):
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has exited in the meantime
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(process_id: int) -> bool:
    try:
        command = Path(f"/proc/{process_id}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    interpreter, *words = map(os.fsdecode, command[:5])
    return Path(interpreter).name.startswith("python") and any(
        Path(word).name in LAUNCHERS or word.startswith(LAUNCHER_MODULES) for word in words
    )


def choose_precision(requested: str) -> tuple[str, str]:
    """The precision for ``--mixed_precision requested``, and that of the launcher (empty without a launcher).

    ``auto`` becomes the precision of ``accelerate launch`` or its config file, unless that is ``no``, which is also its
    default. Raises UserError for a precision that is not supported.
    """
    of_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if requested != "auto" or of_launcher in ("", "no"):
        return requested, of_launcher
    if of_launcher not in PRECISIONS:
        raise UserError(
            f"accelerate launch requests mixed_precision {of_launcher}, which is not supported; set it to no, fp16 or "
            f"bf16, or give --mixed_precision to launch.py."
        )
    return of_launcher, of_launcher


def is_single_process_of_several(num_processes: int) -> bool:
    """Whether ``accelerate launch`` was asked for several processes, but has started one.

    For several processes it sets the address at which they meet; for a single one it sets no rank.
    """
    set_by_launcher = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    return num_processes == 1 and set_by_launcher and "RANK" not in os.environ
