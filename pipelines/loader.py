"""Pipelines turned into batches on the right device, for training and for evaluation."""

from __future__ import annotations

import importlib.util
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.images import ImageArray, ImageFiles, Images
from pipelines.order import Order, Share
from pipelines.reference import reference_evaluation, reference_steps
from stec.batch import Batch, PlainBatch
from stec.commands import Commands
from stec.errors import BadImage, UserError

if TYPE_CHECKING:
    from pipelines.graphs import FileForm, Form, Operators

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
    """Training batches: what ``order`` says, executed by one of the two backends.

    ``workers`` are DALI's threads or torchvision's worker processes. ``probe_order`` gives each batch labelled images
    of its own for the probe, where the images of ``order`` have no labels. ``half``: views in float16, on a GPU.
    ``operators`` are DALI's on a GPU and compiled on a CPU, unless said otherwise.

    An image that turns out to be bad goes to ``order.bad``, and the step that met it is made again without it. A DALI
    pipeline makes views of one size; where it changes, the next pipeline goes on at the step where the last one ended.
    """

    def __init__(
        self,
        order: Order,
        *,
        backend: Backend,
        device: torch.device,
        workers: int,
        probe_order: Order | None = None,
        half: bool = False,
        operators: Operators | None = None,
    ) -> None:
        self.order, self.device, self.workers, self.half = order, device, workers, half
        self.backend = resolve_backend(backend)
        self.operators: Operators = operators or ("dali" if device.type == "cuda" else "compiled")
        self.probe_loader = (
            Loader(probe_order, backend=backend, device=device, workers=workers, half=half, operators=operators)
            if probe_order is not None
            else None
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Endless batches from global step ``first_step`` on, across epochs.

        Raises UserError where too many images are bad.
        """
        own = self._past_bad_images(first_step)
        if self.probe_loader is None:
            yield from own
        else:
            for batch, probe in zip(own, self.probe_loader.batches(first_step)):
                yield replace(batch, probe_views=probe.views, labels=probe.labels)

    def _past_bad_images(self, first_step: int) -> Iterator[Batch]:
        step = first_step
        while True:
            batches = self._dali_batches(step) if self.backend == "dali" else self._torchvision_batches(step)
            try:
                for batch in batches:
                    yield batch
                    step += 1
            except BadImage as bad:
                self.order.bad.add(bad)

    def _torchvision_batches(self, first_step: int) -> Iterator[Batch]:
        dtype = torch.float16 if self.half else torch.float32
        for views, labels, share in reference_steps(self.order, first_step, self.workers):
            yield Batch(
                views=views.to(self.device, non_blocking=True).to(dtype).movedim(-1, -3),
                commands=share.commands,
                labels=labels.to(self.device, non_blocking=True),
                epoch=share.epoch,
                positions=share.positions,
                image_ids=share.image_ids,
            )

    def _dali_batches(self, first_step: int) -> Iterator[Batch]:
        from pipelines.graphs import training_pipeline

        images = self.order.images
        source = _TrainingSource(self.order, first_step, self.operators, self.device)
        pipeline = training_pipeline(
            source,
            source.policy,
            form=source.form,
            views=self.order.views,
            operators=self.operators,
            pixels_on_device=source.pixels_on_device if source.device_pixels is not None else None,
            half=self.half,
            largest_hw=(int(images.sizes[:, 0].max()), int(images.sizes[:, 1].max()))
            if isinstance(images, ImageFiles)
            else None,
            exif_orientation=isinstance(images, ImageFiles) and images.exif_orientation,
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
    """Raise BadImage where a file is not of the size that its command was drawn for."""
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


class _Source:
    """Feeds a pipeline. Keeps what it fed for the last batches: DALI reads it where it lies, some time later."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self._feeds: deque[tuple[NDArray[np.int64], Sequence[Any]]] = deque(maxlen=2 * PREFETCH_DEPTH + 2)

    def keep(self, image_ids: NDArray[np.int64], feed: Sequence[Any]) -> Sequence[Any]:
        self._feeds.append((image_ids, feed))
        return feed

    def settle(self, error: RuntimeError) -> None:
        """See to what DALI failed on, which it does not name: an image of the last batches.

        Raises BadImage for one that Pillow cannot open either. If there is none, Pillow opens all of them from now on.
        Raises UserError where that is done already.
        """
        image_ids = np.unique(np.concatenate([image_ids for image_ids, _ in self._feeds]))
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.images.open, image_ids.tolist()))
        if not isinstance(self.images, ImageFiles) or self.images.needs_pillow[image_ids].all():
            raise UserError(f"DALI could not make a batch: {error}", local=True) from error
        self.images.needs_pillow[image_ids] = True


