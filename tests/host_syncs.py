"""Operations for which the host would wait for a GPU, found on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIZES_DEPEND_ON_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
READ_BY_THE_HOST = {"_local_scalar_dense", "is_nonzero", "equal"}
MADE_BY_THE_HOST = (torch.tensor, Tensor.new_tensor)
"""On a GPU, they copy from memory that is not pinned."""


class HostSyncs(TorchDispatchMode):
    """While open, records the operations whose result the host needs, as a value or as a size, and tensors of Python's
    numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._made = _MadeTensors(self.found)

    def __enter__(self) -> HostSyncs:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READ_BY_THE_HOST | SIZES_DEPEND_ON_VALUES:
            self.found.append(name)
        if name in ("index", "index_put", "index_put_"):
            masks = [t for t in tree_leaves(args[1]) if isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)]
            self.found += [f"{name} by a mask"] * bool(masks)
        # Without a given size, the host must know the sum.
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class _MadeTensors(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MADE_BY_THE_HOST:
            self._found.append(func.__name__)
        return func(*args, **(kwargs or {}))
