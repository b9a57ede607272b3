"""Pipelines turned into batches on the right device, for training and for evaluation."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.images import ImageArray, ImageFiles, Images
from pipelines.order import Order, Share
from pipelines.reference import reference_evaluation, reference_steps
from stec.batch import Batch, PlainBatch
from stec.commands import Commands
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

    ``workers`` are DALI's threads or torchvision's worker processes. ``probe_order`` gives each batch labelled images
    of its own for the probe, where the images of ``order`` have no labels.
    """

    def __init__(
        self, order: Order, *, backend: Backend, device: torch.device, workers: int, probe_order: Order | None = None
    ) -> None:
        self.order, self.device, self.workers = order, device, workers
        self.backend = resolve_backend(backend)
        self.probe_loader = (
            Loader(probe_order, backend=backend, device=device, workers=workers) if probe_order is not None else None
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Endless batches from global step ``first_step`` on, across epochs."""
        own = self._dali_batches(first_step) if self.backend == "dali" else self._torchvision_batches(first_step)
        if self.probe_loader is None:
            yield from own
        else:
            for batch, probe in zip(own, self.probe_loader.batches(first_step)):
                yield replace(batch, probe_views=probe.views, labels=probe.labels)

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
        from pipelines.graphs import training_pipeline

        images = self.order.images
        source = _TrainingSource(self.order, first_step)
        pipeline = training_pipeline(
            source,
            self.order.policy,
            form=images.layout if isinstance(images, ImageArray) else "file",
            views=self.order.views,
            **_pipeline_options(self.order.batch_size, self.workers, self.device),
        )
        for views, packed, record, *stored_shape in _run(pipeline, source, self.device):
            rows: NDArray[np.int64] = np.array(record.as_array())
            commands = Commands.unpack(packed.as_array())
            if stored_shape:
                _check_shapes(images, stored_shape[0].as_array(), commands, rows[:, 2])
            yield Batch(
                views=torch.from_dlpack(views.as_tensor()).movedim(-1, -3),
                commands=commands,
                labels=torch.from_numpy(rows[:, 3].copy()).to(self.device, non_blocking=True),
                epoch=int(rows[0, 0]),
                positions=rows[:, 1],
                image_ids=rows[:, 2],
            )


def _check_shapes(images: Images, stored: NDArray[np.int64], commands: Commands, image_ids: NDArray[np.int64]) -> None:
    """Raise UserError where a file is not of the size that its command was drawn for."""
    changed = (stored[:, 0] != commands.source_height[:, 0]) | (stored[:, 1] != commands.source_width[:, 0])
    for image_id in image_ids[changed]:
        images.open(int(image_id))


def _pipeline_options(batch_size: int, threads: int, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "device": "gpu" if on_gpu else "cpu",
        "device_id": device.index or 0 if on_gpu else None,
        "batch_size": batch_size,
        "num_threads": max(1, threads),
        "prefetch_queue_depth": PREFETCH_DEPTH,
    }


class _InFlight:
    """Keeps what was fed to DALI for the last batches: it reads the arrays where they lie, some time after the call."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self._feeds: deque[tuple[NDArray[np.int64], Sequence[Any]]] = deque(maxlen=2 * PREFETCH_DEPTH + 2)

    def keep(self, image_ids: NDArray[np.int64], feed: Sequence[Any]) -> Sequence[Any]:
        self._feeds.append((image_ids, feed))
        return feed

    def name_culprit(self) -> None:
        """Raise UserError for an image of the last batches that cannot be opened: DALI does not name it."""
        for image_ids, _ in self._feeds:
            for image_id in image_ids:
                self.images.open(int(image_id))


def _run(pipeline: Any, source: _InFlight, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """The outputs of a pipeline, run after run. Raises UserError where an image cannot be read."""
    pipeline.build()
    stream = [torch.cuda.current_stream(device)] if device.type == "cuda" else []
    while True:
        try:
            outputs = pipeline.run(*stream)
        except RuntimeError as error:
            source.name_culprit()
            raise UserError(f"DALI could not make a batch: {error}", local=True) from error
        yield outputs


class _TrainingSource(_InFlight):
    """Feeds ``training_pipeline``: one call a step, in order."""

    def __init__(self, order: Order, first_step: int) -> None:
        super().__init__(order.images)
        self.order, self.step = order, first_step

    def __call__(self) -> Sequence[Any]:
        from pipelines.graphs import argument_names, needed_part, view_arguments

        share = self.order.share(self.step)
        self.step += 1
        images, policy = self.order.images, self.order.policy
        opening: list[Any]
        origin = None
        if isinstance(images, ImageArray):
            opening = [images.pixels[share.image_ids]]
        else:
            origin, extent = needed_part(share.commands)
            opening = [_paths(images, share.image_ids), origin, extent]
        by_name = view_arguments(share.commands, policy, origin)
        arguments = [
            np.ascontiguousarray(by_name[name][:, v])
            for v in range(self.order.views)
            for name in argument_names(policy)
        ]
        feed = [*opening, *arguments, share.commands.pack(), _record(share, images)]
        return self.keep(share.image_ids, feed)


def _paths(images: ImageFiles, image_ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """The files' names as DALI's file reader takes them."""
    return [np.frombuffer(os.fsencode(images.file(int(image_id))), np.uint8) for image_id in image_ids]


def _record(share: Share, images: Images) -> NDArray[np.int64]:
    """[N, 4] int64: epoch, position, image id, label."""
    epoch = np.full_like(share.positions, share.epoch)
    return np.stack([epoch, share.positions, share.image_ids, images.labels[share.image_ids]], axis=-1)


class EvaluationLoader:
    """Images as the official code evaluates them: plain pixels, or the shorter side resized and the centre cut out.

    ``resize_px`` is the shorter side to resize to, None for images that are used as they are.
    """

    def __init__(
        self,
        images: Images,
        *,
        size: int,
        resize_px: int | None,
        batch_size: int,
        backend: Backend,
        device: torch.device,
        workers: int,
    ) -> None:
        self.images, self.size, self.resize_px = images, size, resize_px
        self.batch_size, self.device, self.workers = batch_size, device, workers
        self.backend = resolve_backend(backend)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, image_ids: NDArray[np.int64]) -> Iterator[PlainBatch]:
        """The images of these numbers, in this order."""
        parts = [image_ids[k : k + self.batch_size] for k in range(0, len(image_ids), self.batch_size)]
        for part, images in zip(parts, self._images(parts)):
            labels = torch.from_numpy(self.images.labels[part])
            yield PlainBatch(images=images, labels=labels.to(self.device, non_blocking=True))

    def _images(self, parts: list[NDArray[np.int64]]) -> Iterator[Tensor]:
        if isinstance(self.images, ImageArray) and self.resize_px is None:
            for part in parts:
                pixels = np.ascontiguousarray(self.images.upright(part))
                yield to_unit_range(torch.from_numpy(pixels), self.device)
        elif isinstance(self.images, ImageFiles) and self.resize_px is not None and self.backend == "dali" and parts:
            from pipelines.graphs import evaluation_pipeline

            source = _EvaluationSource(self.images, parts, self.resize_px, self.size)
            options = _pipeline_options(self.batch_size, self.workers, self.device)
            pipeline = evaluation_pipeline(source, self.size, **options)
            for _, (images,) in zip(parts, _run(pipeline, source, self.device)):
                yield to_unit_range(torch.from_dlpack(images.as_tensor()), self.device)
        else:
            for batch in reference_evaluation(self.images, parts, self.resize_px, self.size, self.workers):
                yield batch.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)


class _EvaluationSource(_InFlight):
    """Feeds ``evaluation_pipeline``: one call a batch, and the last batch again while DALI prefetches past the end."""

    def __init__(self, images: ImageFiles, parts: list[NDArray[np.int64]], resize_px: int, size: int) -> None:
        super().__init__(images)
        self.files, self.resize_px, self.size = images, resize_px, size
        self.parts = itertools.chain(parts, itertools.repeat(parts[-1]))

    def __call__(self) -> Sequence[Any]:
        image_ids = next(self.parts)
        resized_hw, corner = centre_of_resized(self.files.image_hw(image_ids), self.resize_px, self.size)
        feed = [_paths(self.files, image_ids), resized_hw.astype(np.float32), corner]
        return self.keep(image_ids, feed)


def centre_of_resized(
    image_hw: NDArray[np.int64], resize_px: int, size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sizes [N, 2] after torchvision's ``Resize(resize_px)``, and corners [N, 2] of its ``CenterCrop(size)``."""
    resized = (resize_px * image_hw / image_hw.min(axis=1, keepdims=True)).astype(np.int32)
    corner = np.rint((resized - size) / 2).astype(np.int32)
    return resized, corner
