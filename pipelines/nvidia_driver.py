"""The NVIDIA driver of this machine, and what it supports."""

from __future__ import annotations

import os
import re
from pathlib import Path

VERSION_FILE = Path("/proc/driver/nvidia/version")
DEVICES = Path("/dev")
OLDEST_DRIVER = {12: 525, 13: 580}
"""The oldest driver that runs programs built for a CUDA version."""


def driver_version() -> str | None:
    """The version of the driver, such as ``570.86.15``; None if there is none."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+[\d.]*)\s", VERSION_FILE.read_text())
    except OSError:
        return None
    return found[1] if found else None


def gpu_is_visible() -> bool:
    """Whether this process may use an NVIDIA GPU that the machine has."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    return not hidden and any(DEVICES.glob("nvidia[0-9]*"))


def driver_is_older_than(cuda: int) -> bool:
    """Whether the driver cannot run programs built for CUDA ``cuda``; unknown drivers and versions can."""
    version = driver_version()
    return version is not None and int(version.split(".")[0]) < OLDEST_DRIVER.get(cuda, 0)
