"""What all encoders share, and the ResNets: torchvision's blocks and names, the three stems of S-TEC, any width."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms import v2

from pipelines.errors import UserError
from stec.architectures import ARCHITECTURES
from stec.models.preprocessing import Preprocessing
from stec.normalization import NORMALIZATIONS, Normalization

Stem = Literal["cifar", "stl10", "imagenet"]
"""``cifar``: 3x3 convolution, stride 1; ``stl10``: 7x7, stride 2; ``imagenet``: 7x7, stride 2, then max-pool."""
STEMS: tuple[Stem, ...] = get_args(Stem)

BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}

NARROW = 16
"""Encoders of a smaller width are not channels-last: oneDNN, which computes PyTorch's convolutions on CPUs, writes past
its workspace in the gradient of a strided 1x1 convolution with fewer channels than a vector register holds, and crashes
or hangs (uxlfoundation/oneDNN issue 6035)."""


class ImageEncoder(nn.Module):
    """Images [N, 3, H, W] in [0, 1] to features [N, D] with D = ``feature_dim``.

    ``normalize`` names the mean and standard deviation that are applied to the images first. They cannot be folded into
    the first convolution: its padding is 0 after normalization, which no padding of the pixels before it is.
    """

    feature_dim: int
    layer3_dim: int = 0
    """Dimension of the third stage's pooled output; 0 if the encoder does not give it."""
    memory_format: torch.memory_format
    """That of the parameters of convolutions, and of the images."""
    preprocessing: Preprocessing | None = None
    """How the images of its evaluation were made; known of loaded encoders."""

    def __init__(self, normalize: Normalization) -> None:
        super().__init__()
        self.normalize = normalize

    @property
    def transform(self) -> v2.Compose:
        """From an image of Pillow, or a uint8 tensor [C, H, W], to the encoder's input [3, H, W] as in its evaluation.

        Raises UserError if that is unknown, as of an encoder that was not loaded.
        """
        if self.preprocessing is None:
            raise UserError("The images of this encoder are unknown; load one by stec.load_encoder.")
        return self.preprocessing.transform()

    def prepared(self, images: Tensor) -> Tensor:
        """The images, normalized, in the encoder's memory format."""
        return _normalized(images, self.normalize).contiguous(memory_format=self.memory_format)


class Encoder(ImageEncoder):
    """A ResNet: images [N, 3, H, W] in [0, 1] to features [N, D] with D = ``feature_dim``.

    ``width`` is the number of channels of the first stage; the others have 2, 4 and 8 times as many. With width 64 the
    parameters have the names and shapes of torchvision's ResNet of the same name, except for ``fc``, which is missing,
    and, with the ``cifar`` stem, ``conv1``. Parameters and images are channels-last in memory, except of narrow
    encoders.
    """

    def __init__(self, arch: str, stem: Stem, width: int = 64, normalize: Normalization = "none") -> None:
        super().__init__(normalize)
        architecture = ARCHITECTURES[arch]
        block = BLOCKS[architecture.block]
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()

        channels = width
        stages = []
        for k, depth in enumerate(architecture.depths):
            planes = width * 2**k
            blocks = []
            for n in range(depth):
                stride = 2 if k > 0 and n == 0 else 1
                blocks.append(_block(block, channels, planes, stride))
                channels = planes * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.feature_dim, self.layer3_dim = channels, channels // 2
        self._initialize()
        self.memory_format = torch.channels_last if width >= NARROW else torch.contiguous_format
        self.to(memory_format=self.memory_format)

    def _initialize(self) -> None:
        """Initialize as the official code: convolutions with half the usual variance before a ReLU."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in) / math.sqrt(2))
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor, with_layer3: bool = False) -> Tensor:
        """``with_layer3`` appends the pooled output of the third stage: [N, D + ``layer3_dim``]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.prepared(images)))))
        third = self.layer3(self.layer2(self.layer1(x)))
        features = torch.flatten(self.avgpool(self.layer4(third)), 1)
        return torch.cat([features, torch.flatten(self.avgpool(third), 1)], dim=1) if with_layer3 else features


def _normalized(images: Tensor, name: Normalization) -> Tensor:
    """Images [N, 3, H, W] with the mean subtracted from each channel, divided by the standard deviation."""
    values = NORMALIZATIONS[name]
    if values is None:
        return images
    # Numbers, because tensors of three would have to be moved to the images' device.
    channels = [(images[:, k] - mean) / deviation for k, (mean, deviation) in enumerate(zip(*values, strict=True))]
    return torch.stack(channels, dim=1)


def _block(block: type[BasicBlock | Bottleneck], channels: int, planes: int, stride: int) -> nn.Module:
    """A residual block with a projected shortcut where the shape changes."""
    shortcut = None
    if stride != 1 or channels != planes * block.expansion:
        shortcut = nn.Sequential(
            nn.Conv2d(channels, planes * block.expansion, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(planes * block.expansion),
        )
    residual: nn.Module = block(channels, planes, stride, shortcut)
    return residual
