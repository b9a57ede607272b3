"""What several tests share: small data, and commands drawn for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import demo
from pipelines.index import ImageArray

SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def demo_test_images() -> ImageArray:
    """The demo set's test split: 2048 images of 32 px."""
    images, labels = demo.render(split="test")
    return ImageArray(images=images, labels=labels)


def smooth_image(height: int, width: int, seed: int) -> np.ndarray:
    """[height, width, 3] uint8: an image without detail finer than a few pixels."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, 5, 5)))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return (fine[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
