"""Encoders of timm: any of its networks whose pooled output is one vector per image."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from pipelines.errors import UserError
from pipelines.executors import SMALLEST_VIEW_PX
from stec.architectures import TIMM
from stec.models.encoder import NARROW, ImageEncoder
from stec.normalization import NORMALIZATIONS, Normalization

DROP_RATES = ("drop_prob", "drop_rate")
"""The attributes in which modules of timm keep the probability that they drop something in training."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a network before its weights are made."""

    options: Mapping[str, Any]
    """Arguments for ``timm.create_model`` besides the name."""
    feature_dim: int
    unused: frozenset[str]
    """Names of parameters that the features do not depend on, such as a token for masked patches."""

    @property
    def fixed_size_px(self) -> int | None:
        """Height and width of the only images that it encodes; None: it encodes images of other sizes as well."""
        return self.options.get("img_size")


class TimmEncoder(ImageEncoder):
    """The network ``arch``, ``timm/NAME``, of timm, without its classifier: features are timm's own pooled output.

    A network whose parameters depend on the size of the images (of a vision transformer, the position embedding) is
    made for ``view_size_px``; images of another size, as evaluation may have them, are resized to it. Dropout and
    stochastic depth are switched off: gradient caching computes features twice, and a resumed run repeats what an
    uninterrupted one does.

    Raises UserError if timm is missing, has no such network, or the network does not encode such images.
    """

    def __init__(self, arch: str, view_size_px: int, normalize: Normalization = "none") -> None:
        super().__init__(normalize)
        facts = facts_of(arch, view_size_px)
        self.fixed_size_px, self.feature_dim = facts.fixed_size_px, facts.feature_dim
        # Not on the meta device, if that is the default: some networks have constants that are in no file of weights.
        with torch.device("cpu"):
            self.network = _create(arch, facts.options)
        _switch_randomness_off(self.network)
        for name, parameter in self.network.named_parameters():
            if name in facts.unused:  # DistributedDataParallel would wait for their gradients
                parameter.requires_grad_(False)
        self.memory_format = torch.contiguous_format if is_narrow(self.network) else torch.channels_last
        self.to(memory_format=self.memory_format)

    def forward(self, images: Tensor) -> Tensor:
        size = self.fixed_size_px
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        features: Tensor = self.network(self.prepared(images))
        return features


@cache
def facts_of(arch: str, view_size_px: int) -> Facts:
    """The facts of the network ``arch`` for views of a size, found without memory for its weights.

    Raises UserError as ``TimmEncoder`` does.
    """
    _check_name(arch)
    try:
        # Whatever the caller has switched off.
        with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
            options, network = _made_for(arch, view_size_px)
            _check_patches(arch, network, options)
            features = network(torch.zeros(2, 3, view_size_px, view_size_px))
            if not isinstance(features, Tensor) or features.ndim != 2:
                shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise UserError(f"--arch {arch} gives {shape} instead of one vector for each image; choose another.")
            features.sum().backward()
    except UserError:
        raise
    except Exception as error:  # networks of timm raise whatever their operators do
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"--arch {arch} cannot encode views of {view_size_px} px ({reason}); give another --view_size, or another "
            f"network."
        ) from error
    unused = frozenset(name for name, parameter in network.named_parameters() if parameter.grad is None)
    return Facts(options=options, feature_dim=features.shape[1], unused=unused)


def check_evaluation(arch: str, view_size_px: int, size_px: int) -> None:
    """Raise UserError if the network that is made for views of a size cannot encode images of ``size_px``."""
    if facts_of(arch, view_size_px).fixed_size_px is None:  # Others resize them.
        facts_of(arch, size_px)


def _made_for(arch: str, view_size_px: int) -> tuple[dict[str, Any], nn.Module]:
    """The options for views of a size, and the network; without options if it takes images of any size."""
    try:
        made_for_views = _create(arch, {"img_size": view_size_px})
    except TypeError:
        return {}, _create(arch, {})
    # Some convolutional networks have the argument for what others of their family may contain.
    with suppress(Exception):
        larger, network = _create(arch, {"img_size": 2 * view_size_px}), _create(arch, {})
        shapes = [{name: of.shape for name, of in one.state_dict().items()} for one in (made_for_views, larger)]
        if shapes[0] == shapes[1]:
            for size_px in (view_size_px, 2 * view_size_px):
                network(torch.zeros(2, 3, size_px, size_px))
            return {}, network
    return {"img_size": view_size_px}, made_for_views


def normalization_of_weights(arch: str) -> Normalization | None:
    """How the images were normalized that timm's own weights of ``arch`` were trained on; None if it has no name."""
    cfg = _timm().get_pretrained_cfg(arch.removeprefix(TIMM))
    values = tuple(cfg.mean), tuple(cfg.std)
    known = {channels: name for name, channels in NORMALIZATIONS.items() if channels is not None}
    return known.get(values, "none" if values == ((0.0,) * 3, (1.0,) * 3) else None)


