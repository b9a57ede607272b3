"""The same commands executed by torchvision: the reference of the tests, and used if DALI is not installed."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from pipelines.commands import Commands, Policy
from pipelines.datasets.images import ImageFiles, Images
from pipelines.errors import BadImage, UserError
from pipelines.sampler import BatchPlan, Sampler
from pipelines.worker_process import begin_work

T = TypeVar("T")

_JITTER_STEPS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
_HUE = 3


def execute(image: Image.Image, commands: Commands, policy: Policy, n: int, v: int) -> Tensor:
    """View ``v`` of image ``n`` of ``commands``, from that image in RGB: [3, size, size] float32 in [0, 1].

    As in the official code, crop, jitter and gray work on 8-bit Pillow images, blur and solarization on floats.
    """
    size = policy.size
    view = F.resized_crop(
        image,
        int(commands.top[n, v]),
        int(commands.left[n, v]),
        int(commands.height[n, v]),
        int(commands.width[n, v]),
        [size, size],
    )
    if commands.flip[n, v]:
        view = F.hflip(view)
    if commands.jitter[n, v]:
        factors = [commands.brightness[n, v], commands.contrast[n, v], commands.saturation[n, v]]
        for step in commands.order[n, v]:
            if step == _HUE:
                view = F.adjust_hue(view, float(commands.hue_turns[n, v]))
            else:
                view = _JITTER_STEPS[step](view, float(factors[step]))
    if commands.gray[n, v]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    tensor: Tensor = F.to_tensor(view)
    if commands.blur[n, v]:
        tensor = blur(tensor, float(commands.sigma_px[n, v]), policy)
    if commands.solarize[n, v]:
        tensor = solarize(tensor)
    return tensor


def blur(view: Tensor, sigma_px: float, policy: Policy) -> Tensor:
    """Gaussian blur of a view [3, H, W] with the official kernel size, mirrored at the borders."""
    blurred: Tensor = F.gaussian_blur(view, [policy.blur_window_px] * 2, [sigma_px] * 2)
    return blurred


def solarize(view: Tensor) -> Tensor:
    """Invert values of one half and more of a view in [0, 1]."""
    return torch.where(view < 0.5, view, 1 - view)


Step = tuple[NDArray[np.float32], NDArray[np.int64], BatchPlan, list[BadImage]]
"""A step: views [N, V, H, W, 3], labels [N], the executed plan, and the bad images that were replaced."""


class _Steps(Dataset[Step | UserError]):
    """Item ``step`` is that step, or the error that prevented it: exceptions in workers would lose their type."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __getitem__(self, step: int) -> Step | UserError:
        bad_images: list[BadImage] = []
        while True:
            try:
                return *self._make(step), bad_images
            except BadImage as bad:
                # The replacement depends on seed, epoch, position and files only, so every process makes the same.
                bad_images.append(bad)
                self.sampler.bad.exclude(bad.image_id)
            except UserError as error:
                return error

    def _make(self, step: int) -> tuple[NDArray[np.float32], NDArray[np.int64], BatchPlan]:
        plan = self.sampler.plan(step)
        images, policy, n = self.sampler.images, plan.policy, 0
        views = np.empty((len(plan.image_ids), self.sampler.views, policy.size, policy.size, 3), np.float32)
        while n < len(plan.image_ids):
            image_id, commands = int(plan.image_ids[n]), plan.commands
            image = images.open(image_id)
            if image.size != (commands.source_width[n, 0], commands.source_height[n, 0]):
                # Its file has changed since it was indexed: only its commands are drawn for another size.
                assert isinstance(images, ImageFiles)
                images.update(image_id)
                plan = self.sampler.plan(step)
                continue
            for v in range(self.sampler.views):
                views[n, v] = execute(image, commands, policy, n, v).permute(1, 2, 0)
            n += 1
        return views, images.labels[plan.image_ids], plan


def evaluation_view(image: Image.Image, resize_px: int | None, size: int) -> Tensor:
    """[3, size, size] float32 in [0, 1]: the image unchanged, or the center after resizing the shorter side."""
    if resize_px is not None:
        image = F.center_crop(F.resize(image, resize_px), [size, size])
    tensor: Tensor = F.to_tensor(image)
    return tensor


def training_steps(sampler: Sampler, first_step: int, workers: int) -> Iterator[Step]:
    """Endless steps from ``first_step`` on, made by ``workers`` processes (0: in this one)."""
    return _load(_Steps(sampler), workers, itertools.count(first_step))


class _EvaluationBatches(Dataset[NDArray[np.float32] | UserError]):
    """Item ``k`` is a batch [n, 3, size, size] of evaluation views, or the error that prevented it."""

    def __init__(self, images: Images, batches: list[NDArray[np.int64]], resize_px: int | None, size: int) -> None:
        self.images, self.image_ids, self.resize_px, self.size = images, batches, resize_px, size

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, k: int) -> NDArray[np.float32] | UserError:
        try:
            images = (self.images.open(int(image_id)) for image_id in self.image_ids[k])
            return np.stack([evaluation_view(image, self.resize_px, self.size).numpy() for image in images])
        except UserError as error:
            return error


def evaluation_batches(
    images: Images, batches: list[NDArray[np.int64]], resize_px: int | None, size: int, workers: int
) -> Iterator[Tensor]:
    """The evaluation views of batches of image ids, each [n, 3, size, size] float32 in [0, 1]."""
    return map(torch.from_numpy, _load(_EvaluationBatches(images, batches, resize_px, size), workers))


def _load(items: Dataset[T | UserError], workers: int, indices: Iterable[int] | None = None) -> Iterator[T]:
    """The items with these indices (None: all), until one is an error, which is raised.

    Workers send arrays through pipes: tensors would need shared memory, which is small in containers.
    """
    if workers:
        # An unreferenced DALI pipeline joins its threads when it is garbage-collected. A forked worker would inherit
        # the pipeline without the threads, and wait forever.
        gc.collect()
    loader = DataLoader(
        items,
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=begin_work,
    )
    try:
        for item in loader:
            if isinstance(item, UserError):
                raise item
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"A worker process was killed ({error}), perhaps because memory ran out; reduce --num_workers or "
            f"--batch_size.",
            local=True,
        ) from error


def _unchanged(item: T) -> T:
    """Replaces PyTorch's collate function, which would convert arrays to tensors."""
    return item
