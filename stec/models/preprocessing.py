"""From an image to the input of an encoder, as evaluation makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchvision.transforms import functional, v2

from pipelines.datasets.headers import to_rgb
from pipelines.datasets.registry import DATA_SETS, DataSetTraits


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """An image is converted to RGB, its shorter side resized, and its center cropped; values are 0 to 1."""

    resize_px: int
    """The shorter side after resizing."""
    size_px: int
    """Height and width of the crop."""

    @classmethod
    def of(cls, traits: DataSetTraits) -> Preprocessing:
        """That of a data set's evaluation loader. Images that it uses as they are have ``size_px`` already."""
        return cls(resize_px=traits.resize_px or traits.view_size_px, size_px=traits.view_size_px)

    @classmethod
    def of_training(cls, settings: Mapping[str, Any], stem: str) -> Preprocessing:
        """That of the evaluation at the end of a training with these settings.

        If they name no data set, it is that of the first data set with this stem.
        """
        traits = DATA_SETS.get(settings.get("dataset", ""))
        if traits is None:
            traits = next(traits for traits in DATA_SETS.values() if traits.stem == stem)
        if traits.resize_px is not None:
            traits = traits.at(settings.get("view_size"))
        return cls.of(traits)

    def transform(self) -> v2.Compose:
        """Images of Pillow, or uint8 tensors [C, H, W] with C 1 or 3, to [3, size_px, size_px] float32 in [0, 1].

        Tensors are resized by Pillow as well, whose arithmetic differs from PyTorch's.
        """
        return v2.Compose(
            [
                v2.ToPILImage(),
                v2.Lambda(to_rgb),
                v2.Resize(self.resize_px),
                v2.CenterCrop(self.size_px),
                # v2.ToDtype multiplies by 1 / 255, which rounds differently from the loaders' division.
                v2.Lambda(functional.to_tensor),
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """As files of weights and exports describe it; ``from_json`` is the inverse."""
        return {
            "color": "RGB",
            "resize_shorter_side_px": self.resize_px,
            "center_crop_px": self.size_px,
            "value_range": [0, 1],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Raises KeyError, TypeError or ValueError if ``values`` are not of ``to_json``."""
        return cls(resize_px=int(values["resize_shorter_side_px"]), size_px=int(values["center_crop_px"]))
