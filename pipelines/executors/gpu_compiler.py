"""Compiles ``gpu_kernels.cu`` by NVRTC, which comes with PyTorch, and caches the machine code on disk."""

from __future__ import annotations

import hashlib
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipelines.commands import PACKED_COLUMNS, Policy
from pipelines.datasets.cache import cache_folder, keep
from pipelines.errors import UserError
from pipelines.executors.cpu_kernels import blur_reach

SOURCE = Path(__file__).with_name("gpu_kernels.cu")
THREADS_PER_BLOCK = 256
TILE_WIDTH, TILE_HEIGHT = 32, 8
"""The pixels of a view that a block executes at a time."""
MAX_REACH = 32
"""The most pixels that the blur may reach: 48 KiB of shared memory hold the pixels of a tile with its surroundings."""
KERNELS = ("crop_of_memory", "crop_of_decoded", "color_to_float", "color_to_half")


def num_tiles(size: int) -> int:
    """The number of tiles of a view."""
    return math.ceil(size / TILE_WIDTH) * math.ceil(size / TILE_HEIGHT)


def definitions(reach: int) -> dict[str, int]:
    """The names that the source expects to be defined. ``reach``: the most pixels that the blur reaches."""
    columns = {("columns" if name == "end" else name).upper(): column for name, column in PACKED_COLUMNS.items()}
    return {**columns, "REACH": reach, "TILE_WIDTH": TILE_WIDTH, "TILE_HEIGHT": TILE_HEIGHT}


def largest_reach(policy: Policy) -> int:
    """The most pixels that the blur of a policy reaches to each side.

    Raises UserError if it is more than the kernels support.
    """
    if policy.p_blur <= 0:
        return 0
    reach = blur_reach(policy.sigma_px[1], policy.blur_window_px)
    if reach > MAX_REACH:
        raise UserError(
            f"Views of {policy.size} px with blur are too large for the kernels on a GPU; use --backend torchvision."
        )
    return reach


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """The compiled kernels for one architecture."""

    cubin: bytes
    log: str
    """The assembler's report on registers and memory."""

    def resources(self) -> dict[str, dict[str, int]]:
        """For each kernel: registers per thread, bytes of shared memory, bytes of spilled registers."""
        patterns = {
            "registers": r"Used (\d+) registers",
            "shared_bytes": r"(\d+) bytes smem",
            "spilled_bytes": r"(\d+) bytes spill stores",
        }
        found: dict[str, dict[str, int]] = {}
        for entry in self.log.split("Compiling entry function ")[1:]:
            matches = {key: re.search(pattern, entry) for key, pattern in patterns.items()}
            found[entry.split("'")[1]] = {key: int(match[1]) if match else 0 for key, match in matches.items()}
        return found


def compile_kernels(reach: int, architecture: str) -> MachineCode:
    """Compile for an architecture such as ``sm_90``; no GPU is needed. Raises RuntimeError if NVRTC fails."""
    from cuda.bindings import nvrtc

    # Products are rounded before they are added, as on the CPU.
    options = ["--fmad=false", "--std=c++17", f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in definitions(reach).items()]
    program = _checked(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], []))
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode(errors="replace").rstrip("\0")
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{SOURCE.name} cannot be compiled for {architecture}: {text}")
    cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    return MachineCode(cubin=bytes(cubin), log=text)


def _checked(result: tuple[Any, ...]) -> Any:
    """The value that a function of cuda.bindings returns beside its error code."""
    code, *values = result
    if code != 0:
        raise RuntimeError(f"CUDA failed: {code!r}")
    return values[0] if values else None


def cached_cubin(reach: int, architecture: str) -> bytes:
    """The machine code, from the cache if it was compiled before from the same source by the same compiler."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    key = f"{SOURCE.read_text()} {definitions(reach)} {architecture} {major}.{minor}"
    file = cache_folder() / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    with suppress(OSError):
        return file.read_bytes()
    cubin = compile_kernels(reach, architecture).cubin
    keep(file, cubin)
    return cubin


@dataclass(frozen=True, kw_only=True)
class LoadedKernel:
    """A kernel on a GPU."""

    address: int
    """Of its CUfunction."""
    blocks: int
    """The blocks that the GPU executes at the same time."""


@cache
def load_kernels(reach: int, device: torch.device) -> dict[str, LoadedKernel]:
    """The kernels in the context of PyTorch on ``device``, by name."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    cubin = cached_cubin(reach, f"sm_{major}{minor}")
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # Creates the context.
        module = _checked(driver.cuModuleLoadData(cubin))
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        loaded = {}
        for name in KERNELS:
            function = _checked(driver.cuModuleGetFunction(module, name.encode()))
            resident = _checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, THREADS_PER_BLOCK, 0))
            loaded[name] = LoadedKernel(address=int(function), blocks=resident * processors)
    return loaded
