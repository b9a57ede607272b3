"""DALI graph functions: images and commands in, views out; one function for CPU and GPU.

An image in a file is decoded once, and only the part that its views need. Stages of a view, in this order:

1. window: cut from the source and resized to the view's size; mirrored by a swapped region of interest. Cutting before
   resizing keeps the filter from seeing past the window, as in torchvision.
2. blur, on those that are blurred. The official order is colour, then blur; both are linear, so they commute but for
   clamping, and blurring here works on 8-bit values.
3. colour: jitter and grey as one affine map (``stec.geometry.colour_maps``) to floats, clamped to [0, 1].
4. solarization: ``min(x, limit - x)``.

Up to the blur pixels are 8 bits; they leave the graph as float32 on the device that wants them, so that nothing is left
to be done for the thread that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, math, pipeline_def, types

from stec.commands import Commands, Policy
from stec.geometry import colour_maps

DataNode = Any
"""A node of a DALI graph; DALI's own types lack what it adds at run time."""

Form = Literal["HWC", "CWH", "file"]
"""How images enter a graph: as pixels [H, W, 3], as pixels [3, W, H], or as files that hold encoded images."""

WINDOW_ARGUMENTS = ("anchor", "shape", "roi_start", "roi_end")
COLOUR_ARGUMENTS = ("colour_matrix", "mean_weights")
BLUR_ARGUMENTS = ("sigma_px", "blur_window_px")
SOLARIZE_ARGUMENTS = ("solarize_limit",)


def argument_names(policy: Policy) -> tuple[str, ...]:
    """Names of the per-view arguments that the graph of this policy takes: stages that never happen are left out."""
    names: tuple[str, ...] = WINDOW_ARGUMENTS
    if policy.p_blur > 0:
        names += BLUR_ARGUMENTS
    if policy.p_color_jitter > 0 or policy.p_grayscale > 0:
        names += COLOUR_ARGUMENTS
    if policy.p_solarize > 0:
        names += SOLARIZE_ARGUMENTS
    return names


def needed_part(commands: Commands) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The smallest window around an image's windows: top-left [N, 2] and height and width [N, 2] in source px."""
    first = np.stack([commands.top.min(1), commands.left.min(1)], -1)
    last = np.stack([(commands.top + commands.height).max(1), (commands.left + commands.width).max(1)], -1)
    return first, last - first


