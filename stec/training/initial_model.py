"""The model that training starts from, and its compilation."""

from __future__ import annotations

import os
import shutil

import torch

from pipelines.errors import UserError
from stec.config import TrainConfig
from stec.models.encoder import Encoder
from stec.models.model import Model
from stec.objectives.registry import BASE_OBJECTIVES
from stec.weights.export import load_weights, read_weights_and_metadata
from stec.weights.pretrained import normalization_of


def initial_model(config: TrainConfig, classes: int) -> Model:
    """The model that training starts from, equal on all processes: from the seed, then from ``ckpt_path`` if given.

    Raises UserError if the weights cannot be read or do not fit.
    """
    torch.manual_seed(config.run.seed)
    model = Model(
        config.model,
        stem=config.traits.stem,
        classes=classes,
        base=BASE_OBJECTIVES[config.objective.objective].heads,
        with_inverse_model=config.objective.manip_lambda > 0,
        stop_gradient=config.objective.stop_gradient,
        predict_both_ways=bool(config.objective.predict_both_ways),
    )
    if config.model.ckpt_path is not None:
        state, metadata = read_weights_and_metadata(config.model.ckpt_path)
        normalize = normalization_of(metadata, config.model.ckpt_path, config.model.normalize)
        if normalize != (config.model.normalize or "none"):
            raise UserError(
                f"{config.model.ckpt_path} holds an encoder that normalizes images by {normalize}; add --normalize "
                f"{normalize}."
            )
        if config.model.reinitialize_supervised_head:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
        loaded = load_weights(model, state, config.model.ckpt_path, required=("encoder",))
        if "target_network" not in loaded:
            model.reset_target_network()
    return model


def compile_encoder(encoder: Encoder, device: torch.device) -> None:
    """Compile the encoder in place, when it is first called. Raises UserError if a CPU's compiler is missing."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"--compile 1 needs a C++ compiler, but there is no {compiler}; install it, name another one by the "
            f"environment variable CXX, or leave --compile out."
        )
    # By default, the compiler also converts narrow encoders to channels-last, in which they hang (see encoder.NARROW).
    encoder.compile(options={"layout_optimization": encoder.memory_format == torch.channels_last})
