"""The loaders of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.batch import PlainLoader, TwoViewLoader


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images of a training run."""

    training: TwoViewLoader
    labeled: PlainLoader | None
    """Images from which evaluation learns; None, like ``test``, if there are no labels."""
    test: PlainLoader | None
    classes: int
    """0 if there are no labels: then there is neither an online linear classifier nor an evaluation."""
