"""Means and standard deviations by which other projects normalize the channels of images.

This module does not import PyTorch, because ``launch.py --help`` needs the names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

Channels = tuple[float, float, float]
"""Red, green, blue; of pixels in [0, 1]."""

NORMALIZATIONS: dict[str, tuple[Channels, Channels] | None] = {
    "none": None,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
}
"""Mean and standard deviation by name: ``none`` is this project's; ``imagenet`` that of torchvision, lightly, MoCo
and most of timm; ``inception`` and ``clip`` that of timm's other weights; the rest are solo-learn's for data sets."""

if TYPE_CHECKING:
    Normalization = str
else:
    Normalization = Literal[tuple(NORMALIZATIONS)]
"""A name in ``NORMALIZATIONS``, as the type of a flag."""
