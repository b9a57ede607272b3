"""The table of base objectives. A new one is a file and a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from stec.config import BaseName, ObjectiveSettings
from stec.models.heads import BaseHeads
from stec.models.model import Outputs
from stec.objectives import byol, relic, simclr


class BaseObjective(NamedTuple):
    """What S-TEC's inverse model is added to."""

    heads: BaseHeads
    loss: Callable[[Outputs, ObjectiveSettings], tuple[Tensor, dict[str, Tensor]]]
    """The loss of this process, whose mean over processes is that of the global batch, and metrics by name."""


BASE_OBJECTIVES: dict[BaseName, BaseObjective] = {
    "simclr": BaseObjective(simclr.HEADS, simclr.loss),
    "byol": BaseObjective(byol.HEADS, byol.loss),
    "relic": BaseObjective(relic.HEADS, relic.loss),
}
