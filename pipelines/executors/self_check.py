"""The check of the kernels on a GPU before their first use: they make the views that the CPU makes, in order.

Images are in memory and in files. All of them differ, so an image in another's place is found as well. The outcome is
kept on disk for each GPU, driver, and version of the libraries and kernels.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.batch import Batch
from pipelines.commands import Policy
from pipelines.datasets.cache import cache_folder, keep
from pipelines.datasets.images import ImageArray, ImageFiles, Images, Names
from pipelines.errors import UserError
from pipelines.executors.gpu_compiler import SOURCE
from pipelines.nvidia_driver import driver_version
from pipelines.sampler import Sampler

NUM_IMAGES, BATCH_SIZE, STEPS = 16, 4, 8
HEIGHT_PX, WIDTH_PX = 40, 56
POLICY = Policy(size=48, jitter_strength=1.0, p_blur=0.5, p_solarize=0.3)
REMEDY = "use --backend torchvision"


@cache
def require_equal_views(device: torch.device) -> None:
    """Check the kernels on a GPU unless this was done before. Raises UserError if they fail or make other views."""
    name = torch.cuda.get_device_name(device)
    file = cache_folder() / f"gpu-check-{_fingerprint(name)}.json"
    with suppress(OSError, ValueError):
        if json.loads(file.read_text())["equal"] is True:
            return
    try:
        differing, views = differing_views(device)
    except (RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise UserError(f"The kernels do not run on {name} ({reason}); {REMEDY}.", local=True) from error
    if differing:
        raise UserError(
            f"The kernels on {name} make {differing} of {views} views differently from the CPU; {REMEDY}.",
            local=True,
        )
    # Failures are not kept: they are found again in a second, or are gone.
    keep(file, json.dumps({"gpu": name, "views": views, "equal": True}).encode())


def _fingerprint(name: str) -> str:
    from nvidia import dali

    packages = [f"{package} {version(package)}" for package in ("torch", "numba", "cuda-bindings")]
    parts = [name, str(driver_version()), dali.__version__, *packages, SOURCE.read_text()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def differing_views(device: torch.device) -> tuple[int, int]:
    """How many of the views that are made on ``device`` differ from those of the CPU, and the number of all."""
    differing = views = 0
    with tempfile.TemporaryDirectory() as folder:
        in_memory = _images()
        for images in (in_memory, _in_files(in_memory, Path(folder))):
            expected = list(_batches(images, torch.device("cpu")))
            for ours, theirs in zip(_batches(images, device), expected, strict=True):
                assert (ours.image_ids == theirs.image_ids).all()
                equal = (ours.views.cpu() == theirs.views).flatten(2).all(dim=2)
                differing, views = differing + int((~equal).sum()), views + equal.numel()
    return differing, views


def _batches(images: Images, device: torch.device) -> Iterator[Batch]:
    from pipelines.loader import dali_batches

    sampler = Sampler(images, POLICY, seed=0, batch_size=BATCH_SIZE)
    return itertools.islice(dali_batches(sampler, device, threads=2, half=False), STEPS)


def _images() -> ImageArray:
    """Noise beside areas of one color."""
    generator = np.random.default_rng(0)
    areas = generator.integers(0, 256, (NUM_IMAGES, HEIGHT_PX // 8, WIDTH_PX // 8, 3), np.uint8)
    pixels = areas.repeat(8, axis=1).repeat(8, axis=2)
    half = (NUM_IMAGES, HEIGHT_PX, WIDTH_PX // 2, 3)
    pixels[:, :, : WIDTH_PX // 2] = generator.integers(0, 256, half, np.uint8)
    return ImageArray(pixels=pixels, labels=np.arange(NUM_IMAGES))


def _in_files(images: ImageArray, folder: Path) -> ImageFiles:
    """The images as files of plain pixels, which all decoders decode equally."""
    for n in range(NUM_IMAGES):
        Image.fromarray(images.pixels[n]).save(folder / f"{n}.ppm")
    names = [f"{n}.ppm" for n in range(NUM_IMAGES)]
    return ImageFiles(
        root=folder,
        files=Names.of([name.encode() for name in names]),
        file_of=np.arange(NUM_IMAGES, dtype=np.int32),
        offset=np.zeros(NUM_IMAGES, np.int64),
        size_bytes=np.array([(folder / name).stat().st_size for name in names], np.int64),
        sizes=np.tile(np.array([HEIGHT_PX, WIDTH_PX], np.int64), (NUM_IMAGES, 1)),
        labels=images.labels,
        needs_pillow=np.zeros(NUM_IMAGES, bool),
        orientation=np.ones(NUM_IMAGES, np.uint8),
    )
