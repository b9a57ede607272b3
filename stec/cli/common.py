"""What commands share: their flags, Accelerate and the console, an encoder and the images that it sees."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro

from pipelines.errors import UserError
from stec.cli.launcher import choose_precision, is_main_process, started_one_of_several
from stec.compatibility import RENAMED_SETTINGS
from stec.config import (
    DATA_SETS,
    LARGEST_VIEW_PX,
    SMALLEST_VIEW_PX,
    DataSetName,
    DataSettings,
    DataSetTraits,
    TrainConfig,
)
from stec.settings import Switch, as_path, check_ranges, fields_of, setting

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from pipelines.datasets.images import Images
    from pipelines.datasets.index import DataSet
    from pipelines.loader import EvaluationLoader, Loader
    from stec.console import Console
    from stec.weights.pretrained import Trained

# Before PyTorch is loaded: its idle threads shall sleep, not spin on the cores that DALI's threads need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The profiler's library prints what it does, and an error where there is no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A trained encoder, and the images that it shall see."""

    dataset: DataSetName
    """Data set to evaluate on."""
    ckpt_path: Path
    """The weights: a finished run's folder, a checkpoint or safetensors file of ours, or an official .ckpt."""
    data_dir: Path | None = None
    """Folder that holds the data set."""
    download: Switch = 0
    """1: fetch CIFAR-10, CIFAR-100 or STL-10 into --data_dir first; checksums are verified."""
    backend: Literal["auto", "dali", "torchvision"] = "auto"
    """What prepares the images; auto is DALI where it is installed."""
    num_workers: int | None = setting(None, at_least=0)
    """DALI threads or torchvision worker processes, per process; default: this process's share of the CPUs."""
    exif_orientation: Switch = 0
    """1: turn image files upright as EXIF says, as the encoder saw them if it was trained with this."""
    view_size: int | None = setting(None, at_least=SMALLEST_VIEW_PX, at_most=LARGEST_VIEW_PX)
    """Height and width in px at which the encoder sees an image; default: the data set's own."""
    trained_on: DataSetName | None = None
    """Data set that the encoder was trained on, which decides its first layers and whether its online classifier can
    be used;
    default: what the weights say, else that of --dataset."""
    arch: Literal["resnet18", "resnet50"] | None = None
    """Architecture that the encoder must have; the weights tell it."""
    width: int | None = setting(None, at_least=1)
    """Channels that the encoder's first stage must have; the weights tell it."""
    batch_size: int = setting(256, at_least=1)
    """Images per process and step."""
    mixed_precision: Literal["no", "auto", "fp16", "bf16"] = "no"
    """Precision of the encoder; no is float32."""

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of its range."""
        check_ranges(self)

    @property
    def traits(self) -> DataSetTraits:
        own = DATA_SETS[self.dataset]
        if self.view_size in (None, own.view_size_px) or own.resize_px is not None:
            return own.at(self.view_size)
        # Images that are otherwise used as they are: all of each at the size that is asked for.
        return replace(own.at(self.view_size), resize_px=self.view_size)


def check_place(path: Path, flag: str = "", *, inputs: Sequence[Path | None] = ()) -> None:
    """Raise UserError where ``path``, which ``flag`` gave, is no place for a file, or there is one that is read.

    Those are the ``inputs``: the files, all that is in the folders among them, and what training wrote to a run's.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{flag} {path} cannot be written; name a file in an existing folder.".lstrip())
    if not path.exists():
        return
    from stec.runs.run_folder import RunFolder

    for source in inputs:
        if source is None or not source.exists():
            continue
        inside = source.is_dir() and path.resolve().is_relative_to(source.resolve())
        if path.samefile(source) or (inside and not RunFolder(source).written()):
            raise UserError(f"{flag} {path} would overwrite a file of {source}; name another file.".lstrip())
    if path.name in {file.name for file in RunFolder(path.parent).written()}:
        raise UserError(f"{flag} {path} would overwrite a file of a run; name another file.".lstrip())


def _program() -> str:
    """What was called: the console script, which an installation has, or ``launch.py``."""
    return "stec" if Path(sys.argv[0]).name == "stec" else "launch.py"


