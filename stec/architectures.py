"""The table of encoder architectures, in which a new ResNet is a row, and the names of timm's.

This module does not import PyTorch, because ``launch.py --help`` needs the names.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipelines.errors import UserError


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
"""The name of a ResNet in the table, as the type of a flag."""

TIMM = "timm/"
"""With what the name of an encoder of timm begins; timm's own name follows."""


def is_timm(arch: str) -> bool:
    """Whether ``arch`` names an encoder of timm."""
    return arch.startswith(TIMM)


def check_architecture(arch: str) -> None:
    """Raise UserError if ``arch`` is neither in the table nor of the form ``timm/NAME``. timm is not asked."""
    if arch in ARCHITECTURES or (is_timm(arch) and arch != TIMM):
        return
    near = difflib.get_close_matches(arch, ARCHITECTURES, n=1)
    hint = f"did you mean {near[0]}? Others are " if near else "give one of "
    raise UserError(f"--arch {arch} is no architecture; {hint}{', '.join(ARCHITECTURES)}, or timm/NAME.")
