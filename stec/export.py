"""Weights in and out: the official implementation's names, and safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

OFFICIAL_PREFIXES = {
    "encoder.": "encoder.",
    "projection.model.": "projection.",
    "binned_prediction_model.model.linear_0.": "inverse_model.hidden.",
    "binned_prediction_model.model.bn_0.": "inverse_model.bn_hidden.",
    "binned_prediction_model.model.linear_final.": "inverse_model.output.",
    "supervised_head.linear_layer.": "probe.",
}
"""How names in an official state dict begin, and how ours do."""


def from_official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under our names, without the encoder's unused ``fc``.

    Raises ValueError for a name that no official model has.
    """
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("encoder.fc."):
            continue
        prefix = next((official for official in OFFICIAL_PREFIXES if name.startswith(official)), None)
        if prefix is None:
            raise ValueError(f"{name} is no name of the official model; expected one of {list(OFFICIAL_PREFIXES)}.")
        renamed[OFFICIAL_PREFIXES[prefix] + name[len(prefix) :]] = tensor
    return renamed


def to_official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``from_official_names``."""
    return {
        official + name[len(ours) :]: tensor
        for name, tensor in state.items()
        for official, ours in OFFICIAL_PREFIXES.items()
        if name.startswith(ours)
    }


def write_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, object]) -> None:
    """Write ``state`` to ``path`` under a temporary name, then rename it.

    The metadata is one JSON text under the key ``stec``: safetensors stores several keys in random order, and equal
    runs must give equal files.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, temporary, {"stec": json.dumps(metadata, sort_keys=True)})
    temporary.replace(path)