def pretrained_weights(arch: str, view_size_px: int) -> dict[str, Tensor]:
    """timm's own weights of the network for views of a size, from its cache or the network.

    Raises UserError if there are none, or they cannot be fetched.
    """
    facts = facts_of(arch, view_size_px)
    try:
        return _create(arch, facts.options, pretrained=True).state_dict()
    except Exception as error:  # downloads raise exceptions without a common base
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"--init pretrained could not get timm's weights of {arch} ({reason}); connect to the network, or name a "
            f"file of them by --ckpt_path."
        ) from error


@dataclass(frozen=True, kw_only=True)
class ParameterNames:
    """Names of the parameters of a network, as timm has them."""

    needed: frozenset[str]
    """Those of the network without a classifier, except batch norm's counters, which old files lack."""
    known: frozenset[str]
    """These, and those of the network with its classifier."""
    classifiers: tuple[str, ...]
    """The modules that classify."""


@cache
def parameter_names(arch: str, view_size_px: int) -> ParameterNames:
    """Raises UserError as ``TimmEncoder`` does."""
    facts = facts_of(arch, view_size_px)
    with torch.device("meta"):
        ours = _create(arch, facts.options).state_dict().keys()
        classifying = _timm().create_model(arch.removeprefix(TIMM))
    classifiers = classifying.default_cfg.get("classifier", ())
    return ParameterNames(
        needed=frozenset(name for name in ours if not name.endswith("num_batches_tracked")),
        known=frozenset(ours | classifying.state_dict().keys()),
        classifiers=(classifiers,) if isinstance(classifiers, str) else tuple(classifiers),
    )


def adapted_weights(arch: str, view_size_px: int, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights of the network in timm's names, with or without a classifier, for views of a size.

    timm adapts what depends on the size. The classifier, and what belongs to it, is left out. ``path`` names the file
    in errors. Raises UserError if ``state`` lacks something or holds something else.
    """
    facts, names = facts_of(arch, view_size_px), parameter_names(arch, view_size_px)
    missing, unknown = sorted(names.needed - state.keys()), sorted(state.keys() - names.known)
    if missing or unknown:
        differences = [f"{name} is missing" for name in missing[:2]] + [f"{name} is unknown" for name in unknown[:2]]
        more = len(missing) + len(unknown) - len(differences)
        shown = "; ".join(differences) + (f"; and {more} more" if more else "")
        raise UserError(f"{path} holds no weights of {arch} ({shown}); check --arch, or give another file.")
    try:
        # As timm does with a download.
        overlay = {"state_dict": dict(state)}
        return _create(arch, facts.options, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    except (RuntimeError, ValueError, KeyError) as error:
        lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
        reason = next((line for line in lines[1:] if line), lines[0])
        raise UserError(f"{path} does not fit {arch} ({reason}); check --arch and --view_size.") from error


def _timm() -> Any:
    try:
        import timm
        import timm.models
    except ImportError as error:
        raise UserError(f"Encoders of timm need the package timm ({error}); run pip install -e '.[timm]'.") from error
    return timm.models


def _create(arch: str, options: Mapping[str, Any], **more: Any) -> nn.Module:
    network: nn.Module = _timm().create_model(arch.removeprefix(TIMM), num_classes=0, **options, **more)
    return network


def _check_name(arch: str) -> None:
    """Raise UserError, with the nearest name, if timm has no such network."""
    models, name = _timm(), arch.removeprefix(TIMM)
    if ":" not in name and "/" not in name and models.is_model(name):
        tags = models.list_pretrained(f"{name.partition('.')[0]}.*") if "." in name else [name]
        if name in tags:
            return
        raise UserError(f"--arch {arch} names weights that timm does not have; known are {', '.join(tags)}.")
    near = difflib.get_close_matches(name, models.list_models(), n=1)
    hint = f"did you mean {TIMM}{near[0]}?" if near else "python -c 'import timm; print(timm.list_models())' lists all."
    raise UserError(f"--arch {arch} is no network of timm; {hint}")


def _check_patches(arch: str, network: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise UserError if a network of fixed size cuts its images into patches that do not fill them."""
    size, patch_sizes = options.get("img_size"), getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if size is None or not isinstance(patch_sizes, tuple):
        return
    for patch in patch_sizes:
        if size % patch:
            fitting = [f"--view_size {n}" for n in (size // patch * patch, (size // patch + 1) * patch)]
            fitting = fitting[size // patch * patch < SMALLEST_VIEW_PX :]
            raise UserError(
                f"--arch {arch} cuts images into patches of {patch} px, which do not divide views of {size} px; give "
                f"{' or '.join(fitting)}."
            )


def _switch_randomness_off(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in DROP_RATES:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def is_narrow(network: nn.Module) -> bool:
    """Whether it has a convolution on which oneDNN crashes in channels-last memory; see ``NARROW``."""
    return any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and min(module.in_channels, module.out_channels) < NARROW
        for module in network.modules()
    )