def view_arguments(
    commands: Commands, policy: Policy, origin: NDArray[np.int32] | None = None
) -> dict[str, NDArray[Any]]:
    """Operator arguments that execute ``commands``, each [N, V, ...], for the names of ``argument_names``.

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
    if "colour_matrix" in names:
        matrix, mean_weights = colour_maps(commands)
        # The factor 1/255 brings 8 bits to [0, 1].
        arguments["colour_matrix"] = matrix / np.float32(255)
        arguments["mean_weights"] = mean_weights[..., None, :] / np.float32(255)
    if "solarize_limit" in names:
        # min(x, 2 - x) leaves every x in [0, 1] as it is.
        arguments["solarize_limit"] = np.where(commands.solarize, 1, 2).astype(np.float32)
    return arguments


def execute(image: DataNode, size: int, arguments: dict[str, DataNode]) -> DataNode:
    """One view of ``image`` [H, W, 3] uint8 on either device: [size, size, 3] float32 in [0, 1].

    ``arguments`` are on the host.
    """
    window = fn.slice(image, arguments["anchor"], arguments["shape"], axes=[0, 1])
    view: DataNode = fn.resize(
        window,
        size=[size, size],
        roi_start=arguments["roi_start"],
        roi_end=arguments["roi_end"],
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    if "sigma_px" in arguments:
        view = _blur(view, arguments["sigma_px"], arguments["blur_window_px"])
    if "colour_matrix" in arguments:
        mean = fn.reductions.mean(view, axes=[0, 1], keep_dims=True)
        offset = fn.coord_transform(mean, M=arguments["mean_weights"])
        view = math.clamp(fn.coord_transform(view, M=arguments["colour_matrix"]) + offset, 0.0, 1.0)
    else:
        view = view / 255.0
    if "solarize_limit" in arguments:
        view = math.min(view, arguments["solarize_limit"] - view)
    return view


def _blur(view: DataNode, sigma_px: DataNode, window_px: DataNode) -> DataNode:
    # A per-sample condition: samples that are not blurred go past the operator without a copy.
    if sigma_px > 0:
        blurred = fn.gaussian_blur(view, sigma=sigma_px, window_size=window_px)
    else:
        blurred = view
    return blurred


def training_pipeline(
    source: Callable[[], Sequence[Any]], policy: Policy, *, form: Form, views: int, device: str, **pipeline_options: Any
) -> Any:
    """A pipeline that makes ``views`` views of each image that ``source`` hands over, a batch at a time.

    ``source`` returns: the inputs of ``open_image``; then for each view the arguments of ``argument_names``; then the
    packed commands [N, V, 20] and the record [N, 4] (epoch, position, image id, label), both of which pass through
    untouched. The pipeline returns the views [N, V, size, size, 3] float32 in [0, 1] on ``device``, the commands, the
    record and, for files, the images' shapes [N, 3] as stored.
    """
    names = argument_names(policy)
    opening = 3 if form == "file" else 1

    @pipeline_def(enable_conditionals=True, exec_dynamic=True, **pipeline_options)  # type: ignore[untyped-decorator]
    def pipeline() -> tuple[DataNode, ...]:
        count = opening + views * len(names) + 2
        inputs = fn.external_source(source, num_outputs=count, batch=True, no_copy=True)
        image, *stored_shape = open_image(inputs[:opening], form, device)
        arguments = inputs[opening:-2]
        made = [
            execute(image, policy.size, dict(zip(names, arguments[v * len(names) : (v + 1) * len(names)])))
            for v in range(views)
        ]
        return fn.stack(*made), inputs[-2], inputs[-1], *stored_shape

    return pipeline()


def open_image(inputs: Sequence[DataNode], form: Form, device: str) -> tuple[DataNode, ...]:
    """An image [H, W, 3] uint8 on ``device``, from pixels, or from a path and the part to decode (top-left, size).

    For a file also the shape [3] of the whole image as it is stored now, which the commands rely on.
    """
    # Decided while the graph is defined: a data set has one form.
    if form == "file":
        path, origin, extent = inputs
        encoded = fn.io.file.read(path, dont_use_mmap=True)
        stored_shape = fn.peek_image_shape(encoded, adjust_orientation=False)
        # DALI 2.4's image_slice crashes the process where a sample is no image or smaller than its slice; reading the
        # header first makes the former an error, and this makes the latter something to be noticed afterwards.
        origin = math.min(origin, stored_shape[:2] - 1)
        extent = math.min(extent, stored_shape[:2] - origin)
        # Without the EXIF rotation, as torchvision's ImageFolder: the commands are for the image as it is stored.
        image = fn.decoders.image_slice(
            encoded,
            origin,
            extent,
            axes=[0, 1],
            normalized_anchor=False,
            normalized_shape=False,
            device="mixed" if device == "gpu" else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
        )
        return image, stored_shape
    image = inputs[0].gpu() if device == "gpu" else inputs[0]
    image = fn.transpose(image, perm=[2, 1, 0]) if form == "CWH" else image
    return (fn.reshape(image, layout="HWC"),)


def evaluation_pipeline(source: Callable[[], Sequence[Any]], size: int, *, device: str, **pipeline_options: Any) -> Any:
    """A pipeline that resizes images from files and cuts out a square.

    ``source`` returns paths, sizes to resize to [N, 2] and top-left corners of the square [N, 2]. The pipeline returns
    images [N, size, size, 3] uint8 on ``device``.
    """

    @pipeline_def(exec_dynamic=True, **pipeline_options)  # type: ignore[untyped-decorator]
    def pipeline() -> DataNode:
        path, resized_hw, corner = fn.external_source(source, num_outputs=3, batch=True, no_copy=True)
        image = fn.decoders.image(
            fn.io.file.read(path, dont_use_mmap=True),
            device="mixed" if device == "gpu" else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
        )
        resized = fn.resize(image, size=resized_hw, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.slice(resized, corner, [size, size], axes=[0, 1])

    return pipeline()
