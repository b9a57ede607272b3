"""Feeds DALI pipelines step by step, and repeats steps that failed or whose image files have changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.commands import PACKED_COLUMNS
from pipelines.datasets.bad_list import remember
from pipelines.datasets.images import ImageFiles, Images
from pipelines.errors import BadImage
from pipelines.executors.dali_failure import DaliFailure
from pipelines.executors.graph import Executor
from pipelines.executors.image_files import FileForm, encoded_inputs, evaluation_inputs, file_form
from pipelines.sampler import BatchPlan, Sampler

PREFETCH_DEPTH = 2
"""Batches that DALI prepares in advance."""
SHARDS_AHEAD = 8
"""Steps in advance that the operating system is asked to read a shard."""


class Feed(ABC):
    """The inputs of a pipeline, one step after the other.

    DALI reads the arrays in place, some time after they were returned, so those of the last steps are kept.
    """

    def __init__(self, images: Images, form: FileForm | None, first_step: int) -> None:
        self.images, self.form, self.next_step = images, form, first_step
        self._in_flight: deque[tuple[int, NDArray[np.int64]]] = deque()
        self._repeated: deque[int] = deque()
        self._kept: deque[Sequence[Any]] = deque(maxlen=4 * PREFETCH_DEPTH)

    @property
    def outdated(self) -> bool:
        """Whether files must enter the graph in another form than the one that it was defined for."""
        return isinstance(self.images, ImageFiles) and self.form != file_form(self.images)

    @abstractmethod
    def covers(self, step: int) -> bool:
        """Whether the pipeline is for this step. DALI prefetches past the last one; those outputs are not used."""

    @abstractmethod
    def image_ids(self, step: int) -> NDArray[np.int64]:
        """The images of a step."""

    @abstractmethod
    def inputs(self, step: int) -> Sequence[Any]:
        """The inputs of a step. Raises BadImage for an image that cannot be read."""

    @abstractmethod
    def changed_files(self, image_ids: NDArray[np.int64], outputs: Sequence[Any]) -> NDArray[np.int64]:
        """Those of a step's images whose files have another size, in px or bytes, than when they were indexed."""

    @abstractmethod
    def exclude(self, images: Sequence[BadImage]) -> None:
        """Stop using these images, or raise an error."""

    def next_inputs(self) -> Sequence[Any]:
        """The next step's inputs."""
        if self._repeated:
            step = self._repeated.popleft()
        else:
            step = self.next_step
            self.next_step += 1
        while True:
            image_ids = self.image_ids(step)
            try:
                inputs = self.inputs(step)
                break
            except BadImage as bad:
                # It may have become readable in the meantime.
                self.exclude(self._bad_among(image_ids) or [bad])
        self._in_flight.append((step, image_ids))
        self._kept.append(inputs)
        return inputs

    def step_of(self, outputs: Sequence[Any]) -> int | None:
        """The step of the next outputs, or None if it has to be repeated because files have changed."""
        step, image_ids = self._in_flight.popleft()
        changed = self.changed_files(image_ids, outputs)
        if len(changed) == 0:
            return step
        assert isinstance(self.images, ImageFiles)
        bad_images = []
        for image_id in changed.tolist():
            try:
                if not self.images.update(image_id):
                    # The file is the same: DALI reads another size from its header than Pillow does.
                    failure = DaliFailure(f"it takes {self.images.name(image_id)} for an image of another size")
                    self._leave_to_pillow(np.array([image_id]), failure)
            except BadImage as bad:
                bad_images.append(bad)
        if bad_images:
            self.exclude(bad_images)
        self._repeated.append(step)
        return None

    def handle_failure(self, error: RuntimeError) -> None:
        """Repeat the step on which DALI failed, without the bad images.

        DALI does not name them, so Pillow opens all. If none of them is bad, Pillow opens them from now on. Raises
        UserError if that is already the case, or if the failure is not about images.
        """
        failure = DaliFailure(error)
        if not failure.is_about_an_image:
            raise failure.for_user() from error
        step, image_ids = self._in_flight.popleft()
        bad_images = self._bad_among(image_ids)
        if bad_images:
            self.exclude(bad_images)
        else:
            self._leave_to_pillow(image_ids, failure)
        self._repeated.append(step)

    def _bad_among(self, image_ids: NDArray[np.int64]) -> list[BadImage]:
        """Those of these images that Pillow cannot open; they are recorded for later runs."""
        assert isinstance(self.images, ImageFiles), "images in memory are never bad"
        with ThreadPoolExecutor() as pool:
            results = pool.map(partial(_why_bad, self.images), np.unique(image_ids).tolist())
            bad_images = [bad for bad in results if bad is not None]
        remember(self.images, bad_images)
        return bad_images

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


