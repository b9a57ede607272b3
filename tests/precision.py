"""One training step of an encoder in single precision, judged by the same step in double precision.

The rounding errors of single precision depend on the processor, so no fixed bound holds everywhere. The errors of the
plain computation on the same processor are the yardstick.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stec.models.encoder import Encoder

EPS = torch.finfo(torch.float32).eps


def exact(encoder: Encoder) -> Encoder:
    """A copy in double precision."""
    return copy.deepcopy(encoder).double()


def images_for(encoder: Encoder, count: int, size: int) -> Tensor:
    """Images [count, 3, size, size] for which no ReLU's input is so near to 0 that rounding could change its sign.

    Such a change makes a gradient differ by far more than rounding, on one processor and not on another.
    """
    nearest: list[Tensor] = []
    reference = exact(encoder)
    for module in reference.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda _, inputs: nearest.append(inputs[0].abs().min()))
    for seed in itertools.count():
        images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
        nearest.clear()
        with torch.no_grad():
            reference(images.double())
        if torch.stack(nearest).min() > 1e-5:
            return images
    raise AssertionError


def one_step(encoder: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Features, the loss of a fixed classifier on them, and the gradients of all parameters, in the encoder's dtype."""
    parameters = dict(encoder.named_parameters())
    encoder.zero_grad()
    features = encoder(images.to(next(iter(parameters.values())).dtype))
    generator = torch.Generator().manual_seed(0)
    classifier = torch.randn(features.shape[1], 5, generator=generator).to(features.dtype)
    loss = F.cross_entropy(features @ classifier, torch.arange(len(images)) % 5)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    return {"features": features.detach(), "loss": loss.detach(), **gradients}


def errors(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each tensor, relative to the reference's norm."""
    assert found.keys() == reference.keys()
    return {
        name: float((found[name].double() - expected).norm() / expected.norm()) for name, expected in reference.items()
    }


def assert_as_exact(found: Mapping[str, Tensor], plain: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    """No tensor has an error of more than 4 times the largest of the plain computation and 4 roundings."""
    bound = 4 * max(errors(plain, reference).values()) + 4 * EPS
    assert bound < 1e-3, "the plain computation is too inexact to compare with"
    assert {name: error for name, error in errors(found, reference).items() if not error < bound} == {}
