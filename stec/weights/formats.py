"""Exports of a trained encoder for other libraries and programs, and of the model as one file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import torch

from pipelines.datasets.registry import DATA_SETS
from pipelines.errors import UserError
from pipelines.files import atomic_write, atomic_write_folder
from stec import __version__
from stec.architectures import TIMM, is_timm
from stec.config import group_of_settings
from stec.models.timm_encoder import TimmEncoder
from stec.weights.export import PARTS, on_cpu, without_folders, write_safetensors
from stec.weights.pretrained import Trained
from stec.weights.programs import onnx_file, torch_export_file

Format = Literal["torchvision", "timm", "huggingface", "full", "onnx", "torch_export"]
SUFFIXES: dict[str, tuple[str, ...]] = {
    "torchvision": (".safetensors", ".pt", ".pth"),
    "timm": (".safetensors", ".pt", ".pth"),
    "full": (".safetensors",),
    "huggingface": (),
    "onnx": (".onnx",),
    "torch_export": (".pt2",),
}
"""The file suffixes of each format; that of Hugging Face is a folder."""


def export(trained: Trained, out: Path, kind: Format, *, source: Path, license: str) -> str:
    """Write ``trained`` to ``out`` atomically; returns the Python expression that loads it.

    ``source`` names it in errors. Raises UserError if the format has no such encoder, or it cannot be written.
    """
    metadata = describe(trained, source=source, license=license)
    if kind == "huggingface":
        from stec.weights.hub import hub_encoder

        encoder = hub_encoder(trained, metadata)
        atomic_write_folder(out, encoder.save_pretrained)
        return f'stec.load_encoder("{out}")'
    if kind == "full":
        if not any(name.startswith(part + ".") for name in trained.state for part in PARTS if part != "encoder"):
            raise UserError(
                f"{source} holds only the encoder, without heads; give a model.safetensors or a checkpoint, or use "
                f"--format huggingface."
            )
        write_safetensors(trained.state, out, metadata)
        return f'safetensors.torch.load_file("{out}")'
    if kind == "onnx":
        atomic_write(out, onnx_file(trained.encoder, trained.preprocessing.size_px, metadata))
        return f'onnxruntime.InferenceSession("{out}").run(None, {{"images": images}})'
    if kind == "torch_export":
        atomic_write(out, torch_export_file(trained.encoder, trained.preprocessing.size_px, metadata))
        return f'torch.export.load("{out}").module()'

    if isinstance(trained.encoder, TimmEncoder):
        if kind == "torchvision":
            raise UserError(
                f"{source} is a {trained.arch}, which no model of torchvision has; export it with --format timm or "
                f"--format huggingface."
            )
        state = on_cpu(trained.encoder.network.state_dict())
    else:
        _check_stem(trained, kind, source)
        state = on_cpu(trained.encoder.state_dict())
    if out.suffix == ".safetensors":
        write_safetensors(state, out, metadata)
    else:
        content = io.BytesIO()
        torch.save(state, content)
        atomic_write(out, content.getvalue())
    if kind == "timm":
        options = ", num_classes=0"
        if isinstance(trained.encoder, TimmEncoder) and trained.encoder.fixed_size_px is not None:
            options += f", img_size={trained.encoder.fixed_size_px}"
        return f'timm.create_model("{trained.arch.removeprefix(TIMM)}"{options}, checkpoint_path="{out}")'
    load = f'safetensors.torch.load_file("{out}")' if out.suffix == ".safetensors" else f'torch.load("{out}")'
    return f"model = torchvision.models.{trained.arch}(); model.fc = torch.nn.Identity(); model.load_state_dict({load})"


def describe(trained: Trained, *, source: Path, license: str) -> dict[str, Any]:
    """The metadata of an export: that of the source, the encoder, and its inputs.

    Raises UserError if a newer version trained it, with unknown settings.
    """
    metadata = without_folders(trained.metadata)
    config = metadata.get("config", {})
    unknown = sorted(config.keys() - group_of_settings().keys())
    if unknown:
        theirs = trained.metadata.get("environment", {}).get("stec", "of another version")
        raise UserError(
            f"{source} was trained by stec {theirs} with the setting {unknown[0]}, which stec {__version__} does not "
            f"know; export it with that version."
        )
    data_set = config.get("dataset")
    view_size = config.get("view_size") or (DATA_SETS[data_set].view_size_px if data_set in DATA_SETS else None)
    shape = {"stem": trained.stem, "width": trained.width}
    if is_timm(trained.arch):
        shape, view_size = {}, trained.view_size_px
    return {
        **metadata,
        "config": config,
        "encoder": {
            "arch": trained.arch,
            **shape,
            "feature_dim": trained.encoder.feature_dim,
            "view_size_px": view_size,
            "normalize": trained.normalize,
        },
        "preprocessing": trained.preprocessing.to_json(),
        "exported_by": f"stec {__version__}",
        "license": license,
    }


def _check_stem(trained: Trained, kind: Format, source: Path) -> None:
    """Raise UserError if torchvision and timm have no such encoder; their models of the same name are equal."""
    differences = []
    if trained.stem != "imagenet":
        convolution = "3x3 convolution, stride 1" if trained.stem == "cifar" else "7x7 convolution, stride 2"
        differences.append(f"the {trained.stem} stem ({convolution}, no max-pool)")
    if trained.width != 64:
        differences.append(f"width {trained.width} instead of 64")
    if differences:
        raise UserError(
            f"{source} is a {trained.arch} with {' and '.join(differences)}, which no model of {kind} has; export it "
            f"with --format huggingface or --format full."
        )
