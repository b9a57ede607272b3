"""The protocol of executors in a DALI graph, and the training pipeline around one."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from nvidia.dali import fn, pipeline_def

from pipelines.commands import Policy
from pipelines.datasets.images import Images
from pipelines.executors import EXECUTORS, DataNode
from pipelines.executors.image_files import Files
from pipelines.sampler import BatchPlan

Inputs = Mapping[str, Any]


class Executor(Protocol):
    """The inputs of a graph that makes ``views`` views of each of N images, and the graph itself.

    The views have the size of ``policy``.
    """

    input_names: tuple[str, ...]
    """Names of the inputs: NumPy arrays [N, ...], or lists of N arrays."""
    files: Files | None
    """How image files enter the graph; None for images in memory."""
    batch_is_sample: bool
    """Whether a sample of the graph is a whole batch: inputs and outputs are [1, N V, ...] instead of [N, V, ...]."""

    def __init__(self, images: Images, policy: Policy, views: int, device: torch.device, *, half: bool = False) -> None:
        """With ``half``, views are float16."""

    def inputs(self, plan: BatchPlan) -> Inputs:
        """The inputs of a batch by name, [N, ...], or [N V, ...] if a batch is a sample.

        Raises BadImage for an image that cannot be read.
        """

    def views(self, nodes: Mapping[str, DataNode], commands: DataNode) -> tuple[DataNode, ...]:
        """Views [N, V, size, size, 3] in [0, 1]; for files also their ``stored_size`` [N, 3].

        ``nodes`` are the inputs by name, ``commands`` the packed commands [N, V, 20].
        """


def executor_class(device: torch.device) -> type[Executor]:
    """The class in ``EXECUTORS``."""
    kind: type[Executor] = pkgutil.resolve_name(EXECUTORS[device.type])
    return kind


def training_pipeline(executor: Executor, source: Callable[[], Sequence[Any]], **pipeline_options: Any) -> Any:
    """A pipeline that makes the views of one batch per run.

    ``source`` returns the inputs of the executor, the packed commands [N, V, 20] and the record [N, 4] (epoch,
    position, image id, label). The pipeline returns the views [N, V, size, size, 3] in [0, 1]; the commands and the
    record; and, for files, their ``stored_size`` [N, 3].
    """
    names = (*executor.input_names, "commands", "record")

    @pipeline_def(enable_conditionals=True, exec_dynamic=True, **pipeline_options)  # type: ignore[untyped-decorator]
    def pipeline() -> tuple[DataNode, ...]:
        nodes = dict(zip(names, fn.external_source(source, num_outputs=len(names), batch=True, no_copy=True)))
        views, *stored_size = executor.views(nodes, nodes["commands"])
        return views, nodes["commands"], nodes["record"], *stored_size

    return pipeline()
