"""Trained models from the folder of a run or a file, and encoders from the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pipelines.datasets.registry import DATA_SETS
from pipelines.errors import UserError
from pipelines.files import read_object
from stec.architectures import ARCHITECTURES, is_timm
from stec.config import ModelSettings, TargetName
from stec.geometry import Convention
from stec.models.encoder import STEMS, ImageEncoder, Stem
from stec.models.heads import InverseModel, make_classifier
from stec.models.model import Model
from stec.models.preprocessing import Preprocessing
from stec.normalization import NORMALIZATIONS, Normalization
from stec.runs import checkpoint
from stec.runs.run_folder import RunFolder
from stec.targets import TARGETS
from stec.weights.export import FOREIGN_PREFIX, TIMM_NETWORK, load_weights, read_weights_and_metadata, timm_encoder_of

WEIGHTS = "model.safetensors"
"""The file of weights in the folder of a run or of the Hub."""
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
"""Suffixes of files of weights; such names are not searched on the Hub."""
OTHER_VERSION = "use the version that wrote it."
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Weights with what is known about their encoder and training."""

    path: Path
    """The file they were read from."""
    arch: str
    stem: Stem | None
    """None of an encoder of timm, as the width."""
    width: int | None
    state: dict[str, Tensor]
    """Encoder and heads with this project's names, as far as the source holds them."""
    normalize: Normalization
    """How the encoder normalizes images."""
    metadata: dict[str, Any]
    """JSON values: ``config``, ``step``, ``environment`` and ``results``, as far as the source holds them."""
    stem_set_by: str
    """The argument or flag that sets the stem, for errors."""
    view_size_px: int | None = None
    """Of an encoder of timm, the size of the views that it was made for."""

    @property
    def description(self) -> str:
        """The architecture with what else determines it."""
        if is_timm(self.arch):
            return f"{self.arch} for views of {self.view_size_px} px"
        return f"{self.arch} of width {self.width} with the {self.stem} stem"

    @cached_property
    def encoder(self) -> ImageEncoder:
        """In evaluation mode, on the CPU, with its ``transform``."""
        encoder = self.model().encoder
        encoder.preprocessing = self.preprocessing
        return encoder

    def model(self, *heads: Literal["classifier", "inverse_models"]) -> Model:
        """The encoder and those of ``heads`` whose weights exist, in evaluation mode, on the CPU.

        Raises UserError if the weights do not fit.
        """
        classifier = self.state.get("classifier.weight")
        required = ["encoder"]
        # Not on a device: the initial weights are replaced, so initializing them would waste time. But networks of timm
        # have constants that are in no file.
        device = "cpu" if is_timm(self.arch) else "meta"
        with torch.random.fork_rng(devices=[]), torch.device(device):
            settings = ModelSettings(arch=self.arch, normalize=self.normalize)
            if self.width is not None:
                settings = dataclasses.replace(settings, width=self.width)
            model = Model(settings, stem=self.stem, view_size_px=self.view_size_px, classes=0, stop_gradient=2)
            feature_dim = model.encoder.feature_dim
            if "classifier" in heads and classifier is not None:
                model.classifier = make_classifier(feature_dim, len(classifier))
                required.append("classifier")
            if "inverse_models" in heads:
                for name in self.targets:
                    hidden, output = (
                        self.state[f"inverse_models.{name}.{layer}.weight"] for layer in ("hidden", "output")
                    )
                    shape = TARGETS[name].shape
                    n_bins = len(output) // (shape[0] * shape[1])
                    model.inverse_models[name] = InverseModel(hidden.shape[-1] // 2, len(hidden), n_bins, shape)
                    model.inverse_from_layer3 = hidden.shape[-1] == 2 * model.encoder.layer3_dim
                if self.targets:
                    required.append("inverse_models")
        if device == "meta":
            model.to_empty(device="cpu")
        remedy = f"it was read as a {self.description}"
        if self.stem is not None:
            remedy += f", which {self.stem_set_by} can change"
        load_weights(model, self.state, self.path, required=tuple(required), remedy=remedy)
        return model.eval()

    def with_target_encoder(self) -> Trained:
        """The same with the target network's encoder alone. Raises UserError if there is none."""
        prefix = "target_network.encoder."
        state = {f"encoder.{k.removeprefix(prefix)}": v for k, v in self.state.items() if k.startswith(prefix)}
        if not state:
            raise UserError(
                f"{self.path} holds no target network; only model.safetensors and checkpoints of BYOL and ReLIC do."
            )
        # Its accuracies were not measured.
        metadata = {name: value for name, value in self.metadata.items() if name != "results"}
        return dataclasses.replace(self, state=state, metadata={**metadata, "weights": "target"})

    @property
    def targets(self) -> list[TargetName]:
        """What its inverse model predicts. Raises UserError for a target that this version does not know."""
        found = {name.split(".")[1] for name in self.state if name.startswith("inverse_models.")}
        unknown = sorted(found - TARGETS.keys())
        if unknown:
            raise UserError(f"{self.path} predicts {unknown[0]}, which this version does not know; {OTHER_VERSION}")
        return [name for name in TARGETS if name in found]

    @property
    def preprocessing(self) -> Preprocessing:
        """That in the metadata, or that of the training's evaluation. Raises UserError if this version lacks it."""
        if "preprocessing" in self.metadata:
            try:
                return Preprocessing.from_json(self.metadata["preprocessing"])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.path} describes its images in another way than this version; {OTHER_VERSION}"
                ) from error
        settings = self.metadata.get("config") or {"view_size": self.view_size_px}
        return Preprocessing.of_training(settings, self.stem or "imagenet")

    @property
    def trained_on(self) -> str | None:
        """The data set, or None if unknown."""
        return self.metadata.get("config", {}).get("dataset")

    @property
    def convention(self) -> Convention | None:
        """The convention of the commands, or None if unknown. Raises UserError if this version does not have it."""
        name = self.metadata.get("config", {}).get("affine")
        if name is not None and name not in get_args(Convention):
            raise UserError(f"{self.path} has the convention {name}, which this version does not know; {OTHER_VERSION}")
        known: Convention | None = name
        return known


