"""What Accelerate's launcher, torchrun or SLURM passed on to this process, and what happens when the launcher ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from pipelines.errors import UserError

ONE_OF_SEVERAL = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What each of several processes needs to find the others."""
NUMBERS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
"""Those that are numbers, each with its smallest value."""
PRECISIONS = ("no", "fp16", "bf16")
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun")
"""Scripts that start processes; as modules they are below ``LAUNCHER_MODULES``."""
LAUNCHER_MODULES = ("accelerate.commands.", "torch.distributed.")
PR_SET_PDEATHSIG = 1


def is_main_process() -> bool:
    """Whether this is the process that prints, before Accelerate is loaded."""
    return os.environ.get("RANK", "0") in ("0", "")


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise UserError where the variables that say which of several processes this is are incomplete or no numbers."""
    said = {name: environment[name] for name in (*ONE_OF_SEVERAL, *NUMBERS) if name in environment}
    for name, smallest in NUMBERS.items():
        if name in said and not (said[name].isascii() and said[name].isdigit() and int(said[name]) >= smallest):
            raise UserError(
                f"The environment variable {name} is '{said[name]}', but launchers set it to a number from {smallest} "
                f"on; unset it, or start several processes by accelerate launch.",
                local=True,
            )
    alone = said.get("WORLD_SIZE") == "1" and said.get("RANK", "0") == "0" and "LOCAL_RANK" not in said
    if alone or not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & said.keys():
        return
    missing = [name for name in ONE_OF_SEVERAL if name not in said]
    if missing:
        there = [name for name in ONE_OF_SEVERAL if name in said]
        raise UserError(
            f"The environment sets {', '.join(there)}, but not {', '.join(missing)}, which each of several processes "
            f"needs; unset {', '.join(there)} for one process, or start several by accelerate launch.",
            local=True,
        )
    for index, count in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if count in said and int(said[index]) >= int(said[count]):
            raise UserError(
                f"The environment variable {index} is {said[index]}, but {count} is {said[count]}; unset them, or "
                f"start several processes by accelerate launch.",
                local=True,
            )


def end_with_launcher() -> None:
    """Have the system send SIGTERM when the launcher ends, which for one process passes no signal on (Linux only).

    Without a launcher, say below a shell, nothing changes.
    """
    parent = os.getppid()
    if sys.platform != "linux" or not _is_launcher(parent):
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended meanwhile
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    interpreter, *words = map(os.fsdecode, command[:5])
    return Path(interpreter).name.startswith("python") and any(
        Path(word).name in LAUNCHERS or word.startswith(LAUNCHER_MODULES) for word in words
    )


def choose_precision(asked: str) -> tuple[str, str]:
    """The precision to use where ``--mixed_precision`` is ``asked``, and the launcher's, empty without a launcher.

    ``auto`` takes that of ``accelerate launch`` or its config file, unless it is ``no``, which the launcher also passes
    on where nobody chose. Raises UserError for one that is not supported.
    """
    launchers = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if asked != "auto" or launchers in ("", "no"):
        return asked, launchers
    if launchers not in PRECISIONS:
        raise UserError(
            f"accelerate launch passes on mixed_precision {launchers}, which is not supported; give it no, fp16 or "
            f"bf16, or give --mixed_precision to launch.py."
        )
    return launchers, launchers


def started_one_of_several(processes: int) -> bool:
    """Whether ``accelerate launch`` was asked for several processes, but started one.

    For several it sets the address where they meet, for one that is alone it sets no rank.
    """
    set_by_launcher = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    return processes == 1 and set_by_launcher and "RANK" not in os.environ
