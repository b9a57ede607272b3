"""The settings of a training run, in groups: every setting once, with its default, range and help text.

A setting's name is its flag and its key in ``config.json``. A component takes its group.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pipelines.datasets.registry import DATA_SETS, DataSetName, DataSetTraits
from pipelines.datasets.urls import RemoteFolder
from pipelines.errors import UserError
from pipelines.executors import SMALLEST_VIEW_PX
from stec.architectures import check_architecture, is_timm
from stec.compatibility import REMOVED_SETTINGS, RENAMED_SETTINGS, with_current_names
from stec.normalization import Normalization
from stec.settings import OnResume, Switch, check_ranges, checked_value, setting, settings_of, with_cache

LARGEST_VIEW_PX = 4096
BaseName = Literal["simclr", "byol", "relic"]
BASE_TITLES: dict[BaseName, str] = {"simclr": "SimCLR", "byol": "BYOL", "relic": "ReLIC"}
TargetName = Literal["window", "color", "blur", "solarize", "gray"]
"""What the inverse model can predict; the table is in ``stec.targets``, which needs NumPy."""
STANDARD_WIDTH = 64
"""Channels of the first stage of a ResNet of torchvision."""
MANY = 10**6
"""An upper limit that catches typing errors before they overflow."""

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""Accelerate's experiment trackers; each is also the name of a package."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Images, and what prepares them: for training, and for a trained encoder."""

    dataset: DataSetName
    """Data set whose images are encoded."""
    data_dir: Path | RemoteFolder | None = setting(None, on_resume="free")
    """Folder that holds the data set; or, of imagenet and folder, the URL of one with shards (s3://, ...)."""
    cache_dir: Path | None = setting(None, on_resume="free")
    """Local folder into which shards of a URL are fetched; default: ~/.cache/stec/shards. Processes share it."""
    cache_gb: float = setting(RemoteFolder.cache_gb, above=0, on_resume="free")
    """The most that --cache_dir holds, in units of 10^9 bytes; what was not read for the longest time is deleted."""
    download: Switch = setting(0, on_resume="free")
    """1: download CIFAR-10, CIFAR-100 or STL-10 into --data_dir first; checksums are verified."""
    exif_orientation: Switch = setting(0)
    """1: rotate image files by their EXIF orientation (photographs), in evaluation as in training; 0: use them as
    stored, as ImageFolder does."""
    backend: Literal["auto", "dali", "torchvision"] = setting("auto")
    """Library that prepares the images; auto is DALI if it is installed."""
    num_workers: int | None = setting(None, at_least=0, on_resume="free")
    """DALI threads or torchvision worker processes per process; default: its part of the CPUs."""

    @property
    def location(self) -> Path | RemoteFolder | None:
        """The folder or URL that holds the data set, with its cache."""
        return with_cache(self.data_dir, self.cache_dir, self.cache_gb)


