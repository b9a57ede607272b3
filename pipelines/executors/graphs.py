"""DALI graphs: images and commands in, views out.

One function defines the graph for either device; what differs is the operator that executes a command:

* on a CPU the compiled function of ``pipelines.executors.kernels``, a single operator from window to float;
* on a GPU DALI's own operators, in these stages:

  1. window: cut from the source and resized to the view's size; mirrored by a swapped region of interest. Cutting
     before resizing keeps the filter from seeing past the window, as in torchvision.
  2. blur, on those that are blurred. The official order is color, then blur; both are almost linear, so they nearly
     commute, and blurring here works on 8-bit values.
  3. color: jitter and gray as an affine map, a turn of the hue and a second affine map, clamped to [0, 1].
  4. solarization: ``min(x, limit - x)``.

``operators`` are DALI's on both devices for tests and benchmarks: they hold the GPU's stages against torchvision where
there is no GPU.

An image in a file is decoded once, and only the part that its views need. Views leave the graph as floats on the device
that wants them, so that nothing is left to be done for the thread that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, math, ops, pipeline_def, types

from pipelines.color import color_maps
from pipelines.commands import Commands, Policy

DataNode = Any
"""A node of a DALI graph; DALI's own types lack what it adds at run time."""

FileForm = Literal["path", "bytes", "either"]
Form = Literal["memory", "HWC", "CWH"] | FileForm
"""How images enter a graph: as addresses of pixels in memory, as pixels [H, W, 3] or [3, W, H], as names of files, as
the content of files, or as either."""

Operators = Literal["compiled", "dali"]
"""What executes commands: ``pipelines.executors.kernels`` or DALI's own operators."""

WINDOW_ARGUMENTS = ("anchor", "shape", "roi_start", "roi_end")
COLOR_ARGUMENTS = ("matrix_before", "mean_weights_before", "hue_turns", "matrix_after", "mean_weights_after")
BLUR_ARGUMENTS = ("sigma_px", "blur_window_px")
SOLARIZE_ARGUMENTS = ("solarize_limit",)


def argument_names(policy: Policy) -> tuple[str, ...]:
    """Names of the per-view arguments that DALI's operators take: stages that never happen are left out."""
    names: tuple[str, ...] = WINDOW_ARGUMENTS
    if policy.p_blur > 0:
        names += BLUR_ARGUMENTS
    if policy.p_color_jitter > 0 or policy.p_grayscale > 0:
        names += COLOR_ARGUMENTS
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
        # min(x, 2 - x) leaves every x in [0, 1] as it is.
        arguments["solarize_limit"] = np.where(commands.solarize, 1, 2).astype(np.float32)[..., None, None, None]
    return arguments


def execute(image: DataNode, size: int, arguments: dict[str, DataNode], device: str) -> DataNode:
    """One view of ``image`` [H, W, 3] uint8 by DALI's operators: [size, size, 3] float32 in [0, 1].

    ``arguments`` are on the host: most operators want them there. Those that arithmetic needs move to ``device``.
    """

    def here(name: str) -> DataNode:
        return arguments[name].gpu() if device == "gpu" else arguments[name]

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
    if "hue_turns" in arguments:
        view = _map_colors(view, arguments["matrix_before"], arguments["mean_weights_before"])
        view = _turn_hue(view, here("hue_turns"), device)
        view = _map_colors(view, arguments["matrix_after"], arguments["mean_weights_after"])
    else:
        view = view / 255.0
    if "solarize_limit" in arguments:
        view = math.min(view, here("solarize_limit") - view)
    return view


def _blur(view: DataNode, sigma_px: DataNode, window_px: DataNode) -> DataNode:
    # A per-sample condition: samples that are not blurred go past the operator without a copy.
    if sigma_px > 0:
        blurred = fn.gaussian_blur(view, sigma=sigma_px, window_size=window_px)
    else:
        blurred = view
    return blurred