def run_pipeline(pipeline: Any, feed: Feed, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """The outputs of a pipeline for the steps that its feed covers, in order, until the feed is outdated.

    A repeated step is fed to the same pipeline, after those in flight, whose outputs wait. A failing operator ends its
    own step and no other: DALI's dynamic executor has a separate state for each.
    """
    step = feed.next_step
    stream = [torch.cuda.current_stream(device)] if device.type == "cuda" else []
    try:
        pipeline.build()
    except RuntimeError as error:
        raise DaliFailure(error).for_user() from error
    waiting: dict[int, tuple[Any, ...]] = {}
    while feed.covers(step) and not feed.outdated:
        if step in waiting:
            yield waiting.pop(step)
            step += 1
            continue
        try:
            outputs = pipeline.run(*stream)
        except RuntimeError as error:
            feed.handle_failure(error)
            continue
        finished = feed.step_of(outputs)
        if finished is not None:
            waiting[finished] = outputs


class TrainingFeed(Feed):
    """The steps from ``first_step`` on whose views have the size that ``executor`` makes."""

    def __init__(self, sampler: Sampler, executor: Executor, first_step: int) -> None:
        super().__init__(sampler.images, executor.files.form if executor.files is not None else None, first_step)
        self.sampler, self.executor = sampler, executor
        self.policy = sampler.policy_of(first_step)
        self.plan: Any = lru_cache(maxsize=4)(sampler.plan)
        self._announced: set[int] = set()

    def covers(self, step: int) -> bool:
        return self.sampler.policy_of(step) == self.policy

    def image_ids(self, step: int) -> NDArray[np.int64]:
        image_ids: NDArray[np.int64] = self._plan(step).image_ids
        return image_ids

    def inputs(self, step: int) -> Sequence[Any]:
        if isinstance(self.images, ImageFiles) and self.images.in_shards:
            self._announce_shards(self.images, step)
        plan = self._plan(step)
        by_name = self.executor.inputs(plan)
        inputs = [by_name[name] for name in self.executor.input_names]
        packed, record = plan.commands.pack(), _record(plan, self.images)
        if self.executor.batch_is_sample:
            whole = [*inputs, packed.reshape(-1, packed.shape[-1]), record]
            return [values[None] for values in whole]
        return [*inputs, packed, record]

    def exclude(self, images: Sequence[BadImage]) -> None:
        self.sampler.bad.add(images)
        self.plan.cache_clear()

    def changed_files(self, image_ids: NDArray[np.int64], outputs: Sequence[Any]) -> NDArray[np.int64]:
        if not isinstance(self.images, ImageFiles):
            return image_ids[:0]
        _, packed, _, stored_size = outputs
        # Not the sizes that are known now: the commands in flight were drawn for earlier ones.
        drawn_for = packed.as_array()[:, 0, [PACKED_COLUMNS["source_height"], PACKED_COLUMNS["source_width"]]]
        changed = _have_changed(self.images, image_ids, stored_size.as_array(), drawn_for)
        if changed.any():
            self.plan.cache_clear()
        return image_ids[changed]

    def _plan(self, step: int) -> BatchPlan:
        """The plan of the step, or of the last covered one before it."""
        while not self.covers(step):
            step -= 1
        plan: BatchPlan = self.plan(step)
        return plan

    def _announce_shards(self, images: ImageFiles, step: int) -> None:
        """Ask the system to read whole shards before their images are needed: long reads suit network storage."""
        ahead = range(step, step + SHARDS_AHEAD) if not self._announced else [step + SHARDS_AHEAD - 1]
        soon = {int(shard) for step in ahead for shard in self.sampler.shards_of(step)}
        for shard in soon - self._announced:
            images.read_ahead(shard)
        self._announced = soon | self._announced if len(self._announced) < 4 * len(soon) else soon


def _record(plan: BatchPlan, images: Images) -> NDArray[np.int64]:
    """[N, 4] int64: epoch, position, image id, label."""
    epoch = np.full_like(plan.positions, plan.epoch)
    return np.stack([epoch, plan.positions, plan.image_ids, images.labels[plan.image_ids]], axis=-1)


class EvaluationFeed(Feed):
    """Batches of image ids for ``evaluation_pipeline``, one per step."""

    def __init__(self, images: ImageFiles, batches: list[NDArray[np.int64]], resize_px: int, size: int) -> None:
        super().__init__(images, file_form(images), 0)
        self.image_files, self.resize_px, self.size, self.batches = images, resize_px, size, batches

    def covers(self, step: int) -> bool:
        return step < len(self.batches)

    def image_ids(self, step: int) -> NDArray[np.int64]:
        return self.batches[min(step, len(self.batches) - 1)]

    def inputs(self, step: int) -> Sequence[Any]:
        assert self.form is not None
        image_ids = self.image_ids(step)
        resized_hw, corner = center_of_resized(self.image_files.image_hw(image_ids), self.resize_px, self.size)
        by_name = encoded_inputs(self.image_files, image_ids, self.form)
        by_name |= {"resized_hw": resized_hw.astype(np.float32), "corner": corner}
        return [by_name[name] for name in evaluation_inputs(self.form)]

    def exclude(self, images: Sequence[BadImage]) -> None:
        raise images[0]

    def changed_files(self, image_ids: NDArray[np.int64], outputs: Sequence[Any]) -> NDArray[np.int64]:
        image_hw = self.image_files.image_hw(image_ids)
        return image_ids[_have_changed(self.image_files, image_ids, outputs[1].as_array(), image_hw)]


def _have_changed(
    images: ImageFiles, image_ids: NDArray[np.int64], stored_size: NDArray[np.int64], expected_hw: NDArray[Any]
) -> NDArray[np.bool_]:
    """Whether the size of each file, in px or bytes, is another one. What Pillow decoded enters the graph as pixels."""
    other_bytes = (stored_size[:, 2] != images.size_bytes[image_ids]) & ~images.needs_pillow[image_ids]
    return (stored_size[:, :2] != expected_hw).any(axis=1) | other_bytes


def center_of_resized(
    image_hw: NDArray[np.int64], resize_px: int, size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sizes [N, 2] after torchvision's ``Resize(resize_px)``, and corners [N, 2] of its ``CenterCrop(size)``."""
    resized = (resize_px * image_hw / image_hw.min(axis=1, keepdims=True)).astype(np.int32)
    corner = np.rint((resized - size) / 2).astype(np.int32)
    return resized, corner