@dataclass(frozen=True, kw_only=True)
class DataSettings(ImageSettings):
    """The images, and what prepares them."""

    dataset: DataSetName = setting("demo", on_resume="never")
    """Data set to train on; demo is generated and needs no files."""
    limit_train: int | None = setting(None, at_least=1, on_resume="never")
    """Use only the first N training images (ImageNet: evenly spread over the classes)."""
    shuffle_window: int = setting(16, at_least=0)
    """For images in tar shards or Parquet files: number of shards or row groups that are shuffled together, so that
    reads are long; 0: all images."""
    max_bad_fraction: float = setting(0.01, at_least=0, at_most=1, on_resume="free")
    """Stop if more than this fraction of the training images is unusable; fewer are replaced by other images."""


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """The two views of an image."""

    view_size: int | None = setting(None, at_least=SMALLEST_VIEW_PX, at_most=LARGEST_VIEW_PX)
    """Height and width of a view in px; default: that of the data set (32, STL-10 96, ImageNet and folders 224)."""
    resolution_schedule: str | None = setting(None)
    """Progressive resizing, FIRST:LAST in px, for example 160:224: views grow over the epochs to full size, LAST."""
    p_color_jitter: float = setting(0.8, at_most=1)
    """Probability of color jitter; 0 or less is never."""
    p_grayscale: float = setting(0.2, at_most=1)
    """Probability of gray; 0 or less is never."""
    use_gaussian_blur: Switch = setting(0)
    """1: blur half of the views."""
    use_solarization: Switch = setting(0)
    """1: solarize a fifth of the views."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The encoder and its heads."""

    arch: str = setting("resnet18", on_resume="never")
    """Architecture of the encoder: resnet18, resnet34, resnet50, resnet101, or timm/NAME for any image encoder of timm,
    for example timm/vit_small_patch16_224; see docs/encoders.md."""
    width: int = setting(STANDARD_WIDTH, at_least=1, on_resume="never")
    """Channels of a ResNet's first stage; 16 is a narrow encoder for CPUs."""
    hidden_mlp: int = setting(-1, on_resume="never")
    """Width of the projection's hidden layer; -1: the default of the architecture (512 for resnet18 and resnet34, 2048
    for resnet50 and resnet101, the dimension of the features for timm's)."""
    feat_dim: int = setting(128, at_least=1, on_resume="never")
    """Dimension of the projected features that the contrastive loss compares."""
    manip_hidden_mlp: int = setting(512, at_least=1, on_resume="never")
    """Width of the inverse model's hidden layer."""
    n_bins: int = setting(6, at_least=2, at_most=1000, on_resume="never")
    """Number of bins for each entry of the command."""
    predict: tuple[TargetName, ...] = setting(("window",), on_resume="never")
    """What the inverse model predicts: window is the command of the crop boxes, all five the full efference copy."""
    inverse_from: Literal["layer4", "layer3"] = setting("layer4", on_resume="never")
    """Stage of a ResNet whose pooled output the inverse model gets; layer4 is the features."""
    init: Literal["random", "pretrained"] = setting("random")
    """pretrained: start from timm's own weights of --arch timm/NAME, or from a file of them that --ckpt_path names."""
    ckpt_path: Path | None = setting(None)
    """Initial weights: the folder of a run, a checkpoint or safetensors file of this project, an official .ckpt, or
    another project's."""
    normalize: Normalization | None = setting(None, on_resume="never")
    """With --ckpt_path of another project, or --init pretrained: the mean and standard deviation by which its encoder
    normalizes images."""
    reinitialize_supervised_head: Switch = setting(0)
    """1: with --ckpt_path, reinitialize the online linear classifier."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """The losses and their weights."""

    objective: BaseName = setting("simclr", on_resume="never")
    """Base objective, to which the inverse model is added; byol and relic train against a moving average (EMA)."""
    temperature: float = setting(0.1, above=0)
    """Temperature of the contrastive loss (simclr, relic)."""
    target_momentum: float = setting(0.996, at_least=0, at_most=1)
    """Initial momentum of the target network (byol, relic); it grows to 1 by half a cosine."""
    relic_alpha: float = setting(1.0, at_least=0)
    """Weight of ReLIC's divergence."""
    discrimination_lambda: float = setting(2.0, at_least=0)
    """Weight of the base objective."""
    manip_lambda: float = setting(0.0, at_least=0)
    """Weight of the inverse model's loss; 0 is the base objective alone."""
    manip_weights: tuple[float, ...] | None = setting(None, at_least=0)
    """Weights of the targets of --predict in the inverse model's loss; default: window 1, the others 0.1."""
    predict_both_ways: Switch = setting(0)
    """1: the inverse model is also asked from view j to view i."""
    supervised_lambda: float = setting(1.0, at_least=0)
    """Weight of the online linear classifier's loss."""
    stop_gradient: Literal[0, 1, 2] = setting(1, on_resume="never")
    """1: the online linear classifier's gradient stops at the features; 2: only this classifier is trained; 0: its
    gradient also trains the encoder."""
    affine: Literal["official", "exact", "egocentric"] = setting("official")
    """Convention of the command from view i to view j."""


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """The optimizer, its schedule and the batch."""

    optimizer: Literal["lars", "sgd", "adam", "adamw"] = setting("lars", on_resume="never")
    """Optimizer; adamw decays neither biases nor batch norms."""
    learning_rate: float = setting(1e-3, at_least=0)
    """Peak learning rate for the batch size as given (no scaling rule is applied)."""
    weight_decay: float = setting(1e-6, at_least=0)
    """Weight decay."""
    nesterov: Switch = setting(0)
    """1: Nesterov momentum."""
    lr_scheduler: Literal["cosine", "none"] = setting("cosine")
    """cosine: linear warm-up, then half a cosine to 0; none: constant."""
    warmup_epochs: int = setting(10, at_least=0, at_most=MANY)
    """Epochs of linear warm-up from 0."""
    max_epochs: int = setting(1000, at_least=1, at_most=MANY)
    """Epochs to train."""
    batch_size: int = setting(1024, at_least=2)
    """Images per forward pass and process."""
    accumulate: int = setting(1, at_least=1, on_resume="never")
    """Micro-batches per step and process; the loss is that of all of them together (gradient caching)."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Devices, files and logs."""

    gpus: int | None = setting(None, at_least=1, on_resume="free")
    """Check that Accelerate started this number of processes per machine; Accelerate itself starts them."""
    num_nodes: int | None = setting(None, at_least=1, on_resume="free")
    """Check that Accelerate runs on this number of machines."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = setting("auto")
    """auto: bf16 if the device is fast at it (and ONEDNN_MAX_CPU_ISA allows it), fp16 on older GPUs, otherwise no."""
    compile: Switch = setting(0)
    """1: compile the encoder with torch.compile; takes a minute at the start, and a C++ compiler on CPUs."""
    deterministic: Switch = setting(0)
    """1: use only algorithms that give the same bits again on the same device; slower on GPUs."""
    seed: int = setting(2022, at_least=0, at_most=2**63 - 1)
    """Seed of the weights, the order of the images and the commands."""
    results_path: Path | None = setting(None, on_resume="free")
    """Folder of this run's files; default: the next free runs/DATASET-NUMBER."""
    resume: Literal["no", "auto"] = setting("no", on_resume="free")
    """auto: resume from the last undamaged checkpoint in --results_path, or start if there is none."""
    allow_changes: Switch = setting(0, on_resume="free")
    """1: resume with changed settings, such as --max_epochs; they are printed and written to starts.jsonl."""
    log_every: int = setting(10, at_least=1, on_resume="free")
    """Steps between two lines of metrics.jsonl; metrics leave the device only then."""
    eval_every: int = setting(0, at_least=0, on_resume="free")
    """Epochs between two evaluations on a subset of the images, kNN and RankMe (without labels RankMe alone); 0: never.
    The weights do not depend on it."""
    log_with: str | None = setting(None, on_resume="free")
    """Also send metrics to these trackers of Accelerate, for example tensorboard,trackio or wandb; see docs/runs.md."""
    profile: int = setting(0, at_least=0, on_resume="free")
    """After a few warm-up steps, profile this number of steps: a table, and a trace for https://ui.perfetto.dev."""
    checkpoint_every: int = setting(1, at_least=1, on_resume="free")
    """Epochs between two checkpoints; one is always written at the end and at an interruption."""
    checkpoint_every_steps: int = setting(500, at_least=1, on_resume="free")
    """Steps between two checkpoints within an epoch: the most that a crash loses."""
    keep_checkpoints: int = setting(2, at_least=1, on_resume="free")
    """Number of newest checkpoints that are kept."""
    keep_every: int | None = setting(None, at_least=1, on_resume="free")
    """Besides those, keep the checkpoint of every Nth epoch forever."""
    on_save_error: Literal["stop", "continue"] = setting("stop", on_resume="free")
    """If a checkpoint cannot be written: stop, or print a warning, continue and try again at the next one."""
    stop_exit_code: int = setting(0, at_least=0, at_most=255, on_resume="free")
    """Exit code after SIGTERM or SIGUSR1, which save and stop (as Ctrl-C does, with 130)."""
    process_timeout_s: int = setting(1800, at_least=1, on_resume="free")
    """Seconds that processes wait for one that hangs."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in ``log_with``, each once."""
        names = (name.strip() for name in (self.log_with or "").split(","))
        return tuple(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train S-TEC. Without --dataset, --recipe or --config this trains on the embedded demo set."""

    data: DataSettings = DataSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    model: ModelSettings = ModelSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimization: OptimizationSettings = OptimizationSettings()
    run: RunSettings = RunSettings()

    def updated(self, **values: Any) -> TrainConfig:
        """A copy with other values of some settings, by their names."""
        groups: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            groups.setdefault(group_of_settings()[name], {})[name] = value
        changed = {group: dataclasses.replace(getattr(self, group), **of_group) for group, of_group in groups.items()}
        return dataclasses.replace(self, **changed)

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of its range."""
        check_ranges(self)
        self._check_encoder()
        self._check_resolution_schedule()
        for name in self.run.trackers:
            if name not in TRACKERS:
                raise UserError(f"--log_with {name} is no tracker; known are {', '.join(TRACKERS)}.")
        self._check_inverse_model()
        if self.model.hidden_mlp < 1 and self.model.hidden_mlp != -1:
            raise UserError(f"--hidden_mlp {self.model.hidden_mlp} is no width; give 1 or more, or -1 for the default.")
        warmup_epochs, max_epochs = self.optimization.warmup_epochs, self.optimization.max_epochs
        if warmup_epochs > max_epochs:
            raise UserError(
                f"--warmup_epochs {warmup_epochs} is more than --max_epochs {max_epochs}; "
                f"give --warmup_epochs {max_epochs} or less."
            )

    def _check_encoder(self) -> None:
        arch, width = self.model.arch, self.model.width
        check_architecture(arch)
        if is_timm(arch):
            if width != STANDARD_WIDTH:
                raise UserError(f"--width {width} is for ResNets, but {arch} has a width of its own; omit --width.")
            if self.model.inverse_from != "layer4":
                raise UserError(
                    f"--inverse_from {self.model.inverse_from} is for ResNets, but {arch} gives its features alone; "
                    f"omit --inverse_from."
                )
        elif self.model.init == "pretrained" and self.model.ckpt_path is None:
            raise UserError(
                f"--init pretrained is for encoders of timm, and --arch {arch} is none; give --arch timm/{arch}, or "
                f"name a file of weights by --ckpt_path."
            )

    def _check_inverse_model(self) -> None:
        predict, weights, augmentation = self.model.predict, self.objective.manip_weights, self.augmentation
        flag = f"--predict {' '.join(predict)}"
        if not predict or len(set(predict)) < len(predict):
            known = ", ".join(typing.get_args(TargetName))
            raise UserError(f"{flag.rstrip()} is no set of targets; give some of {known}, each once.")
        if weights is not None and len(weights) != len(predict):
            raise UserError(f"--manip_weights has {len(weights)} weights for {flag}; give one for each target.")
        if self.objective.manip_lambda == 0:
            if predict != ("window",):
                raise UserError(f"{flag} needs an inverse model; add --manip_lambda 1, or another weight above 0.")
            return
        for name, never, remedy in (
            ("color", augmentation.p_color_jitter <= 0, "--p_color_jitter above 0"),
            ("gray", augmentation.p_grayscale <= 0, "--p_grayscale above 0"),
            ("blur", not augmentation.use_gaussian_blur, "--use_gaussian_blur 1"),
            ("solarize", not augmentation.use_solarization, "--use_solarization 1"),
        ):
            if name in predict and never:
                raise UserError(f"{flag} includes {name}, which never changes; add {remedy}, or leave it out.")

    def _check_resolution_schedule(self) -> None:
        schedule = self.augmentation.resolution_schedule
        if schedule is None:
            return
        flag, full = f"--resolution_schedule {schedule}", self.view_size_px
        if not re.fullmatch("[0-9]{1,4}:[0-9]{1,4}", schedule):
            example = max(full, 2 * SMALLEST_VIEW_PX)
            raise UserError(
                f"{flag} is no pair of sizes in px; give two whole numbers such as {example // 2}:{example}."
            )
        first, last = map(int, schedule.split(":"))
        if first < SMALLEST_VIEW_PX:
            raise UserError(f"{flag} begins too small; begin at {SMALLEST_VIEW_PX} px or more.")
        if first >= last:
            raise UserError(f"{flag} does not grow; give the smaller size first.")
        if last != full:
            raise UserError(
                f"{flag} does not end at the size of the views, {full} px; end it there, or change that size by "
                f"--view_size {last}."
            )

    @property
    def target_weights(self) -> dict[TargetName, float]:
        """The predicted targets, each with the weight of its loss within that of the inverse model."""
        predict, weights = self.model.predict, self.objective.manip_weights
        if weights is not None:
            return dict(zip(predict, weights, strict=True))
        from stec.targets import TARGETS

        return {name: TARGETS[name].weight for name in predict}

    @property
    def traits(self) -> DataSetTraits:
        """What the method fixes for the data set, at the size of the views."""
        return DATA_SETS[self.data.dataset].at(self.augmentation.view_size)

    @property
    def view_size_px(self) -> int:
        """Height and width of a full-size view in px: in training without a resolution schedule, and in evaluation if
        images are resized for it."""
        return self.traits.view_size_px

    def view_size_at(self, epoch: int) -> int:
        """Height and width of a view in px in an epoch of training.

        With a resolution schedule it grows linearly over the first three quarters of the epochs, rounded down to a
        multiple of 32 px, or of 8 px if full-size views have less than 128 px; after that, views have their full size.
        """
        last, schedule = self.view_size_px, self.augmentation.resolution_schedule
        growing_epochs = self.optimization.max_epochs * 3 // 4
        if schedule is None or epoch >= growing_epochs:
            return last
        first = int(schedule.split(":")[0])
        multiple = 32 if last >= 128 else 8
        size = first + (last - first) * epoch // growing_epochs
        return max(first, size // multiple * multiple)

    def identity(self) -> dict[str, Any]:
        """The settings that the trained weights depend on: all but the locations of files and the monitoring."""
        values = self.to_json()
        return {
            field.name: values[field.name] for field, _ in settings_of(self) if field.metadata["on_resume"] != "free"
        }

    def to_json(self) -> dict[str, Any]:
        """All settings by name, as JSON values; ``with_settings`` is the inverse."""
        return {field.name: _as_json(value) for field, value in settings_of(self)}


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path | RemoteFolder) else value


@cache
def group_of_settings() -> dict[str, str]:
    """The names of all settings, each with the name of its group."""
    return {
        field.name: group.name
        for group in dataclasses.fields(TrainConfig)
        for field in dataclasses.fields(getattr(TrainConfig, group.name))
    }


@cache
def rule_on_resume() -> dict[str, OnResume]:
    """The names of all settings, each with whether a resumed run may change it."""
    return {field.name: field.metadata["on_resume"] for field, _ in settings_of(TrainConfig())}


def with_settings(base: TrainConfig, settings: Mapping[str, Any], source: str) -> TrainConfig:
    """``base`` with other values of the ``settings`` that a file holds, each checked against its declared type.

    An encoder of timm that replaces a ResNet does not take over its width. ``source`` names the file in errors. Raises
    UserError for an unknown name (with the nearest known one) or a value of the wrong type.
    """
    groups = group_of_settings()
    values = {}
    for name, value in with_current_names(settings, RENAMED_SETTINGS).items():
        if (name, value) in REMOVED_SETTINGS.items():
            continue
        if name not in groups:
            near = difflib.get_close_matches(name, groups, n=1)
            hint = f"did you mean {near[0]}?" if near else "see launch.py --help for the known ones."
            raise UserError(f"{source} has the unknown key {name}; {hint}")
        declared = typing.get_type_hints(type(getattr(base, groups[name])))[name]
        values[name] = checked_value(value, declared, f"{source}: {name}")
    if is_timm(values.get("arch", "")):
        values.setdefault("width", STANDARD_WIDTH)
    return base.updated(**values)
