"""Pipelines turned into batches on the right device, for training and for evaluation."""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.index import ImageArray
from pipelines.order import Order, Share
from pipelines.reference import reference_steps
from stec.batch import Batch, PlainBatch
from stec.commands import VIEWS, Commands
from stec.errors import UserError

Backend = Literal["auto", "dali", "torchvision"]

PREFETCH_DEPTH = 2
"""Batches that DALI prepares ahead."""


def resolve_backend(backend: Backend) -> Literal["dali", "torchvision"]:
    """``auto`` is DALI where it is installed (it has wheels for Linux only), else torchvision."""
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if backend == "dali" and not installed:
        raise UserError(
            "--backend dali needs NVIDIA DALI, which is not installed; run pip install nvidia-dali-cuda130 (Linux), "
            "or use --backend torchvision."
        )
    if backend == "auto":
        return "dali" if installed else "torchvision"
    return backend


def to_unit_range(pixels: Tensor, device: torch.device) -> Tensor:
    """[..., H, W, 3] uint8 to [..., 3, H, W] float32 in [0, 1] on ``device``, channels-last in memory.

    The bytes move before they become floats: a quarter of the traffic.
    """
    moved = pixels.to(device, non_blocking=True)
    return moved.movedim(-1, -3).to(torch.float32).div_(255)


class Loader:
    """Training batches: what ``order`` says, executed by one of the two backends.

    ``workers`` are DALI's threads or torchvision's worker processes.
    """

    def __init__(self, order: Order, *, backend: Backend, device: torch.device, workers: int) -> None:
        self.order, self.device, self.workers = order, device, workers
        self.backend = resolve_backend(backend)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Endless batches from global step ``first_step`` on, across epochs."""
        return self._dali_batches(first_step) if self.backend == "dali" else self._torchvision_batches(first_step)

    def _torchvision_batches(self, first_step: int) -> Iterator[Batch]:
        for views, labels, share in reference_steps(self.order, first_step, self.workers):
            yield Batch(
                views=views.to(self.device, non_blocking=True).movedim(-1, -3),
                commands=share.commands,
                labels=labels.to(self.device, non_blocking=True),
                epoch=share.epoch,
                positions=share.positions,
                image_ids=share.image_ids,
            )

    def _dali_batches(self, first_step: int) -> Iterator[Batch]:
        from pipelines.graphs import array_pipeline

        on_gpu = self.device.type == "cuda"
        pipeline = array_pipeline(
            _DaliSource(self.order, first_step),
            self.order.policy,
            device="gpu" if on_gpu else "cpu",
            batch_size=self.order.batch_size,
            num_threads=max(1, self.workers),
            device_id=self.device.index or 0 if on_gpu else None,
            prefetch_queue_depth=PREFETCH_DEPTH,
        )
        pipeline.build()
        stream = [torch.cuda.current_stream(self.device)] if on_gpu else []
        while True:
            views, commands, record = pipeline.run(*stream)
            pixels = torch.from_dlpack(views.as_tensor())
            rows: NDArray[np.int64] = np.array(record.as_array())
            yield Batch(
                views=to_unit_range(pixels, self.device),
                commands=Commands.unpack(commands.as_array()),
                labels=torch.from_numpy(rows[:, 3].copy()).to(self.device, non_blocking=True),
                epoch=int(rows[0, 0]),
                positions=rows[:, 1],
                image_ids=rows[:, 2],
            )


class _DaliSource:
    """Feeds ``array_pipeline``: one call a step, in order."""

    def __init__(self, order: Order, first_step: int) -> None:
        self.order, self.step = order, first_step
        # DALI reads the arrays where they lie, some time after the call: they must outlive the prefetch queue.
        self._in_flight: deque[Sequence[NDArray[Any]]] = deque(maxlen=2 * PREFETCH_DEPTH + 2)

    def __call__(self) -> Sequence[NDArray[Any]]:
        from pipelines.graphs import argument_names, view_arguments

        share = self.order.share(self.step)
        self.step += 1
        images, policy = self.order.images, self.order.policy
        by_name = view_arguments(share.commands, policy)
        arguments = [np.ascontiguousarray(by_name[name][:, v]) for v in range(VIEWS) for name in argument_names(policy)]
        feed = [images.images[share.image_ids], *arguments, share.commands.pack(), _record(share, images)]
        self._in_flight.append(feed)
        return feed


def _record(share: Share, images: ImageArray) -> NDArray[np.int64]:
    """[N, 4] int64: epoch, position, image id, label."""
    epoch = np.full_like(share.positions, share.epoch)
    return np.stack([epoch, share.positions, share.image_ids, images.labels[share.image_ids]], axis=-1)


class ArrayPlainLoader:
    """Evaluation's view of images in memory: plain pixels, as the official code evaluates CIFAR."""

    def __init__(self, images: ImageArray, *, batch_size: int, device: torch.device) -> None:
        self.images, self.batch_size, self.device = images, batch_size, device

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, first: int, last: int) -> Iterator[PlainBatch]:
        """The images numbered ``first`` to ``last - 1``, in order."""
        for start in range(first, last, self.batch_size):
            stop = min(start + self.batch_size, last)
            yield PlainBatch(
                images=to_unit_range(torch.from_numpy(self.images.images[start:stop]), self.device),
                labels=torch.from_numpy(self.images.labels[start:stop]).to(self.device, non_blocking=True),
            )
