"""Command-line flags: dataclasses to values, with hints for the names that other trainers use."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from pipelines.datasets.urls import RemoteFolder
from pipelines.errors import UserError
from stec.compatibility import RENAMED_SETTINGS
from stec.distributed.launcher import is_main_process
from stec.settings import as_location, as_path, fields_of

C = TypeVar("C")


def _program() -> str:
    """The name in the usage line: the installed console script, or ``launch.py``."""
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
"""Flags of other trainers, and the flags of this one that they correspond to."""


def _current_flag(argument: str) -> str:
    """The argument with a flag of 0.1.0 replaced by its present name."""
    flag, equals, value = argument.partition("=")
    name = flag.removeprefix("--")
    return f"--{RENAMED_SETTINGS[name]}{equals}{value}" if name in RENAMED_SETTINGS else argument


def _check_aliases(kind: type, arguments: Sequence[str]) -> None:
    """Raise UserError for a flag of another trainer, with its name here."""
    known = {field.name for field in fields_of(kind)}
    for argument in arguments:
        flag = argument.split("=")[0]
        alias = flag.lstrip("-").replace("-", "_")
        if flag.startswith("-") and alias not in known and ALIASES.get(alias) in known:
            raise UserError(f"There is no {flag}; it is called --{ALIASES[alias]} here.")


PATHS = tyro.constructors.ConstructorRegistry()
"""The rule that converts flags to paths."""


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


@PATHS.primitive_rule
def _location_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    # Without a rule for the union, tyro would make subcommands of its types.
    if info.type not in (Path | RemoteFolder, Path | RemoteFolder | None):
        return None
    optional = info.type == Path | RemoteFolder | None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{None}|PATH|URL" if optional else "PATH|URL",
        instance_from_str=lambda words: None if optional and words == ["None"] else as_location(words[0]),
        is_instance=lambda value: isinstance(value, Path | RemoteFolder) or (optional and value is None),
        str_from_instance=lambda location: [str(location)],
    )


def parse(
    kind: type[C], arguments: list[str], *, name: str, default: C | None = None, epilogue: str = "", **options: Any
) -> C:
    """A configuration from flags. On invalid flags tyro prints an explanation and exits with code 2.

    ``options`` are passed to tyro.
    """
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
    """As ``parse``, and the arguments that are not flags of ``kind``."""
    config_and_rest: Any = parse(kind, arguments, name=name, return_unknown_args=True)
    config, rest = config_and_rest
    return config, rest
