"""Commands: the augmentation parameters of each view, drawn before anything is executed.

A command is data. ``draw`` is a pure function of (seed, epoch, position in the epoch, image size, policy), so commands
do not depend on the number of processes, the device, or whether a run was resumed. Each position owns a fixed range of
a counter-based generator's stream; a batch of consecutive positions is therefore one contiguous draw.

Shapes: N images, V = 2 views (i and j).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

VIEWS = 2
TRIES = 10
"""The number of tries of torchvision's RandomResizedCrop before it uses the center."""

JITTER_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int32)
"""[24, 4]: every order of brightness (0), contrast (1), saturation (2) and hue (3)."""

# One column per random choice of a view. 36 and not 33 columns: a Philox counter yields four numbers at a time, and
# a position must start on a counter.
_AREA, _RATIO = 0, TRIES  # one column per try
_TOP, _LEFT, _FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(2 * TRIES, 2 * TRIES + 8)
_ORDER, _GRAY, _BLUR, _SIGMA, _SOLARIZE = range(_HUE + 1, _HUE + 6)
UNIFORMS_PER_VIEW = 36
_COUNTERS_PER_VIEW = UNIFORMS_PER_VIEW // 4

COMMAND_STREAM, IMAGE_STREAM, LABELED_STREAM, REPLACEMENT_STREAM = 1, 2, 3, 4
"""Streams of the generator: the commands, the order of the images, the commands of labeled images for the online
classifier, and the replacements of bad images."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The distribution that commands are drawn from; the defaults are the official CIFAR policy.

    A probability of 0 or less means never. The strengths follow SimCLR: brightness, contrast and saturation factors
    lie within ``1 ± 0.8 jitter_strength`` (not below 0), the hue within ``± 0.2 jitter_strength`` turns.
    """

    size: int = 32
    """Height and width of a view in px. Only the strength of the blur depends on it."""
    area: tuple[float, float] = (0.08, 1.0)
    """Range of the crop box's area as a fraction of the image."""
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop box's width over height."""
    p_flip: float = 0.5
    jitter_strength: float = 0.5
    p_color_jitter: float = 0.8
    p_grayscale: float = 0.2
    p_blur: float = 0.0
    p_solarize: float = 0.0

    @property
    def sigma_px(self) -> tuple[float, float]:
        """Range of the blur's standard deviation in px of the view: 0.1 to 2 at 224 px, scaled with the size."""
        return 0.1 * self.size / 224, 2.0 * self.size / 224

    @property
    def blur_window_px(self) -> int:
        """Width of the official blur kernel: a tenth of the size, made odd."""
        width = int(0.1 * self.size)
        return width + 1 if width % 2 == 0 else width


