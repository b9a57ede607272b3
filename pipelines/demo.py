"""The embedded demo set: coloured, textured shapes over cluttered backgrounds, made from a seed.

The class is the shape alone. Position, size, rotation, colours, textures and clutter are drawn at random for every
image, so that neither colour nor background tells the class, and neither crop, flip nor jitter changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CLASSES = ("disc", "ring", "square", "triangle", "cross", "star", "crescent", "bar", "heart", "hourglass")
SIZE_PX = 32
IMAGES = {"train": 8192, "test": 2048}

Floats = NDArray[np.float32]


def render(*, split: Literal["train", "test"]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [N, 32, 32, 3] uint8 and labels [N] int64; classes are interleaved, so any prefix is balanced."""
    count = IMAGES[split]
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    images = np.empty((count, SIZE_PX, SIZE_PX, 3), np.uint8)
    # Chunks of this size keep the intermediate arrays within the processor's cache.
    chunk = 64
    for start in range(0, count, chunk):
        rng = np.random.default_rng([2022, split == "test", start])
        images[start : start + chunk] = _render_chunk(labels[start : start + chunk], rng)
    return images, labels


def _render_chunk(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Floats:
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    axis = (np.arange(SIZE_PX, dtype=np.float32) + 0.5) / SIZE_PX * 2 - 1
    x, y = axis[None, None, :], axis[None, :, None]

    image = _texture(x, y, count, uniform)
    for _ in range(4):
        image = _clutter(image, x, y, uniform)

    radius = uniform(0.42, 0.62)[:, None, None]
    angle = uniform(-0.5, 0.5)[:, None, None]
    centre_x, centre_y = (uniform(-0.3, 0.3)[:, None, None] for _ in range(2))
    u = (np.cos(angle) * (x - centre_x) + np.sin(angle) * (y - centre_y)) / radius
    v = (-np.sin(angle) * (x - centre_x) + np.cos(angle) * (y - centre_y)) / radius
    distance = np.empty_like(u)
    for label, shape in enumerate(_SHAPES):
        chosen = labels == label
        distance[chosen] = shape(u[chosen], v[chosen])
    # One pixel of the image is this long in the shape's own coordinates: the width of its soft edge.
    edge = 2 / SIZE_PX / radius
    cover = np.clip(0.5 - distance / edge, 0, 1)[..., None]
    image = image * (1 - cover) + _texture(x, y, count, uniform) * cover

    image += rng.normal(0, 0.02, image.shape).astype(np.float32)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _texture(x: Floats, y: Floats, count: int, uniform: Callable[..., Floats]) -> Floats:
    """[N, H, W, 3]: a wave between two colours, anything from a slow gradient to fine stripes or checks."""
    first, second = uniform(0, 1, 1, 1, 3), uniform(0, 1, 1, 1, 3)
    angle, frequency = uniform(0, np.pi, 1, 1), uniform(0.5, 9, 1, 1)
    phase, other_phase = uniform(0, 2 * np.pi, 1, 1), uniform(0, 2 * np.pi, 1, 1)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = -np.sin(angle) * x + np.cos(angle) * y
    wave = np.sin(frequency * along + phase)
    checked = uniform(0, 1, 1, 1) < 0.4
    wave = np.where(checked, wave * np.sin(frequency * across + other_phase), wave)
    mix = (0.5 + 0.5 * np.clip(1.5 * wave, -1, 1))[..., None] * 0.6
    return first + (second - first) * mix


def _clutter(image: Floats, x: Floats, y: Floats, uniform: Callable[..., Floats]) -> Floats:
    """A small ellipse or stroke of one colour somewhere in each image."""
    angle = uniform(0, np.pi, 1, 1)
    dx, dy = x - uniform(-1, 1, 1, 1), y - uniform(-1, 1, 1, 1)
    along = (np.cos(angle) * dx + np.sin(angle) * dy) / uniform(0.08, 0.45, 1, 1)
    across = (-np.sin(angle) * dx + np.cos(angle) * dy) / uniform(0.04, 0.14, 1, 1)
    cover = np.clip(3 * (1 - np.hypot(along, across)), 0, 1)[..., None]
    return image * (1 - cover) + uniform(0, 1, 1, 1, 3) * cover


# Shapes are signed distances (negative inside) in coordinates where the shape fills about [-1, 1]^2, y down.


def _disc(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - 0.85


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(np.hypot(u, v) - 0.72) - 0.2


def _square(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - 0.78


def _triangle(u: Floats, v: Floats) -> Floats:
    return np.maximum(0.87 * np.abs(u) - 0.5 * (v - 0.1) - 0.5, v - 0.7)


def _cross(u: Floats, v: Floats) -> Floats:
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 0.95, b - 0.27), np.maximum(b - 0.95, a - 0.27))


def _star(u: Floats, v: Floats) -> Floats:
    # Folded into one tenth of the star, its outline is the straight edge from the tip to the notch beside it.
    sector = 2 * np.pi / 5
    folded = np.abs((np.arctan2(u, -v) + sector / 2) % sector - sector / 2)
    radius = np.hypot(u, v)
    return 0.35 * (radius * np.cos(folded) - 1) + 0.94 * radius * np.sin(folded)


def _crescent(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.hypot(u, v) - 0.95, 0.72 - np.hypot(u - 0.5, v))


def _bar(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u) - 1.0, np.abs(v) - 0.3)


def _heart(u: Floats, v: Floats) -> Floats:
    a = np.abs(u)
    lobes = np.hypot(a - 0.42, v + 0.3) - 0.5
    point = np.maximum(0.71 * a + 0.71 * v - 0.58, -v - 0.3)
    return np.minimum(lobes, np.maximum(point, a - 0.92))


def _hourglass(u: Floats, v: Floats) -> Floats:
    return np.maximum(0.8 * (np.abs(u) - np.abs(v)) - 0.1, np.abs(v) - 0.9)


_SHAPES: tuple[Callable[[Floats, Floats], Floats], ...] = (
    _disc, _ring, _square, _triangle, _cross, _star, _crescent, _bar, _heart, _hourglass,
)  # fmt: skip
