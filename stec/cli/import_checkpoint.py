"""Turn a checkpoint into a safetensors file under our names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from pipelines.errors import UserError
from stec.cli.flags import parse
from stec.cli.outputs import check_place


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Turn a checkpoint, official .ckpt files included, into a safetensors file under our names."""

    checkpoint: tyro.conf.Positional[Path]
    """File to read; nothing in it is executed."""
    out: tyro.conf.Positional[Path]
    """File to write, ending in .safetensors."""


def run(arguments: list[str]) -> None:
    """Turn a checkpoint into a safetensors file under our names."""
    config = parse(ImportConfig, arguments, name="import")
    if config.out.suffix != ".safetensors":
        raise UserError(f"{config.out} must end in .safetensors, the format that is written.")
    check_place(config.out, inputs=(config.checkpoint,))

    from stec.weights.export import read_weights, write_safetensors

    state = read_weights(config.checkpoint)
    write_safetensors(state, config.out, {"imported_from": config.checkpoint.name})
    values = sum(tensor.numel() for tensor in state.values())
    print(f"{config.out}: {len(state)} tensors, {values} values")
