"""The configuration of a training run: every setting once, with its default, its help text and its limits.

Nothing heavy is imported here, so that ``launch.py --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.datasets.registry import DATA_SETS, DataSetName, DataSetTraits
from pipelines.errors import UserError
from stec.compatibility import RENAMED_SETTINGS, with_current_names

Switch = Literal[0, 1]

SMALLEST_VIEW_PX, LARGEST_VIEW_PX = 16, 4096

RUN_LOCAL = frozenset(
    {
        "data_dir",
        "download",
        "num_workers",
        "gpus",
        "num_nodes",
        "results_path",
        "resume",
        "allow_changes",
        "log_every",
        "log_with",
        "profile",
        "checkpoint_every",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "keep_every",
        "on_save_error",
        "stop_exit_code",
        "process_timeout_s",
        "max_bad_fraction",
    }
)
"""Settings that may differ between a run and its continuation: they do not change the weights."""

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""Accelerate's experiment trackers; each is also the name of a package."""

FIXED = frozenset(
    {
        "dataset",
        "limit_train",
        "arch",
        "width",
        "hidden_mlp",
        "feat_dim",
        "manip_hidden_mlp",
        "n_bins",
        "stop_gradient",
        "optimizer",
        "accumulate",
    }
)
"""Settings that no continuation may change: what is in a checkpoint would not fit them, or not mean the same."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train S-TEC. Without --dataset, --recipe or --config this trains on the embedded demo set."""

    # Data
    dataset: DataSetName = "demo"
    """Data set to train on; demo is generated and needs no files."""
    data_dir: Path | None = None
    """Folder that holds the data set."""
    download: Switch = 0
    """1: fetch CIFAR-10, CIFAR-100 or STL-10 into --data_dir first; checksums are verified."""
    limit_train: int | None = None
    """Use only the first so many training images (ImageNet: evenly spread over the classes)."""
    shuffle_window: int = 16
    """For images in tar shards: so many shards are shuffled together, so that reads are long; 0 shuffles all images."""
    max_bad_fraction: float = 0.01
    """A run stops when more than this share of the training images cannot be used; others stand in for fewer."""
    exif_orientation: Switch = 0
    """1: turn image files upright as EXIF says (a camera's photographs); 0: use them as stored, as ImageFolder does."""
    backend: Literal["auto", "dali", "torchvision"] = "auto"
    """What executes the commands; auto is DALI where it is installed."""
    num_workers: int | None = None
    """DALI threads or torchvision worker processes, per training process; default: this process's share of the CPUs."""

    # Views
    view_size: int | None = None
    """Height and width of a view in px; default: the data set's own (32, STL-10 96, ImageNet and folders 224)."""
    resolution_schedule: str | None = None
    """FIRST:LAST in px, say 160:224: views begin small and grow over the epochs to their full size, which is LAST."""
    p_color_jitter: float = 0.8
    """Probability of color jitter; 0 or less is never."""
    p_grayscale: float = 0.2
    """Probability of gray; 0 or less is never."""
    use_gaussian_blur: Switch = 0
    """1: blur half of the views."""
    use_solarization: Switch = 0
    """1: solarize a fifth of the views."""

    # Model
    arch: Literal["resnet18", "resnet50"] = "resnet18"
    """Architecture of the encoder."""
    width: int = 64
    """Channels of the encoder's first stage; 16 makes a narrow encoder for CPUs."""
    hidden_mlp: int = -1
    """Width of the projection's hidden layer; -1: 512 for resnet18, 2048 for resnet50."""
    feat_dim: int = 128
    """Dimension of the projected features that the contrastive loss compares."""
    manip_hidden_mlp: int = 512
    """Width of the inverse model's hidden layer."""
    n_bins: int = 6
    """Bins that each entry of the command is sorted into."""
    affine: Literal["official", "exact", "egocentric"] = "official"
    """Convention of the command from view i to view j."""

    ckpt_path: Path | None = None
    """Start from these weights: a checkpoint or safetensors file of ours, or an official .ckpt."""
    reinitialize_supervised_head: Switch = 0
    """1: with --ckpt_path, start the online linear classifier afresh."""

    # Objective
    temperature: float = 0.1
    """Temperature of the contrastive loss."""
    discrimination_lambda: float = 2.0
    """Weight of the contrastive loss."""
    manip_lambda: float = 0.0
    """Weight of the inverse model's loss; 0 is SimCLR."""
    supervised_lambda: float = 1.0
    """Weight of the online linear classifier's loss."""
    stop_gradient: Literal[0, 1, 2] = 1
    """1: the online classifier's gradient stops at the features; 2: only the online classifier is trained; 0: it
    trains the encoder, too."""

    # Optimization
    optimizer: Literal["lars", "sgd", "adam"] = "lars"
    """Optimizer."""
    learning_rate: float = 1e-3
    """Peak learning rate, for the batch size as it is (no scaling rule is applied)."""
    weight_decay: float = 1e-6
    """Weight decay."""
    nesterov: Switch = 0
    """1: Nesterov momentum."""
    lr_scheduler: Literal["cosine", "none"] = "cosine"
    """cosine: linear warm-up, then half a cosine to 0; none: constant."""
    warmup_epochs: int = 10
    """Epochs of linear warm-up from 0."""
    max_epochs: int = 1000
    """Epochs to train."""
    batch_size: int = 1024
    """Images that one forward pass holds, per process."""
    accumulate: int = 1
    """Such passes per step and process; the loss is that of all of them together (gradient caching)."""

    # Run
    gpus: int | None = None
    """Check that Accelerate started so many processes per machine; it starts them itself."""
    num_nodes: int | None = None
    """Check that Accelerate runs on so many machines."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto: bf16 where the device is fast at it (and ONEDNN_MAX_CPU_ISA allows it), fp16 on older GPUs, else no."""
    compile: Switch = 0
    """1: have PyTorch compile the encoder; takes a minute at the start, and a C++ compiler on CPUs."""
    deterministic: Switch = 0
    """1: use those algorithms only that give the same bits again on the same device; slower on GPUs."""
    seed: int = 2022
    """Seed of the weights, the order of the images and the commands."""
    results_path: Path | None = None
    """Folder of this run's files; default: the next free runs/DATASET-NUMBER."""
    resume: Literal["no", "auto"] = "no"
    """auto: go on from the last undamaged checkpoint in --results_path, or start where there is none."""
    allow_changes: Switch = 0
    """1: go on with changed settings, such as --max_epochs; they are printed and noted in starts.jsonl."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl; metrics leave the device only then."""
    log_with: str | None = None
    """Also send metrics to these trackers of Accelerate's, say tensorboard,trackio or wandb; see docs/watch.md."""
    profile: int = 0
    """After some steps of warming up, profile so many: a table, and a trace for https://ui.perfetto.dev."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints; one is always written at the end and at an interruption."""
    checkpoint_every_steps: int = 500
    """Steps between two checkpoints within an epoch: what a crash costs at most."""
    keep_checkpoints: int = 2
    """The newest checkpoints that stay on disk."""
    keep_every: int | None = None
    """Besides those, keep the checkpoint of every so many epochs for good."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written: stop, or say so, train on and try again at the next one."""
    stop_exit_code: int = 0
    """Exit code after SIGTERM or SIGUSR1, which save and stop (Ctrl-C does, too: 130)."""
    process_timeout_s: int = 1800
    """Seconds that processes wait for one that hangs before they give up."""

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of its range."""
        # Upper limits keep typing errors from ending in overflows.
        at_least_1 = ("limit_train", "width", "feat_dim", "manip_hidden_mlp", "log_every", "checkpoint_every", "gpus",
                      "num_nodes", "accumulate", "checkpoint_every_steps", "keep_checkpoints", "keep_every",
                      "process_timeout_s")  # fmt: skip
        at_least_0 = ("num_workers", "profile", "shuffle_window", "manip_lambda", "discrimination_lambda",
                      "supervised_lambda", "weight_decay", "learning_rate")  # fmt: skip
        limits: dict[str, tuple[int, int | None]] = {
            **dict.fromkeys(at_least_1, (1, None)),
            **dict.fromkeys(at_least_0, (0, None)),
            "batch_size": (2, None),
            "n_bins": (2, 1000),
            "view_size": (SMALLEST_VIEW_PX, LARGEST_VIEW_PX),
            "warmup_epochs": (0, 10**6),
            "max_epochs": (1, 10**6),
            "seed": (0, 2**63 - 1),
            "stop_exit_code": (0, 255),
        }
        check_ranges(self, limits)
        self._check_resolution_schedule()
        for name in self.trackers:
            if name not in TRACKERS:
                raise UserError(f"--log_with {name} is no tracker; known are {', '.join(TRACKERS)}.")
        for name in ("p_color_jitter", "p_grayscale"):
            if not getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)} is no probability; give 1 or less.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max_bad_fraction {self.max_bad_fraction} is no share; give a number from 0 to 1.")
        if not self.temperature > 0:
            raise UserError(f"--temperature {self.temperature} makes no sense; give a number above 0.")
        if self.hidden_mlp < 1 and self.hidden_mlp != -1:
            raise UserError(f"--hidden_mlp {self.hidden_mlp} makes no sense; give a width, or -1 for the default.")
        if self.warmup_epochs > self.max_epochs:
            raise UserError(
                f"--warmup_epochs {self.warmup_epochs} is more than --max_epochs {self.max_epochs}; "
                f"give --warmup_epochs {self.max_epochs} or less."
            )

    @property
    def traits(self) -> DataSetTraits:
        return DATA_SETS[self.dataset].at(self.view_size)

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in ``log_with``, each once."""
        names = (name.strip() for name in (self.log_with or "").split(","))
        return tuple(dict.fromkeys(name for name in names if name))

    def _check_resolution_schedule(self) -> None:
        if self.resolution_schedule is None:
            return
        said, full = f"--resolution_schedule {self.resolution_schedule}", self.view_size_px
        if not re.fullmatch("[0-9]{1,4}:[0-9]{1,4}", self.resolution_schedule):
            example = max(full, 2 * SMALLEST_VIEW_PX)
            raise UserError(
                f"{said} is no pair of sizes in px; give two whole numbers such as {example // 2}:{example}."
            )
        first, last = map(int, self.resolution_schedule.split(":"))
        if first < SMALLEST_VIEW_PX:
            raise UserError(f"{said} begins too small; begin at {SMALLEST_VIEW_PX} px or more.")
        if first >= last:
            raise UserError(f"{said} does not grow; give the smaller size first.")
        if last != full:
            raise UserError(
                f"{said} does not end at the size of the views, {full} px; let it end there, or change that size by "
                f"--view_size {last}."
            )

    @property
    def view_size_px(self) -> int:
        """Height and width of a full-size view in px: in training but for a resolution schedule, and in evaluation if
        images are resized for that."""
        return self.traits.view_size_px

    def view_size_at(self, epoch: int) -> int:
        """Height and width of a view in px in an epoch of training.

        With a resolution schedule it grows linearly over the first three quarters of the epochs, rounded down to a
        multiple of 32 px, or of 8 px where full-size views have less than 128 px; then views have their full size.
        """
        last = self.view_size_px
        growing_epochs = self.max_epochs * 3 // 4
        if self.resolution_schedule is None or epoch >= growing_epochs:
            return last
        first = int(self.resolution_schedule.split(":")[0])
        multiple = 32 if last >= 128 else 8
        size = first + (last - first) * epoch // growing_epochs
        return max(first, size // multiple * multiple)

    def identity(self) -> dict[str, Any]:
        """The settings that the trained weights depend on: all but where files lie and how the work is watched."""
        return {name: value for name, value in self.to_json().items() if name not in RUN_LOCAL}

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; ``from_mapping`` takes them back."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(self).items()
        }