def load_encoder(
    path_or_hub_id: str | Path,
    *,
    stem: Stem | None = None,
    normalize: Normalization | None = None,
    arch: str | None = None,
    view_size_px: int | None = None,
) -> ImageEncoder:
    """A trained encoder in evaluation mode, on the CPU: images [N, 3, H, W] in [0, 1] to features [N, D].

    Its ``transform`` makes such an image from one of Pillow or a uint8 tensor, as the evaluation loader does.
    ``path_or_hub_id``: a run's or an exported folder, a safetensors file or checkpoint of ours, an official ``.ckpt``,
    a ResNet's checkpoint of another project, or ``owner/name`` on the Hugging Face Hub, which needs the extra
    ``export``. ``stem`` is needed for official checkpoints with a 7x7 convolution, which do not record whether a
    max-pool follows. ``normalize`` is needed for those of other projects: how they normalize images, which becomes the
    first operation of the encoder. For one of timm that is no ResNet of torchvision, ``arch`` is ``timm/NAME``, and the
    encoder is made for images of ``view_size_px`` (default 224). No code in a file is executed. Raises UserError if
    there is no encoder, or another one than ``arch``.
    """
    source = Path(path_or_hub_id)
    if HUB_ID.fullmatch(str(path_or_hub_id)) and source.suffix not in SUFFIXES and not source.exists():
        from stec.weights.hub import download

        source = download(str(path_or_hub_id), WEIGHTS)
    trained = read_trained(
        source, stem=stem, normalize=normalize, stem_set_by="stem", arch=arch, view_size_px=view_size_px
    )
    return trained.encoder


def read_trained(
    source: Path,
    *,
    stem: Stem | None = None,
    otherwise: Stem | None = None,
    normalize: Normalization | None = None,
    stem_set_by: str = "--dataset",
    arch: str | None = None,
    view_size_px: int | None = None,
) -> Trained:
    """The weights in a folder or file as for ``load_encoder``, heads included, and what is known of them.

    ``otherwise`` is the stem where neither the source nor its weights tell it. A file of another project is one of
    ``arch``, if that is an encoder of timm, and adapted to the size of the views (default: 224 px). Raises UserError
    where there are none, which says that ``stem_set_by`` can change the stem, or if they are not of ``arch``.
    """
    path, state, metadata = read_source(source, arch=arch, view_size_px=view_size_px)
    if any(name.startswith(TIMM_NETWORK) for name in state):
        encoder = timm_encoder_of(metadata)
        if encoder is None:
            raise UserError(
                f"{path} holds an encoder of timm, but not its name and the size of its views; give the file that "
                f"training, import or export wrote."
            )
        facts: dict[str, Any] = {"arch": encoder[0], "stem": None, "width": None, "view_size_px": encoder[1]}
    else:
        first = state["encoder.conv1.weight"]
        if first.ndim != 4:
            raise UserError(
                f"{path} holds no encoder of ours: its conv1.weight has {first.ndim} dimensions instead of 4."
            )
        facts = {
            "arch": _architecture_of(state, path),
            "stem": stem or _stem_of(first, metadata, path, otherwise, stem_set_by),
            "width": len(first),
        }
    trained = Trained(
        path=path,
        state=state,
        normalize=normalization_of(metadata, path, normalize),
        metadata=metadata,
        stem_set_by=stem_set_by,
        **facts,
    )
    if arch not in (None, trained.arch):
        raise UserError(f"{path} does not match --arch {arch}: it is a {trained.description}; omit --arch.")
    return trained


