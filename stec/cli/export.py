"""Export a trained encoder for torchvision, timm or Hugging Face, or the whole model as one file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pipelines.errors import UserError
from stec.cli.flags import parse


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a trained encoder for torchvision, timm or Hugging Face, or the whole model as one file."""

    source: tyro.conf.Positional[Path]
    """A run's folder, one of its safetensors files or checkpoints, an exported folder, or an official .ckpt."""
    out: tyro.conf.Positional[Path]
    """File to write, ending in .safetensors or .pth; for huggingface, a folder."""
    format: Literal["torchvision", "timm", "huggingface", "full"]
    """What shall load it; full is encoder and heads under our names."""
    license: str = "unknown"
    """Under which the weights may be used, as the Hub writes it: mit, apache-2.0, cc-by-4.0, other."""
    stem: Literal["cifar", "stl10", "imagenet"] | None = None
    """For official checkpoints, which do not say it: the data set whose stem the encoder has."""

    def validate(self) -> None:
        """Raise UserError for the first setting that makes no sense."""
        if not re.fullmatch("[a-z0-9][a-z0-9.+-]*", self.license):
            raise UserError(
                f"--license {self.license} is no license's short name as the Hub writes it; give one such as mit, "
                f"apache-2.0, cc-by-4.0 or other."
            )


def run(arguments: list[str]) -> None:
    """Export a trained encoder; prints how it is loaded."""
    config = parse(ExportConfig, arguments, name="export")
    config.validate()

    from stec.weights.formats import check_out, export
    from stec.weights.pretrained import read_trained

    check_out(config.out, config.format)
    trained = read_trained(config.source, stem=config.stem, stem_set_by="--stem")
    loading = export(trained, config.out, config.format, source=config.source, license=config.license)
    values = sum(tensor.numel() for tensor in trained.encoder.state_dict().values())
    print(f"{config.out}: {trained.arch}, width {trained.width}, {trained.stem} stem, {values} values in the encoder")
    print(f"Load it by: {loading}")
