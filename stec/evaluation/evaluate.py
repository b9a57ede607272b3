"""Measures of features: the online linear classifier, linear probing on all labels and on few (low-shot), kNN, the
effective rank, and decoded generative factors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.batch import PlainLoader
from stec.evaluation.decoding import R2, decode
from stec.models.encoder import ImageEncoder

Measure = Literal["online_classifier", "linear_probing", "low_shot", "knn", "rankme", "parameters"]
"""In the order of tables: the online linear classifier of the training, linear probing on all labeled images, linear
probing on a few of them, kNN, RankMe, and decoded parameters: here the generative factors of images, and in
``stec.evaluation.parameters`` the commands of pairs of views."""
MEASURES: tuple[Measure, ...] = get_args(Measure)
UNLABELED_MEASURES: tuple[Measure, ...] = ("rankme", "parameters")
"""Those that need no labels."""
NEIGHBORS = 20
KNN = f"knn{NEIGHBORS}"
"""Name of the kNN result."""
FACTORS = "factors"
MAX_LABELED = 50_000
"""The maximum number of labeled images for kNN and linear probing."""
RANKME_IMAGES = 25_600
"""The maximum number of images for RankMe, as in its paper."""
PERCENTAGES = (10, 1)
"""Percentages of the labeled images for ``low_shot``."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of N images, on the host."""

    features: Tensor
    """[N, D] float32."""
    labels: Tensor
    """[N] int64."""

    def __getitem__(self, rows: Tensor) -> Features:
        return Features(features=self.features[rows], labels=self.labels[rows])


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well the images of a data set were classified; accuracies are 0 to 1."""

    accuracy: float
    top5_accuracy: float
    class_accuracies: list[float | None]
    """The accuracy on the images of each class; None for a class without images."""
    loss: float | None
    """Mean cross-entropy; None if the classifier has no probabilities."""
    labeled_images: int | None
    """Number of labeled images that the classifier used; None for the online linear classifier."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of the requested measures."""

    scores: dict[str, Score] = field(default_factory=dict)
    """Of the classifiers, by name."""
    rankme: float | None = None
    factors: dict[str, R2] = field(default_factory=dict)
    """R2 of the generative factors, by name."""


def evaluate(
    encoder: ImageEncoder,
    classifier: nn.Linear | None,
    *,
    labeled: PlainLoader | None,
    test: PlainLoader,
    classes: int,
    measures: Collection[Measure],
    accelerator: Accelerator,
    seed: int = 0,
) -> Evaluation:
    """Measures on the test images; each image is encoded once.

    All processes share that work and return the same. ``classifier`` is needed for the measure of that name,
    ``labeled`` for the others except ``rankme``. ``seed`` chooses the images of ``low_shot``: the same for any encoder.
    """
    scores: dict[str, Score] = {}
    rank: float | None = None
    factors: dict[str, R2] = {}
    queries = extract_features(encoder, test, accelerator, np.arange(len(test)))
    if "online_classifier" in measures:
        assert classifier is not None, "the measure needs it"
        scores["online_classifier"] = score(classifier_logits(classifier, queries), queries.labels)
    if "rankme" in measures:
        rank = rankme(queries[torch.from_numpy(evenly_spread(len(test), RANKME_IMAGES))].features)
    chosen = _chosen(labeled, measures, seed)
    if labeled is None or not chosen:
        return Evaluation(scores=scores, rankme=rank)

    image_ids = np.unique(np.concatenate([*chosen.values()]))
    bank = extract_features(encoder, labeled, accelerator, image_ids)
    if (ids := chosen.pop(FACTORS, None)) is not None:
        known = bank[torch.from_numpy(np.searchsorted(image_ids, ids))]
        of_bank = {name: values[ids] for name, values in labeled.factors.items()}
        factors = decode(known.features, of_bank, queries.features, test.factors)
    for name, of_score in chosen.items():
        classify = knn_votes if name == KNN else linear_probing_logits
        known = bank[torch.from_numpy(np.searchsorted(image_ids, of_score))]
        classified = classify(known, queries, classes, accelerator.device)
        scores[name] = score(classified, queries.labels, labeled_images=len(of_score), probabilities=name != KNN)
    return Evaluation(scores=scores, rankme=rank, factors=factors)


def _chosen(labeled: PlainLoader | None, measures: Collection[Measure], seed: int) -> dict[str, NDArray[np.int64]]:
    """Which labeled images each linear probing gets, which are neighbors, and which tell their generative factors, by
    the names of the results."""
    chosen: dict[str, NDArray[np.int64]] = {}
    if labeled is None:
        return chosen
    spread = evenly_spread(len(labeled), MAX_LABELED)
    if "linear_probing" in measures:
        chosen["linear_probing"] = spread
    if "low_shot" in measures:
        for percent in PERCENTAGES:
            chosen[f"linear_probing_{percent}_percent"] = class_balanced(labeled.labels, percent / 100, seed)
    if "knn" in measures:
        chosen[KNN] = spread
    if "parameters" in measures and labeled.factors:
        chosen[FACTORS] = spread
    return chosen


def evenly_spread(count: int, limit: int) -> NDArray[np.int64]:
    """Numbers of at most ``limit`` of ``count`` images, evenly spread, because images may be sorted by class."""
    chosen = min(count, limit)
    return np.arange(chosen) * count // chosen


