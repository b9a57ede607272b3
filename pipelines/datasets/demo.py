"""The embedded demo set: colored, textured shapes over cluttered backgrounds, made from a seed.

The class is the shape. Positions, sizes, rotations, colors, textures and clutter are random for every image, so that
color and background do not depend on the class, and crop, flip and jitter preserve it. Every image shows its shape five
times, so that most crop boxes hold one. Colors are muted, so that after the jitter they do not identify an image;
otherwise contrastive learning would learn colors only.

Each image comes with the generative factors of its background and of its large shape, which is painted last, over the
others. Those of the four small shapes are left out: nothing in the image tells which of them is the first.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.cache import cache_folder, write_arrays
from pipelines.datasets.images import ImageArray
from pipelines.datasets.registry import Source, Split

CLASSES = ("disc", "ring", "square", "triangle", "cross", "star", "crescent", "bar", "heart", "hourglass")
SYMMETRIES = (0, 0, 4, 3, 4, 5, 1, 2, 1, 2)
"""For each class, how many rotations leave the shape as it is; 0: all. The triangle's are about another point than its
center, and move it."""
SIZE_PX = 32
IMAGES = {"train": 8192, "test": 2048}
VERSION = 1
"""Increased when the images change."""
FACTORS = (
    "x", "y", "size", "rotation sine", "rotation cosine", "red", "green", "blue",
    "background red", "background green", "background blue",
)  # fmt: skip
"""Center of the large shape (x right, y down, the image is [-1, 1]^2), half of its width (1 is half of the image's),
``sin(k a)`` and ``cos(k a)`` of its rotation a, if k turns of 1/k make the shape look the same (NaN for discs and
rings), and the colors of shape and background, 0 to 1, each averaged over its texture."""
CHUNK = 64
"""Images painted at a time; few enough for the intermediate arrays to fit into the processor's cache."""

Floats = NDArray[np.floating]


def read_demo(_source: Source, splits: Sequence[str]) -> list[Split]:
    """The splits ``train`` and ``test`` of the demo set."""
    return [Split(images=load(split="test" if split == "test" else "train"), classes=CLASSES) for split in splits]


def load(*, split: Literal["train", "test"]) -> ImageArray:
    """The result of ``render``, from the user's cache folder if it is there, as painting takes seconds."""
    count = IMAGES[split]
    file = cache_folder() / f"demo-{VERSION}-{split}-{count}.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels, factors = (arrays[name] for name in ("images", "labels", "factors"))
        shapes = (count, SIZE_PX, SIZE_PX, 3), (count,), (count, len(FACTORS))
        if (images.shape, labels.shape, factors.shape) == shapes:
            return _image_array(images, labels, factors)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    rendered = render(split=split)
    factors = np.stack(list(rendered.factors.values()), axis=1)
    write_arrays(file, images=rendered.pixels, labels=rendered.labels, factors=factors)
    return rendered


def render(*, split: Literal["train", "test"]) -> ImageArray:
    """The images of a split, with ``FACTORS``; classes alternate, so that any prefix is balanced."""
    count = IMAGES[split]
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    images = np.empty((count, SIZE_PX, SIZE_PX, 3), np.uint8)
    factors = np.empty((count, len(FACTORS)), np.float32)

    def render_chunk(start: int) -> None:
        chunk = slice(start, start + CHUNK)
        rng = np.random.default_rng([2022, split == "test", start])
        images[chunk], factors[chunk] = _paint(labels[chunk], rng)

    # NumPy releases the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        list(pool.map(render_chunk, range(0, count, CHUNK)))
    return _image_array(images, labels, factors)


def _image_array(images: NDArray[np.uint8], labels: NDArray[np.int64], factors: NDArray[np.float32]) -> ImageArray:
    return ImageArray(pixels=images, labels=labels, factors=dict(zip(FACTORS, factors.T, strict=True)))


def _paint(labels: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Images [N, 32, 32, 3] and their factors [N, F]."""
    painter = _Painter(len(labels), rng)
    image, background = painter.texture()
    for _ in range(4):
        image = painter.clutter(image)
    for _ in range(4):
        image, _ = painter.shape(image, labels, radius=(0.22, 0.32), reach=0.8)
    image, of_shape = painter.shape(image, labels, radius=(0.4, 0.55), reach=0.4)
    image += rng.normal(0, 0.02, image.shape).astype(np.float32)
    factors = np.concatenate([of_shape, background], axis=1)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), factors


class _Painter:
    """Paint a chunk of N images [N, H, W, 3] with random draws for each."""

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        self.count, self.rng = count, rng
        axis = (np.arange(SIZE_PX, dtype=np.float32) + 0.5) / SIZE_PX * 2 - 1
        self.x, self.y = axis[None, None, :], axis[None, :, None]

    def uniform(self, low: float, high: float, *shape: int) -> Floats:
        return self.rng.uniform(low, high, (self.count, *shape)).astype(np.float32)

    def color(self) -> Floats:
        """[N, 1, 1, 3]: a muted color."""
        return np.clip(self.uniform(0.1, 0.9, 1, 1, 1) + self.uniform(-0.1, 0.1, 1, 1, 3), 0, 1)

    def texture(self) -> tuple[Floats, Floats]:
        """A wave between two colors [N, H, W, 3], a slow gradient or stripes or checks, and its mean color [N, 3]."""
        first, second = self.color(), self.color()
        angle, frequency = self.uniform(0, np.pi, 1, 1), self.uniform(0.5, 9, 1, 1)
        along = np.cos(angle) * self.x + np.sin(angle) * self.y
        across = -np.sin(angle) * self.x + np.cos(angle) * self.y
        wave = np.sin(frequency * along + self.uniform(0, 2 * np.pi, 1, 1))
        checks = wave * np.sin(frequency * across + self.uniform(0, 2 * np.pi, 1, 1))
        wave = np.where(self.uniform(0, 1, 1, 1) < 0.4, checks, wave)
        mean = (first + (second - first) * 0.15)[:, 0, 0]
        return first + (second - first) * (0.15 + 0.15 * np.clip(1.5 * wave, -1, 1))[..., None], mean

    def clutter(self, image: Floats) -> Floats:
        """Add a small ellipse or stroke."""
        angle = self.uniform(0, np.pi, 1, 1)
        dx, dy = self.x - self.uniform(-1, 1, 1, 1), self.y - self.uniform(-1, 1, 1, 1)
        along = (np.cos(angle) * dx + np.sin(angle) * dy) / self.uniform(0.08, 0.45, 1, 1)
        across = (-np.sin(angle) * dx + np.cos(angle) * dy) / self.uniform(0.04, 0.14, 1, 1)
        cover = np.clip(3 * (1 - np.hypot(along, across)), 0, 1)[..., None]
        return image * (1 - cover) + self.color() * cover

    def shape(
        self, image: Floats, labels: NDArray[np.int64], *, radius: tuple[float, float], reach: float
    ) -> tuple[Floats, Floats]:
        """Add the shape of each image's class, of a size within ``radius``, at most ``reach`` from the center.

        Also returns the shape's factors [N, 8].
        """
        angle, size = self.uniform(-0.4, 0.4, 1, 1), self.uniform(*radius, 1, 1)
        center_x, center_y = self.uniform(-reach, reach, 1, 1), self.uniform(-reach, reach, 1, 1)
        dx, dy = self.x - center_x, self.y - center_y
        u = (np.cos(angle) * dx + np.sin(angle) * dy) / size
        v = (-np.sin(angle) * dx + np.cos(angle) * dy) / size
        distance = np.empty_like(u)
        for label, signed_distance in enumerate(_SHAPES):
            chosen = labels == label
            distance[chosen] = signed_distance(u[chosen], v[chosen])
        # The width of the soft edge: one pixel in the shape's coordinates.
        edge = 2 / SIZE_PX / size
        cover = np.clip(0.5 - distance / edge, 0, 1)[..., None]
        texture, mean_color = self.texture()
        turns = np.array(SYMMETRIES, np.float32)[labels]
        phase = np.where(turns > 0, turns * angle[:, 0, 0], np.nan)
        numbers = np.stack([center_x[:, 0, 0], center_y[:, 0, 0], size[:, 0, 0], np.sin(phase), np.cos(phase)], axis=1)
        return image * (1 - cover) + texture * cover, np.concatenate([numbers, mean_color], axis=1)


# Shapes are signed distances (negative inside) in coordinates in which the shape fills about [-1, 1]^2, y down.


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
    # Folded into a tenth of the star, the outline is the straight edge from the tip to the next notch.
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
