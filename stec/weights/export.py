"""Reading and writing weights: safetensors files, checkpoints, and official checkpoints."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipelines.datasets.registry import DATA_SETS
from pipelines.errors import UserError
from pipelines.files import atomic_write
from stec.architectures import is_timm
from stec.compatibility import with_current_parameter_names
from stec.models.timm_encoder import adapted_weights, parameter_names
from stec.runs import checkpoint
from stec.runs.checkpoint import FORMAT_VERSION
from stec.weights.inert_pickle import read_torch_file
from stec.weights.layouts import NESTED, find_networks, find_resnets, find_state, without_wrappers

PARTS = ("encoder", "projection", "predictor", "inverse_models", "classifier", "target_network")

PORTABLE = ("stec", "torch", "python", "training_images", "data_fingerprint")
"""The keys of a run's environment that are stored with its weights."""
OBJECTS = ("config", "environment", "encoder", "preprocessing", "results")
"""The keys of a file's metadata that are JSON objects, if present."""
FOREIGN_PREFIX = "foreign_prefix"
"""The key of the metadata of an encoder from another project: with what the names of its parameters began."""

TIMM_NETWORK = "encoder.network."
"""With what the names of the parameters of an encoder of timm begin; timm's own follow."""

OFFICIAL_PREFIXES = {
    "encoder.": "encoder.",
    "projection.model.": "projection.",
    "binned_prediction_model.model.linear_0.": "inverse_models.window.hidden.",
    "binned_prediction_model.model.bn_0.": "inverse_models.window.bn_hidden.",
    "binned_prediction_model.model.linear_final.": "inverse_models.window.output.",
    "supervised_head.linear_layer.": "classifier.",
}
"""Prefixes of parameter names in an official state dict, and here."""


def from_official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict with this project's names, without the encoder's unused ``fc``.

    Raises ValueError for a name that is not in the official model.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("encoder.fc."):
            continue
        prefix = next((official for official in OFFICIAL_PREFIXES if name.startswith(official)), None)
        if prefix is None:
            raise ValueError(f"{name} is not in the official model; expected one of {list(OFFICIAL_PREFIXES)}.")
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
    """Write ``state`` to ``path`` atomically. Raises UserError if it cannot be written.

    The metadata is one JSON text with the key ``stec``: safetensors stores several keys in random order, and equal runs
    must give equal files.
    """
    atomic_write(path, save(on_cpu(state), {"stec": json.dumps(metadata, sort_keys=True)}))


def on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights with this project's names from a safetensors file, a checkpoint, or an official ``.ckpt``.

    A file of the encoder, or of another project, gives the encoder alone. No code in the file is executed. Raises
    UserError if it is missing, damaged or none of these.
    """
    return read_weights_and_metadata(path)[0]


def read_weights_and_metadata(
    path: Path, *, arch: str | None = None, view_size_px: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As ``read_weights``, and the metadata of a file of this project; of another project's, ``FOREIGN_PREFIX``.

    If ``arch`` is an encoder of timm, a file of another project holds its weights, which are adapted to the size of the
    views (default: 224 px).
    """
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
    else:
        content = read_torch_file(path)
        found = find_state(content)
        if not all(isinstance(value, Tensor) for value in found.values()):
            raise UserError(
                f"{path} holds no weights under {' or '.join(NESTED)}, but {_listed(content)}; give a checkpoint of a "
                f"trained model."
            )
        state, metadata = dict(found), _checkpoint_metadata(content, path)
    ours = metadata is not None
    metadata = {
        name: value for name, value in (metadata or {}).items() if name not in OBJECTS or isinstance(value, dict)
    }
    if not ours and arch is not None and is_timm(arch) and not _has_our_names(state):
        view_size_px = view_size_px or DATA_SETS["imagenet"].view_size_px
        names = parameter_names(arch, view_size_px)
        state = without_wrappers(state)
        networks = find_networks(state, names.needed, names.classifiers) or {"": state}
        prefix = _only_prefix(networks, path)
        # Before they are adapted, which may spread what is not finite.
        weights = adapted_weights(arch, view_size_px, _finite(networks[prefix], path), path)
        state = {f"{TIMM_NETWORK}{name}": tensor for name, tensor in weights.items()}
        metadata |= {FOREIGN_PREFIX: prefix, "encoder": {"arch": arch, "view_size_px": view_size_px}}
    else:
        state, foreign_prefix = _our_names(state, path, ours=ours, of_timm=timm_encoder_of(metadata) is not None)
        if foreign_prefix is not None:
            metadata[FOREIGN_PREFIX] = foreign_prefix
    return _finite(state, path), metadata


def _finite(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same. Raises UserError if a value is NaN or infinite."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{path} holds NaN or infinite values (first in {name}), so its features would be useless; use an "
                f"earlier checkpoint, or other weights."
            )
    return state


def timm_encoder_of(metadata: Mapping[str, Any]) -> tuple[str, int] | None:
    """The encoder of timm that metadata are of, and the size of its views in px; None if they are of another one."""
    encoder, config = metadata.get("encoder", {}), metadata.get("config", {})
    arch = encoder.get("arch", config.get("arch"))
    if not isinstance(arch, str) or not is_timm(arch):
        return None
    of_data_set = DATA_SETS[config["dataset"]].view_size_px if config.get("dataset") in DATA_SETS else None
    size = encoder.get("view_size_px") or config.get("view_size") or of_data_set
    return (arch, size) if isinstance(size, int) else None