@dataclass(frozen=True, kw_only=True)
class Commands:
    """The parameters of V views of each of N images. Arrays are [N, V] unless noted otherwise.

    Switched-off parts hold the neutral value (factor 1, hue 0, sigma 0), so the values alone describe what is executed.
    All values are representable in float32, as ``pack`` requires.
    """

    source_height: NDArray[np.int32]
    """Height of the source image in px."""
    source_width: NDArray[np.int32]
    """Width of the source image in px."""
    top: NDArray[np.int32]
    """First row of the crop box in source px."""
    left: NDArray[np.int32]
    """First column of the crop box in source px."""
    height: NDArray[np.int32]
    """Height of the crop box in source px."""
    width: NDArray[np.int32]
    """Width of the crop box in source px."""
    flip: NDArray[np.bool_]
    """Whether the resized crop is mirrored left to right."""
    jitter: NDArray[np.bool_]
    """Whether the colors are jittered."""
    brightness: NDArray[np.float32]
    """Factor >= 0."""
    contrast: NDArray[np.float32]
    """Factor >= 0."""
    saturation: NDArray[np.float32]
    """Factor >= 0."""
    hue_turns: NDArray[np.float32]
    """Rotation of the hue in turns, -0.5 to 0.5."""
    order: NDArray[np.int32]
    """[N, V, 4]: the order of brightness (0), contrast (1), saturation (2) and hue (3)."""
    gray: NDArray[np.bool_]
    """Whether the view is made gray."""
    blur: NDArray[np.bool_]
    """Whether the view is blurred."""
    sigma_px: NDArray[np.float32]
    """Standard deviation of the Gaussian blur in px of the view; 0 where not blurred."""
    solarize: NDArray[np.bool_]
    """Whether values of one half and more are inverted."""

    def __len__(self) -> int:
        return len(self.top)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Commands:
        """The commands of some of the images, as an index along N."""
        return Commands(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def pack(self) -> NDArray[np.float32]:
        """[N, V, 20] float32 in the order of the fields: one tensor that travels with its batch."""
        packed = np.empty((*self.top.shape, PACKED_COLUMNS["end"]), dtype=np.float32)
        for field in fields(self):
            packed[..., _columns_of(field.name)] = getattr(self, field.name)
        return packed

    @staticmethod
    def unpack(packed: NDArray[np.float32]) -> Commands:
        """The inverse of ``pack``, bit-exact."""
        values: dict[str, NDArray[np.generic]] = {}
        for field in fields(Commands):
            dtype = np.bool_ if "bool" in str(field.type) else np.int32 if "int32" in str(field.type) else np.float32
            values[field.name] = packed[..., _columns_of(field.name)].astype(dtype)
        return Commands(**values)  # type: ignore[arg-type]


def _packed_columns() -> dict[str, int]:
    columns, column = {}, 0
    for field in fields(Commands):
        columns[field.name] = column
        column += 4 if field.name == "order" else 1
    return {**columns, "end": column}


PACKED_COLUMNS = _packed_columns()
"""The first column of each field in a row of ``Commands.pack``; ``end`` is the number of columns."""


def _columns_of(name: str) -> int | slice:
    first = PACKED_COLUMNS[name]
    return slice(first, first + 4) if name == "order" else first


def generator(stream: int, seed: int, epoch: int, counter: int = 0) -> np.random.Generator:
    """A counter-based generator whose output is a pure function of its four arguments.

    ``counter`` skips ahead in units of four float64 numbers.
    """
    philox = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    return np.random.Generator(philox.advance(counter) if counter else philox)


def draw(
    policy: Policy,
    *,
    seed: int,
    epoch: int,
    first_position: int,
    image_hw: NDArray[np.integer],
    views: int = VIEWS,
    stream: int = COMMAND_STREAM,
) -> Commands:
    """Draw the commands of consecutive positions of an epoch.

    ``image_hw`` is [N, 2], the source images' heights and widths in px at the positions ``first_position`` to
    ``first_position + N - 1``. The distribution is that of torchvision's RandomResizedCrop, RandomHorizontalFlip,
    ColorJitter in RandomApply and RandomGrayscale, followed by the official blur and solarization.
    """
    counter = first_position * views * _COUNTERS_PER_VIEW
    uniforms = generator(stream, seed, epoch, counter).random((len(image_hw), views, UNIFORMS_PER_VIEW))
    return commands_from_uniforms(policy, uniforms, image_hw)


def commands_from_uniforms(policy: Policy, uniforms: NDArray[np.float64], image_hw: NDArray[np.integer]) -> Commands:
    """Turn uniforms in [0, 1), [N, V, 36] float64, into commands for images of sizes ``image_hw`` [N, 2]."""
    shape = uniforms.shape[:2]
    source_height = np.broadcast_to(np.asarray(image_hw[:, 0], np.int32)[:, None], shape)
    source_width = np.broadcast_to(np.asarray(image_hw[:, 1], np.int32)[:, None], shape)
    top, left, height, width = _crop_boxes(policy, uniforms, source_height, source_width)

    def happens(column: int, probability: float) -> NDArray[np.bool_]:
        return uniforms[..., column] < probability

    def between(column: int, low: float, high: float) -> NDArray[np.float64]:
        return low + uniforms[..., column] * (high - low)

    jitter = happens(_JITTER, policy.p_color_jitter)
    blur = happens(_BLUR, policy.p_blur)
    factor_range = (max(0.0, 1 - 0.8 * policy.jitter_strength), 1 + 0.8 * policy.jitter_strength)
    hue_range = (-0.2 * policy.jitter_strength, 0.2 * policy.jitter_strength)

    def where(mask: NDArray[np.bool_], values: NDArray[np.float64], neutral: float) -> NDArray[np.float32]:
        return np.where(mask, values, neutral).astype(np.float32)

    return Commands(
        source_height=source_height,
        source_width=source_width,
        top=top,
        left=left,
        height=height,
        width=width,
        flip=happens(_FLIP, policy.p_flip),
        jitter=jitter,
        brightness=where(jitter, between(_BRIGHTNESS, *factor_range), 1),
        contrast=where(jitter, between(_CONTRAST, *factor_range), 1),
        saturation=where(jitter, between(_SATURATION, *factor_range), 1),
        hue_turns=where(jitter, between(_HUE, *hue_range), 0),
        order=JITTER_ORDERS[(uniforms[..., _ORDER] * len(JITTER_ORDERS)).astype(np.int64)],
        gray=happens(_GRAY, policy.p_grayscale),
        blur=blur,
        sigma_px=where(blur, between(_SIGMA, *policy.sigma_px), 0),
        solarize=happens(_SOLARIZE, policy.p_solarize),
    )


def _crop_boxes(
    policy: Policy,
    uniforms: NDArray[np.float64],
    source_height: NDArray[np.int32],
    source_width: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Crop boxes as torchvision draws them: up to 10 tries, then the largest central one within the ratio bounds."""
    flat = uniforms.reshape(-1, uniforms.shape[-1])
    rows, columns = source_height.reshape(-1), source_width.reshape(-1)
    low_area, high_area = policy.area
    low_ratio, high_ratio = policy.aspect_ratio

    height, width = np.zeros(len(flat), np.int32), np.zeros(len(flat), np.int32)
    pending = np.arange(len(flat))
    for attempt in range(TRIES):
        area = rows[pending] * columns[pending] * (low_area + flat[pending, _AREA + attempt] * (high_area - low_area))
        log_ratio = np.log(low_ratio) + flat[pending, _RATIO + attempt] * np.log(high_ratio / low_ratio)
        root = np.exp(0.5 * log_ratio)
        w = np.rint(np.sqrt(area) * root).astype(np.int32)
        h = np.rint(np.sqrt(area) / root).astype(np.int32)
        fits = (w > 0) & (w <= columns[pending]) & (h > 0) & (h <= rows[pending])
        height[pending[fits]], width[pending[fits]] = h[fits], w[fits]
        pending = pending[~fits]
        if not len(pending):
            break

    top = (flat[:, _TOP] * (rows - height + 1)).astype(np.int32)
    left = (flat[:, _LEFT] * (columns - width + 1)).astype(np.int32)

    if len(pending):
        h, w = rows[pending].copy(), columns[pending].copy()
        ratio = w / h
        too_tall, too_wide = ratio < low_ratio, ratio > high_ratio
        h[too_tall] = np.rint(w[too_tall] / low_ratio)
        w[too_wide] = np.rint(h[too_wide] * high_ratio)
        height[pending], width[pending] = h, w
        top[pending], left[pending] = (rows[pending] - h) // 2, (columns[pending] - w) // 2

    shape = source_height.shape
    return top.reshape(shape), left.reshape(shape), height.reshape(shape), width.reshape(shape)
