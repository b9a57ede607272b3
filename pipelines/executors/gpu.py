"""Commands executed on a GPU: two kernels, as operators of a DALI graph, with the arithmetic of the CPU's function.

Images in memory are uploaded once. Then a sample of the graph is a whole batch: the kernels get the addresses of its
images, so that nothing is gathered and the number of launches does not depend on the batch size. Images in files are
decoded in the graph, and the kernels are launched for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import ops, types

from pipelines.commands import Policy
from pipelines.datasets.images import ImageArray, ImageFiles, Images
from pipelines.executors import DataNode
from pipelines.executors.cpu_kernels import blur_weights, gpu_shape_function
from pipelines.executors.gpu_compiler import (
    THREADS_PER_BLOCK,
    LoadedKernel,
    largest_reach,
    load_kernels,
    num_tiles,
)
from pipelines.executors.image_arrays import addresses
from pipelines.executors.image_files import Files
from pipelines.sampler import BatchPlan


class Kernel(ops.python_op_factory("GpuKernel", "NumbaFuncImpl", "NumbaFuncImpl", generated=False)):  # type: ignore[misc]
    """DALI's operator for compiled kernels, given their addresses; private, as ``cpu.CompiledViews`` is."""

    def __init__(
        self,
        kernel: LoadedKernel,
        shape_function: int,
        inputs: Sequence[tuple[Any, int]],
        outputs: Sequence[tuple[Any, int]],
    ) -> None:
        """``inputs`` and ``outputs`` are types and numbers of dimensions."""
        super().__init__(device="gpu")
        self.arguments = {
            "run_fn": kernel.address,
            "setup_fn": shape_function,
            "in_types": [dtype for dtype, _ in inputs],
            "ins_ndim": [ndim for _, ndim in inputs],
            "out_types": [dtype for dtype, _ in outputs],
            "outs_ndim": [ndim for _, ndim in outputs],
            # DALI warns about each launch with fewer blocks than the GPU executes at the same time.
            "blocks": [kernel.blocks, 1, 1],
            "threads_per_block": [THREADS_PER_BLOCK, 1, 1],
            "batch_processing": False,
        }

    def __call__(self, *inputs: DataNode) -> Any:
        return super().__call__(*inputs, **self.arguments)


class GpuExecutor:
    """The two kernels, after the upload or the decoder. ``half`` makes the second write float16."""

    def __init__(self, images: Images, policy: Policy, views: int, device: torch.device, *, half: bool = False) -> None:
        assert device.type == "cuda", "its operators run on GPUs only"
        self.images, self.policy, self.num_views, self.device = images, policy, views, device
        self.reach = largest_reach(policy)
        self.files = Files(images, "gpu") if isinstance(images, ImageFiles) else None
        self.batch_is_sample = self.files is None
        opening = ("where",) if self.files is None else self.files.names
        self.input_names: tuple[str, ...] = (*opening, "blur_weights")
        # Not while the graph is defined: DALI would translate the compiler's own code.
        kernels = load_kernels(self.reach, device)
        shapes = gpu_shape_function(policy.size, num_tiles(policy.size))
        numbers, pixels, sums = (types.FLOAT, 2), (types.UINT8, 4), (types.INT32, 2)
        crop, source = "crop_of_memory", [(types.INT64, 2)]
        if self.files is not None:
            crop, source = "crop_of_decoded", [(types.UINT8, 3)]
        color, output = ("color_to_half", types.FLOAT16) if half else ("color_to_float", types.FLOAT)
        self.crop = Kernel(kernels[crop], shapes, [*source, numbers], [pixels, sums])
        self.color = Kernel(kernels[color], shapes, [pixels, sums, numbers, numbers], [(output, 4)])

    def inputs(self, plan: BatchPlan) -> dict[str, Any]:
        inputs: dict[str, Any]
        if self.files is not None:
            inputs = self.files.inputs(plan.image_ids, plan.commands)
        else:
            assert isinstance(self.images, ImageArray)
            where = addresses(self.images, plan.image_ids, self.device)
            inputs = {"where": np.repeat(where, self.num_views, axis=0)}
        sigma_px = plan.commands.sigma_px
        weights = blur_weights(np.ravel(sigma_px), self.policy.blur_window_px, self.reach)
        inputs["blur_weights"] = weights if self.batch_is_sample else weights.reshape(*sigma_px.shape, -1)
        return inputs

    def views(self, nodes: Mapping[str, DataNode], commands: DataNode) -> tuple[DataNode, ...]:
        """Of images in memory, the sample of a batch is [N * V, size, size, 3]."""
        stored_size: list[DataNode] = []
        on_gpu = commands.gpu()
        if self.files is None:
            cropped, luma_sums = self.crop(nodes["where"].gpu(), on_gpu)
        else:
            image, *stored_size = self.files.decode(nodes)
            cropped, luma_sums = self.crop(image, on_gpu)
        return self.color(cropped, luma_sums, on_gpu, nodes["blur_weights"].gpu()), *stored_size
