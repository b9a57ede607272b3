"""kNN and RankMe during training, on a subset of the images."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from pipelines.batch import PlainLoader
from pipelines.errors import BadImage
from stec.evaluation.evaluate import Features, evenly_spread, extract_features, knn_votes, rankme, score
from stec.loaders import Data
from stec.models.encoder import ImageEncoder
from stec.training.progress import Progress, Schedule

SUBSET = 4096
"""The maximum number of labeled images, among which neighbors are searched, and of test images: twice the features of a
ResNet-50, as RankMe needs more images than features, and an accuracy that is uncertain by at most 0.8 %. Encoding both
costs about 3 % of an epoch of CIFAR-10's 50,000 pairs of views."""


class Monitor:
    """Measures the encoder at the end of every ``every`` epochs; 0 is never.

    kNN on test images with labels, RankMe on the same or, without labels, on training images. Training is not changed:
    the encoder is in evaluation mode meanwhile, and the random state is restored.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        data: Data,
        schedule: Schedule,
        progress: Progress,
        *,
        every: int,
        accelerator: Accelerator,
    ) -> None:
        self._encoder, self._data, self._accelerator = encoder, data, accelerator
        self._progress, self._steps = progress, every * schedule.steps_per_epoch

    def due(self) -> bool:
        return self._steps > 0 and self._progress.step % self._steps == 0

    def measure(self) -> dict[str, float]:
        """``rankme``, and ``knn``, the top-1 accuracy, if there are labels; call it on all processes.

        An accuracy is 0 to 1.
        """
        data = self._data
        # torchvision's loader draws from the global random state.
        with torch.random.fork_rng(devices=[]):
            if data.labeled is None or data.test is None:
                return {"rankme": rankme(self._features(data.plain).features)}
            bank, queries = self._features(data.labeled), self._features(data.test)
        votes = knn_votes(bank, queries, data.classes, self._accelerator.device)
        return {"knn": score(votes, queries.labels, probabilities=False).accuracy, "rankme": rankme(queries.features)}

    def _features(self, loader: PlainLoader) -> Features:
        """Features of the subset. A bad image is replaced by another: it is no reason to stop training."""
        image_ids: NDArray[np.int64] = evenly_spread(len(loader), SUBSET)
        while True:
            try:
                return extract_features(self._encoder, loader, self._accelerator, image_ids)
            except BadImage as bad:
                others = image_ids[image_ids != bad.image_id]
                if not len(others):
                    raise
                image_ids = np.where(image_ids == bad.image_id, others[0], image_ids)
