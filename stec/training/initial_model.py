"""The model that training starts from, and its compilation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipelines.errors import UserError
from stec.architectures import is_timm
from stec.config import TrainConfig
from stec.models.encoder import ImageEncoder
from stec.models.model import Model
from stec.models.preprocessing import Preprocessing
from stec.models.timm_encoder import (
    adapted_weights,
    check_evaluation,
    facts_of,
    normalization_of_weights,
    pretrained_weights,
)
from stec.objectives.registry import BASE_OBJECTIVES
from stec.weights.export import TIMM_NETWORK, load_weights, timm_encoder_of
from stec.weights.pretrained import normalization_of, read_source


def check_encoder(config: TrainConfig) -> None:
    """Raise UserError for an encoder of timm that cannot be made, or cannot encode the views, before data is opened."""
    model, schedule = config.model, config.augmentation.resolution_schedule
    if not is_timm(model.arch):
        return
    for size_px in {config.view_size_px, config.view_size_at(0)}:
        facts = facts_of(model.arch, size_px)
        if schedule is not None and facts.fixed_size_px is not None:
            raise UserError(
                f"--resolution_schedule {schedule} needs an encoder of images of any size, but {model.arch} is made "
                f"for one size; omit it, or choose a convolutional network."
            )
    # Images of small data sets are evaluated at their own size.
    evaluated_px = Preprocessing.of_training(config.identity(), config.traits.stem).size_px
    try:
        check_evaluation(model.arch, config.view_size_px, evaluated_px)
    except UserError as error:
        raise UserError(f"--dataset {config.data.dataset} is evaluated at {evaluated_px} px: {error}") from error
    if model.init == "pretrained" and model.ckpt_path is None and model.normalize is None:
        expected = normalization_of_weights(model.arch)
        raise UserError(
            f"--init pretrained needs --normalize: timm's weights of {model.arch} expect images normalized by "
            f"{expected or 'values that have no name here'}; add --normalize {expected or 'imagenet'}."
        )


def initial_model(config: TrainConfig, classes: int) -> Model:
    """The model that training starts from, equal on all processes: from the seed, then from ``ckpt_path`` or timm's
    weights if given.

    Raises UserError if the weights cannot be read or do not fit.
    """
    torch.manual_seed(config.run.seed)
    model = Model(
        config.model,
        stem=config.traits.stem,
        view_size_px=config.view_size_px,
        classes=classes,
        base=BASE_OBJECTIVES[config.objective.objective].heads,
        with_inverse_model=config.objective.manip_lambda > 0,
        stop_gradient=config.objective.stop_gradient,
        predict_both_ways=bool(config.objective.predict_both_ways),
    )
    if config.model.ckpt_path is not None:
        path, state, metadata = read_source(
            config.model.ckpt_path, arch=config.model.arch, view_size_px=config.view_size_px
        )
        normalize = normalization_of(metadata, path, config.model.normalize)
        if normalize != (config.model.normalize or "none"):
            raise UserError(
                f"{path} holds an encoder that normalizes images by {normalize}; add --normalize {normalize}."
            )
        of_file = timm_encoder_of(metadata)
        if of_file is not None and of_file[0] == config.model.arch and of_file[1] != config.view_size_px:
            state = _adapted_to(config.model.arch, config.view_size_px, state, path)
        if config.model.reinitialize_supervised_head:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
        loaded = load_weights(model, state, path, required=("encoder",))
        if "target_network" not in loaded:
            model.reset_target_network()
    elif config.model.init == "pretrained":
        with torch.random.fork_rng(devices=[]):
            weights = pretrained_weights(config.model.arch, config.view_size_px)
        model.load_state_dict({f"{TIMM_NETWORK}{name}": of for name, of in weights.items()}, strict=False)
        model.reset_target_network()
    return model


def _adapted_to(arch: str, view_size_px: int, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same weights with the encoder of timm, and that of the target network, for views of another size."""
    adapted = dict(state)
    for prefix in (TIMM_NETWORK, f"target_network.{TIMM_NETWORK}"):
        network = {name.removeprefix(prefix): of for name, of in state.items() if name.startswith(prefix)}
        if network:
            weights = adapted_weights(arch, view_size_px, network, path)
            adapted |= {f"{prefix}{name}": of for name, of in weights.items()}
    return adapted


def compile_encoder(encoder: ImageEncoder, device: torch.device) -> None:
    """Compile the encoder in place, when it is first called. Raises UserError if a CPU's compiler is missing."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"--compile 1 needs a C++ compiler, but there is no {compiler}; install it, name another one by the "
            f"environment variable CXX, or leave --compile out."
        )
    # By default, the compiler also converts narrow encoders to channels-last, in which they hang (see encoder.NARROW).
    encoder.compile(options={"layout_optimization": encoder.memory_format == torch.channels_last})
