"""A trained encoder as torchvision, timm and Hugging Face hold it, and the whole model as one file."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, Literal

import torch

from pipelines.datasets.registry import DATA_SETS
from pipelines.errors import UserError
from pipelines.files import atomic_write, atomic_write_folder
from stec import __version__
from stec.config import group_of_settings
from stec.weights.export import PARTS, on_cpu, write_safetensors
from stec.weights.pretrained import Trained

Format = Literal["torchvision", "timm", "huggingface", "full"]
SUFFIXES: dict[str, tuple[str, ...]] = {
    "torchvision": (".safetensors", ".pt", ".pth"),
    "timm": (".safetensors", ".pt", ".pth"),
    "full": (".safetensors",),
}
"""What a file of the format may end in; Hugging Face's is a folder."""


def check_out(out: Path, kind: Format) -> None:
    """Raise UserError where nothing can be written to ``out``, or something is there already."""
    if os.path.lexists(out):  # a link to nowhere is something, too
        raise UserError(f"{out} is there already; name another one, or remove it.")
    suffixes = SUFFIXES.get(kind)
    if suffixes is not None and out.suffix not in suffixes:
        raise UserError(f"--format {kind} is a file; let {out} end in {' or '.join(suffixes)}.")
    if not out.parent.is_dir():
        raise UserError(f"{out} cannot be written: there is no folder {out.parent}; make it, or name another one.")


def export(trained: Trained, out: Path, kind: Format, *, source: Path, license: str) -> str:
    """Write ``trained`` to ``out``, whole or not at all; returns how it is loaded, in Python.

    ``source`` names it in errors. Raises UserError where the format has no such encoder, or it cannot be written.
    """
    check_out(out, kind)
    metadata = describe(trained, source=source, license=license)
    if kind == "huggingface":
        from stec.weights.hub import HubEncoder

        encoder = HubEncoder.of(trained, metadata)
        atomic_write_folder(out, encoder.save_pretrained)
        return f'stec.load_encoder("{out}")'
    if kind == "full":
        if not any(name.startswith(part + ".") for name in trained.state for part in PARTS if part != "encoder"):
            raise UserError(
                f"{source} holds the encoder alone, without any head; give a model.safetensors or a checkpoint, or "
                f"export it by --format huggingface."
            )
        write_safetensors(trained.state, out, metadata)
        return f'safetensors.torch.load_file("{out}")'

    _check_stem(trained, kind, source)
    state = on_cpu(trained.encoder.state_dict())
    if out.suffix == ".safetensors":
        write_safetensors(state, out, metadata)
    else:
        content = io.BytesIO()
        torch.save(state, content)
        atomic_write(out, content.getvalue())
    if kind == "timm":
        return f'timm.create_model("{trained.arch}", num_classes=0, checkpoint_path="{out}")'
    load = f'safetensors.torch.load_file("{out}")' if out.suffix == ".safetensors" else f'torch.load("{out}")'
    return f"model = torchvision.models.{trained.arch}(); model.fc = torch.nn.Identity(); model.load_state_dict({load})"


def describe(trained: Trained, *, source: Path, license: str) -> dict[str, Any]:
    """What an export says of itself: the source's metadata, what the encoder is and what it takes.

    Raises UserError where a later version trained it, with settings that are not known here.
    """
    config = dict(trained.metadata.get("config", {}))
    unknown = sorted(config.keys() - group_of_settings().keys())
    if unknown:
        theirs = trained.metadata.get("environment", {}).get("stec", "of another version")
        raise UserError(
            f"{source} was trained by stec {theirs} with the setting {unknown[0]}, which stec {__version__} does not "
            f"know; export it by that version."
        )
    if config.get("ckpt_path"):
        config["ckpt_path"] = Path(config["ckpt_path"]).name  # no one else's business where it lay
    data_set = config.get("dataset")
    view_size = config.get("view_size") or (DATA_SETS[data_set].view_size_px if data_set in DATA_SETS else None)
    return {
        **trained.metadata,
        "config": config,
        "encoder": {
            "arch": trained.arch,
            "stem": trained.stem,
            "width": trained.width,
            "feature_dim": trained.encoder.feature_dim,
            "view_size_px": view_size,
        },
        "exported_by": f"stec {__version__}",
        "license": license,
    }


def _check_stem(trained: Trained, kind: Format, source: Path) -> None:
    """Raise UserError where torchvision and timm, whose models of that name are alike, have no such encoder."""
    differences = []
    if trained.stem != "imagenet":
        convolution = "3x3 convolution, stride 1" if trained.stem == "cifar" else "7x7 convolution, stride 2"
        differences.append(f"the {trained.stem} stem ({convolution}, no max-pool)")
    if trained.width != 64:
        differences.append(f"width {trained.width} instead of 64")
    if differences:
        raise UserError(
            f"{source} is a {trained.arch} with {' and '.join(differences)}, which no model of {kind} has; export it "
            f"by --format huggingface or --format full."
        )