ALIASES = {
    "b": "batch_size",
    "bs": "batch_size",
    "bsz": "batch_size",
    "batch": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "checkpoint": "ckpt_path",
    "ckpt": "ckpt_path",
    "model": "ckpt_path",
    "pretrained": "ckpt_path",
    "weights": "ckpt_path",
    "data": "data_dir",
    "data_path": "data_dir",
    "data_root": "data_dir",
    "root": "data_dir",
    "epochs": "max_epochs",
    "n_epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "num_train_epochs": "max_epochs",
    "fp16": "mixed_precision",
    "bf16": "mixed_precision",
    "amp": "mixed_precision",
    "precision": "mixed_precision",
    "gradient_accumulation_steps": "accumulate",
    "accum_iter": "accumulate",
    "img_size": "view_size",
    "image_size": "view_size",
    "input_size": "view_size",
    "crop_size": "view_size",
    "j": "num_workers",
    "workers": "num_workers",
    "lr": "learning_rate",
    "base_lr": "learning_rate",
    "opt": "optimizer",
    "optim": "optimizer",
    "out_dir": "results_path",
    "output": "results_path",
    "output_dir": "results_path",
    "log_dir": "results_path",
    "save_dir": "results_path",
    "resume_from_checkpoint": "resume",
    "sched": "lr_scheduler",
    "scheduler": "lr_scheduler",
    "tau": "temperature",
    "temp": "temperature",
    "warmup": "warmup_epochs",
    "wd": "weight_decay",
    "backbone": "arch",
}
"""What other trainers call our flags."""


def _current_flag(argument: str) -> str:
    """The argument with a flag of 0.1.0 replaced by its present name."""
    flag, equals, value = argument.partition("=")
    name = flag.removeprefix("--")
    return f"--{RENAMED_SETTINGS[name]}{equals}{value}" if name in RENAMED_SETTINGS else argument


def _check_aliases(kind: type, arguments: Sequence[str]) -> None:
    """Raise UserError for a flag that ``kind`` has under another name."""
    known = {field.name for field in fields_of(kind)}
    for argument in arguments:
        flag = argument.split("=")[0]
        alias = flag.lstrip("-").replace("-", "_")
        if flag.startswith("-") and alias not in known and ALIASES.get(alias) in known:
            raise UserError(f"There is no {flag}; it is called --{ALIASES[alias]} here.")


PATHS = tyro.constructors.ConstructorRegistry()
"""How a flag becomes a path."""


@PATHS.primitive_rule
def _path_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: as_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def parse(
    kind: type[C], arguments: list[str], *, name: str, default: C | None = None, epilogue: str = "", **options: Any
) -> C:
    """A configuration from flags; on a mistake tyro explains it and exits with code 2. ``options`` are tyro's."""
    arguments = [_current_flag(argument) for argument in arguments]
    _check_aliases(kind, arguments)
    if default is not None:
        options["default"] = default
    return tyro.cli(
        kind,
        prog=f"{_program()} {name}".rstrip(),
        description=(kind.__doc__ or "") + epilogue,
        args=arguments,
        use_underscores=True,
        console_outputs=is_main_process(),
        registry=PATHS,
        config=(tyro.conf.OmitArgPrefixes,),
        **options,
    )


def parse_some(kind: type[C], arguments: list[str], *, name: str) -> tuple[C, list[str]]:
    """As ``parse``, and the flags that are none of this configuration's."""
    both: Any = parse(kind, arguments, name=name, return_unknown_args=True)
    config, others = both
    return config, others


def start(
    mixed_precision: str, process_timeout_s: int = 1800, deterministic: bool = False
) -> tuple[Accelerator, Console, str]:
    """Accelerate, the console and the precision that was chosen, for any command that computes."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    from stec.console import Console
    from stec.training.precision import resolve_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked, launchers = choose_precision(mixed_precision)
    precision = resolve_precision(asked, device)
    # Accelerate does not yet know the option by its new name.
    warnings.filterwarnings("ignore", message=r".*broadcast_buffers.*is deprecated", category=FutureWarning)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=process_timeout_s)),
        ],
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"Accelerate is set to {accelerator.gradient_accumulation_steps} gradient accumulation steps, which would "
            f"change the contrastive loss; set --gradient_accumulation_steps 1 for accelerate launch."
        )
    # Shapes stay as they are for many steps, so that trying cuDNN's algorithms pays; another may win in the next run.
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # Read when cuBLAS starts; without a fixed workspace it may sum in another order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory would only help code that reads it before writing.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu":
        # accelerate launch allows each process one thread unless told otherwise.
        torch.set_num_threads(own_cpus())
    console = Console(enabled=accelerator.is_main_process)
    if asked != mixed_precision:
        console.say(f"Precision {precision}, as accelerate launch says (mixed_precision).")
    elif launchers not in ("", precision):
        console.say(
            f"Precision {precision} (--mixed_precision {mixed_precision}); the mixed_precision {launchers} of "
            f"accelerate launch is not used."
        )
    if started_one_of_several(accelerator.num_processes):
        console.say(
            "accelerate launch was asked for several processes, but started only one, as it does without GPUs; for two "
            "use accelerate launch --config_file configs/cpu-2.yaml, or add --multi_gpu and leave --cpu out."
        )
    return accelerator, console, precision


def own_cpus() -> int:
    """This process's share of the CPUs that may be used."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def workers(data: DataSettings | EncoderConfig) -> int:
    """Number of DALI threads or torchvision worker processes of this process."""
    return own_cpus() if data.num_workers is None else data.num_workers


