"""Views on the CPU: one compiled function that executes a command from crop to float, like Pillow and torchvision.

The arithmetic is Pillow's own, rounding included (its ``Resample.c``, ``Blend.c``, ``Convert.c``, ``ImageEnhance``), so
that a view equals the one that torchvision's transforms make from the same command. All stages of a view are executed
while it is in the cache. DALI calls the function from its threads, once per image, as an operator of its graph.

Numba compiles on first use, in a few seconds, and caches the machine code on disk.

Indices are unsigned in inner loops: Numba would otherwise check for negative ones at every access.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipelines.commands import PACKED_COLUMNS
from pipelines.executors import SMALLEST_VIEW_PX, vectors

WEIGHT_BITS = 22
"""Fraction bits of the resampling weights, as in Pillow: 32 less 8 for the pixel and 2 to spare."""
HALF = 1 << (WEIGHT_BITS - 1)

TOP, LEFT, HEIGHT, WIDTH = (PACKED_COLUMNS[name] for name in ("top", "left", "height", "width"))
FLIP, JITTER, GRAY, SOLARIZE = (PACKED_COLUMNS[name] for name in ("flip", "jitter", "gray", "solarize"))
BRIGHTNESS, CONTRAST, SATURATION = (PACKED_COLUMNS[name] for name in ("brightness", "contrast", "saturation"))
HUE, ORDER, BLUR, SIGMA = (PACKED_COLUMNS[name] for name in ("hue_turns", "order", "blur", "sigma_px"))
SOURCE_HEIGHT, SOURCE_WIDTH = PACKED_COLUMNS["source_height"], PACKED_COLUMNS["source_width"]
COLUMNS = PACKED_COLUMNS["end"]


def _can_cache() -> bool:
    """Whether Numba can cache machine code, next to this file or in the user's cache folder."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


CACHE = _can_cache()

BLOCK_PX = SMALLEST_VIEW_PX
"""Pixels of a row that are computed together when columns are resized."""
BLOCK_FLOATS = 32
"""Floats of a row that are computed together in a blur."""
_filled_pixel, _add_pixel = vectors.filled(types.int32, 4), vectors.add_product(types.int32, 4)
_filled_block, _add_block = vectors.filled(types.int32, 4 * BLOCK_PX), vectors.add_product(types.int32, 4 * BLOCK_PX)
_filled_floats, _add_floats = (
    vectors.filled(types.float32, BLOCK_FLOATS),
    vectors.add_product(types.float32, BLOCK_FLOATS),
)
_store_pixel, _store_planes = vectors.store_bytes(4, WEIGHT_BITS), vectors.store_planes(BLOCK_PX, WEIGHT_BITS)
_store_floats = vectors.store_floats(BLOCK_FLOATS)

