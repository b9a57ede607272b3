"""Commands executed by DALI's operators, on a GPU or a CPU.

The stages of a view:

1. crop: the crop box is cut from the source, then resized to the size of the view, and mirrored by a swapped region of
   interest. Cutting first keeps the resampling filter inside the crop box, as in torchvision.
2. blur. The official order is color, then blur; both are almost linear, so they nearly commute, and here the blur
   works on 8-bit values.
3. color: jitter and gray as an affine map, a rotation of the hue and a second affine map, clamped to [0, 1].
4. solarization: ``min(x, limit - x)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, math, types
from torch import Tensor

from pipelines.color import color_maps
from pipelines.commands import Commands, Policy
from pipelines.datasets.images import ImageArray, ImageFiles, Images
from pipelines.devices import to_device
from pipelines.executors import DataNode
from pipelines.executors.image_arrays import pixels_on_device
from pipelines.executors.image_files import Files
from pipelines.sampler import BatchPlan

CROP_ARGUMENTS = ("anchor", "shape", "roi_start", "roi_end")
COLOR_ARGUMENTS = ("matrix_before", "mean_weights_before", "hue_turns", "matrix_after", "mean_weights_after")
BLUR_ARGUMENTS = ("sigma_px", "blur_window_px")
SOLARIZE_ARGUMENTS = ("solarize_limit",)


class DaliExecutor:
    """Images in memory are copied to the GPU once, and batches are gathered there; images in files are decoded."""

    batch_is_sample = False

    def __init__(self, images: Images, policy: Policy, views: int, device: torch.device, *, half: bool = False) -> None:
        self.images, self.policy, self.num_views, self.torch_device = images, policy, views, device
        self.half = half
        self.device = "gpu" if device.type == "cuda" else "cpu"
        self.files = Files(images, self.device) if isinstance(images, ImageFiles) else None
        self.arguments = argument_names(policy)
        opening = self.files.names if self.files is not None else ("pixels",) if self.device == "cpu" else ()
        self.host_inputs: tuple[str, ...] = (
            *opening,
            *(f"{name}_{v}" for v in range(views) for name in self.arguments),
        )
        self.device_inputs: tuple[str, ...] = ("pixels",) if self.files is None and self.device == "gpu" else ()

    def inputs(self, plan: BatchPlan) -> dict[str, Any]:
        inputs: dict[str, Any]
        if self.files is not None:
            inputs = self.files.inputs(plan.image_ids, plan.commands)
        else:
            assert isinstance(self.images, ImageArray)
            inputs = {"pixels": self._gather(self.images, plan.image_ids)}
        arguments = view_arguments(plan.commands, self.policy, inputs.get("origin"))
        for v in range(self.num_views):
            for name in self.arguments:
                inputs[f"{name}_{v}"] = np.ascontiguousarray(arguments[name][:, v])
        return inputs

    def views(self, nodes: Mapping[str, DataNode], commands: DataNode) -> tuple[DataNode, ...]:
        image, *stored_shape = self._image(nodes)
        views = []
        for v in range(self.num_views):
            arguments = {name: nodes[f"{name}_{v}"] for name in self.arguments}
            views.append(execute(image, self.policy.size, arguments, self.device))
        stacked = fn.stack(*views)
        return (fn.cast(stacked, dtype=types.FLOAT16) if self.half else stacked), *stored_shape

    def _gather(self, images: ImageArray, image_ids: NDArray[np.int64]) -> NDArray[np.uint8] | Tensor:
        """The pixels of a batch, gathered on the executor's device."""
        if self.device == "cpu":
            return images.pixels[image_ids]
        return pixels_on_device(images, self.torch_device)[to_device(image_ids, self.torch_device)]

    def _image(self, nodes: Mapping[str, DataNode]) -> tuple[DataNode, ...]:
        if self.files is not None:
            return self.files.decode(nodes)
        assert isinstance(self.images, ImageArray)
        pixels = nodes["pixels"]
        if self.images.layout == "CWH":
            pixels = fn.transpose(pixels, perm=[2, 1, 0])
        return (fn.reshape(pixels, layout="HWC"),)


def argument_names(policy: Policy) -> tuple[str, ...]:
    """Names of the arguments of a view; stages with probability 0 have none."""
    names: tuple[str, ...] = CROP_ARGUMENTS
    if policy.p_blur > 0:
        names += BLUR_ARGUMENTS
    if policy.p_color_jitter > 0 or policy.p_grayscale > 0:
        names += COLOR_ARGUMENTS
    if policy.p_solarize > 0:
        names += SOLARIZE_ARGUMENTS
    return names


