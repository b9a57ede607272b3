"""Loaders: batches on the right device, for training and for evaluation."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch, PlainBatch
from pipelines.commands import Commands
from pipelines.datasets.bad_list import remember
from pipelines.datasets.images import ImageArray, ImageFiles, Images
from pipelines.devices import to_device
from pipelines.errors import UserError
from pipelines.executors.torchvision import evaluation_batches, training_steps
from pipelines.nvidia_driver import OLDEST_DRIVER, driver_is_older_than, driver_version
from pipelines.read_ahead import ShardOrder, reading_ahead
from pipelines.sampler import Sampler

Backend = Literal["auto", "dali", "torchvision"]


def resolve_backend(backend: Backend, device: torch.device) -> Literal["dali", "torchvision"]:
    """``auto`` is DALI if it is installed (it has wheels for Linux only), otherwise torchvision.

    Raises UserError if DALI is requested but not installed, or installed but cannot be used on ``device``.
    """
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if backend == "dali" and not installed:
        raise UserError(
            "--backend dali needs NVIDIA DALI, which is not installed (nvidia-dali on PyPI is an empty package); run "
            "pip install nvidia-dali-cuda130 (Linux), or use --backend torchvision."
        )
    if backend == "torchvision" or not installed:
        return "torchvision"
    try:
        from nvidia import dali

        cuda = dali.__cuda_version__ // 1000
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"NVIDIA DALI is installed but cannot be imported ({error}), as if several of its wheels were installed; "
            f"uninstall all of them, run pip install nvidia-dali-cuda130, or use --backend torchvision."
        ) from error
    if device.type == "cuda" and driver_is_older_than(cuda):
        raise UserError(
            f"NVIDIA DALI is built for CUDA {cuda}, but the GPU's driver is {driver_version()}; update it to "
            f"{OLDEST_DRIVER[cuda]} or newer, install nvidia-dali-cuda120 instead (docs/install.md), or use --backend "
            f"torchvision."
        )
    return "dali"


def to_unit_range(pixels: Tensor, device: torch.device) -> Tensor:
    """[..., H, W, 3] uint8 to [..., 3, H, W] float32 in [0, 1] on ``device``, channels-last in memory.

    The bytes are moved before they are converted: a quarter of the traffic.
    """
    return to_device(pixels, device).movedim(-1, -3).to(torch.float32).div_(255)


class Loader:
    """Training batches: the plans of ``sampler``, executed by DALI or torchvision.

    ``workers`` is the number of DALI threads or torchvision worker processes. ``labeled_sampler`` adds labeled images
    for the online linear classifier to each batch, if the images of ``sampler`` have no labels. With ``half``, views
    are float16. Raises UserError if DALI's kernels do not work on the GPU.

    A bad image is reported to ``sampler.bad``, and its step is repeated without it. A DALI pipeline makes views of one
    size; if the size changes, a new pipeline continues at the next step.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        backend: Backend,
        device: torch.device,
        workers: int,
        labeled_sampler: Sampler | None = None,
        half: bool = False,
    ) -> None:
        self.sampler, self.device, self.workers, self.half = sampler, device, workers, half
        self.backend = resolve_backend(backend, device)
        if self.backend == "dali" and device.type == "cuda":
            from pipelines.executors.self_check import require_equal_views

            require_equal_views(device)
        self.labeled_loader = (
            Loader(labeled_sampler, backend=backend, device=device, workers=workers, half=half)
            if labeled_sampler is not None
            else None
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Endless batches from micro-batch ``first_step`` on, across epochs.

        Raises UserError if too many images are bad.
        """
        batches = reading_ahead(self.sampler.images, self._batches(first_step), self.sampler.shards_from, first_step)
        reported = self._reporting_epochs(batches)
        if self.labeled_loader is None:
            yield from reported
        else:
            for batch, labeled in zip(reported, self.labeled_loader.batches(first_step)):
                yield replace(batch, labeled_views=labeled.views, labels=labeled.labels)

    def _reporting_epochs(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        epoch = None
        for batch in batches:
            if epoch is not None and batch.epoch != epoch:
                self.sampler.bad.end_epoch(epoch)
            epoch = batch.epoch
            yield batch

    def _batches(self, first_step: int) -> Iterator[Batch]:
        if self.backend == "torchvision":
            return self._torchvision_batches(first_step)
        options: dict[str, Any] = {"threads": self.workers, "half": self.half, "first_step": first_step}
        return dali_batches(self.sampler, self.device, **options)

    def _torchvision_batches(self, first_step: int) -> Iterator[Batch]:
        dtype = torch.float16 if self.half else torch.float32
        for views, labels, plan, bad_images in training_steps(self.sampler, first_step, self.workers):
            if bad_images:
                assert isinstance(self.sampler.images, ImageFiles)
                remember(self.sampler.images, bad_images)
                self.sampler.bad.add(bad_images)
            yield Batch(
                views=to_device(views, self.device).to(dtype).movedim(-1, -3),
                commands=plan.commands,
                labels=to_device(labels, self.device),
                epoch=plan.epoch,
                positions=plan.positions,
                image_ids=plan.image_ids,
            )


def dali_batches(
    sampler: Sampler, device: torch.device, *, threads: int, half: bool, first_step: int = 0
) -> Iterator[Batch]:
    """Endless batches from micro-batch ``first_step`` on, whose plans are executed in DALI's graph."""
    from pipelines.executors.graph import executor_class, training_pipeline
    from pipelines.feed import TrainingFeed, run_pipeline

    step, by_view = first_step, (sampler.batch_size, sampler.views)
    while True:
        policy = sampler.policy_of(step)
        graph = executor_class(device)(sampler.images, policy, sampler.views, device, half=half)
        feed = TrainingFeed(sampler, graph, step)
        options = pipeline_options(1 if graph.batch_is_sample else sampler.batch_size, threads, device)
        pipeline = training_pipeline(graph, feed.next_inputs, **options)
        for views, packed, record, *_ in run_pipeline(pipeline, feed, device):
            rows: NDArray[np.int64] = np.array(record.as_array()).reshape(-1, 4)
            assert rows[0, 1] == sampler.first_position(step), "DALI has lost or swapped a step"
            pixels = torch.from_dlpack(views.as_tensor()).reshape(*by_view, policy.size, policy.size, 3)
            yield Batch(
                views=pixels.movedim(-1, -3),
                commands=Commands.unpack(packed.as_array().reshape(*by_view, -1)),
                labels=to_device(rows[:, 3].copy(), device),
                epoch=int(rows[0, 0]),
                positions=rows[:, 1],
                image_ids=rows[:, 2],
            )
            step += 1


def pipeline_options(batch_size: int, threads: int, device: torch.device) -> dict[str, Any]:
    """The options of a DALI pipeline on ``device``."""
    from pipelines.feed import PREFETCH_DEPTH

    return {
        "device_id": device.index or 0 if device.type == "cuda" else None,
        "batch_size": batch_size,
        "num_threads": max(1, threads),
        "prefetch_queue_depth": PREFETCH_DEPTH,
    }


class EvaluationLoader:
    """Images as the official code evaluates them: unchanged, or the shorter side resized and the center cropped.

    ``resize_px`` is the size of the shorter side; None leaves images unchanged. A bad image raises UserError: an
    accuracy without it would not be that of the data set.
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
        self.backend = resolve_backend(backend, device)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.images.labels

    @property
    def factors(self) -> Mapping[str, NDArray[np.float32]]:
        return self.images.factors if isinstance(self.images, ImageArray) else {}

    def batches(self, *id_ranges: NDArray[np.int64]) -> Iterator[PlainBatch]:
        """The images with these ids, in this order; no batch holds images of two ranges."""
        size = self.batch_size
        batches = [image_ids[k : k + size] for image_ids in id_ranges for k in range(0, len(image_ids), size)]
        made = self._images(batches)
        if isinstance(self.images, ImageFiles) and self.images.shards is not None and batches:
            order = ShardOrder(self.images.shard_of[np.concatenate(batches)])
            firsts = np.cumsum([0, *map(len, batches)])
            made = reading_ahead(self.images, made, lambda k: order.after(firsts[k]))
        for image_ids, images in zip(batches, made):
            yield PlainBatch(images=images, labels=to_device(self.images.labels[image_ids], self.device))

    def _images(self, batches: list[NDArray[np.int64]]) -> Iterator[Tensor]:
        if isinstance(self.images, ImageArray) and self.resize_px is None:
            for image_ids in batches:
                pixels = np.ascontiguousarray(self.images.upright(image_ids))
                yield to_unit_range(torch.from_numpy(pixels), self.device)
        elif isinstance(self.images, ImageFiles) and self.resize_px is not None and self.backend == "dali":
            yield from self._dali_images(self.images, batches, self.resize_px)
        else:
            for images in evaluation_batches(self.images, batches, self.resize_px, self.size, self.workers):
                yield to_device(images, self.device).contiguous(memory_format=torch.channels_last)

    def _dali_images(self, images: ImageFiles, batches: list[NDArray[np.int64]], resize_px: int) -> Iterator[Tensor]:
        from pipelines.executors.image_files import evaluation_pipeline
        from pipelines.feed import EvaluationFeed, run_pipeline

        done = 0
        while done < len(batches):
            feed = EvaluationFeed(images, batches[done:], resize_px, self.size)
            assert feed.form is not None
            pipeline = evaluation_pipeline(
                images,
                feed.next_inputs,
                self.size,
                device="gpu" if self.device.type == "cuda" else "cpu",
                form=feed.form,
                **pipeline_options(self.batch_size, self.workers, self.device),
            )
            for pixels, _ in run_pipeline(pipeline, feed, self.device):
                yield to_unit_range(torch.from_dlpack(pixels.as_tensor()), self.device)
                done += 1