# Called from compiled code only, so the wrappers for Python are not needed.
compiled = njit(cache=CACHE, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@compiled
def _make_views(
    image: Any, strides: Any, image_hw: Any, origin: Any, commands: Any, window_px: int, views: Any
) -> None:
    """Fill ``views`` [V, size, size, 3] float32 in [0, 1] by executing ``commands`` [V, 20] float32.

    ``image`` is a flat array of uint8 with ``strides`` between rows, columns and colors. It is the part of the source
    image that starts at ``origin`` and has the size ``image_hw``. ``window_px``: width of the official blur kernel.
    """
    size = views.shape[1]
    for v in range(len(views)):
        command, view = commands[v], views[v]
        # The file may have changed since its command was drawn: never read out of bounds. The change is detected later.
        top = min(max(int(command[TOP]) - origin[0], 0), image_hw[0] - 1)
        left = min(max(int(command[LEFT]) - origin[1], 0), image_hw[1] - 1)
        height, width = min(int(command[HEIGHT]), image_hw[0] - top), min(int(command[WIDTH]), image_hw[1] - left)
        start = top * strides[0] + left * strides[1]
        planes = _resize(image, start, strides, height, width, size, command[FLIP] != 0)
        if command[JITTER] != 0:
            for k in range(4):
                step = int(command[ORDER + k])
                if step == 0:
                    _brightness(planes, command[BRIGHTNESS])
                elif step == 1:
                    _contrast(planes, command[CONTRAST])
                elif step == 2:
                    _saturation(planes, command[SATURATION])
                else:
                    _hue(planes, command[HUE])
        if command[GRAY] != 0:
            _gray(planes)
        if command[BLUR] != 0:
            _blurred(planes, float(command[SIGMA]), window_px, view)
        else:
            _interleave(planes, view)
        if command[SOLARIZE] != 0:
            _solarize(view)


@compiled
def _weights(source_px: int, target_px: int) -> tuple[Any, Any, Any]:
    """Pillow's triangle filter: first source pixel, number of taps and weights of each target pixel."""
    scale = source_px / target_px
    support = max(scale, 1.0)
    most = math.ceil(support) * 2 + 1
    first = np.empty(target_px, np.int64)
    taps = np.empty(target_px, np.int64)
    weights = np.empty((target_px, most), np.int32)
    exact = np.empty(most)
    for target in range(np.uint64(target_px)):
        center = (np.int64(target) + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), source_px) - low
        total = 0.0
        for k in range(np.uint64(count)):
            weight = max(0.0, 1.0 - abs((np.int64(k) + low - center + 0.5) / support))
            exact[k] = weight
            total += weight
        for k in range(np.uint64(count)):
            weights[target, k] = int(0.5 + exact[k] / total * (1 << WEIGHT_BITS))
        first[target] = low
        taps[target] = count
    return first, taps, weights


