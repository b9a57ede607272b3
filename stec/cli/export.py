"""``launch.py export``: an encoder for another library or program, or the model as one file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pipelines.errors import UserError
from stec.architectures import check_architecture
from stec.cli.flags import parse
from stec.cli.outputs import check_output
from stec.config import LARGEST_VIEW_PX, SMALLEST_VIEW_PX
from stec.normalization import NORMALIZATIONS, Normalization
from stec.settings import check_ranges, setting


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export an encoder for torchvision, timm, Hugging Face, ONNX or torch.export, or the model as one file."""

    source: tyro.conf.Positional[Path]
    """The folder of a run, one of its safetensors files or checkpoints, an exported folder, an official .ckpt,
    or a ResNet of another project, or with --arch timm/NAME any encoder of timm."""
    out: tyro.conf.Positional[Path]
    """File to write, ending in .safetensors or .pth, .onnx, or .pt2 (torch_export); for huggingface, a folder."""
    format: Literal["torchvision", "timm", "huggingface", "full", "onnx", "torch_export"]
    """The library that loads it; full is encoder and heads with this project's names."""
    weights: Literal["online", "target"] = "online"
    """Which encoder of BYOL or ReLIC: the trained one, or its moving average, the target network."""
    license: str = "unknown"
    """License of the weights in the short form of the Hub: mit, apache-2.0, cc-by-4.0, other."""
    stem: Literal["cifar", "stl10", "imagenet"] | None = None
    """Stem of the encoder, for official checkpoints, which do not record it."""
    arch: str | None = None
    """Architecture that the encoder must have; for weights of another project, timm/NAME is also how they are read."""
    view_size: int | None = setting(None, at_least=SMALLEST_VIEW_PX, at_most=LARGEST_VIEW_PX)
    """With --arch timm/NAME, for weights of another project: height and width in px of the images that the encoder is
    made for; default: 224."""
    normalize: Normalization | None = None
    """Mean and standard deviation by which the encoder normalizes images; needed for checkpoints of other projects."""

    def validate(self) -> None:
        """Raise UserError if the license is invalid, a setting out of its range, or flags contradict each other."""
        check_ranges(self)
        if self.arch is not None:
            check_architecture(self.arch)
        if not re.fullmatch("[a-z0-9][a-z0-9.+-]*", self.license):
            raise UserError(
                f"--license {self.license} is not a license in the short form of the Hub; give one such as mit, "
                f"apache-2.0, cc-by-4.0 or other."
            )
        if self.weights == "target" and self.format == "full":
            raise UserError("--format full holds both encoders; omit --weights target.")


def run(arguments: list[str]) -> None:
    """Export, and print the Python line that loads the result."""
    config = parse(ExportConfig, arguments, name="export")
    config.validate()

    from stec.weights.formats import SUFFIXES, export
    from stec.weights.pretrained import read_trained

    check_output(config.out, suffixes=SUFFIXES[config.format], may_exist=False)
    trained = read_trained(
        config.source,
        stem=config.stem,
        normalize=config.normalize,
        stem_set_by="--stem",
        arch=config.arch,
        view_size_px=config.view_size,
    )
    if config.weights == "target":
        trained = trained.with_target_encoder()
    loading = export(trained, config.out, config.format, source=config.source, license=config.license)
    values = sum(tensor.numel() for tensor in trained.encoder.state_dict().values())
    print(f"{config.out}: {trained.description}, {values} values in the encoder")
    print(f"Load it with: {loading}")
    fixed_size_px = getattr(trained.encoder, "fixed_size_px", None)
    if config.format == "timm" and fixed_size_px not in (None, trained.preprocessing.size_px):
        print(f"It takes images of {fixed_size_px} px alone, to which this project's encoder resizes others.")
    values_of_images = NORMALIZATIONS[trained.normalize]
    if values_of_images is not None and config.format in ("torchvision", "timm"):
        mean, deviation = values_of_images
        print(f"It takes images that were normalized with mean={mean}, std={deviation}, which is not in the file.")
