"""A trained encoder from a run's folder, a file, or the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stec import checkpoint
from stec.config import DATA_SETS
from stec.encoder import STEMS, Encoder, Stem
from stec.errors import UserError
from stec.export import read_weights_and_metadata
from stec.run_folder import RunFolder

WEIGHTS = "model.safetensors"
"""In a run's folder as in one on the Hub."""
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
"""Of files of weights: no such name is looked up on the Hub."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An encoder, and what is known of how it came about."""

    encoder: Encoder
    """In evaluation mode, on the CPU."""
    arch: str
    stem: Stem
    width: int
    state: dict[str, Tensor]
    """Encoder and heads under our names, as far as the source holds them."""
    metadata: dict[str, Any]
    """JSON values: ``config``, ``step``, ``environment`` and ``results``, each where the source tells it."""


def load_encoder(path_or_hub_id: str | Path, *, stem: Stem | None = None) -> Encoder:
    """A trained encoder in evaluation mode, on the CPU: images [N, 3, H, W] in [0, 1] to features [N, D].

    ``path_or_hub_id``: a run's or an exported folder, a safetensors file or checkpoint of ours, an official ``.ckpt``,
    or ``owner/name`` on the Hugging Face Hub, which needs the extra ``export``. ``stem`` is needed for official
    checkpoints with a 7x7 convolution, which do not say whether a max-pool follows. Nothing in a file is executed.
    Raises UserError where there is no encoder to be had.
    """
    source = Path(path_or_hub_id)
    if HUB_ID.fullmatch(str(path_or_hub_id)) and source.suffix not in SUFFIXES and not source.exists():
        from stec.hub import download

        source = download(str(path_or_hub_id), WEIGHTS)
    return read_trained(source, stem=stem).encoder


def read_trained(source: Path, *, stem: Stem | None = None) -> Trained:
    """As ``load_encoder``, from a folder or file, with everything else that it holds."""
    if not os.path.exists(source):  # noqa: PTH110 - which does not raise where a name is too long
        raise UserError(f"There is no file or folder {source}; give a run's folder, or a file of trained weights.")
    if not source.is_dir():
        return _trained(*read_weights_and_metadata(source), source, stem)
    state, metadata = read_weights_and_metadata(_weights_in(source))
    results = RunFolder(source).results
    if results.exists():
        metadata = {**metadata, "results": _json_of(results)}
    return _trained(state, metadata, source / WEIGHTS, stem)


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder. Raises UserError where there is none, or training is to change it yet."""
    run, weights = RunFolder(folder), folder / WEIGHTS
    checkpoints = list(checkpoint.checkpoints(folder).values())
    if not run.starts.exists() and not checkpoints:
        if weights.exists():
            return weights
        raise UserError(f"{folder} is no run's folder and holds no {WEIGHTS}; name one that training wrote.")
    newest = checkpoints[-1] if checkpoints else None
    remedy = "let it end by --resume auto" + (f", or take its newest checkpoint, {newest}" if newest else "")
    if not (weights.exists() and run.results.exists()):
        missing = run.results if weights.exists() else weights
        raise UserError(f"The run in {folder} is not finished: it has no {missing.name} yet; {remedy}.")
    if run.config.exists():
        now = _json_of(run.config)
        trained = read_weights_and_metadata(weights)[1].get("config", {})
        changed = [name for name, value in trained.items() if name in now and now[name] != value]
        if changed:
            raise UserError(
                f"The run in {folder} is being trained on with another --{changed[0]}, so its {WEIGHTS} is not the "
                f"last word; {remedy}."
            )
    return weights


def _json_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); bring it back from a copy, or delete it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; bring it back from a copy, or delete it.")
    return content


def _trained(state: dict[str, Tensor], metadata: dict[str, Any], path: Path, stem: Stem | None) -> Trained:
    """The encoder that the weights are of. Raises UserError where they are of none of ours."""
    first = state["encoder.conv1.weight"]
    if first.ndim != 4:
        raise UserError(f"{path} holds no encoder of ours: its conv1.weight has {first.ndim} dimensions instead of 4.")
    arch = "resnet50" if "encoder.layer1.0.conv3.weight" in state else "resnet18"
    width = len(first)
    stem = stem or _stem_of(first, metadata, path)
    # On no device: neither time nor random numbers go into weights that are replaced at once.
    with torch.device("meta"):
        encoder = Encoder(arch, stem, width)
    own = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    try:
        encoder.load_state_dict(own, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).partition(": ")[2][:200]
        raise UserError(f"{path} is no {arch} of width {width} with the {stem} stem: {reason}") from error
    encoder.to(memory_format=encoder.memory_format)
    return Trained(encoder=encoder.eval(), arch=arch, stem=stem, width=width, state=state, metadata=metadata)


def _stem_of(conv1: Tensor, metadata: Mapping[str, Any], path: Path) -> Stem:
    """What the metadata says, or else the first convolution's size. Raises UserError where neither tells."""
    said = metadata.get("encoder", {}).get("stem")
    data_set = metadata.get("config", {}).get("dataset")
    if said is None and data_set is not None:
        if data_set not in DATA_SETS:
            raise UserError(
                f"{path} was trained on {data_set}, a data set that this version does not know; use the version that "
                f"wrote it."
            )
        said = DATA_SETS[data_set].stem
    if said is None and conv1.shape[-1] == 3:
        return "cifar"
    if said is None:
        raise UserError(
            f"{path} does not say whether a max-pool follows its first convolution; add --stem imagenet (it does) or "
            f"--stem stl10 (it does not)."
        )
    if said not in STEMS:
        raise UserError(f"{path} has the stem {said}, which this version does not know; use the version that wrote it.")
    known: Stem = said
    return known
