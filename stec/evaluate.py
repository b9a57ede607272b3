"""How good features are: nearest neighbours, a fresh linear fit, and the trained probe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from stec.batch import PlainLoader
from stec.encoder import Encoder

NEIGHBOURS = 20
BANK_LIMIT = 50_000
"""At most so many labelled images serve as neighbours and for the linear fit."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of N images, on the host."""

    features: Tensor
    """[N, D] float32."""
    labels: Tensor
    """[N] int64."""


def evenly_spread(images: int, limit: int | None) -> NDArray[np.int64]:
    """The numbers of so many of ``images`` at most (None: of all), first to last."""
    count = images if limit is None else min(limit, images)
    return np.arange(count) * images // count


def extract_features(
    encoder: Encoder, loader: PlainLoader, accelerator: Accelerator, limit: int | None = None
) -> Features:
    """Features of the loader's images, in order, on every process; the work is shared.

    ``limit``: of so many images at most, evenly spread, since images may be sorted by class. Each process takes one
    stretch of the images; the stretches are padded to equal length for the exchange.
    """
    image_ids = evenly_spread(len(loader), limit)
    stretches = np.array_split(image_ids, accelerator.num_processes)
    longest = len(stretches[0])
    own_features = torch.zeros(longest, encoder.feature_dim, device=accelerator.device)
    own_labels = torch.zeros(longest, dtype=torch.int64, device=accelerator.device)
    was_training = encoder.training
    encoder.eval()
    done = 0
    with torch.no_grad():
        for batch in loader.batches(stretches[accelerator.process_index]):
            here = slice(done, done + len(batch.labels))
            with accelerator.autocast():
                own_features[here] = encoder(batch.images).float()
            own_labels[here] = batch.labels
            done = here.stop
    encoder.train(was_training)
    all_features = accelerator.gather(own_features).cpu().split(longest)
    all_labels = accelerator.gather(own_labels).cpu().split(longest)
    return Features(
        features=torch.cat([part[: len(ids)] for part, ids in zip(all_features, stretches)]),
        labels=torch.cat([part[: len(ids)] for part, ids in zip(all_labels, stretches)]),
    )


def nearest(bank: Features, queries: Features, count: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities [N, count] of each query's nearest in the bank, nearest first, and their rows there."""
    keys = F.normalize(bank.features, dim=1)
    similarity, rows = (F.normalize(queries.features, dim=1) @ keys.T).topk(min(count, len(keys)), dim=1)
    return similarity, rows


def knn_accuracy(bank: Features, queries: Features, classes: int, device: torch.device) -> float:
    """Share of queries whose class wins among their 20 nearest neighbours in the bank, 0 to 1.

    Cosine similarity s, votes weighted by exp(s / 0.07), as in Wu et al. 2018, "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination".
    """
    keys = F.normalize(bank.features.to(device), dim=1)
    key_labels = bank.labels.to(device)
    neighbours = min(NEIGHBOURS, len(keys))
    correct = 0
    for features, labels in zip(queries.features.split(1024), queries.labels.split(1024), strict=True):
        similarity, nearest = (F.normalize(features.to(device), dim=1) @ keys.T).topk(neighbours, dim=1)
        votes = torch.zeros(len(features), classes, device=device)
        votes.scatter_add_(1, key_labels[nearest], torch.exp(similarity / 0.07))
        correct += int((votes.argmax(1).cpu() == labels).sum())
    return correct / len(queries.labels)


def linear_fit_accuracy(bank: Features, queries: Features, classes: int, device: torch.device) -> float:
    """Top-1 on the queries, 0 to 1, of a logistic regression fitted to the bank's standardised features.

    Full-batch L-BFGS with an L2 penalty of 1e-4; deterministic.
    """
    mean, deviation = bank.features.mean(0), bank.features.std(0) + 1e-6
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
        predicted = (test @ weight + bias).argmax(1).cpu()
    return float((predicted == queries.labels).float().mean())


def evaluate_probe(probe: nn.Linear, queries: Features) -> dict[str, float]:
    """Top-1 and top-5 (0 to 1) and mean cross-entropy of a trained probe on the queries, in float32 on the host."""
    weight, bias = probe.weight.detach().float().cpu(), probe.bias.detach().float().cpu()
    logits = F.linear(queries.features, weight, bias)
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == queries.labels[:, None]
    return {
        "accuracy": float(best[:, 0].float().mean()),
        "top5_accuracy": float(best.any(dim=1).float().mean()),
        "loss": float(F.cross_entropy(logits, queries.labels)),
    }
