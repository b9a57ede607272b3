"""A resolution schedule changes the size of views and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from pipelines.bad_images import BadImages
from pipelines.batch import Batch
from pipelines.commands import LABELED_STREAM, VIEWS, Commands, Policy
from pipelines.datasets.images import ImageArray, ImageFiles, Images
from pipelines.executors import torchvision as reference
from pipelines.loader import Loader
from pipelines.sampler import Sampler
from stec.config import TrainConfig
from stec.geometry import relative_windows
from stec.recipes import recipe
from stec.runs import checkpoint
from stec.training.step import Step
from tests.runs import Run

POLICY = Policy(size=64, p_blur=0.5, p_solarize=0.2)
CONFIG = TrainConfig().updated(view_size=64, max_epochs=4, resolution_schedule="32:64")
SIZES = [32, 40, 48, 64]
"""The sizes of ``CONFIG`` by epoch."""
TOLERANCES = {"dali": 0.5, "torchvision": 0.001}
"""Largest mean differences to torchvision in 1/255."""


def sampler(images: Images, **settings: Any) -> Sampler:
    return Sampler(images, POLICY, **{"seed": 5, "batch_size": 16, "view_size_at": CONFIG.view_size_at, **settings})


def take(source: Sampler, count: int, first: int = 0, backend: str = "dali") -> list[Batch]:
    workers = 2 if backend == "dali" else 0
    loader = Loader(source, backend=backend, device=torch.device("cpu"), workers=workers)
    return list(itertools.islice(loader.batches(first), count))


@pytest.fixture(params=["memory", "files"])
def images(request: pytest.FixtureRequest, demo_test_images: ImageArray, photographs: ImageFiles) -> Images:
    return demo_test_images.limited(64) if request.param == "memory" else photographs


def test_sizes_increase_to_the_full_one() -> None:
    """In steps of 32 px from 128 px on, otherwise of 8 px; the last quarter of the epochs has the full size."""
    imagenet = recipe("imagenet-resnet50").updated(resolution_schedule="160:224", max_epochs=80)
    sizes = [imagenet.view_size_at(epoch) for epoch in range(100)]
    assert sizes == [160] * 30 + [192] * 30 + [224] * 40
    assert [CONFIG.view_size_at(epoch) for epoch in range(4)] == SIZES
    for first, last, epochs in itertools.product((16, 17, 100), (127, 128, 225), (1, 2, 7, 90)):
        config = TrainConfig().updated(
            view_size=last, max_epochs=epochs, warmup_epochs=0, resolution_schedule=f"{first}:{last}"
        )
        config.validate()
        sizes = [config.view_size_at(epoch) for epoch in range(epochs)]
        assert sizes == sorted(sizes) and sizes[0] == (first if epochs > 1 else last)
        assert set(sizes[-(-epochs * 3 // 4) :]) <= {last} and sizes[-1] == last
        assert all(size % (32 if last >= 128 else 8) == 0 for size in set(sizes) - {first, last})


@pytest.mark.parametrize("backend", TOLERANCES)
def test_only_the_size_of_views_changes(images: Images, backend: str) -> None:
    """Images and commands are those without a schedule, and the views are those that the commands describe."""
    scheduled = take(sampler(images), 16, 0, backend)
    plain_sampler = sampler(images, view_size_at=None)
    for step, batch in enumerate(scheduled):
        size = SIZES[step // 4]
        assert batch.views.shape == (16, VIEWS, 3, size, size)
        expected = plain_sampler.plan(step)
        assert batch.epoch == expected.epoch
        np.testing.assert_array_equal(batch.positions, expected.positions)
        np.testing.assert_array_equal(batch.image_ids, expected.image_ids)
        for field in dataclasses.fields(Commands):
            ours, theirs = getattr(batch.commands, field.name), getattr(expected.commands, field.name)
            if field.name == "sigma_px":
                # Sigma is proportional to the size of the view.
                np.testing.assert_allclose(ours, theirs * size / 64, rtol=1e-6)
                assert ours.any()
            else:
                np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(relative_windows(batch.commands), relative_windows(expected.commands))
        policy = dataclasses.replace(POLICY, size=size)
        views = [
            reference.execute(images.open(int(image_id)), batch.commands, policy, n, v)
            for n, image_id in enumerate(batch.image_ids)
            for v in range(VIEWS)
        ]
        assert float((batch.views.flatten(0, 1) - torch.stack(views)).abs().mean()) * 255 < TOLERANCES[backend]


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_any_step_can_be_the_first(images: Images, backend: str) -> None:
    """Also with several micro-batches per step, and with one micro-batch per epoch."""
    for settings, count in (({"accumulate": 2, "batch_size": 8}, 32), ({"batch_size": 64}, 4)):
        straight = take(sampler(images, **settings), count, backend=backend)
        for first in (0, count // 4 - 1, count // 4, count // 2 + 1):
            resumed = take(sampler(images, **settings), count - first, first, backend)
            for one, two in zip(straight[first:], resumed, strict=True):
                assert torch.equal(one.views, two.views)
                np.testing.assert_array_equal(one.commands.pack(), two.commands.pack())


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_a_bad_image_in_the_last_batch_of_a_size(photographs: ImageFiles, backend: str, tmp_path: Path) -> None:
    """DALI fails on it while earlier batches are in flight; no other view is lost, repeated or changed."""
    shutil.copytree(photographs.root, tmp_path / "copy")
    copied = dataclasses.replace(photographs, root=tmp_path / "copy", needs_pillow=photographs.needs_pillow.copy())
    whole = take(sampler(copied), 12, backend=backend)
    image_id = int(whole[7].image_ids[3])  # of the last batch of an epoch
    copied.path(image_id).write_text("no image")
    bad = BadImages(copied, max_fraction=0.05)
    replaced = take(sampler(copied, bad=bad), 12, backend=backend)
    assert bad.count == 1
    for ours, before in zip(replaced, whole, strict=True):
        assert ours.views.shape == before.views.shape and image_id not in ours.image_ids
        np.testing.assert_array_equal(ours.positions, before.positions)
        same = torch.from_numpy(before.image_ids != image_id)
        assert torch.equal(ours.views[same], before.views[same])


def test_labeled_images_have_the_same_size(demo_test_images: ImageArray) -> None:
    images, labeled = demo_test_images.limited(64), demo_test_images.limited(10)
    labeled_sampler = sampler(labeled, views=1, command_stream=LABELED_STREAM, epoch_length=64)
    loader = Loader(
        sampler(images), backend="dali", device=torch.device("cpu"), workers=1, labeled_sampler=labeled_sampler
    )
    for batch in itertools.islice(loader.batches(0), 16):
        assert batch.labeled_views is not None
        assert batch.labeled_views.shape == (16, 1, 3, SIZES[batch.epoch], SIZES[batch.epoch])


RUN = (
    "--limit_train 128 --batch_size 16 --accumulate 2 --width 4 --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 "
    "--max_epochs 4 --log_every 2 --num_workers 1 --checkpoint_every_steps 1 --keep_checkpoints 100 --resume auto "
    "--view_size 32 --resolution_schedule 16:32 --results_path"
).split()


def print_sizes() -> None:
    """Print the shapes of the views of each step."""
    step = Step.__call__

    def printing_step(self: Step, micro_batches: Any) -> dict[str, torch.Tensor]:
        print("trained on", {tuple(batch.views.shape) for batch in micro_batches}, flush=True)
        return step(self, micro_batches)

    patch.object(Step, "__call__", printing_step).start()


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """From the middle of an epoch of the second size; another schedule is an error."""
    whole = tmp_path / "whole"
    output = Run(*RUN, whole, prepare=print_sizes).end()
    shapes = [line for line in output.splitlines() if line.startswith("trained on")]
    assert shapes == [f"trained on {{(16, 2, 3, {size}, {size})}}" for size in (16, 16, 24, 32) for _ in range(4)]
    assert re.search(r"\b32 px\b.*\b16 px\b", output)
    folder = tmp_path / "resumed"
    folder.mkdir()
    shutil.copy(checkpoint.checkpoint_path(whole, 10), folder)
    assert "Resuming after step 10." in Run(*RUN, folder).end()
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    output = Run(*RUN, folder, "--resolution_schedule", "24:32").end(2)
    assert all(value in output for value in ("--resolution_schedule", "16:32", "24:32"))
