"""Reads PyTorch files of other programs without executing code from them.

A pickle names classes and functions to be called. Here only tensors, numbers, strings and containers are created. Any
other class becomes an inert placeholder, so files with classes of PyTorch Lightning are read without Lightning; so does
the result of a few harmless calls, which are not made. A file that requests any other call is rejected.
"""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pipelines.errors import UserError


class ForeignCall(pickle.UnpicklingError):
    """The pickle requests a call that is not allowed."""


class _PlaceholderType(type):
    """The class of placeholders, which a pickle may create (without calling their class), but not call."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ForeignCall(f"{cls.__module__}.{cls.__qualname__}")


class _Placeholder(metaclass=_PlaceholderType):
    """An object of an unknown class, which ignores its state and items."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Placeholder:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


def _reconstruct(cls: type, base: type, state: Any) -> Any:
    """``copyreg._reconstructor`` for placeholders only."""
    if isinstance(cls, _PlaceholderType):
        return object.__new__(cls)  # type: ignore[arg-type]
    raise ForeignCall("copyreg._reconstructor")


def _uncalled(*_arguments: Any) -> _Placeholder:
    """Replaces a function: a placeholder instead of its result."""
    return object.__new__(_Placeholder)


_UNCALLED = {
    "collections": ("Counter", "defaultdict"),
    "numpy": ("dtype",),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "_codecs": ("encode",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}
"""What checkpoints of Lightning and others call to make schedules, settings and measures, none of which is a weight."""

_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("copyreg", "_reconstructor"): _reconstruct,
    ("copy_reg", "_reconstructor"): _reconstruct,
    # The second name is that of protocol 2, by which torch.save writes.
    **{
        (module, of.__name__): of
        for of in (set, frozenset, complex, bytearray, object)
        for module in ("builtins", "__builtin__")
    },
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    **{(module, name): _uncalled for module, names in _UNCALLED.items() for name in names},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _PlaceholderType(name.rpartition(".")[2], (_Placeholder,), {"__module__": module, "__qualname__": name})


def _load(*args: Any, **kwargs: Any) -> Any:
    return _Unpickler(*args, **kwargs).load()


_PICKLE_MODULE: Any = SimpleNamespace(
    Unpickler=_Unpickler, load=_load, UnpicklingError=pickle.UnpicklingError, __name__="stec.weights.inert_pickle"
)


def read_torch_file(path: Path) -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``, with tensors on the CPU.

    Raises UserError if the file is missing, truncated, of another kind, or requests a call.
    """
    try:
        if not path.exists():
            raise UserError(f"There is no file {path}; give the path of a checkpoint.")
        # torch.load would execute the code of a TorchScript archive, which has this record.
        if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise UserError(
                f"{path} is a TorchScript archive, which holds code, so it is rejected; use a checkpoint of weights."
            )
        content = torch.load(path, map_location="cpu", pickle_module=_PICKLE_MODULE, weights_only=False)
    except UserError:
        raise
    except ForeignCall as error:
        raise UserError(
            f"{path} requests a call of {error}, which no checkpoint of weights needs, so it is rejected; use a file "
            f"of tensors, numbers, strings and containers from a source that you trust."
        ) from error
    except (Exception, MemoryError) as error:  # damaged files raise exceptions without a common base
        raise UserError(
            f"{path} is damaged or not a PyTorch checkpoint ({_first_line(error)}); download it again."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} instead of a dictionary; so it is not a checkpoint.")
    return content


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
