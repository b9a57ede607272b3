"""Trouble with GPUs: drivers, versions and memory, each in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipelines.errors import UserError
from pipelines.nvidia_driver import OLDEST_DRIVER, driver_is_older_than, driver_version, gpu_is_visible


def reason_for_cpu() -> str | None:
    """Why the CPU is used although there is a GPU; None if the GPU is used, or there is none."""
    if torch.cuda.is_available() or not gpu_is_visible():
        return None
    start = "There is an NVIDIA GPU, but PyTorch cannot use it, so the CPU is used"
    if torch.version.cuda is None:
        return f"{start}: this PyTorch was built without CUDA; install another build (https://pytorch.org)."
    cuda = int(torch.version.cuda.split(".")[0])
    if driver_is_older_than(cuda):
        return (
            f"{start}: the driver {driver_version()} is too old for CUDA {torch.version.cuda}; update it to "
            f"{OLDEST_DRIVER[cuda]} or newer, or install PyTorch and DALI for CUDA 12 (docs/install.md)."
        )
    return f"{start}: check the driver with nvidia-smi, and that this process may open /dev/nvidia*."


def check_capability(device: torch.device) -> None:
    """Raise UserError if PyTorch has no code for a GPU."""
    capability, supported = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    versions = [int(name.removeprefix("sm_").rstrip("af")) for name in supported if name.startswith("sm_")]
    if versions and 10 * capability[0] + capability[1] < min(versions):
        oldest = divmod(min(versions), 10)
        raise UserError(
            f"The GPU {torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, but "
            f"this PyTorch supports {oldest[0]}.{oldest[1]} and newer; hide it by CUDA_VISIBLE_DEVICES=-1, or install "
            f"an older PyTorch."
        )


@contextmanager
def memory_errors(batch_size: int, remedy: str) -> Iterator[None]:
    """While open, lack of memory raises UserError with the batch size that was tried and the remedy."""
    try:
        yield
    except RuntimeError as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not on_gpu and "DefaultCPUAllocator: can't allocate memory" not in str(error):
            raise
        where = "The GPU" if on_gpu else "The machine"
        raise UserError(
            f"{where} has too little memory for --batch_size {batch_size}; {remedy}.", local=True
        ) from error
