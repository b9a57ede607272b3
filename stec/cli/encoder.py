"""What the commands on a trained encoder share: their flags, and reading its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.datasets.registry import DATA_SETS, DataSetName, DataSetTraits
from pipelines.errors import UserError
from stec.architectures import check_architecture, is_timm
from stec.config import LARGEST_VIEW_PX, SMALLEST_VIEW_PX, ImageSettings
from stec.normalization import Normalization
from stec.settings import check_ranges, setting

if TYPE_CHECKING:
    from stec.weights.pretrained import Trained


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ImageSettings):
    """A trained encoder and the images that it encodes."""

    ckpt_path: Path
    """Weights: the folder of a finished run, a checkpoint or safetensors file of this project, an official .ckpt, or a
    ResNet of torchvision, timm, lightly, solo-learn or MoCo, or with --arch timm/NAME any encoder of timm."""
    view_size: int | None = setting(None, at_least=SMALLEST_VIEW_PX, at_most=LARGEST_VIEW_PX)
    """Height and width of the images in px; default: that of the data set."""
    trained_on: DataSetName | None = None
    """Data set that the encoder was trained on, which determines its stem, and whether its online classifier is used;
    default: that in the weights' metadata, otherwise --dataset."""
    normalize: Normalization | None = None
    """Mean and standard deviation by which the encoder normalizes images; needed for checkpoints of other projects."""
    arch: str | None = None
    """Architecture that the encoder must have; default: that of the weights. For weights of another project, timm/NAME
    is also how they are read."""
    width: int | None = setting(None, at_least=1)
    """Channels that a ResNet's first stage must have; default: those of the weights."""
    batch_size: int = setting(256, at_least=1)
    """Images per process and step."""
    mixed_precision: Literal["no", "auto", "fp16", "bf16"] = "no"
    """Precision of the encoder; no is float32."""

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of its range."""
        check_ranges(self)
        if self.arch is not None:
            check_architecture(self.arch)

    @property
    def traits(self) -> DataSetTraits:
        """What the method fixes for the data set, at the size of the images."""
        defaults = DATA_SETS[self.dataset]
        if self.view_size in (None, defaults.view_size_px) or defaults.resize_px is not None:
            return defaults.at(self.view_size)
        # By default, these images are neither resized nor cropped; now the whole image is resized.
        return replace(defaults.at(self.view_size), resize_px=self.view_size)


def read_encoder(config: EncoderConfig) -> tuple[Trained, str]:
    """The weights in ``ckpt_path``, and the data set that they were trained on.

    Raises UserError if there are none, or their architecture or width is not the one in the flags.
    """
    from stec.weights.pretrained import read_trained

    trained = read_trained(
        config.ckpt_path,
        stem=None if config.trained_on is None else DATA_SETS[config.trained_on].stem,
        otherwise=config.traits.stem,
        normalize=config.normalize,
        stem_set_by="--trained_on",
        arch=config.arch,
        view_size_px=config.traits.view_size_px,
    )
    if is_timm(trained.arch):
        from stec.models.timm_encoder import check_evaluation

        assert trained.view_size_px is not None
        check_evaluation(trained.arch, trained.view_size_px, config.traits.view_size_px)
    if config.width not in (None, trained.width):
        raise UserError(
            f"{trained.path} does not match --width {config.width}: it is a {trained.description}; omit --width."
        )
    return trained, config.trained_on or trained.trained_on or config.dataset
