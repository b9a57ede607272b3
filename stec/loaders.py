"""The loaders of ``pipelines`` that a run's settings describe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.bad_images import BadImages
from pipelines.batch import PlainLoader, TwoViewLoader
from pipelines.commands import LABELED_STREAM, Policy
from pipelines.datasets.images import Images
from pipelines.datasets.registry import DataSet, DataSetTraits
from pipelines.loader import EvaluationLoader, Loader
from pipelines.sampler import Sampler
from stec.config import ImageSettings, TrainConfig
from stec.distributed.launcher import cpus_of_process


@dataclass(frozen=True, kw_only=True)
class Data:
    """The loaders of a training run."""

    training: TwoViewLoader
    plain: PlainLoader
    """The training images without augmentation."""
    labeled: PlainLoader | None
    """Images from which evaluation learns; None, like ``test``, if there are no labels."""
    test: PlainLoader | None
    classes: int
    """0 if there are no labels: then there is neither an online linear classifier nor an evaluation."""


def policy_of(config: TrainConfig) -> Policy:
    """The distribution of a run's commands."""
    augmentation = config.augmentation
    return Policy(
        size=config.view_size_px,
        jitter_strength=config.traits.jitter_strength,
        p_color_jitter=augmentation.p_color_jitter,
        p_grayscale=augmentation.p_grayscale,
        p_blur=0.5 if augmentation.use_gaussian_blur else 0.0,
        p_solarize=0.2 if augmentation.use_solarization else 0.0,
    )


MAX_GPU_THREADS = 32
"""For each of DALI's threads, the decoder of a GPU reserves 16 MiB of its memory and as much of the host's."""


def num_workers(settings: ImageSettings, device: torch.device) -> int:
    """Number of DALI threads or torchvision worker processes of this process."""
    if settings.num_workers is not None:
        return settings.num_workers
    return min(cpus_of_process(), MAX_GPU_THREADS) if device.type == "cuda" else cpus_of_process()


def training_loader(
    config: TrainConfig,
    data_set: DataSet,
    *,
    device: torch.device,
    precision: str,
    process_index: int = 0,
    num_processes: int = 1,
) -> Loader:
    """Batches of two views. Raises UserError if there is not one global batch.

    With a model ``precision`` of 16 bits, views on a GPU are float16.
    """
    policy = policy_of(config)
    options: dict[str, Any] = {
        "seed": config.run.seed,
        "batch_size": config.optimization.batch_size,
        "process_index": process_index,
        "num_processes": num_processes,
        "accumulate": config.optimization.accumulate,
        "view_size_at": config.view_size_at if config.augmentation.resolution_schedule is not None else None,
    }
    bad = BadImages(data_set.train, max_fraction=config.data.max_bad_fraction)
    sampler = Sampler(data_set.train, policy, **options, bad=bad, shuffle_window=config.data.shuffle_window)
    labeled_sampler = None
    if data_set.labeled is not None and data_set.labeled is not data_set.train:
        # As in the official code: one view of a labeled image beside each unlabeled one, neither blurred nor solarized.
        labeled_sampler = Sampler(
            data_set.labeled,
            dataclasses.replace(policy, p_blur=0.0, p_solarize=0.0),
            **options,
            views=1,
            command_stream=LABELED_STREAM,
            epoch_length=len(data_set.train),
        )
        if config.objective.stop_gradient == 2:
            sampler, labeled_sampler = labeled_sampler, None
    return Loader(
        sampler,
        backend=config.data.backend,
        device=device,
        workers=num_workers(config.data, device),
        labeled_sampler=labeled_sampler,
        # DALI has no bfloat16; float16 resolves [0, 1] more finely.
        half=device.type == "cuda" and precision != "no",
    )


def pair_loader(
    images: Images, data: ImageSettings, policy: Policy, *, seed: int, views_per_batch: int, device: torch.device
) -> Loader:
    """Pairs of views for the evaluation of an encoder, the same on every process."""
    sampler = Sampler(images, policy, seed=seed, batch_size=min(max(1, views_per_batch // 2), len(images)))
    return Loader(sampler, backend=data.backend, device=device, workers=num_workers(data, device))


def evaluation_loader(
    images: Images, data: ImageSettings, *, traits: DataSetTraits, batch_size: int, device: torch.device
) -> EvaluationLoader:
    """Images without augmentation, at the size at which the encoder is evaluated."""
    return EvaluationLoader(
        images,
        size=traits.view_size_px,
        resize_px=traits.resize_px,
        batch_size=batch_size,
        backend=data.backend,
        device=device,
        workers=num_workers(data, device),
    )
