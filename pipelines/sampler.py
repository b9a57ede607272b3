"""The images and commands of each step, as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipelines.bad_images import BadImages
from pipelines.commands import COMMAND_STREAM, IMAGE_STREAM, VIEWS, Commands, Policy, draw, generator
from pipelines.datasets.images import ImageFiles, Images
from pipelines.datasets.remote import require_room
from pipelines.errors import UserError
from pipelines.read_ahead import ShardOrder


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One micro-batch of one process: N images, their positions in the epoch, and their commands."""

    epoch: int
    positions: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    commands: Commands
    policy: Policy
    """The distribution of the commands; its size is that of the views."""


class Sampler:
    """Permutes the images once per epoch, and divides the epoch into global batches of ``accumulate`` micro-batches,
    each with one range of positions per process.

    A step of this class is a micro-batch. The last, incomplete global batch of an epoch is dropped. Each position gets
    ``views`` commands drawn from ``policy`` in ``command_stream``. Images known to be bad are replaced.

    ``shuffle_window`` is for images in shards: this number of shards, in random order, is shuffled together, window by
    window, so that an epoch reads long ranges of few files at a time. 0 shuffles all images. Of row groups of Parquet
    files, a window has no more than fit in memory.

    ``epoch_length`` is for images that accompany a larger set: an epoch has this number of positions, and the images
    are repeated. (The labeled images of STL-10 accompany the unlabeled ones.)

    ``view_size_at`` maps an epoch to the size of its views in px, in place of that of ``policy``.

    Raises UserError if an epoch does not fill one global batch, or shards that are shuffled together do not fit in the
    cache for remote ones.
    """

    def __init__(
        self,
        images: Images,
        policy: Policy,
        *,
        seed: int,
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        accumulate: int = 1,
        views: int = VIEWS,
        command_stream: int = COMMAND_STREAM,
        epoch_length: int | None = None,
        shuffle_window: int = 0,
        view_size_at: Callable[[int], int] | None = None,
        bad: BadImages | None = None,
    ) -> None:
        self.images, self.policy, self.seed = images, policy, seed
        self.batch_size, self.process_index = batch_size, process_index
        self.views, self.command_stream = views, command_stream
        self.view_size_at = view_size_at
        self.bad = BadImages(images) if bad is None else bad
        self.shuffle_window = shuffle_window if isinstance(images, ImageFiles) and images.in_shards else 0
        if isinstance(images, ImageFiles) and (most := images.shards_in_memory) is not None:
            all_fit = len(images.files) <= most
            self.shuffle_window = shuffle_window if all_fit else min(shuffle_window or most, most)
        if isinstance(images, ImageFiles):
            require_room(images, self.shuffle_window)
        self.epoch_length = epoch_length or len(images)
        self.micro_batch_size = batch_size * num_processes
        self.global_batch_size = self.micro_batch_size * accumulate
        self.steps_per_epoch = self.epoch_length // self.global_batch_size
        self.micro_batches_per_epoch = self.steps_per_epoch * accumulate
        if self.steps_per_epoch == 0:
            micro_batches = num_processes * accumulate
            fits = self.epoch_length // micro_batches
            raise UserError(
                f"--batch_size {batch_size} on {num_processes} process(es) with --accumulate {accumulate} makes a "
                f"global batch of {self.global_batch_size}, but there are only {self.epoch_length} training images; "
                + (f"use --batch_size {fits} or less." if fits > 1 else f"train on {2 * micro_batches} images or more.")
            )
        self._permutations: dict[int, NDArray[np.int64]] = {}
        self._shard_orders: dict[int, ShardOrder] = {}

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The images of an epoch in order; those of the last two epochs are cached."""
        if epoch not in self._permutations:
            for old in list(self._permutations)[:-1]:
                del self._permutations[old]
            self._permutations[epoch] = self._permute(epoch)
        return self._permutations[epoch]

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        random = generator(IMAGE_STREAM, self.seed, epoch)
        if self.shuffle_window:
            return self._permute_windows(random)[: self.epoch_length]
        # The larger of the two: a short epoch must draw from all images, a long one repeats them.
        positions = max(self.epoch_length, len(self.images))
        return random.permutation(positions)[: self.epoch_length] % len(self.images)

    def _permute_windows(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Shards in random order, then the images of each window in random order."""
        assert isinstance(self.images, ImageFiles)
        shard_of = self.images.shard_of
        rank_of_shard = random.permutation(int(shard_of.max()) + 1)
        return np.lexsort((random.random(len(shard_of)), rank_of_shard[shard_of] // self.shuffle_window))

    def shards_of(self, step: int) -> NDArray[np.int32]:
        """The shards with the images of this process in a step, each once."""
        assert isinstance(self.images, ImageFiles)
        _, _, image_ids = self._planned(step)
        return np.unique(self.images.shard_of[image_ids])

    def shards_from(self, step: int) -> NDArray[np.int32]:
        """The shards that all processes need from a step to the end of the next epoch, the soonest first."""
        assert isinstance(self.images, ImageFiles)
        epoch, step_in_epoch = divmod(step, self.micro_batches_per_epoch)
        for missing in {epoch, epoch + 1} - set(self._shard_orders):
            self._shard_orders[missing] = ShardOrder(self.images.shard_of[self._permutation(missing)])
        self._shard_orders = {k: order for k, order in self._shard_orders.items() if k >= epoch}
        position = step_in_epoch * self.micro_batch_size
        return np.concatenate([self._shard_orders[epoch].after(position), self._shard_orders[epoch + 1].after(0)])

    def _planned(self, step: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        """Epoch, positions and images of this process in a step, including bad images."""
        epoch, first = step // self.micro_batches_per_epoch, self.first_position(step)
        positions = np.arange(first, first + self.batch_size, dtype=np.int64)
        return epoch, positions, self._permutation(epoch)[first : first + self.batch_size]

    def first_position(self, step: int) -> int:
        """The first position of this process in a step."""
        return step % self.micro_batches_per_epoch * self.micro_batch_size + self.process_index * self.batch_size

    def policy_of(self, step: int) -> Policy:
        """The distribution of a step's commands: ``policy`` with the view size of the epoch."""
        if self.view_size_at is None:
            return self.policy
        return replace(self.policy, size=self.view_size_at(step // self.micro_batches_per_epoch))

    def plan(self, step: int) -> BatchPlan:
        """The plan of this process for a step, counted in micro-batches from the start of training."""
        epoch, positions, planned = self._planned(step)
        image_ids = self.bad.replace(planned, seed=self.seed, epoch=epoch, positions=positions)
        policy = self.policy_of(step)
        commands = draw(
            policy,
            seed=self.seed,
            epoch=epoch,
            first_position=int(positions[0]),
            image_hw=self.images.image_hw(image_ids),
            views=self.views,
            stream=self.command_stream,
        )
        return BatchPlan(epoch=epoch, positions=positions, image_ids=image_ids, commands=commands, policy=policy)
