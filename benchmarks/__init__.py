"""Measurements of the pipelines, each a program of its own: ``python -m benchmarks.throughput --help``."""

import os

# As launch.py does, before PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
