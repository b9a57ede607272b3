"""Single images as training sees them, for previews and reports."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from pipelines.datasets.images import UNLABELED
from pipelines.loader import Loader
from stec.evaluation.predictions import predictions
from stec.evaluation.preview import Example
from stec.models.model import Model
from stec.objectives.inverse import EfferenceCopy


def examples(
    loader: Loader,
    *,
    epoch: int,
    position: int,
    count: int,
    classes: Sequence[str],
    inverse: tuple[Model, EfferenceCopy] | None = None,
) -> list[Example]:
    """The images at ``count`` positions of an epoch from ``position`` on, at most to its end.

    The batches of the loader must have one image, so that they can begin at any position; a view depends on seed, epoch
    and position, not on its batch. ``inverse`` is a model whose predictions are shown, and what it predicts.
    """
    sampler = loader.sampler
    assert sampler.global_batch_size == 1, "a batch of several images cannot begin at any position"
    shown = []
    first = epoch * sampler.steps_per_epoch + position
    for batch in itertools.islice(loader.batches(first), min(count, sampler.steps_per_epoch - position)):
        image_id = int(batch.image_ids[0])
        label = int(sampler.images.labels[image_id])
        name = f", {classes[label]}" if label != UNLABELED and classes else ""
        pixels = batch.views[0].float().movedim(-3, -1).cpu().numpy()
        predict = inverse if sampler.views == 2 else None
        shown.append(
            Example(
                title=f"number {image_id}, at position {int(batch.positions[0])}{name}",
                source=sampler.images.open(image_id),
                views=np.rint(pixels * 255).astype(np.uint8),
                commands=batch.commands,
                predictions=predictions(predict[0], batch.views, batch.commands, predict[1]) if predict else None,
                convention=predict[1].convention if predict else "official",
            )
        )
    return shown
