"""The ways to execute commands.

An executor in a DALI graph is a class that implements ``graph.Executor``: it defines the inputs of the graph and the
graph that makes the views from them.
``torchvision`` executes the same commands without DALI, as the reference of the tests and if DALI is not installed.
"""

from typing import Any

SMALLEST_VIEW_PX = 16
"""Smallest height and width of a view in px."""
DataNode = Any
"""A node of a DALI graph; DALI's type stubs lack attributes that it adds at run time."""

EXECUTORS = {"cpu": "pipelines.executors.cpu:CpuExecutor", "cuda": "pipelines.executors.gpu:GpuExecutor"}
"""The classes of executors in a DALI graph, by type of device: all stages of a view in one compiled function on a CPU,
and in two kernels, with the same arithmetic, on a GPU."""