def _map_colors(view: DataNode, matrix: DataNode, mean_weights: DataNode) -> DataNode:
    """``matrix @ rgb + mean_weights @ mean``, clamped to [0, 1]; the mean is the view's own."""
    mean = fn.reductions.mean(view, axes=[0, 1], keep_dims=True)
    # The offset is a sum and not an argument of the operator: it is on the device, arguments must be on the host.
    offset = fn.coord_transform(mean, M=mean_weights)
    return math.clamp(fn.coord_transform(view, M=matrix) + offset, 0.0, 1.0)


def _turn_hue(view: DataNode, turns: DataNode, device: str) -> DataNode:
    """HSV's hue turned, value and saturation kept (Smith 1978, "Color Gamut Transform Pairs"), without its six cases.

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


class _Compiled(ops.python_op_factory("CompiledViews", "NumbaFuncImpl", "NumbaFuncImpl", generated=False)):  # type: ignore[misc]
    """DALI's operator for compiled functions, given their addresses.

    DALI's Numba plugin would compile anew at every start (4 s) and load CUDA's part of Numba; the functions of
    ``pipelines.executors.kernels`` come compiled from the disk.
    """

    def __init__(self, views: int, size: int, form: Form) -> None:
        from pipelines.executors import kernels

        super().__init__(device="cpu")
        in_memory = form == "memory"
        self.arguments = {
            "setup_fn": kernels.shape_function(views, size),
            "run_fn": kernels.views_of_memory() if in_memory else kernels.views_of_decoded(),
            "out_types": [types.FLOAT],
            "outs_ndim": [4],
            "in_types": [types.INT64, types.FLOAT] if in_memory else [types.UINT8, types.INT64, types.FLOAT],
            "ins_ndim": [1, 2] if in_memory else [3, 1, 2],
            "batch_processing": False,
        }

    def __call__(self, *inputs: DataNode) -> DataNode:
        return super().__call__(*inputs, **self.arguments)


def training_pipeline(
    source: Callable[[], Sequence[Any]],
    policy: Policy,
    *,
    form: Form,
    views: int,
    device: str,
    operators: Operators,
    pixels_on_device: Callable[[], Any] | None = None,
    half: bool = False,
    largest_hw: tuple[int, int] | None = None,
    exif_orientation: bool = False,
    **pipeline_options: Any,
) -> Any:
    """A pipeline that makes ``views`` views of each image that ``source`` hands over, a batch at a time.

    ``source`` returns, one after the other,

    * for the form ``memory``, [N, 5] int64: addresses of pixels, strides of rows, columns and colors, and the width of
      the blur kernel; else the inputs of ``open_image``;
    * for compiled operators on decoded images, [N, 3] int64: top-left of the part that is decoded, width of the blur
      kernel; for DALI's operators the arguments of ``argument_names``, for each view;
    * the packed commands [N, V, 20] and the record [N, 4] (epoch, position, image id, label), which pass untouched.

    ``pixels_on_device`` hands over the pixels of the forms HWC and CWH in its place, where they are on the GPU already.
    ``largest_hw`` is what the GPU's decoders prepare their memory for. With ``exif_orientation`` images are turned
    upright.

    The pipeline returns the views [N, V, size, size, 3] in [0, 1] on ``device``, float32 or with ``half`` float16; the
    commands; the record; and, for files, the images' shapes [N, 3] as they are now.
    """
    names = argument_names(policy)
    opening = (
        {"memory": 1, "HWC": 1, "CWH": 1, "path": 3, "bytes": 3, "either": 5}[form] if pixels_on_device is None else 0
    )
    placing = {"compiled": 0 if form == "memory" else 1, "dali": views * len(names)}[operators]

    @pipeline_def(enable_conditionals=True, exec_dynamic=True, **pipeline_options)  # type: ignore[untyped-decorator]
    def pipeline() -> tuple[DataNode, ...]:
        inputs = fn.external_source(source, num_outputs=opening + placing + 2, batch=True, no_copy=True)
        arguments, packed, record = inputs[opening:-2], inputs[-2], inputs[-1]
        # All that depends on form, device and operators is decided here, while the graph is defined.
        if form == "memory":
            return _Compiled(views, policy.size, form)(inputs[0], packed), packed, record
        images = inputs[:opening]
        if pixels_on_device is not None:
            # Copied, on the stream that picks the pixels out: DALI's own streams would not wait for that, and PyTorch
            # may use the memory for something else before they have read it.
            images = [fn.external_source(pixels_on_device, batch=True, no_copy=False, device="gpu")]
        image, *stored_shape = open_image(images, form, device, largest_hw, exif_orientation)
        if operators == "compiled":
            made = _Compiled(views, policy.size, form)(image, arguments[0], packed)
        else:
            by_view = [arguments[v * len(names) : (v + 1) * len(names)] for v in range(views)]
            made = fn.stack(*(execute(image, policy.size, dict(zip(names, given)), device) for given in by_view))
        if half:
            made = fn.cast(made, dtype=types.FLOAT16)
        return made, packed, record, *stored_shape

    return pipeline()


def open_image(
    inputs: Sequence[DataNode],
    form: Form,
    device: str,
    largest_hw: tuple[int, int] | None = None,
    exif_orientation: bool = False,
) -> tuple[DataNode, ...]:
    """An image [H, W, 3] uint8 on ``device``.

    ``inputs`` of pixels are the pixels; of a file, those of ``_encoded`` and the part to decode (top-left, size). For a
    file also the shape [3] of the whole image as it is now, which the commands rely on.
    """
    if form in ("HWC", "CWH"):
        image = fn.transpose(inputs[0], perm=[2, 1, 0]) if form == "CWH" else inputs[0]
        return (fn.reshape(image, layout="HWC"),)
    *given, origin, extent = inputs
    encoded = _encoded(given, form)
    stored_shape = fn.peek_image_shape(encoded, adjust_orientation=exif_orientation)
    # DALI 2.4's image_slice crashes the process where a sample is no image or smaller than its slice; reading the
    # header first makes the former an error, and this makes the latter something to be noticed afterwards.
    origin = math.min(origin, stored_shape[:2] - 1)
    extent = math.min(extent, stored_shape[:2] - origin)
    on_gpu = device == "gpu"
    height, width = largest_hw or (0, 0)
    hints: dict[str, Any] = {"preallocate_height_hint": height, "preallocate_width_hint": width} if on_gpu else {}
    image = fn.decoders.image_slice(
        encoded,
        origin,
        extent,
        axes=[0, 1],
        normalized_anchor=False,
        normalized_shape=False,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=exif_orientation,
        **hints,
    )
    return image, stored_shape


def _encoded(given: Sequence[DataNode], form: Form) -> DataNode:
    """The content of a file: it is given, or its name is, or whether it is, itself, and the name."""
    if form == "bytes":
        return given[0]
    if form == "path":
        return fn.io.file.read(given[0], dont_use_mmap=True)
    is_given, content, path = given
    # A per-sample condition.
    if is_given:
        encoded = content
    else:
        encoded = fn.io.file.read(path, dont_use_mmap=True)
    return encoded


def evaluation_pipeline(
    source: Callable[[], Sequence[Any]],
    size: int,
    *,
    form: FileForm,
    device: str,
    exif_orientation: bool = False,
    **pipeline_options: Any,
) -> Any:
    """A pipeline that resizes images from files and cuts out a square.

    ``source`` returns the inputs of a file as in ``open_image``, less the part to decode; sizes to resize to [N, 2] and
    top-left corners of the square [N, 2]. The pipeline returns images [N, size, size, 3] uint8 on ``device``, and the
    images' shapes [N, 3] as they are now.
    """
    opening = {"path": 1, "bytes": 1, "either": 3}[form]

    @pipeline_def(enable_conditionals=True, exec_dynamic=True, **pipeline_options)  # type: ignore[untyped-decorator]
    def pipeline() -> tuple[DataNode, ...]:
        *given, resized_hw, corner = fn.external_source(source, num_outputs=opening + 2, batch=True, no_copy=True)
        encoded = _encoded(given, form)
        stored_shape = fn.peek_image_shape(encoded, adjust_orientation=exif_orientation)
        image = fn.decoders.image(
            encoded,
            device="mixed" if device == "gpu" else "cpu",
            output_type=types.RGB,
            adjust_orientation=exif_orientation,
        )
        resized = fn.resize(image, size=resized_hw, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.slice(resized, corner, [size, size], axes=[0, 1]), stored_shape

    return pipeline()
