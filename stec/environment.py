"""Environment variables of libraries, which they read when they are imported."""

from __future__ import annotations

import os


def set_library_defaults() -> None:
    """Set what this program needs, unless the user has set it. Call it before PyTorch is imported."""
    # Idle OpenMP threads sleep instead of spinning on the cores that DALI's threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The profiler's library logs what it does, and an error if there is no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