def as_path(text: str) -> Path:
    """The path that a flag or a file gives, with ~ as the home folder. Raises ValueError for an empty one."""
    if not text.strip() or "\0" in text:
        raise ValueError("the path is empty; is a shell variable not set?")
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path's own raises where there is no such user


def check_ranges(config: Any, limits: Mapping[str, tuple[int, int | None]]) -> None:
    """Raise UserError for the first setting outside its limits, or infinite or NaN; None is a setting left open."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{field.name} {value} is not finite; give a number.")
    for name, (lowest, highest) in limits.items():
        value = getattr(config, name)
        if value is not None and not value >= lowest:
            raise UserError(f"--{name} {value} is too small; give {lowest} or more.")
        if value is not None and highest is not None and value > highest:
            raise UserError(f"--{name} {value} is too large; give {highest} or less.")


def with_settings(base: TrainConfig, settings: Mapping[str, Any], source: str) -> TrainConfig:
    """``base`` with ``settings`` from a file put on top, each checked against its declared type.

    ``source`` names the file in errors. Raises UserError for an unknown key (with the nearest known one) or a value
    of the wrong type.
    """
    types_by_name = typing.get_type_hints(TrainConfig)
    values = {}
    for name, value in with_current_names(settings, RENAMED_SETTINGS).items():
        if name not in types_by_name:
            near = difflib.get_close_matches(name, types_by_name, n=1)
            hint = f"did you mean {near[0]}?" if near else "see launch.py --help for the known ones."
            raise UserError(f"{source} has the unknown key {name}; {hint}")
        values[name] = _checked(value, types_by_name[name], f"{source}: {name}")
    return dataclasses.replace(base, **values)


def _checked(value: Any, declared: Any, where: str) -> Any:
    options = typing.get_args(declared)
    if typing.get_origin(declared) is Literal:
        if value in options and not isinstance(value, bool):
            return value
        raise UserError(f"{where} is {value!r}; give one of {', '.join(map(repr, options))}.")
    if type(None) in options:
        if value is None:
            return None
        declared = next(option for option in options if option is not type(None))
    if declared is Path and isinstance(value, str):
        try:
            return as_path(value)
        except ValueError as error:
            raise UserError(f"{where} is {value!r}: {error}") from error
    if declared is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, declared) or isinstance(value, bool):
        raise UserError(f"{where} is {value!r}; give a value of type {declared.__name__}.")
    return value