def view_arguments(
    commands: Commands, policy: Policy, origin: NDArray[np.int32] | None = None
) -> dict[str, NDArray[Any]]:
    """Arguments of DALI's operators that execute ``commands``, each [N, V, ...], for the names of ``argument_names``.

    ``origin`` [N, 2] is the top-left of the part of the image that enters the graph, in source px (None: all of it).
    """
    names = argument_names(policy)
    height, width = commands.height, commands.width
    zero = np.zeros_like(height)
    arguments: dict[str, NDArray[Any]] = {
        "anchor": np.stack([commands.top, commands.left], -1) - (0 if origin is None else origin[:, None]),
        "shape": np.stack([height, width], -1),
        "roi_start": np.stack([zero, np.where(commands.flip, width, 0)], -1).astype(np.float32),
        "roi_end": np.stack([height, np.where(commands.flip, 0, width)], -1).astype(np.float32),
    }
    if "sigma_px" in names:
        arguments["sigma_px"] = commands.sigma_px
        # Three sigmas to each side hold 99.7 % of the kernel; the official kernel is never wider than its own limit.
        reach = np.minimum(np.ceil(3 * commands.sigma_px), policy.blur_window_px // 2)
        arguments["blur_window_px"] = (2 * reach + 1).astype(np.int32)
    if "hue_turns" in names:
        for part in ("before", "after"):
            matrix, mean_weights = color_maps(commands, part)
            # The first map brings 8 bits to [0, 1].
            scale = np.float32(1 / 255 if part == "before" else 1)
            arguments[f"matrix_{part}"] = matrix * scale
            arguments[f"mean_weights_{part}"] = mean_weights[..., None, :] * scale
        arguments["hue_turns"] = commands.hue_turns[..., None, None, None]
    if "solarize_limit" in names:
        # min(x, 2 - x) is x for x in [0, 1].
        arguments["solarize_limit"] = np.where(commands.solarize, 1, 2).astype(np.float32)[..., None, None, None]
    return arguments


def execute(image: DataNode, size: int, arguments: dict[str, DataNode], device: str) -> DataNode:
    """One view of ``image`` [H, W, 3] uint8 by DALI's operators: [size, size, 3] float32 in [0, 1].

    ``arguments`` are on the host, where most operators require them; arguments of arithmetic are moved to ``device``.
    """

    def on_device(name: str) -> DataNode:
        return arguments[name].gpu() if device == "gpu" else arguments[name]

    crop = fn.slice(image, arguments["anchor"], arguments["shape"], axes=[0, 1])
    view: DataNode = fn.resize(
        crop,
        size=[size, size],
        roi_start=arguments["roi_start"],
        roi_end=arguments["roi_end"],
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        # One launch for all samples instead of one for 32.
        minibatch_size=Pipeline.current().max_batch_size,
    )
    if "sigma_px" in arguments:
        view = _blur(view, arguments["sigma_px"], arguments["blur_window_px"])
    if "hue_turns" in arguments:
        view = _map_colors(view, arguments["matrix_before"], arguments["mean_weights_before"])
        view = _rotate_hue(view, on_device("hue_turns"), device)
        view = _map_colors(view, arguments["matrix_after"], arguments["mean_weights_after"])
    else:
        view = view / 255.0
    if "solarize_limit" in arguments:
        view = math.min(view, on_device("solarize_limit") - view)
    return view


def _blur(view: DataNode, sigma_px: DataNode, window_px: DataNode) -> DataNode:
    # A condition per sample: samples without blur skip the operator, without a copy.
    if sigma_px > 0:
        blurred = fn.gaussian_blur(view, sigma=sigma_px, window_size=window_px)
    else:
        blurred = view
    return blurred


def _map_colors(view: DataNode, matrix: DataNode, mean_weights: DataNode) -> DataNode:
    """``matrix @ rgb + mean_weights @ mean``, clamped to [0, 1]; ``mean`` is the mean color of the view."""
    mean = fn.reductions.mean(view, axes=[0, 1], keep_dims=True)
    # Not an argument of the operator, because arguments must be on the host, and the mean is on the device.
    offset = fn.coord_transform(mean, M=mean_weights)
    return math.clamp(fn.coord_transform(view, M=matrix) + offset, 0.0, 1.0)


def _rotate_hue(view: DataNode, turns: DataNode, device: str) -> DataNode:
    """Rotate the hue in HSV (Smith 1978, "Color Gamut Transform Pairs"), without the six cases of the inverse.

    With k = (n + 6 hue) mod 6 and n = 5, 3, 1 for red, green and blue, a color is
    ``value - chroma * clamp(min(k, 4 - k), 0, 1)``.
    """
    value = fn.reductions.max(view, axes=[2], keep_dims=True)
    chroma = value - fn.reductions.min(view, axes=[2], keep_dims=True)
    divisor = math.max(chroma, 1e-6)
    red, green, blue = view[:, :, 0:1], view[:, :, 1:2], view[:, :, 2:3]
    is_red, is_green = fn.cast(red == value, dtype=types.FLOAT), fn.cast(green == value, dtype=types.FLOAT)
    from_red, from_green, from_blue = (
        (green - blue) / divisor,
        2.0 + (blue - red) / divisor,
        4.0 + (red - green) / divisor,
    )
    sixths = is_red * from_red + (1.0 - is_red) * (is_green * from_green + (1.0 - is_green) * from_blue)
    channels = types.Constant(np.array([[[5, 3, 1]]], np.float32), device=device)
    k = channels + (sixths + 6.0 * turns)
    k = k - 6.0 * math.floor(k / 6.0)
    return value - chroma * math.clamp(math.min(k, 4.0 - k), 0.0, 1.0)
