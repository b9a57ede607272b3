"""The table of encoder architectures. A new one is a row.

This module does not import PyTorch, because ``launch.py --help`` needs the names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A ResNet of torchvision's blocks."""

    block: Literal["basic", "bottleneck"]
    depths: tuple[int, int, int, int]
    """Number of blocks in each stage."""
    hidden_mlp: int
    """Default width of the projection's hidden layer, for resnet18 and resnet50 as in the official code."""


ARCHITECTURES = {
    "resnet18": Architecture(block="basic", depths=(2, 2, 2, 2), hidden_mlp=512),
    "resnet34": Architecture(block="basic", depths=(3, 4, 6, 3), hidden_mlp=512),
    "resnet50": Architecture(block="bottleneck", depths=(3, 4, 6, 3), hidden_mlp=2048),
    "resnet101": Architecture(block="bottleneck", depths=(3, 4, 23, 3), hidden_mlp=2048),
}

if TYPE_CHECKING:
    Arch = str
else:
    Arch = Literal[tuple(ARCHITECTURES)]
"""The name of an architecture, as the type of a flag."""
