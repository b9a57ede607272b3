"""Pipelines turned into batches on the right device, for training and for evaluation."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch, PlainBatch
from pipelines.commands import PACKED_COLUMNS, Commands
from pipelines.datasets.bad_list import remember
from pipelines.datasets.images import ImageArray, ImageFiles, Images
from pipelines.errors import BadImage, UserError
from pipelines.executors.dali_failure import DaliFailure
from pipelines.executors.reference import reference_evaluation, reference_steps
from pipelines.sampler import BatchPlan, Sampler

if TYPE_CHECKING:
    from pipelines.executors.graphs import FileForm, Form, Operators

Backend = Literal["auto", "dali", "torchvision"]

PREFETCH_DEPTH = 2
"""Batches that DALI prepares ahead."""
SHARDS_AHEAD = 8
"""Steps before a shard is needed that the system is asked to read it."""


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
    """Training batches: what ``sampler`` says, executed by one of the two backends.

    ``workers`` are DALI's threads or torchvision's worker processes. ``labeled_sampler`` gives each batch labeled
    images
    of its own for the online classifier, where the images of ``sampler`` have no labels. ``half``: views in float16,
    on a GPU.
    ``operators`` are DALI's on a GPU and compiled on a CPU, unless said otherwise.

    An image that turns out to be bad goes to ``sampler.bad``, and the step that met it is made again without it. A DALI
    pipeline makes views of one size; where that changes, another one goes on at the step where the last one ended.
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
        operators: Operators | None = None,
    ) -> None:
        self.sampler, self.device, self.workers, self.half = sampler, device, workers, half
        self.backend = resolve_backend(backend)
        self.operators: Operators = operators or ("dali" if device.type == "cuda" else "compiled")
        self.labeled_loader = (
            Loader(labeled_sampler, backend=backend, device=device, workers=workers, half=half, operators=operators)
            if labeled_sampler is not None
            else None
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Endless batches from global step ``first_step`` on, across epochs.

        Raises UserError where too many images are bad.
        """
        batches = self._dali_batches if self.backend == "dali" else self._torchvision_batches
        own = self._epoch_by_epoch(batches(first_step))
        if self.labeled_loader is None:
            yield from own
        else:
            for batch, classifier in zip(own, self.labeled_loader.batches(first_step)):
                yield replace(batch, labeled_views=classifier.views, labels=classifier.labels)

    def _epoch_by_epoch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        epoch = None
        for batch in batches:
            if epoch is not None and batch.epoch != epoch:
                self.sampler.bad.end_epoch(epoch)
            epoch = batch.epoch
            yield batch

    def _torchvision_batches(self, first_step: int) -> Iterator[Batch]:
        dtype = torch.float16 if self.half else torch.float32
        for views, labels, plan, found in reference_steps(self.sampler, first_step, self.workers):
            if found:
                assert isinstance(self.sampler.images, ImageFiles)
                remember(self.sampler.images, found)
                self.sampler.bad.add(found)
            yield Batch(
                views=torch.from_numpy(views).to(self.device, non_blocking=True).to(dtype).movedim(-1, -3),
                commands=plan.commands,
                labels=torch.from_numpy(labels).to(self.device, non_blocking=True),
                epoch=plan.epoch,
                positions=plan.positions,
                image_ids=plan.image_ids,
            )

    def _dali_batches(self, first_step: int) -> Iterator[Batch]:
        from pipelines.executors.graphs import training_pipeline

        images, step = self.sampler.images, first_step
        while True:
            source = _TrainingSource(self.sampler, step, self.operators, self.device)
            pipeline = training_pipeline(
                source,
                source.policy,
                form=source.form,
                views=self.sampler.views,
                operators=self.operators,
                pixels_on_device=source.pixels_on_device if source.device_pixels is not None else None,
                half=self.half,
                largest_hw=(int(images.sizes[:, 0].max()), int(images.sizes[:, 1].max()))
                if isinstance(images, ImageFiles)
                else None,
                exif_orientation=isinstance(images, ImageFiles) and images.exif_orientation,
                **_pipeline_options(self.sampler.batch_size, self.workers, self.device),
            )
            for views, packed, record, *_ in _run(pipeline, source, self.device):
                rows: NDArray[np.int64] = np.array(record.as_array())
                assert rows[0, 1] == self.sampler.first_position(step), "DALI has lost or swapped a step"
                yield Batch(
                    views=torch.from_dlpack(views.as_tensor()).movedim(-1, -3),
                    commands=Commands.unpack(packed.as_array()),
                    labels=torch.from_numpy(rows[:, 3].copy()).to(self.device, non_blocking=True),
                    epoch=int(rows[0, 0]),
                    positions=rows[:, 1],
                    image_ids=rows[:, 2],
                )
                step += 1


def _pipeline_options(batch_size: int, threads: int, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "device": "gpu" if on_gpu else "cpu",
        "device_id": device.index or 0 if on_gpu else None,
        "batch_size": batch_size,
        "num_threads": max(1, threads),
        "prefetch_queue_depth": PREFETCH_DEPTH,
    }


class _Source(ABC):
    """Feeds a pipeline with one step after the other, and again with those that did not come out as they should.

    Keeps what it fed for the last steps: DALI reads it where it lies, some time later.
    """

    form: Form
    """How images enter the pipeline."""

    def __init__(self, images: Images, first_step: int) -> None:
        self.images, self.next_step = images, first_step
        self._in_flight: deque[tuple[int, NDArray[np.int64]]] = deque()
        self._again: deque[int] = deque()
        self._feeds: deque[Sequence[Any]] = deque(maxlen=4 * PREFETCH_DEPTH)

    @property
    def outdated(self) -> bool:
        """Whether images must enter by another form by now than the pipeline was defined for."""
        return isinstance(self.images, ImageFiles) and self.form != _file_form(self.images)

    @abstractmethod
    def covers(self, step: int) -> bool:
        """Whether the pipeline is for this step. DALI prefetches past the last one; those are never used."""

    @abstractmethod
    def image_ids(self, step: int) -> NDArray[np.int64]:
        """The images of a step."""

    @abstractmethod
    def make_feed(self, step: int) -> Sequence[Any]:
        """The pipeline's inputs for a step. Raises BadImage for an image that cannot be read."""

    @abstractmethod
    def replaced_files(self, image_ids: NDArray[np.int64], outputs: Sequence[Any]) -> NDArray[np.int64]:
        """Those of a step's images whose files were replaced by ones of another size since they were indexed."""

    @abstractmethod
    def exclude(self, found: Sequence[BadImage]) -> None:
        """Use these images no more, or raise what the first of them means."""

    def __call__(self) -> Sequence[Any]:
        if self._again:
            step = self._again.popleft()
        else:
            step = self.next_step
            self.next_step += 1
        while True:
            image_ids = self.image_ids(step)
            try:
                feed = self.make_feed(step)
                break
            except BadImage as bad:
                # By now it may be readable again.
                self.exclude(self._bad_among(image_ids) or [bad])
        self._in_flight.append((step, image_ids))
        self._feeds.append(feed)
        return feed

    def arrived(self, outputs: Sequence[Any]) -> int | None:
        """The step that these outputs are of; None where it has to be made again, as files were replaced."""
        step, image_ids = self._in_flight.popleft()
        replaced = self.replaced_files(image_ids, outputs)
        if len(replaced) == 0:
            return step
        assert isinstance(self.images, ImageFiles)
        found = []
        for image_id in replaced.tolist():
            try:
                if not self.images.update(image_id):
                    # The file is the same: DALI reads another size from its header than Pillow does.
                    failure = DaliFailure(f"it takes {self.images.name(image_id)} for an image of another size")
                    self._leave_to_pillow(np.array([image_id]), failure)
            except BadImage as bad:
                found.append(bad)
        if found:
            self.exclude(found)
        self._again.append(step)
        return None

    def failed(self, error: RuntimeError) -> None:
        """Have the step that DALI failed on made again, without the images that are bad.

        DALI does not name them, so Pillow opens all. Where none of them is bad, Pillow opens them from now on. Raises
        UserError where that is done already, or what failed has nothing to do with images.
        """
        failure = DaliFailure(error)
        if not failure.is_about_an_image:
            raise failure.for_user() from error
        step, image_ids = self._in_flight.popleft()
        found = self._bad_among(image_ids)
        if found:
            self.exclude(found)
        else:
            self._leave_to_pillow(image_ids, failure)
        self._again.append(step)

    def _bad_among(self, image_ids: NDArray[np.int64]) -> list[BadImage]:
        """Those of these images that Pillow cannot open; they are remembered for later runs."""
        assert isinstance(self.images, ImageFiles), "images in memory are never bad"
        with ThreadPoolExecutor() as pool:
            checked = pool.map(partial(_why_bad, self.images), np.unique(image_ids).tolist())
            found = [bad for bad in checked if bad is not None]
        remember(self.images, found)
        return found

    def _leave_to_pillow(self, image_ids: NDArray[np.int64], failure: DaliFailure) -> None:
        assert isinstance(self.images, ImageFiles)
        if self.images.needs_pillow[image_ids].all():
            raise failure.for_user()
        self.images.needs_pillow[image_ids] = True


def _why_bad(images: ImageFiles, image_id: int) -> BadImage | None:
    try:
        images.open(image_id)
    except BadImage as bad:
        return bad
    return None


def _run(pipeline: Any, source: _Source, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """The outputs of a pipeline for the steps that its source covers, in their order, until the source is outdated.

    A step that has to be made again is fed to the same pipeline, behind those that are in flight, whose outputs wait. A
    failure in an operator ends the step it belongs to and no other: DALI's dynamic executor has an own state for each.
    """
    step = source.next_step
    stream = [torch.cuda.current_stream(device)] if device.type == "cuda" else []
    try:
        pipeline.build()
    except RuntimeError as error:
        raise DaliFailure(error).for_user() from error
    waiting: dict[int, tuple[Any, ...]] = {}
    while source.covers(step) and not source.outdated:
        if step in waiting:
            yield waiting.pop(step)
            step += 1
            continue
        try:
            outputs = pipeline.run(*stream)
        except RuntimeError as error:
            source.failed(error)
            continue
        arrived = source.arrived(outputs)
        if arrived is not None:
            waiting[arrived] = outputs


class _TrainingSource(_Source):
    """Feeds ``training_pipeline`` with the steps from ``first_step`` on whose views have the same size."""

    def __init__(self, sampler: Sampler, first_step: int, operators: Operators, device: torch.device) -> None:
        super().__init__(sampler.images, first_step)
        self.sampler, self.operators = sampler, operators
        self.policy = sampler.policy_of(first_step)
        self.plan: Any = lru_cache(maxsize=4)(sampler.plan)
        self.device_pixels: Tensor | None = None
        self.pixel_step = first_step
        self._asked_for: set[int] = set()
        images = sampler.images
        if isinstance(images, ImageFiles):
            self.form = _file_form(images)
        elif operators == "compiled":
            self.form = "memory"
        else:
            self.form = images.layout
            # The whole data set moves to the GPU once; a batch is then picked out there.
            if device.type == "cuda":
                self.device_pixels = _on_device(images, device)

    def covers(self, step: int) -> bool:
        return self.sampler.policy_of(step) == self.policy

    def image_ids(self, step: int) -> NDArray[np.int64]:
        image_ids: NDArray[np.int64] = self.plan(self._covered(step)).image_ids
        return image_ids

    def make_feed(self, step: int) -> Sequence[Any]:
        plan = self.plan(self._covered(step))
        return [*self._opening_and_arguments(plan, step), plan.commands.pack(), _record(plan, self.images)]

    def exclude(self, found: Sequence[BadImage]) -> None:
        self.sampler.bad.add(found)
        self.plan.cache_clear()

    def replaced_files(self, image_ids: NDArray[np.int64], outputs: Sequence[Any]) -> NDArray[np.int64]:
        _, packed, _, *stored_shape = outputs
        if not stored_shape:
            return image_ids[:0]
        # Not the sizes that the images have by now: commands in flight were drawn for those before.
        drawn_for = packed.as_array()[:, 0, [PACKED_COLUMNS["source_height"], PACKED_COLUMNS["source_width"]]]
        replaced = (stored_shape[0].as_array()[:, :2] != drawn_for).any(axis=1)
        if replaced.any():
            self.plan.cache_clear()
        return image_ids[replaced]

    def pixels_on_device(self) -> Tensor:
        """The pixels of a step, from the GPU's copy of the data set."""
        assert self.device_pixels is not None
        image_ids = torch.from_numpy(self.plan(self._covered(self.pixel_step)).image_ids)
        self.pixel_step += 1
        return self.device_pixels[image_ids.to(self.device_pixels.device, non_blocking=True)]

    def _covered(self, step: int) -> int:
        """The step, or the last one before it that is covered."""
        while not self.covers(step):
            step -= 1
        return step

    def _opening_and_arguments(self, plan: BatchPlan, step: int) -> list[Any]:
        from pipelines.executors.graphs import argument_names, needed_part, view_arguments

        images, policy, image_ids = self.images, self.policy, plan.image_ids
        origin = None
        if isinstance(images, ImageArray):
            if self.form == "memory":
                return [_addresses(images, image_ids, policy.blur_window_px)]
            opening: list[Any] = [images.pixels[image_ids]] if self.device_pixels is None else []
        else:
            if images.in_shards:
                self._ask_for_shards(images, step)
            origin, extent = needed_part(plan.commands)
            opening = [*_contents(images, image_ids, self.form), origin, extent]
        if self.operators == "compiled":
            assert origin is not None
            window = np.full(len(origin), policy.blur_window_px)
            return [*opening, np.stack([origin[:, 0], origin[:, 1], window], axis=-1, dtype=np.int64)]
        by_name = view_arguments(plan.commands, policy, origin)
        arguments = (by_name[name][:, v] for v in range(self.sampler.views) for name in argument_names(policy))
        return [*opening, *(np.ascontiguousarray(argument) for argument in arguments)]

    def _ask_for_shards(self, images: ImageFiles, step: int) -> None:
        """Have shards read as a whole before their images are needed: long reads, which network storage likes."""
        ahead = range(step, step + SHARDS_AHEAD) if not self._asked_for else [step + SHARDS_AHEAD - 1]
        soon = {int(shard) for step in ahead for shard in self.sampler.shards_of(step)}
        for shard in soon - self._asked_for:
            images.read_ahead(shard)
        self._asked_for = soon | self._asked_for if len(self._asked_for) < 4 * len(soon) else soon


@lru_cache(maxsize=2)
def _on_device(images: ImageArray, device: torch.device) -> Tensor:
    return torch.from_numpy(images.pixels).to(device)


def _addresses(images: ImageArray, image_ids: NDArray[np.int64], blur_window_px: int) -> NDArray[np.int64]:
    """[N, 5]: of each image the address of its first byte, its strides, and the width of the blur kernel."""
    pixels = images.pixels
    strides = [pixels.strides[1 + images.layout.index(axis)] for axis in "HWC"]
    where = np.empty((len(image_ids), 5), np.int64)
    where[:, 0] = pixels.ctypes.data + image_ids * pixels.strides[0]
    where[:, 1:] = [*strides, blur_window_px]
    return where


_NOTHING = np.zeros(1, np.uint8)


def _file_form(images: ImageFiles) -> FileForm:
    """Files are read by DALI; what lies in a shard, or must be opened by Pillow, is given by its content."""
    if images.in_shards:
        return "bytes"
    return "either" if images.needs_pillow.any() else "path"


def _contents(images: ImageFiles, image_ids: NDArray[np.int64], form: Form) -> list[Any]:
    """How DALI gets at images, as the form of the graph wants it."""
    if form == "path":
        return [images.path_bytes(image_ids)]
    by_pillow = images.needs_pillow[image_ids]
    given = zip(image_ids.tolist(), by_pillow.tolist())
    if form == "bytes":
        return [[_as_ppm(images, image_id) if odd else images.encoded(image_id) for image_id, odd in given]]
    contents = [_as_ppm(images, image_id) if odd else _NOTHING for image_id, odd in given]
    return [by_pillow, contents, images.path_bytes(image_ids)]


def _as_ppm(images: ImageFiles, image_id: int) -> NDArray[np.uint8]:
    """An image that DALI would decode otherwise than Pillow, in a format of plain pixels."""
    image = images.open(image_id)
    return np.frombuffer(b"P6 %d %d 255\n" % image.size + image.tobytes(), np.uint8)


def _record(plan: BatchPlan, images: Images) -> NDArray[np.int64]:
    """[N, 4] int64: epoch, position, image id, label."""
    epoch = np.full_like(plan.positions, plan.epoch)
    return np.stack([epoch, plan.positions, plan.image_ids, images.labels[plan.image_ids]], axis=-1)


class EvaluationLoader:
    """Images as the official code evaluates them: plain pixels, or the shorter side resized and the center cut out.

    ``resize_px`` is the shorter side to resize to, None for images that are used as they are. A bad image raises
    UserError: an accuracy is over all images or it is none.
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

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.images.labels

    def batches(self, *stretches: NDArray[np.int64]) -> Iterator[PlainBatch]:
        """The images of these numbers, in this order; no batch holds images of two stretches."""
        size = self.batch_size
        parts = [stretch[k : k + size] for stretch in stretches for k in range(0, len(stretch), size)]
        for part, images in zip(parts, self._images(parts)):
            labels = torch.from_numpy(self.images.labels[part])
            yield PlainBatch(images=images, labels=labels.to(self.device, non_blocking=True))

    def _images(self, parts: list[NDArray[np.int64]]) -> Iterator[Tensor]:
        if isinstance(self.images, ImageArray) and self.resize_px is None:
            for part in parts:
                pixels = np.ascontiguousarray(self.images.upright(part))
                yield to_unit_range(torch.from_numpy(pixels), self.device)
        elif isinstance(self.images, ImageFiles) and self.resize_px is not None and self.backend == "dali":
            yield from self._dali_images(self.images, parts, self.resize_px)
        else:
            for batch in reference_evaluation(self.images, parts, self.resize_px, self.size, self.workers):
                yield batch.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)

    def _dali_images(self, images: ImageFiles, parts: list[NDArray[np.int64]], resize_px: int) -> Iterator[Tensor]:
        from pipelines.executors.graphs import evaluation_pipeline

        done = 0
        while done < len(parts):
            source = _EvaluationSource(images, parts[done:], resize_px, self.size)
            options = _pipeline_options(self.batch_size, self.workers, self.device)
            pipeline = evaluation_pipeline(
                source, self.size, form=_file_form(images), exif_orientation=images.exif_orientation, **options
            )
            for made, _ in _run(pipeline, source, self.device):
                yield to_unit_range(torch.from_dlpack(made.as_tensor()), self.device)
                done += 1


class _EvaluationSource(_Source):
    """Feeds ``evaluation_pipeline``: a step a batch."""

    def __init__(self, images: ImageFiles, parts: list[NDArray[np.int64]], resize_px: int, size: int) -> None:
        super().__init__(images, 0)
        self.files, self.resize_px, self.size = images, resize_px, size
        self.form = _file_form(images)
        self.parts = parts

    def covers(self, step: int) -> bool:
        return step < len(self.parts)

    def image_ids(self, step: int) -> NDArray[np.int64]:
        return self.parts[min(step, len(self.parts) - 1)]

    def make_feed(self, step: int) -> Sequence[Any]:
        image_ids = self.image_ids(step)
        resized_hw, corner = center_of_resized(self.files.image_hw(image_ids), self.resize_px, self.size)
        return [*_contents(self.files, image_ids, self.form), resized_hw.astype(np.float32), corner]

    def exclude(self, found: Sequence[BadImage]) -> None:
        raise found[0]

    def replaced_files(self, image_ids: NDArray[np.int64], outputs: Sequence[Any]) -> NDArray[np.int64]:
        stored: NDArray[np.int64] = outputs[1].as_array()
        return image_ids[(stored[:, :2] != self.files.image_hw(image_ids)).any(axis=1)]


def center_of_resized(
    image_hw: NDArray[np.int64], resize_px: int, size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sizes [N, 2] after torchvision's ``Resize(resize_px)``, and corners [N, 2] of its ``CenterCrop(size)``."""
    resized = (resize_px * image_hw / image_hw.min(axis=1, keepdims=True)).astype(np.int32)
    corner = np.rint((resized - size) / 2).astype(np.int32)
    return resized, corner