def training_loader(
    config: TrainConfig,
    data_set: DataSet,
    *,
    device: torch.device,
    precision: str,
    process_index: int = 0,
    num_processes: int = 1,
) -> Loader:
    """The batches that a configuration trains on, prepared as the settings say. Raises UserError where there is none.

    ``precision`` is the model's: in 16 bits views leave a GPU's pipeline as such.
    """
    from pipelines.bad_images import BadImages
    from pipelines.commands import LABELED_STREAM
    from pipelines.loader import Loader
    from pipelines.sampler import Sampler
    from stec.augmentation import policy_of

    policy = policy_of(config)
    sharing: dict[str, Any] = {
        "seed": config.run.seed,
        "batch_size": config.optimization.batch_size,
        "process_index": process_index,
        "num_processes": num_processes,
        "accumulate": config.optimization.accumulate,
        "view_size_at": config.view_size_at if config.augmentation.resolution_schedule is not None else None,
    }
    bad = BadImages(data_set.train, max_fraction=config.data.max_bad_fraction)
    sampler = Sampler(data_set.train, policy, **sharing, bad=bad, shuffle_window=config.data.shuffle_window)
    labeled_sampler = None
    if data_set.labeled is not None and data_set.labeled is not data_set.train:
        # As in the official code: one view of a labeled image beside each unlabeled one, not blurred or solarized.
        labeled_sampler = Sampler(
            data_set.labeled,
            dataclasses.replace(policy, p_blur=0.0, p_solarize=0.0),
            **sharing,
            views=1,
            command_stream=LABELED_STREAM,
            epoch_length=len(data_set.train),
        )
        if config.objective.stop_gradient == 2:
            sampler, labeled_sampler = labeled_sampler, None
    return Loader(
        sampler,
        backend=config.data.backend,
        device=device,
        workers=workers(config.data),
        labeled_sampler=labeled_sampler,
        # DALI knows no bfloat16; float16 holds [0, 1] more finely.
        half=device.type == "cuda" and precision != "no",
    )


def evaluation_loader(
    images: Images,
    data: DataSettings | EncoderConfig,
    *,
    traits: DataSetTraits,
    batch_size: int,
    device: torch.device,
) -> EvaluationLoader:
    """Images as an encoder sees them in evaluation, prepared as the settings require."""
    from pipelines.loader import EvaluationLoader

    return EvaluationLoader(
        images,
        size=traits.view_size_px,
        resize_px=traits.resize_px,
        batch_size=batch_size,
        backend=data.backend,
        device=device,
        workers=workers(data),
    )


def read_encoder(config: EncoderConfig) -> tuple[Trained, str]:
    """The weights that the flags name, and the data set that they were trained on.

    Raises UserError where there are none, or they are of another encoder than the flags say.
    """
    from stec.weights.pretrained import read_trained

    trained = read_trained(
        config.ckpt_path,
        stem=None if config.trained_on is None else DATA_SETS[config.trained_on].stem,
        otherwise=config.traits.stem,
        stem_set_by="--trained_on",
    )
    for flag in ("arch", "width"):
        if getattr(config, flag) not in (None, getattr(trained, flag)):
            raise UserError(
                f"{trained.path} does not fit the model that --{flag} {getattr(config, flag)} asks for: it is a "
                f"{trained.arch} of width {trained.width}; leave --{flag} out."
            )
    return trained, config.trained_on or trained.trained_on or config.dataset