def _run(pipeline: Any, source: _Source, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """The outputs of a pipeline, until its source ends, or DALI fails on an image and the source has seen to it."""
    pipeline.build()
    stream = [torch.cuda.current_stream(device)] if device.type == "cuda" else []
    while True:
        try:
            outputs = pipeline.run(*stream)
        except RuntimeError as error:
            source.settle(error)
            return
        except StopIteration:
            return
        yield outputs


class _TrainingSource(_Source):
    """Feeds ``training_pipeline``: one call a step, in order, until views change their size."""

    def __init__(self, order: Order, first_step: int, operators: Operators, device: torch.device) -> None:
        super().__init__(order.images)
        self.order, self.step, self.operators = order, first_step, operators
        self.policy = order.policy_of(first_step)
        self.share: Callable[[int], Share] = lru_cache(maxsize=4)(order.share)
        self.device_pixels: Tensor | None = None
        self.pixel_step = first_step
        self._asked_for: set[int] = set()
        images = order.images
        if isinstance(images, ImageFiles):
            self.form: Form = _file_form(images)
        elif operators == "compiled":
            self.form = "memory"
        else:
            self.form = images.layout
            # The whole data set moves to the GPU once; a batch is then picked out there.
            if device.type == "cuda":
                self.device_pixels = _on_device(images, device)

    def __call__(self) -> Sequence[Any]:
        if self.order.policy_of(self.step) != self.policy:
            raise StopIteration
        share = self.share(self.step)
        feed = [*self._opening_and_arguments(share), share.commands.pack(), _record(share, self.images)]
        self.step += 1
        return self.keep(share.image_ids, feed)

    def pixels_on_device(self) -> Tensor:
        """The pixels of a step, from the GPU's copy of the data set."""
        assert self.device_pixels is not None
        image_ids = torch.from_numpy(self.share(self.pixel_step).image_ids)
        self.pixel_step += 1
        return self.device_pixels[image_ids.to(self.device_pixels.device, non_blocking=True)]

    def _opening_and_arguments(self, share: Share) -> list[Any]:
        from pipelines.graphs import argument_names, needed_part, view_arguments

        images, policy, image_ids = self.images, self.policy, share.image_ids
        origin = None
        if isinstance(images, ImageArray):
            if self.form == "memory":
                return [_addresses(images, image_ids, policy.blur_window_px)]
            opening: list[Any] = [images.pixels[image_ids]] if self.device_pixels is None else []
        else:
            if images.in_shards:
                self._ask_for_shards(images)
            origin, extent = needed_part(share.commands)
            opening = [*_contents(images, image_ids, self.form), origin, extent]
        if self.operators == "compiled":
            assert origin is not None
            window = np.full(len(origin), policy.blur_window_px)
            return [*opening, np.stack([origin[:, 0], origin[:, 1], window], axis=-1, dtype=np.int64)]
        by_name = view_arguments(share.commands, policy, origin)
        arguments = (by_name[name][:, v] for v in range(self.order.views) for name in argument_names(policy))
        return [*opening, *(np.ascontiguousarray(argument) for argument in arguments)]

    def _ask_for_shards(self, images: ImageFiles) -> None:
        """Have shards read as a whole before their images are needed: long reads, which network storage likes."""
        ahead = range(self.step, self.step + SHARDS_AHEAD) if not self._asked_for else [self.step + SHARDS_AHEAD - 1]
        soon = {int(shard) for step in ahead for shard in self.order.shards_of(step)}
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


def _record(share: Share, images: Images) -> NDArray[np.int64]:
    """[N, 4] int64: epoch, position, image id, label."""
    epoch = np.full_like(share.positions, share.epoch)
    return np.stack([epoch, share.positions, share.image_ids, images.labels[share.image_ids]], axis=-1)


class EvaluationLoader:
    """Images as the official code evaluates them: plain pixels, or the shorter side resized and the centre cut out.

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
        from pipelines.graphs import evaluation_pipeline

        done = 0
        while done < len(parts):
            source = _EvaluationSource(images, parts[done:], resize_px, self.size)
            options = _pipeline_options(self.batch_size, self.workers, self.device)
            pipeline = evaluation_pipeline(
                source, self.size, form=source.form, exif_orientation=images.exif_orientation, **options
            )
            for _, (made,) in zip(parts[done:], _run(pipeline, source, self.device)):
                yield to_unit_range(torch.from_dlpack(made.as_tensor()), self.device)
                done += 1


class _EvaluationSource(_Source):
    """Feeds ``evaluation_pipeline``: one call a batch, and the last batch again while DALI prefetches past the end."""

    def __init__(self, images: ImageFiles, parts: list[NDArray[np.int64]], resize_px: int, size: int) -> None:
        super().__init__(images)
        self.files, self.resize_px, self.size = images, resize_px, size
        self.form = _file_form(images)
        self.parts = itertools.chain(parts, itertools.repeat(parts[-1]))

    def __call__(self) -> Sequence[Any]:
        image_ids = next(self.parts)
        resized_hw, corner = centre_of_resized(self.files.image_hw(image_ids), self.resize_px, self.size)
        feed = [*_contents(self.files, image_ids, self.form), resized_hw.astype(np.float32), corner]
        return self.keep(image_ids, feed)


def centre_of_resized(
    image_hw: NDArray[np.int64], resize_px: int, size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sizes [N, 2] after torchvision's ``Resize(resize_px)``, and corners [N, 2] of its ``CenterCrop(size)``."""
    resized = (resize_px * image_hw / image_hw.min(axis=1, keepdims=True)).astype(np.int32)
    corner = np.rint((resized - size) / 2).astype(np.int32)
    return resized, corner
