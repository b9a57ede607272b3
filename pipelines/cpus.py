"""The number of CPUs that this process may use."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """CPUs in this process's affinity mask, or all of the machine's if the system has no such masks."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
