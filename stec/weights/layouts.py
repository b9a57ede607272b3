"""Finds the ResNet in checkpoints of other projects: torchvision, timm, lightly, solo-learn, MoCo and others.

They hold torchvision's names, or the numbers of a torchvision ResNet's children in a ``nn.Sequential``, below a prefix
and beside heads. The parameters are copied as they are; what belongs to no encoder is left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
"""Keys below which checkpoints hold their weights. The first two are those of a moving average, which timm prefers as
well. DINO's hold a student and a teacher; features are the teacher's."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile add to all names."""
COPY = re.compile(r"momentum|(^|[._])(encoder_k|ema|target)[._]")
"""Prefixes of the moving average of an encoder that is in the file as well (MoCo, BYOL, solo-learn, lightly)."""
ENCODER = re.compile(r"(conv1|bn1|layer[1-4])\.")
"""Names of an encoder's parameters; others, such as ``fc``, are of a head."""


def find_state(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The innermost mapping below the keys ``NESTED``."""
    key = next((key for key in NESTED if isinstance(content.get(key), Mapping)), None)
    return content if key is None else find_state(content[key])


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without prefixes of ``WRAPPERS`` that all names have."""
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            return without_wrappers({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return dict(state)


def find_resnets(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parameters of each ResNet under torchvision's names, by its prefix.

    Moving averages are left out if there is something else.
    """
    found = {}
    for name, tensor in state.items():
        if tensor.ndim != 4:
            continue
        for first, rename in (("conv1.weight", _torchvision_names), ("0.weight", _names_of_children)):
            if name == first or name.endswith(f".{first}"):
                prefix = name.removesuffix(first)
                inside = {name.removeprefix(prefix): of for name, of in state.items() if name.startswith(prefix)}
                resnet = rename(inside)
                if resnet:
                    found[prefix] = _completed(resnet)
    originals = {prefix: resnet for prefix, resnet in found.items() if not COPY.search(prefix)}
    return originals or found


def find_networks(
    state: Mapping[str, Tensor], needed: Collection[str], classifiers: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """The parameters of each network that has all ``needed`` names, by their prefix, without ``classifiers``.

    Without a prefix, these are all of ``state``. Moving averages are left out if there is something else.
    """
    one = min(needed)
    prefixes = [name.removesuffix(one) for name in state if name == one or name.endswith(f".{one}")]
    prefixes = [prefix for prefix in prefixes if all(f"{prefix}{name}" in state for name in needed)]
    heads = tuple(f"{name}." for name in classifiers)
    found = {}
    for prefix in [prefix for prefix in prefixes if not COPY.search(prefix)] or prefixes:
        inside = {name.removeprefix(prefix): of for name, of in state.items() if name.startswith(prefix)}
        found[prefix] = {name: of for name, of in inside.items() if not prefix or not name.startswith(heads)}
    return found


def _torchvision_names(inside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's parameters; empty if there is none (a residual block also has a conv1, but no layer1)."""
    if not any(name.startswith("layer1.") for name in inside):
        return {}
    return {name: tensor for name, tensor in inside.items() if ENCODER.match(name)}


def _names_of_children(inside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for a Sequential of conv1, bn1, ReLU, max-pool (or a module that does nothing) and four stages.

    Empty if it is not: lightly's own ResNet, whose ReLU is no module, becomes a Sequential without it, with other
    numbers, and computes something else.
    """
    stages = sorted({int(match[1]) for name in inside if (match := re.match(r"(\d+)\.0\.conv1\.weight$", name))})
    if stages != [4, 5, 6, 7] or "1.running_mean" not in inside:
        return {}
    names = {0: "conv1", 1: "bn1", **{number: f"layer{k}" for k, number in enumerate(stages, start=1)}}
    numbered = ((name.partition("."), tensor) for name, tensor in inside.items())
    return {
        f"{names[int(number)]}.{rest}": tensor
        for (number, _, rest), tensor in numbered
        if number.isdecimal() and int(number) in names
    }


def _completed(resnet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the name of the projected shortcut in ResNets for CIFAR, and batch norm's counters, which old files lack."""
    renamed = {name.replace(".shortcut.", ".downsample."): tensor for name, tensor in resnet.items()}
    norms = [name.removesuffix("running_mean") for name in renamed if name.endswith(".running_mean")]
    return {**{f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}, **renamed}
