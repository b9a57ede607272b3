"""``launch.py import``: convert a checkpoint to a safetensors file with this project's names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from stec.architectures import check_architecture
from stec.cli.flags import parse
from stec.cli.outputs import check_output
from stec.config import LARGEST_VIEW_PX, SMALLEST_VIEW_PX
from stec.settings import check_ranges, setting


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Convert a checkpoint, also an official .ckpt or a ResNet of another project, to a safetensors file of ours."""

    checkpoint: tyro.conf.Positional[Path]
    """File to read, or the folder of a run; no code in it is executed."""
    out: tyro.conf.Positional[Path]
    """File to write, ending in .safetensors."""
    arch: str | None = None
    """For weights of another project: timm/NAME if they are of an encoder of timm."""
    view_size: int | None = setting(None, at_least=SMALLEST_VIEW_PX, at_most=LARGEST_VIEW_PX)
    """With --arch: height and width in px of the images that the encoder is made for; default: 224."""


def run(arguments: list[str]) -> None:
    """Convert a checkpoint to a safetensors file with this project's names."""
    config = parse(ImportConfig, arguments, name="import")
    check_ranges(config)
    if config.arch is not None:
        check_architecture(config.arch)
    check_output(config.out, suffixes=(".safetensors",), inputs=(config.checkpoint,))

    from stec.weights.export import without_folders, write_safetensors
    from stec.weights.pretrained import read_source

    _, state, metadata = read_source(config.checkpoint, arch=config.arch, view_size_px=config.view_size)
    write_safetensors(state, config.out, {**without_folders(metadata), "imported_from": config.checkpoint.name})
    values = sum(tensor.numel() for tensor in state.values())
    print(f"{config.out}: {len(state)} tensors, {values} values")
