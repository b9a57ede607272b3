"""What several tests share: small data, and commands drawn for it."""

from __future__ import annotations

import importlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# As launch.py does, before PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Files are tested side by side, one per core; threads of one test would wait for those of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from pipelines.datasets import demo
from pipelines.datasets.images import ImageArray, ImageFiles, Names
from tests.runs import leave_nothing_running

# The compiler's cache does not distinguish instruction sets, so what was compiled for another one would be loaded.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"torchinductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"),
)

# PyTorch's compiler loads it, which fails where Python's own distutils were loaded before.
importlib.import_module("setuptools")

SHARED = Path(__file__).parents[2] / "shared"


# A shell starts what it leaves in the background with Ctrl-C ignored, and so would everything that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state for the life of a process; each test begins without one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    leave_nothing_running()


@pytest.fixture(scope="session")
def demo_test_images() -> ImageArray:
    """The demo set's test split: 2048 images of 32 px."""
    return demo.load(split="test")


def smooth_image(height: int, width: int, seed: int) -> np.ndarray:
    """[height, width, 3] uint8: an image without detail finer than a few pixels."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, 5, 5)))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return (fine[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    """64 JPEG files of many sizes, every fifth of them gray."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    sizes = rng.integers(60, 240, (64, 2))
    for n, (height, width) in enumerate(sizes):
        # Colors as muted as those of photographs are.
        muted = 128 + 0.4 * (smooth_image(height, width, n) - 128.0) + rng.normal(0, 4, (height, width, 3))
        image = Image.fromarray(muted.astype(np.uint8))
        (image.convert("L") if n % 5 == 0 else image).save(root / f"{n}.jpg", quality=92)
    names = [f"{n}.jpg" for n in range(64)]
    return ImageFiles(
        root=root,
        files=Names.of([os.fsencode(name) for name in names]),
        file_of=np.arange(64, dtype=np.int32),
        offset=np.zeros(64, np.int64),
        size_bytes=np.array([(root / name).stat().st_size for name in names]),
        sizes=sizes,
        labels=np.arange(64, dtype=np.int64) % 7,
        needs_pillow=np.zeros(64, bool),
        orientation=np.ones(64, np.uint8),
    )
