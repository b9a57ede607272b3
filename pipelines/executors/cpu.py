"""Commands executed on the CPU: a compiled function, as one operator of a DALI graph, makes all views of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, ops, types

from pipelines.commands import Policy
from pipelines.datasets.images import ImageArray, ImageFiles, Images
from pipelines.errors import UserError
from pipelines.executors import SMALLEST_VIEW_PX, DataNode
from pipelines.executors.image_arrays import addresses
from pipelines.executors.image_files import Files
from pipelines.sampler import BatchPlan


class CompiledViews(ops.python_op_factory("CompiledViews", "NumbaFuncImpl", "NumbaFuncImpl", generated=False)):  # type: ignore[misc]
    """DALI's operator for compiled functions, given their addresses.

    It is the private operator of DALI's Numba plugin. The plugin itself would compile at each start (4 s) and import
    the CUDA part of Numba; the functions in ``cpu_kernels`` are cached on disk.
    """

    def __init__(self, views: int, size: int, *, in_memory: bool) -> None:
        from pipelines.executors import cpu_kernels

        super().__init__(device="cpu")
        self.arguments = {
            "setup_fn": cpu_kernels.shape_function(views, size),
            "run_fn": cpu_kernels.views_of_memory() if in_memory else cpu_kernels.views_of_decoded(),
            "out_types": [types.FLOAT],
            "outs_ndim": [4],
            "in_types": [types.INT64, types.FLOAT] if in_memory else [types.UINT8, types.INT64, types.FLOAT],
            "ins_ndim": [1, 2] if in_memory else [3, 1, 2],
            "batch_processing": False,
        }

    def __call__(self, *inputs: DataNode) -> DataNode:
        return super().__call__(*inputs, **self.arguments)


class CpuExecutor:
    """Images in memory enter the graph as addresses, images in files are decoded in it."""

    batch_is_sample = False

    def __init__(self, images: Images, policy: Policy, views: int, device: torch.device, *, half: bool = False) -> None:
        assert device.type == "cpu", "its operator runs on CPUs only"
        if policy.size < SMALLEST_VIEW_PX:
            raise UserError(f"Views of {policy.size} px are too small; use {SMALLEST_VIEW_PX} or more.")
        self.images, self.policy, self.num_views, self.device, self.half = images, policy, views, device, half
        self.files = Files(images, "cpu") if isinstance(images, ImageFiles) else None
        self.input_names: tuple[str, ...] = ("addresses",) if self.files is None else (*self.files.names, "placement")

    def inputs(self, plan: BatchPlan) -> dict[str, Any]:
        blur_window_px = self.policy.blur_window_px
        if isinstance(self.images, ImageArray):
            where = addresses(self.images, plan.image_ids, self.device)
            return {"addresses": np.insert(where, 4, blur_window_px, axis=1)}
        assert self.files is not None
        inputs = self.files.inputs(plan.image_ids, plan.commands)
        origin = inputs["origin"]
        blur_window = np.full(len(origin), blur_window_px)
        inputs["placement"] = np.stack([origin[:, 0], origin[:, 1], blur_window], axis=-1, dtype=np.int64)
        return inputs

    def views(self, nodes: Mapping[str, DataNode], commands: DataNode) -> tuple[DataNode, ...]:
        execute = CompiledViews(self.num_views, self.policy.size, in_memory=self.files is None)
        stored_size: list[DataNode] = []
        if self.files is None:
            views = execute(nodes["addresses"], commands)
        else:
            part, *stored_size = self.files.decode(nodes)
            views = execute(part, nodes["placement"], commands)
        return (fn.cast(views, dtype=types.FLOAT16) if self.half else views), *stored_size
