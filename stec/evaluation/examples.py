"""Images as training sees them, one by one, to be looked at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from pipelines.datasets.images import UNLABELED
from pipelines.loader import Loader
from stec.evaluation.predictions import predictions
from stec.evaluation.preview import Example
from stec.models.model import Model
from stec.objectives.geometry import Convention


def examples(
    loader: Loader,
    *,
    epoch: int,
    position: int,
    count: int,
    classes: Sequence[str],
    asked: tuple[Model, Convention] | None = None,
) -> list[Example]:
    """What stands at ``count`` positions of an epoch from ``position`` on, up to its end.

    The loader's batches are of one image each, so that they can begin anywhere; a view depends on seed, epoch and
    position, not on its batch. ``asked`` is a model whose inverse model says what it predicts.
    """
    sampler = loader.sampler
    assert sampler.global_batch_size == 1, "a batch of several images cannot begin anywhere"
    made = []
    first = epoch * sampler.steps_per_epoch + position
    for batch in itertools.islice(loader.batches(first), min(count, sampler.steps_per_epoch - position)):
        image_id = int(batch.image_ids[0])
        label = int(sampler.images.labels[image_id])
        name = f", {classes[label]}" if label != UNLABELED and classes else ""
        pixels = batch.views[0].float().movedim(-3, -1).cpu().numpy()
        paired = asked is not None and sampler.views == 2
        made.append(
            Example(
                title=f"number {image_id}, at position {int(batch.positions[0])}{name}",
                source=sampler.images.open(image_id),
                views=np.rint(pixels * 255).astype(np.uint8),
                commands=batch.commands,
                predictions=predictions(asked[0], batch.views, batch.commands, asked[1]) if asked and paired else None,
            )
        )
    return made
