"""The augmentation policy that a run's settings stand for."""

from __future__ import annotations

from pipelines.commands import Policy
from stec.config import TrainConfig


def policy_of(config: TrainConfig) -> Policy:
    """The distribution that the commands of a run are drawn from."""
    return Policy(
        size=config.view_size_px,
        jitter_strength=config.traits.jitter_strength,
        p_color_jitter=config.augmentation.p_color_jitter,
        p_grayscale=config.augmentation.p_grayscale,
        p_blur=0.5 if config.augmentation.use_gaussian_blur else 0.0,
        p_solarize=0.2 if config.augmentation.use_solarization else 0.0,
    )
