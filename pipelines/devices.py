"""Copies to a device that do not wait for it."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """A tensor or array on ``device``; one that is there already shares the memory.

    Copies to a GPU are queued behind the work that it has, from pinned memory: from other memory, the host would wait.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
