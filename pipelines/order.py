"""Which image stands where in an epoch, and what each process takes of a step: a pure function of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.images import Images
from stec.commands import COMMAND_STREAM, ORDER_STREAM, VIEWS, Commands, Policy, draw, generator
from stec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process does in one forward pass: N images, their positions in the epoch, and the commands for them."""

    epoch: int
    positions: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    commands: Commands


class Order:
    """A permutation of the images per epoch, cut into global batches of ``accumulate`` chunks, each cut into one
    stretch per process.

    The last, incomplete global batch of an epoch is dropped. Each position gets ``views`` commands of ``policy`` from
    ``command_stream``.

    ``epoch_length`` is for images that accompany those of another, longer order: an epoch has so many positions, at
    which the images are repeated. (STL-10's labelled images accompany the unlabelled ones like this.)

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
    ) -> None:
        self.images, self.policy, self.seed = images, policy, seed
        self.batch_size, self.process_index = batch_size, process_index
        self.views, self.command_stream = views, command_stream
        self.epoch_length = epoch_length or len(images)
        self.chunk_size = batch_size * num_processes
        self.global_batch_size = self.chunk_size * accumulate
        self.steps_per_epoch = self.epoch_length // self.global_batch_size
        self.chunks_per_epoch = self.steps_per_epoch * accumulate
        if self.steps_per_epoch == 0:
            raise UserError(
                f"--batch_size {batch_size} on {num_processes} process(es) with --accumulate {accumulate} makes a "
                f"global batch of {self.global_batch_size}, but there are only {self.epoch_length} training images; "
                f"use --batch_size {max(1, self.epoch_length // (num_processes * accumulate))} or less."
            )
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        # As many positions as either needs: a short epoch must draw from all images, a long one repeats them.
        positions = max(self.epoch_length, len(self.images))
        order = generator(ORDER_STREAM, self.seed, epoch).permutation(positions)
        return order[: self.epoch_length] % len(self.images)

    def share(self, chunk: int) -> Share:
        """This process's share of chunk ``chunk``, counted from the start of training."""
        epoch, chunk_in_epoch = divmod(chunk, self.chunks_per_epoch)
        first = chunk_in_epoch * self.chunk_size + self.process_index * self.batch_size
        image_ids = self._permutation(epoch)[first : first + self.batch_size]
        commands = draw(
            self.policy,
            seed=self.seed,
            epoch=epoch,
            first_position=first,
            image_hw=self.images.image_hw(image_ids),
            views=self.views,
            stream=self.command_stream,
        )
        positions = np.arange(first, first + self.batch_size, dtype=np.int64)
        return Share(epoch=epoch, positions=positions, image_ids=image_ids, commands=commands)
