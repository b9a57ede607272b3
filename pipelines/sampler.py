"""Which image stands where in an epoch, and what each process takes of a step: a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipelines.bad_images import BadImages
from pipelines.commands import COMMAND_STREAM, IMAGE_STREAM, VIEWS, Commands, Policy, draw, generator
from pipelines.datasets.images import ImageFiles, Images
from pipelines.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What one process does in one forward pass: N images, their positions in the epoch, and the commands for them."""

    epoch: int
    positions: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    commands: Commands
    policy: Policy
    """What the commands were drawn from; its size is that of the views."""


class Sampler:
    """A permutation of the images per epoch, cut into global batches of ``accumulate`` chunks, each cut into one
    stretch per process.

    The last, incomplete global batch of an epoch is dropped. Each position gets ``views`` commands of ``policy`` from
    ``command_stream``. Images that are known to be bad are replaced.

    ``shuffle_window`` is for images in shards: so many shards, themselves in random order, are shuffled together, one
    window after the other, so that an epoch reads long stretches of few files at a time. 0 shuffles all images.

    ``epoch_length`` is for images that accompany those of another, longer order: an epoch has so many positions, at
    which the images are repeated. (STL-10's labeled images accompany the unlabeled ones like this.)

    ``view_size_at`` gives views another size in px, epoch by epoch, than that of ``policy``.

    Raises UserError where an epoch does not fill one global batch.
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
        self.epoch_length = epoch_length or len(images)
        self.chunk_size = batch_size * num_processes
        self.global_batch_size = self.chunk_size * accumulate
        self.steps_per_epoch = self.epoch_length // self.global_batch_size
        self.chunks_per_epoch = self.steps_per_epoch * accumulate
        if self.steps_per_epoch == 0:
            passes = num_processes * accumulate
            fits = self.epoch_length // passes
            raise UserError(
                f"--batch_size {batch_size} on {num_processes} process(es) with --accumulate {accumulate} makes a "
                f"global batch of {self.global_batch_size}, but there are only {self.epoch_length} training images; "
                + (f"use --batch_size {fits} or less." if fits > 1 else f"train on {2 * passes} images or more.")
            )
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The images of an epoch in their order; those of the last two epochs are kept."""
        if epoch not in self._permutations:
            for old in list(self._permutations)[:-1]:
                del self._permutations[old]
            self._permutations[epoch] = self._permute(epoch)
        return self._permutations[epoch]

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        random = generator(IMAGE_STREAM, self.seed, epoch)
        if self.shuffle_window:
            return self._permute_windows(random)[: self.epoch_length]
        # As many positions as either needs: a short epoch must draw from all images, a long one repeats them.
        positions = max(self.epoch_length, len(self.images))
        order = random.permutation(positions)
        return order[: self.epoch_length] % len(self.images)

    def _permute_windows(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Shards in random order, then the images of each window of them."""
        assert isinstance(self.images, ImageFiles)
        shard_of = self.images.shard_of
        place_of_shard = random.permutation(int(shard_of.max()) + 1)
        return np.lexsort((random.random(len(shard_of)), place_of_shard[shard_of] // self.shuffle_window))

    def shards_of(self, chunk: int) -> NDArray[np.int32]:
        """The shards that hold the images of this process in ``chunk``, each once."""
        assert isinstance(self.images, ImageFiles)
        _, _, image_ids = self._planned(chunk)
        return np.unique(self.images.shard_of[image_ids])

    def _planned(self, chunk: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        """Epoch, positions and images of this process in ``chunk``, bad images included."""
        epoch, first = chunk // self.chunks_per_epoch, self.first_position(chunk)
        positions = np.arange(first, first + self.batch_size, dtype=np.int64)
        return epoch, positions, self._permutation(epoch)[first : first + self.batch_size]

    def first_position(self, chunk: int) -> int:
        """Where in its epoch this process's share of a chunk begins."""
        return chunk % self.chunks_per_epoch * self.chunk_size + self.process_index * self.batch_size

    def policy_of(self, chunk: int) -> Policy:
        """What the commands of a chunk are drawn from: ``policy`` with the size of views in the chunk's epoch."""
        if self.view_size_at is None:
            return self.policy
        return replace(self.policy, size=self.view_size_at(chunk // self.chunks_per_epoch))

    def plan(self, chunk: int) -> BatchPlan:
        """This process's share of chunk ``chunk``, counted from the start of training."""
        epoch, positions, planned = self._planned(chunk)
        image_ids = self.bad.replace(planned, seed=self.seed, epoch=epoch, positions=positions)
        policy = self.policy_of(chunk)
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
