"""``launch.py import``: convert a checkpoint to a safetensors file with this project's names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from stec.cli.flags import parse
from stec.cli.outputs import check_output


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Convert a checkpoint, also an official .ckpt or a ResNet of another project, to a safetensors file of ours."""

    checkpoint: tyro.conf.Positional[Path]
    """File to read; no code in it is executed."""
    out: tyro.conf.Positional[Path]
    """File to write, ending in .safetensors."""


def run(arguments: list[str]) -> None:
    """Convert a checkpoint to a safetensors file with this project's names."""
    config = parse(ImportConfig, arguments, name="import")
    check_output(config.out, suffixes=(".safetensors",), inputs=(config.checkpoint,))

    from stec.weights.export import FOREIGN_PREFIX, read_weights_and_metadata, timm_encoder_of, write_safetensors

    state, metadata = read_weights_and_metadata(config.checkpoint)
    kept = {name: metadata[name] for name in (FOREIGN_PREFIX,) if name in metadata}
    if encoder := timm_encoder_of(metadata):
        kept["encoder"] = {"arch": encoder[0], "view_size_px": encoder[1]}
    write_safetensors(state, config.out, {"imported_from": config.checkpoint.name, **kept})
    values = sum(tensor.numel() for tensor in state.values())
    print(f"{config.out}: {len(state)} tensors, {values} values")
