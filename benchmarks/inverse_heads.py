"""Bins or regression for what the inverse model predicts: both on the same frozen features.

    python -m benchmarks.inverse_heads RUN

Inverse models are trained on the features of pairs of views by a trained encoder, one with a cross-entropy over bins
and one with the squared error, and compared by R2 on other pairs of other images. A bin predicts its center, or all
bins their mean center, weighted by their probabilities.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor

from benchmarks import report
from benchmarks.report import Figures, Output
from pipelines.datasets.registry import DataSetName, open_data_set
from stec.config import TargetName, TrainConfig, with_settings
from stec.console import Console
from stec.evaluation.parameters import FIT_SEED, TEST_SEED, encode_pairs
from stec.loaders import pair_loader, policy_of
from stec.models.heads import InverseModel
from stec.objectives.inverse import EfferenceCopy, bin_centers, inverse_loss
from stec.targets import TARGETS, Target
from stec.weights.pretrained import read_trained

HIDDEN, EPOCHS, BATCH_SIZE, LEARNING_RATE = 512, 3, 256, 1e-3
"""Few epochs: in training no pair comes twice, so an inverse model does not overfit."""
COMPARED: tuple[TargetName, ...] = ("color", "blur")


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """Compare bins with regression."""

    run: tyro.conf.Positional[Path]
    """Folder of a run whose views are jittered and blurred."""
    dataset: DataSetName = "demo"
    """Its data set."""
    data_dir: Path | None = None
    """Folder that holds the data set."""
    pairs: int = 10_000
    """The maximum number of pairs to train on, and half as many to test on."""
    n_bins: tuple[int, ...] = (6, 12, 24)
    """Numbers of bins."""
    seeds: int = 3
    """Initial weights of each head."""


def trained_head(features: Tensor, values: Tensor, valid: Tensor, target: Target, n_bins: int, seed: int) -> Any:
    """An inverse model in evaluation mode, trained by Adam on features [N, 2D]."""
    torch.manual_seed(seed)
    head = InverseModel(features.shape[1] // 2, HIDDEN, target.outputs(n_bins), target.shape)
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(features)).split(BATCH_SIZE)[:-1]:
            loss, _ = inverse_loss(head(*features[rows].chunk(2, dim=1)), values[rows], valid[rows], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.eval()


@torch.no_grad()
def r2_by_reading(head: Any, features: Tensor, values: Tensor, valid: Tensor, target: Target) -> dict[str, float]:
    """R2, the mean over entries, of each way to read the outputs for valid pairs."""
    outputs = head(*features.chunk(2, dim=1))
    if target.loss == "regression":
        readings = {"": outputs[:, 0]}
    else:
        n_bins = outputs.shape[1]
        bins = torch.arange(n_bins)[:, None, None].expand(n_bins, *target.shape)
        centers = bin_centers(bins, n_bins, target)
        readings = {
            ", largest": bin_centers(outputs.argmax(1), n_bins, target),
            ", mean": (outputs.softmax(1) * centers).sum(1),
        }
    true = values[valid]
    variance = (true - true.mean(0)).square().sum(0)
    return {
        name: float((1 - (true - predicted[valid]).square().sum(0) / variance).mean())
        for name, predicted in readings.items()
    }


def measure(options: Options, console: Console) -> None:
    report.check(options)
    report.check_positive(options, "pairs", "seeds")
    accelerator = Accelerator(cpu=True)
    trained = read_trained(options.run)
    config = with_settings(TrainConfig(), trained.metadata.get("config", {}), str(trained.path))
    policy = policy_of(config)
    data_set = open_data_set(options.dataset, options.data_dir)
    copy = EfferenceCopy(weights=dict.fromkeys(COMPARED, 1.0), jitter_strength=policy.jitter_strength)
    encoded = []
    for images, seed, limit in (
        (data_set.train, FIT_SEED, options.pairs),
        (data_set.test or data_set.train, TEST_SEED, options.pairs // 2),
    ):
        loader = pair_loader(images, config.data, policy, seed=seed, views_per_batch=512, device=torch.device("cpu"))
        with console.waiting("features"):
            features, commands = encode_pairs(trained.encoder, loader, limit, accelerator)
        encoded.append((features, copy.values([commands], policy.size, torch.device("cpu"))))
    (fit, fit_values), (test, test_values) = encoded
    figures = []
    for name in COMPARED:
        regression = TARGETS[name]
        binned = replace(regression, loss="bins", limits=(2.0,) * regression.shape[1])
        turns: dict[str, list[float]] = {}
        for label, target, n_bins in [
            ("regression", regression, 1),
            *((f"{n} bins", binned, n) for n in options.n_bins),
        ]:
            for seed in range(options.seeds):
                with console.waiting(f"{name}: {label}"):
                    head = trained_head(fit, *fit_values[name], target, n_bins, seed)
                for reading, r2 in r2_by_reading(head, test, *test_values[name], target).items():
                    turns.setdefault(label + reading, []).append(r2)
        figures.append(Figures(title=f"{name}: frozen features of {options.run.name}", unit="R2", turns=turns))
    report.publish(figures, options, console)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.inverse_heads", args=arguments, use_underscores=True)
    return report.run(lambda: measure(options, Console(enabled=True)))


if __name__ == "__main__":
    sys.exit(main())
