"""The ways to execute commands, one file each.

An executor in a DALI graph is a class that implements ``graph.Executor``: it defines the inputs of the graph and the
graph that makes the views from them. A new one is a file and a row of ``EXECUTORS``.
``torchvision`` executes the same commands without DALI, as the reference of the tests and if DALI is not installed.
"""

from typing import Any, Literal

ExecutorName = Literal["cpu", "dali"]
DataNode = Any
"""A node of a DALI graph; DALI's type stubs lack attributes that it adds at run time."""

EXECUTORS: dict[ExecutorName, str] = {
    "cpu": "pipelines.executors.cpu:CpuExecutor",
    "dali": "pipelines.executors.dali_operators:DaliExecutor",
}
"""The classes of executors in a DALI graph. ``cpu`` runs one compiled function per image, ``dali`` DALI's operators on
a CPU or GPU."""