def class_balanced(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Ascending numbers of about ``fraction`` of the images: equally many of each class, at least one, or all of a
    class that has fewer.

    A pure function of the labels and the seed; a smaller fraction is a subset of a larger one.
    """
    present = np.unique(labels)
    per_class = max(1, round(fraction * len(labels) / len(present)))
    orders = [np.random.default_rng([seed, k]).permutation(np.flatnonzero(labels == k)) for k in present.tolist()]
    return np.sort(np.concatenate([order[:per_class] for order in orders]))


def encode_batches(encoder: ImageEncoder, batches: Iterable[Tensor], accelerator: Accelerator) -> Iterator[Tensor]:
    """Features [n, D] float32 on the device of each batch of images, of the encoder in evaluation mode."""
    was_training = encoder.training
    encoder.eval()
    try:
        for images in batches:
            # A compiled encoder would be compiled again for this mode and other batch sizes, for a minute or more.
            with torch.no_grad(), accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                features = encoder(images).float()
            yield features
    finally:
        encoder.train(was_training)


def extract_features(
    encoder: ImageEncoder, loader: PlainLoader, accelerator: Accelerator, image_ids: NDArray[np.int64]
) -> Features:
    """Features of the images with these ids, in this order, on every process.

    Each process encodes one range of the images; ranges are padded to equal length for the gather.
    """
    id_ranges = np.array_split(image_ids, accelerator.num_processes)
    longest = len(id_ranges[0])
    own = torch.zeros(longest, encoder.feature_dim, device=accelerator.device)
    done = 0
    batches = (batch.images for batch in loader.batches(id_ranges[accelerator.process_index]))
    for features in encode_batches(encoder, batches, accelerator):
        own[done : done + len(features)] = features
        done += len(features)
    return Features(
        features=gather_rows(own, [len(ids) for ids in id_ranges], accelerator),
        labels=torch.from_numpy(loader.labels[image_ids]),
    )


def gather_rows(padded: Tensor, counts: Sequence[int], accelerator: Accelerator) -> Tensor:
    """The first ``counts[k]`` rows of each process k, concatenated, on the host of every process.

    ``padded`` has the same number of rows on all of them.
    """
    gathered = accelerator.gather(padded).cpu().split(len(padded))
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


def rankme(features: Tensor) -> float:
    """The effective rank of features [N, D]: 1 to the smaller of N and D; NaN if one is not finite or all are 0.

    The exponential of the entropy of their singular values, divided by their sum, plus 1e-7 (Garrido et al. 2023,
    "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their Rank",
    equation 1). As there, features are not centered.
    """
    if not features.isfinite().all():
        return float("nan")
    singular_values = torch.linalg.svdvals(features.double().cpu())
    p = singular_values / singular_values.sum() + 1e-7
    return float((-(p * p.log()).sum()).exp())


def score(
    classified: Tensor, labels: Tensor, *, labeled_images: int | None = None, probabilities: bool = True
) -> Score:
    """The score of logits or votes [N, C], the highest of which tells an image's class, where the labels are [N].

    ``probabilities``: they are logits.
    """
    classes = classified.shape[1]
    best = classified.topk(min(5, classes), dim=1).indices == labels[:, None]
    per_class = torch.bincount(labels, minlength=classes)
    correct = torch.bincount(labels[best[:, 0]], minlength=classes)
    return Score(
        accuracy=float(best[:, 0].float().mean()),
        top5_accuracy=float(best.any(dim=1).float().mean()),
        class_accuracies=[right / all_ if all_ else None for right, all_ in zip(correct.tolist(), per_class.tolist())],
        loss=float(F.cross_entropy(classified, labels)) if probabilities else None,
        labeled_images=labeled_images,
    )


def nearest(bank: Features, queries: Features, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine similarities [N, count] of each query's nearest in the bank, nearest first, and their rows there, both on
    the host. A bank of fewer gives fewer.
    """
    keys = F.normalize(bank.features.to(device), dim=1)
    found = [
        (F.normalize(features.to(device), dim=1) @ keys.T).topk(min(count, len(keys)), dim=1)
        for features in queries.features.split(1024)
    ]
    return torch.cat([best.values.cpu() for best in found]), torch.cat([best.indices.cpu() for best in found])


def knn_votes(bank: Features, queries: Features, classes: int, device: torch.device) -> Tensor:
    """[N, C] on the host: the votes of each query's 20 kNN in the bank.

    Cosine similarity s, votes weighted by exp(s / 0.07), as in Wu et al. 2018, "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination".
    """
    similarity, rows = nearest(bank, queries, NEIGHBORS, device)
    votes = torch.zeros(len(queries.labels), classes)
    return votes.scatter_add_(1, bank.labels[rows], torch.exp(similarity / 0.07))


def linear_probing_logits(bank: Features, queries: Features, classes: int, device: torch.device) -> Tensor:
    """[N, C] on the host: the queries' logits of a logistic regression on the bank's standardized features.

    Full-batch L-BFGS with an L2 penalty of 1e-4 on the weights; deterministic.
    """
    mean, deviation = bank.features.mean(0), bank.features.std(0, correction=0) + 1e-6
    train = ((bank.features - mean) / deviation).to(device)
    test = ((queries.features - mean) / deviation).to(device)
    labels = bank.labels.to(device)
    weight = torch.zeros(train.shape[1], classes, device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, labels) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (test @ weight + bias).cpu()


def classifier_logits(classifier: nn.Linear, queries: Features) -> Tensor:
    """[N, C]: the queries' logits of a trained online linear classifier, in float32 on the host."""
    return F.linear(queries.features, classifier.weight.detach().float().cpu(), classifier.bias.detach().float().cpu())
