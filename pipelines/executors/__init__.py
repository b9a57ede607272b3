"""The ways to execute commands, one file each.

An executor in a DALI graph is a class like those in ``EXECUTORS``: it owns the inputs of the graph that a batch needs
and the graph that makes the views from them (see ``graph.Executor``). A new one is a file and a row of the table.
``torchvision`` executes the same commands without DALI, as the reference of the tests and if DALI is not installed.
"""

from typing import Literal

ExecutorName = Literal["cpu", "dali"]

EXECUTORS: dict[ExecutorName, str] = {
    "cpu": "pipelines.executors.cpu:CpuExecutor",
    "dali": "pipelines.executors.dali_operators:DaliExecutor",
}
"""The classes of executors in a DALI graph. ``cpu`` runs one compiled function per image, ``dali`` DALI's operators on
a CPU or GPU."""