def _has_our_names(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(TIMM_NETWORK) for name in without_wrappers(state))


def _our_names(
    state: dict[str, Tensor], path: Path, *, ours: bool, of_timm: bool
) -> tuple[dict[str, Tensor], str | None]:
    """The weights with this project's names, and the prefix of an encoder of another project, otherwise None.

    ``ours``: the file is of this project; ``of_timm``: and holds an encoder of timm. Raises UserError if no encoder is
    found, or several.
    """
    if _has_our_names(state):
        return with_current_parameter_names(without_wrappers(state)), None
    if of_timm:  # the encoder alone: that of a run, or an export with timm's names
        below = "encoder." if all(name.startswith("network.") for name in state) else TIMM_NETWORK
        return {f"{below}{name}": tensor for name, tensor in state.items()}, None
    if any(name.startswith(("supervised_head.", "projection.model.")) for name in state):
        try:
            return from_official_names(state), None
        except ValueError as error:
            raise UserError(f"{path} is not a checkpoint of the official S-TEC model: {error}") from error
    unwrapped = with_current_parameter_names(without_wrappers(state))
    foreign = (name for name in unwrapped if name.partition(".")[0] not in PARTS or name.startswith("encoder.fc."))
    if "encoder.conv1.weight" in unwrapped and not any(foreign):
        return unwrapped, None
    resnets = find_resnets(state)
    if not resnets:
        raise UserError(
            f"{path} holds no encoder: no ResNet (conv1, bn1, layer1 to layer4, or their numbers 0, 1, 4 to "
            f"7) is among its tensors, which are "
            f"{_listed(state)}; give a checkpoint of a trained ResNet; "
            f"others of timm's are read with --arch timm/NAME."
        )
    prefix = _only_prefix(resnets, path)
    encoder = {f"encoder.{name}": tensor for name, tensor in resnets[prefix].items()}
    return encoder, None if ours and prefix == "" else prefix


def _only_prefix(prefixes: Collection[str], path: Path) -> str:
    """The prefix of the encoder in a file. Raises UserError if there are several."""
    prefix, *others = prefixes
    if others:
        raise UserError(
            f"{path} holds several encoders, whose names begin with {' and '.join(prefixes)}; choose one and save it "
            f"alone: torch.save({{name.removeprefix('{prefix}'): tensor for name, tensor in state.items() if "
            f"name.startswith('{prefix}')}}, 'encoder.pth')."
        )
    return prefix


def _listed(values: Mapping[str, Any]) -> str:
    """The first names in a file, tensors with their shapes."""
    shown = [
        f"{name} {list(value.shape)}" if isinstance(value, Tensor) else str(name)
        for name, value in list(values.items())[:4]
    ]
    return (", ".join(shown) or "none") + (f" and {len(values) - 4} more" if len(values) > 4 else "")


def _checkpoint_metadata(content: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """The metadata of a checkpoint of this project, and None of another file.

    Raises UserError if a newer version wrote it, or its checksum does not match.
    """
    if not {"format_version", "identity"} & content.keys():
        return None
    version = content.get("format_version", 0)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(f"{path} is a checkpoint of format {version}, but this version knows {FORMAT_VERSION}; update.")
    if version == FORMAT_VERSION:
        try:
            checkpoint.load(path)
        except checkpoint.DamagedCheckpoint as damage:
            raise UserError(f"{path} is damaged ({damage}); use another checkpoint.") from damage
    environment = content.get("environment")
    values = {
        "config": content.get("identity"),
        "step": content.get("step"),
        "environment": portable(environment) if isinstance(environment, dict) else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def portable(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's environment that does not depend on the machine, so that equal runs have equal files."""
    return {name: environment[name] for name in PORTABLE if name in environment}


def without_folders(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the name alone of the file that training started from, whose location is private."""
    config = metadata.get("config", {})
    if not config.get("ckpt_path"):
        return dict(metadata)
    return {**metadata, "config": {**config, "ckpt_path": Path(config["ckpt_path"]).name}}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors, and the metadata of a file of this project, and None of another."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("stec", "null"))
        return load_file(path), metadata if isinstance(metadata, dict) else None
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}; give the path of a checkpoint.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); download it again.") from error


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: Path,
    *,
    required: tuple[str, ...],
    remedy: str = "check --arch, --width, --dataset (for stem and classes) and the sizes of the heads",
) -> list[str]:
    """Load weights into a ``Model``, part by part; returns the names of the parts in ``state``.

    Raises UserError with the differences and the ``remedy`` if a part does not fit, or one of ``required`` is missing.
    """
    wanted = model.state_dict()
    loaded, differences = [], []
    for part in PARTS:
        ours = {name for name in wanted if name.startswith(part + ".")}
        theirs = {name for name in state if name.startswith(part + ".")}
        if not ours or not theirs:
            if part in required:
                differences.append(f"it has no {part}")
            continue
        loaded.append(part)
        differences += [f"{name} is missing" for name in sorted(ours - theirs)]
        differences += [f"{name} is unknown here" for name in sorted(theirs - ours)]
        differences += [
            f"{name} is {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in sorted(ours & theirs)
            if state[name].shape != wanted[name].shape
        ]
    if differences:
        shown = "; ".join(differences[:4]) + (f"; and {len(differences) - 4} more" if len(differences) > 4 else "")
        raise UserError(f"{path} does not fit the model ({shown}); {remedy}.")
    model.load_state_dict({name: state[name] for name in wanted if name.split(".")[0] in loaded}, strict=False)
    return loaded