@compiled
def _resize(image: Any, start: int, strides: Any, height: int, width: int, size: int, flip: bool) -> Any:
    """[3, size * size] uint8: the rows of the crop resized first, then its columns, rounded in between."""
    across = _weights(width, size)
    # Of each pixel red, green, blue and an unused byte, so that one register holds a pixel.
    rows = np.empty(4 * height * size, np.uint8)
    fours = 0
    if strides[1] == 3 and strides[2] == 1:
        fours = height // 4
        # The byte after the last pixel is read as well.
        if start + (4 * fours - 1) * strides[0] + 3 * width + 1 > image.size:
            fours -= 1
        _resize_fours_of_rows(image, start, strides[0], fours, size, flip, across, rows)
    _resize_rows(image, start, strides, 4 * fours, height, size, flip, across, rows)
    first, taps, weights = _weights(height, size)
    planes = np.empty((3, size * size), np.uint8)
    red, green, blue = planes[0], planes[1], planes[2]
    pitch = np.uint64(4 * size)
    for y in range(np.uint64(size)):
        for block in range(np.uint64((size + BLOCK_PX - 1) // BLOCK_PX)):
            # The last block overlaps the one before if the size is no multiple.
            x = min(block * np.uint64(BLOCK_PX), np.uint64(size - BLOCK_PX))
            at = np.uint64(first[y]) * pitch + np.uint64(4) * x
            total = _filled_block(np.int32(HALF))
            for k in range(np.uint64(taps[y])):
                total = _add_block(total, rows, at, weights[y, k])
                at += pitch
            _store_planes(red, green, blue, y * np.uint64(size) + x, total)
    return planes


@compiled
def _resize_rows(
    image: Any, start: int, strides: Any, first_row: int, height: int, size: int, flip: bool, across: Any, rows: Any
) -> None:
    """Resize the rows of an image of any layout, from ``first_row`` on, by the filter ``across``."""
    first, taps, weights = across
    step_y, step_x, step_c = np.uint64(strides[0]), np.uint64(strides[1]), np.uint64(strides[2])
    last = np.uint64(size - 1)
    for y in range(np.uint64(first_row), np.uint64(height)):
        row = np.uint64(start) + y * step_y
        for x in range(np.uint64(size)):
            at = row + np.uint64(first[x]) * step_x
            red = green = blue = np.int32(HALF)
            for k in range(np.uint64(taps[x])):
                weight = weights[x, k]
                red += np.int32(image[at]) * weight
                green += np.int32(image[at + step_c]) * weight
                blue += np.int32(image[at + step_c + step_c]) * weight
                at += step_x
            to = np.uint64(4) * (y * np.uint64(size) + (last - x if flip else x))
            rows[to] = red >> WEIGHT_BITS
            rows[to + np.uint64(1)] = green >> WEIGHT_BITS
            rows[to + np.uint64(2)] = blue >> WEIGHT_BITS


@compiled
def _resize_fours_of_rows(
    image: Any, start: int, step_y: int, fours: int, size: int, flip: bool, across: Any, rows: Any
) -> None:
    """``_resize_rows`` of the first 4 * ``fours`` rows of an image whose pixels are three bytes each."""
    first, taps, weights = across
    one_row, pitch, last = np.uint64(step_y), np.uint64(4 * size), np.uint64(size - 1)
    for block in range(np.uint64(fours)):
        row, to_row = np.uint64(start) + np.uint64(4) * block * one_row, np.uint64(4) * block * pitch
        for x in range(np.uint64(size)):
            a = row + np.uint64(3) * np.uint64(first[x])
            total_a = total_b = total_c = total_d = _filled_pixel(np.int32(HALF))
            for k in range(np.uint64(taps[x])):
                weight, b = weights[x, k], a + one_row
                c = b + one_row
                total_a, total_b = _add_pixel(total_a, image, a, weight), _add_pixel(total_b, image, b, weight)
                total_c = _add_pixel(total_c, image, c, weight)
                total_d = _add_pixel(total_d, image, c + one_row, weight)
                a += np.uint64(3)
            to = to_row + np.uint64(4) * (last - x if flip else x)
            _store_pixel(rows, to, total_a)
            _store_pixel(rows, to + pitch, total_b)
            _store_pixel(rows, to + pitch + pitch, total_c)
            _store_pixel(rows, to + pitch + pitch + pitch, total_d)


@compiled
def _blend(background: Any, value: Any, factor: Any) -> Any:
    """Pillow's ``Image.blend``: away from the background for factors above 1, rounded down, clipped."""
    mixed = background + factor * (value - background)
    return np.uint8(np.int32(min(max(mixed, np.float32(0)), np.float32(255))))


@compiled
def _luma(red: Any, green: Any, blue: Any) -> Any:
    """Pillow's gray of a color, in integers."""
    return (np.int32(red) * 19595 + np.int32(green) * 38470 + np.int32(blue) * 7471 + 0x8000) >> 16


@compiled
def _brightness(planes: Any, factor: Any) -> None:
    for c in range(3):
        plane = planes[c]
        for p in range(plane.size):
            plane[p] = _blend(np.float32(0), np.float32(plane[p]), factor)


@compiled
def _contrast(planes: Any, factor: Any) -> None:
    red, green, blue = planes[0], planes[1], planes[2]
    total = np.int32(0)
    for p in range(red.size):
        total += np.int32(_luma(red[p], green[p], blue[p]))
    mean = np.float32(int(total / red.size + 0.5))
    for c in range(3):
        plane = planes[c]
        for p in range(plane.size):
            plane[p] = _blend(mean, np.float32(plane[p]), factor)


@compiled
def _saturation(planes: Any, factor: Any) -> None:
    red, green, blue = planes[0], planes[1], planes[2]
    for p in range(red.size):
        luma = np.float32(_luma(red[p], green[p], blue[p]))
        red[p] = _blend(luma, np.float32(red[p]), factor)
        green[p] = _blend(luma, np.float32(green[p]), factor)
        blue[p] = _blend(luma, np.float32(blue[p]), factor)


@compiled
def _gray(planes: Any) -> None:
    red, green, blue = planes[0], planes[1], planes[2]
    for p in range(red.size):
        luma = np.uint8(_luma(red[p], green[p], blue[p]))
        red[p] = luma
        green[p] = luma
        blue[p] = luma


@compiled
def _hue(planes: Any, turns: Any) -> None:
    """Through Pillow's HSV, whose three values have 8 bits each; without branches, so that it is vectorized.

    In single precision, where Pillow partly uses double: one color in 1,000 gets the adjacent hue.
    """
    shift = np.int32(np.float64(turns) * 255)
    red, green, blue = planes[0], planes[1], planes[2]
    one, full, half = np.float32(1), np.float32(255), np.float32(0.5)
    for p in range(np.uint64(red.size)):
        # Bytes where they suffice, of which a register holds four times as many.
        r8, g8, b8 = red[p], green[p], blue[p]
        v8, low8 = max(r8, max(g8, b8)), min(r8, min(g8, b8))
        r, g, b, value = np.float32(r8), np.float32(g8), np.float32(b8), np.float32(v8)
        chroma = np.float32(np.uint8(v8 - low8))
        inverse = one / max(chroma, one)
        rc, gc, bc = (value - r) * inverse, (value - g) * inverse, (value - b) * inverse
        sixths = np.float32(4) + gc - rc
        sixths = np.float32(2) + rc - bc if g8 == v8 else sixths
        sixths = bc - gc if r8 == v8 else sixths
        turn = sixths / np.float32(6)
        turn = turn + one if turn < np.float32(0) else turn
        hue = (np.int32(turn * full) + shift) & 255
        saturation = np.float32(np.int32(chroma / max(value, one) * full)) / full

        sixths = np.float32(hue) * np.float32(6) / full
        sector = np.uint8(np.int32(sixths))
        part = sixths - np.float32(np.int32(sixths))
        lowest = np.uint8(np.int32(value * (one - saturation) + half))
        falling = np.uint8(np.int32(value * (one - saturation * part) + half))
        rising = np.uint8(np.int32(value * (one - saturation * (one - part)) + half))
        first = (sector == np.uint8(0)) | (sector == np.uint8(6))
        r8 = v8 if first | (sector == np.uint8(5)) else lowest
        r8 = falling if sector == np.uint8(1) else (rising if sector == np.uint8(4) else r8)
        g8 = v8 if (sector == np.uint8(1)) | (sector == np.uint8(2)) else lowest
        g8 = rising if first else (falling if sector == np.uint8(3) else g8)
        b8 = v8 if (sector == np.uint8(3)) | (sector == np.uint8(4)) else lowest
        b8 = rising if sector == np.uint8(2) else (falling if sector == np.uint8(5) else b8)
        red[p], green[p], blue[p] = r8, g8, b8


@compiled
def _interleave(planes: Any, view: Any) -> None:
    """Planes of bytes to a view [size, size, 3] float32 in [0, 1]."""
    flat = view.reshape(-1)
    red, green, blue = planes[0], planes[1], planes[2]
    full = np.float32(255)
    for p in range(np.uint64(red.size)):
        flat[np.uint64(3) * p] = np.float32(red[p]) / full
        flat[np.uint64(3) * p + np.uint64(1)] = np.float32(green[p]) / full
        flat[np.uint64(3) * p + np.uint64(2)] = np.float32(blue[p]) / full


def blur_reach(sigma_px: float, window_px: int) -> int:
    """How many pixels the blur reaches to each side.

    Four sigmas are within one part in 10,000 of the official kernel, of ``window_px``, which is never exceeded.
    """
    return min(window_px // 2, math.ceil(4 * sigma_px))


_blur_reach = compiled(blur_reach)


@compiled
def _fill_blur_weights(sigma_px: float, reach: int, weights: Any) -> None:
    """``weights`` [2 ``reach`` + 1]: torchvision's Gaussian, with the sum 1."""
    total = 0.0
    for k in range(2 * reach + 1):
        distance = (k - reach) / sigma_px
        weights[k] = math.exp(-0.5 * distance * distance)
        total += weights[k]
    for k in range(2 * reach + 1):
        weights[k] = weights[k] / total


@njit(cache=CACHE, nogil=True, error_model="numpy")
def blur_weights(sigma_px: Any, window_px: int, reach: int) -> Any:
    """[N, 2 ``reach`` + 1] float32: the kernels of blurs with ``sigma_px`` [N] float32, followed by zeros.

    ``reach`` must be that of the largest sigma or more. A sigma of 0, of no blur, has only zeros.
    """
    weights = np.zeros((len(sigma_px), 2 * reach + 1), np.float32)
    for n in range(len(sigma_px)):
        sigma = float(sigma_px[n])
        if sigma > 0:
            _fill_blur_weights(sigma, _blur_reach(sigma, window_px), weights[n])
    return weights


@compiled
def _blurred(planes: Any, sigma_px: float, window_px: int, view: Any) -> None:
    """``_interleave`` with torchvision's Gaussian blur, mirrored at the borders."""
    size = view.shape[0]
    reach = _blur_reach(sigma_px, window_px)
    weights = np.empty(2 * reach + 1, np.float32)
    _fill_blur_weights(sigma_px, reach, weights)
    # Lines are as long as whole vectors; what is computed behind their ends is not used.
    blocks = np.uint64((size + BLOCK_FLOATS - 1) // BLOCK_FLOATS)
    pitch = np.uint64(BLOCK_FLOATS) * blocks
    padded = np.zeros(int(pitch) + 2 * reach, np.float32)
    rows = np.empty(size * int(pitch), np.float32)
    blurred = np.empty((3, size * int(pitch)), np.float32)
    full = np.float32(255)
    for c in range(3):
        for y in range(size):
            plane = planes[c, y * size : (y + 1) * size]
            for x in range(size):
                padded[reach + x] = np.float32(plane[x]) / full
            for k in range(reach):
                padded[reach - 1 - k] = padded[reach + 1 + k]
                padded[reach + size + k] = padded[reach + size - 2 - k]
            for block in range(blocks):
                total = _filled_floats(np.float32(0))
                for k in range(np.uint64(weights.size)):
                    total = _add_floats(total, padded, np.uint64(BLOCK_FLOATS) * block + k, weights[k])
                _store_floats(rows, np.uint64(y) * pitch + np.uint64(BLOCK_FLOATS) * block, total)
        plane_of_floats = blurred[c]
        for y in range(size):
            for block in range(blocks):
                total = _filled_floats(np.float32(0))
                for k in range(2 * reach + 1):
                    at = abs(y + k - reach)
                    at = 2 * (size - 1) - at if at >= size else at
                    total = _add_floats(
                        total, rows, np.uint64(at) * pitch + np.uint64(BLOCK_FLOATS) * block, weights[k]
                    )
                _store_floats(plane_of_floats, np.uint64(y) * pitch + np.uint64(BLOCK_FLOATS) * block, total)
    flat = view.reshape(-1)
    red, green, blue = blurred[0], blurred[1], blurred[2]
    for y in range(np.uint64(size)):
        to, at = np.uint64(3) * np.uint64(size) * y, pitch * y
        for x in range(np.uint64(size)):
            flat[to + np.uint64(3) * x] = red[at + x]
            flat[to + np.uint64(3) * x + np.uint64(1)] = green[at + x]
            flat[to + np.uint64(3) * x + np.uint64(2)] = blue[at + x]


@compiled
def _solarize(view: Any) -> None:
    flat = view.reshape(-1)
    for p in range(flat.size):
        flat[p] = min(flat[p], np.float32(1) - flat[p])


# --- C functions of addresses, in the form that DALI's operator for Numba calls ---


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@compiled
def _at(address: int, shape: Any, dtype: Any) -> Any:
    return carray(_pointer(address), shape, dtype)


_U, _I = types.uint64, types.int32
_SHAPES = types.void(_U, _U, _I, _U, _U, _I, _I)
_RUN = types.void(_U, _U, _U, _I, _U, _U, _U, _I)

# Each is compiled when it is first needed: a run uses one of the two below.


def shape_function(views: int, size: int) -> int:
    """Address of the function that returns the shape of each sample's output: [views, size, size, 3]."""

    @cfunc(_SHAPES, cache=CACHE)
    def shapes(outputs, _ranks, _count, _input_shapes, _input_ranks, _input_count, samples):
        by_sample = _at(outputs, samples, np.uint64)
        for n in range(samples):
            shape = _at(by_sample[n], 4, np.int64)
            shape[0], shape[1], shape[2], shape[3] = views, size, size, 3

    return int(shapes.address)


def gpu_shape_function(size: int, tiles: int) -> int:
    """Address of the function that returns the shapes of the outputs of a kernel on a GPU.

    The first is [views, size, size, 3], the second, if any, [views, tiles]. The number of views is the first dimension
    of the last input.
    """

    @cfunc(_SHAPES, cache=CACHE)
    def shapes(outputs, _ranks, count, input_shapes, _input_ranks, inputs, samples):
        by_output = _at(outputs, count * samples, np.uint64)
        by_input = _at(input_shapes, inputs * samples, np.uint64)
        for n in range(samples):
            views = _at(by_input[(inputs - 1) * samples + n], 2, np.int64)[0]
            shape = _at(by_output[n], 4, np.int64)
            shape[0], shape[1], shape[2], shape[3] = views, size, size, 3
            if count > 1:
                shape = _at(by_output[samples + n], 2, np.int64)
                shape[0], shape[1] = views, tiles

    return int(shapes.address)


def views_of_memory() -> int:
    """Address of the operator on images in memory, with any layout.

    Inputs of a sample: [5] int64, the address of the image's first byte, its three strides and the width of the blur
    kernel; its commands [V, 20].
    """

    @cfunc(_RUN, cache=CACHE)
    def run(outputs, shapes, _ranks, _count, inputs, _input_shapes, _input_ranks, _input_count):
        shape = _at(_at(shapes, 1, np.uint64)[0], 4, np.int64)
        views = _at(_at(outputs, 1, np.uint64)[0], (shape[0], shape[1], shape[2], 3), np.float32)
        by_input = _at(inputs, 2, np.uint64)
        where = _at(by_input[0], 5, np.int64)
        commands = _at(by_input[1], (shape[0], COLUMNS), np.float32)
        height, width = int(commands[0, SOURCE_HEIGHT]), int(commands[0, SOURCE_WIDTH])
        image = _at(np.uint64(where[0]), height * width * 3, np.uint8)
        _make_views(image, where[1:4], (height, width), (0, 0), commands, where[4], views)

    return int(run.address)


def views_of_decoded() -> int:
    """Address of the operator on decoded images.

    Inputs of a sample: the decoded part of the image [H, W, 3] uint8; its top-left in the source and the width of the
    blur kernel, [3] int64; its commands [V, 20].
    """

    @cfunc(_RUN, cache=CACHE)
    def run(outputs, shapes, _ranks, _count, inputs, input_shapes, _input_ranks, _input_count):
        shape = _at(_at(shapes, 1, np.uint64)[0], 4, np.int64)
        views = _at(_at(outputs, 1, np.uint64)[0], (shape[0], shape[1], shape[2], 3), np.float32)
        by_input = _at(inputs, 3, np.uint64)
        part = _at(_at(input_shapes, 3, np.uint64)[0], 3, np.int64)
        where = _at(by_input[1], 3, np.int64)
        commands = _at(by_input[2], (shape[0], COLUMNS), np.float32)
        image = _at(by_input[0], part[0] * part[1] * 3, np.uint8)
        strides = np.array([part[1] * 3, 3, 1])
        _make_views(image, strides, (part[0], part[1]), (where[0], where[1]), commands, where[2], views)

    return int(run.address)
