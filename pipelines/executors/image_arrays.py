"""How images in memory enter a DALI graph: by their addresses, on the host or on a GPU."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.datasets.images import ImageArray


def addresses(images: ImageArray, image_ids: NDArray[np.int64], device: torch.device) -> NDArray[np.int64]:
    """[N, 4]: the address of each image's first byte on ``device``, and its strides along H, W and C."""
    if device.type == "cpu":
        first, strides = images.pixels.ctypes.data, images.pixels.strides
    else:
        on_device = pixels_on_device(images, device)
        first, strides = on_device.data_ptr(), on_device.stride()
    where = np.empty((len(image_ids), 4), np.int64)
    where[:, 0] = first + image_ids * strides[0]
    where[:, 1:] = [strides[1 + images.layout.index(axis)] for axis in "HWC"]
    return where


@lru_cache(maxsize=2)
def pixels_on_device(images: ImageArray, device: torch.device) -> Tensor:
    """All pixels of a data set on ``device``, complete for every stream; those of the last two data sets are kept."""
    pixels = torch.from_numpy(images.pixels).to(device).contiguous()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return pixels
