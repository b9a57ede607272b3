"""Declaration of settings: dataclass fields with a range and a rule for resumed runs beside each default.

This module imports nothing heavy, so that ``launch.py --help`` answers quickly.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import os
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipelines.datasets.urls import RemoteFolder, is_url
from pipelines.errors import UserError

Switch = Literal[0, 1]

OnResume = Literal["free", "allowed", "never"]
"""Whether a resumed run may have another value: ``free``: always, as the weights do not depend on it; ``allowed``: with
``--allow_changes 1``; ``never``: a checkpoint would not fit the model, or have another meaning."""


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    on_resume: OnResume = "allowed",
) -> Any:
    """A dataclass field with its range, or that of a tuple's values; None, if the type allows it, is in range."""
    limits = {"at_least": at_least, "at_most": at_most, "above": above}
    return dataclasses.field(default=default, metadata={**limits, "on_resume": on_resume})


def fields_of(config: Any) -> Iterator[dataclasses.Field[Any]]:
    """The fields of a configuration or its class, with the fields of a group in place of the group."""
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.default):
            yield from fields_of(field.default)
        else:
            yield field


def settings_of(config: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """``fields_of`` a configuration, each with its value."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(field.default):
            yield from settings_of(value)
        else:
            yield field, value


def check_ranges(config: Any) -> None:
    """Raise UserError for the first setting that is out of its range, infinite or NaN."""
    for field, value in settings_of(config):
        for one in value if isinstance(value, tuple) else (value,):
            _check_range(field.name, one, field.metadata)


def _check_range(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name} {value} is not finite; give a number.")
    if value is None or not limits:
        return
    if limits["at_least"] is not None and value < limits["at_least"]:
        raise UserError(f"--{name} {value} is too small; give {limits['at_least']} or more.")
    if limits["above"] is not None and value <= limits["above"]:
        raise UserError(f"--{name} {value} is too small; give more than {limits['above']}.")
    if limits["at_most"] is not None and value > limits["at_most"]:
        raise UserError(f"--{name} {value} is too large; give {limits['at_most']} or less.")


def as_path(text: str) -> Path:
    """The path that a flag or a file gives, with ~ as the home folder. Raises ValueError if it is empty."""
    if not text.strip() or "\0" in text:
        raise ValueError("the path is empty; is a shell variable not set?")
    if is_url(text):
        raise ValueError("a URL is given where only a local path can be used.")
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path's own raises if there is no such user


def as_location(text: str) -> Path | RemoteFolder:
    """A local folder, or one at a URL. Raises ValueError if ``text`` is empty, or the URL is of no folder."""
    if not is_url(text):
        return as_path(text)
    protocol, _, rest = text.partition("://")
    url = f"{protocol.lower()}://{rest}"
    if not rest.strip("/"):
        raise ValueError("the URL names no server.")
    if url.startswith("http") and "?" in url:
        raise ValueError("a URL with a query (?...) is of one file; give that of a folder.")
    return RemoteFolder(url)


L = TypeVar("L", bound=Path | RemoteFolder | None)


def with_cache(location: L, cache_dir: Path | None, cache_gb: float) -> L:
    """The location of a data set; one at a URL with the cache of the flags."""
    if isinstance(location, RemoteFolder):
        return dataclasses.replace(location, cache_dir=cache_dir, cache_gb=cache_gb)
    return location


def checked_value(value: Any, declared: Any, where: str) -> Any:
    """``value``, as JSON holds it, converted to the declared type of a setting.

    Raises UserError, beginning with ``where``, if it has another type or is none of the choices.
    """
    options = typing.get_args(declared)
    if type(None) in options:
        if value is None:
            return None
        declared = functools.reduce(operator.or_, (option for option in options if option is not type(None)))
        return checked_value(value, declared, where)
    if typing.get_origin(declared) is Literal:
        if value in options and not isinstance(value, bool):
            return value
        raise UserError(f"{where} is {value!r}; give one of {', '.join(map(repr, options))}.")
    if typing.get_origin(declared) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {value!r}; give a list.")
        return tuple(checked_value(one, options[0], where) for one in value)
    if declared == Path | RemoteFolder and isinstance(value, RemoteFolder):
        return value
    if declared in (Path, Path | RemoteFolder) and isinstance(value, str):
        try:
            return as_path(value) if declared is Path else as_location(value)
        except ValueError as error:
            raise UserError(f"{where} is {value!r}: {error}") from error
    if declared is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, declared) or isinstance(value, bool):
        raise UserError(f"{where} is {value!r}; give a value of type {getattr(declared, '__name__', 'Path')}.")
    return value