def read_source(
    source: Path, *, arch: str | None = None, view_size_px: int | None = None
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The file that a file or folder of weights is, the weights, and the metadata; see ``read_weights_and_metadata``.

    Raises UserError if there are none.
    """
    if not os.path.exists(source):  # noqa: PTH110 - which does not raise where a name is too long
        raise UserError(f"There is no file or folder {source}; give a run's folder, or a file of trained weights.")
    if source.is_dir():
        return _read_folder(source)
    return source, *read_weights_and_metadata(source, arch=arch, view_size_px=view_size_px)


def _architecture_of(state: Mapping[str, Tensor], path: Path) -> str:
    """The architecture with the blocks and depths of an encoder. Raises UserError if there is none."""
    block = "bottleneck" if "encoder.layer1.0.conv3.weight" in state else "basic"
    blocks = {tuple(name.split(".")[1:3]) for name in state if name.startswith("encoder.layer")}
    depths = tuple(sum(stage == f"layer{k}" for stage, _ in blocks) for k in range(1, 5))
    for name, architecture in ARCHITECTURES.items():
        if (architecture.block, architecture.depths) == (block, depths):
            return name
    raise UserError(
        f"{path} holds an encoder of {block} blocks and depths {depths}, which is none of {', '.join(ARCHITECTURES)}."
    )


def _read_folder(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The file of weights in a folder, the weights, and what it and the run's results say.

    Raises UserError where there is none, or training is to change it yet.
    """
    run, checkpoints = RunFolder(folder), list(checkpoint.checkpoints(folder).values())
    trained_here = run.starts.exists() or bool(checkpoints)
    missing = [file for file in (run.model, run.results) if not file.exists()]
    remedy = "let training go on to its end" + (
        f", or take its newest checkpoint, {checkpoints[-1]}" if checkpoints else ""
    )
    if trained_here and missing:
        raise UserError(f"The run in {folder} is not finished: it has no {missing[0].name} yet; {remedy}.")
    if run.model in missing:
        raise UserError(f"{folder} is no run's folder and holds no {WEIGHTS}; name one that training wrote.")
    state, metadata = read_weights_and_metadata(run.model)
    restore = "bring it back from a copy, or delete it"
    now = read_object(run.config, restore) if trained_here and run.config.exists() else {}
    for name, value in metadata.get("config", {}).items():
        if name in now and now[name] != value:
            raise UserError(
                f"The run in {folder} is being trained on with another {name}, so its {WEIGHTS} is not the last "
                f"word; {remedy}."
            )
    return run.model, state, metadata if missing else {**metadata, "results": read_object(run.results, restore)}


def _stem_of(conv1: Tensor, metadata: Mapping[str, Any], path: Path, otherwise: Stem | None, stem_set_by: str) -> Stem:
    """The stem in the metadata, or that of the first convolution's size, or ``otherwise``.

    Raises UserError if all are unknown.
    """
    name = metadata.get("encoder", {}).get("stem")
    data_set = metadata.get("config", {}).get("dataset")
    if name is None and data_set is not None:
        if data_set not in DATA_SETS:
            raise UserError(
                f"{path} was trained on {data_set}, a data set that this version does not know; {OTHER_VERSION}"
            )
        name = DATA_SETS[data_set].stem
    if name is None and conv1.shape[-1] == 3:
        return "cifar"
    if name is None and FOREIGN_PREFIX in metadata:
        return "imagenet"  # of torchvision's ResNet, which the other projects train
    name = name or otherwise
    if name is None:
        raise UserError(
            f"{path} does not say whether a max-pool follows its first convolution; add {stem_set_by} imagenet (it "
            f"does) or {stem_set_by} stl10 (it does not)."
        )
    if name not in STEMS:
        raise UserError(f"{path} has the stem {name}, which this version does not know; {OTHER_VERSION}")
    known: Stem = name
    return known


def normalization_of(metadata: Mapping[str, Any], path: Path, given: Normalization | None) -> Normalization:
    """That in the metadata, or ``given``, or none for encoders of this project.

    Raises UserError if both are known and differ, or if none is, as of other projects.
    """
    prefix = metadata.get(FOREIGN_PREFIX)
    name = metadata.get("encoder", {}).get("normalize") or metadata.get("config", {}).get("normalize")
    if name is None and prefix is None and "config" in metadata:
        name = "none"
    if None not in (name, given) and name != given:
        raise UserError(f"{path} holds an encoder that normalizes images by {name}; give --normalize {name}.")
    name = name or given
    if name is None and prefix is not None:
        found = f" (the encoder's names begin with {prefix})" if prefix else ""
        raise UserError(
            f"{path} is a checkpoint of another project{found}, which does not say how its images were normalized; set "
            f"normalize (--normalize) to imagenet, as torchvision, timm, lightly and MoCo do, to inception or clip, "
            f"as other weights of timm do, to none, as this project does, or to "
            f"{', '.join(list(NORMALIZATIONS)[4:])}, as solo-learn does for these data sets."
        )
    if name is not None and name not in tuple(NORMALIZATIONS):
        raise UserError(f"{path} has the normalization {name}, which this version does not know; {OTHER_VERSION}")
    known: Normalization = name or "none"
    return known
