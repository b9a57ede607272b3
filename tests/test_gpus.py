"""Trouble with GPUs, brought about without one: drivers, versions and memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from nvidia import dali

from pipelines import nvidia_driver
from pipelines.errors import UserError
from pipelines.loader import resolve_backend
from stec import gpus
from stec.runs import checkpoint
from tests.runs import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
OPEN_DRIVER = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16)
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:18:22 UTC 2025\n"
SMALL = (
    "--limit_train 64 --batch_size 16 --width 4 --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 --num_workers 1 "
    "--max_epochs 2 --warmup_epochs 0"
).split()


@dataclass(frozen=True)
class Machine:
    """A machine with a GPU that PyTorch cannot use."""

    folder: Path
    driver: str = OPEN_DRIVER

    def __call__(self) -> None:
        (self.folder / "nvidia0").touch()
        (self.folder / "version").write_text(self.driver)
        patch.object(nvidia_driver, "DEVICES", self.folder).start()
        patch.object(nvidia_driver, "VERSION_FILE", self.folder / "version").start()


@dataclass(frozen=True)
class OutOfMemory(Machine):
    """And whose memory is exhausted in a step."""

    step: int = 6

    def __call__(self) -> None:
        super().__call__()
        from stec.training.step import Step

        compute, steps = Step.__call__, 0

        def exhausted(self_: Step, micro_batches: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == self.step:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return compute(self_, micro_batches)

        patch.object(Step, "__call__", exhausted).start()


@pytest.fixture
def machine(tmp_path: Path) -> Any:
    yield lambda driver: Machine(tmp_path, driver)()
    patch.stopall()


@pytest.mark.parametrize(
    ("driver", "version", "is_old"), [(OPEN_DRIVER, "570.86.15", True), (DRIVER, "580.65.06", False)]
)
def test_drivers(machine: Any, driver: str, version: str, is_old: bool) -> None:
    machine(driver)
    assert nvidia_driver.driver_version() == version
    assert nvidia_driver.driver_is_older_than(13) == is_old and not nvidia_driver.driver_is_older_than(12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use this machine's GPU")
def test_the_reason_for_the_cpu(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.reason_for_cpu() is None
    machine(OPEN_DRIVER)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    reason = gpus.reason_for_cpu()
    assert reason is not None and "570.86.15" in reason and "580" in reason
    machine(DRIVER)
    reason = gpus.reason_for_cpu()
    assert reason is not None and "580" not in reason
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert gpus.reason_for_cpu() is None


def test_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    for capability in ((7, 5), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=capability: value)
        gpus.check_capability(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(UserError, match=r"Tesla V100 .*7\.0.*7\.5"):
        gpus.check_capability(GPU)


def test_dali_for_another_driver(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(OPEN_DRIVER)
    monkeypatch.setattr(dali, "__cuda_version__", 13020)
    assert resolve_backend("auto", CPU) == "dali"
    with pytest.raises(UserError, match=r"13.*570\.86\.15"):
        resolve_backend("auto", GPU)
    monkeypatch.setattr(dali, "__cuda_version__", 12090)
    assert resolve_backend("dali", GPU) == "dali"


def test_dali_that_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = ModuleType("nvidia.dali")
    monkeypatch.setitem(sys.modules, "nvidia.dali", damaged)
    monkeypatch.setattr(sys.modules["nvidia"], "dali", damaged)
    damaged.__spec__ = dali.__spec__
    with pytest.raises(UserError, match="nvidia-dali-cuda130"):
        resolve_backend("auto", CPU)
    assert resolve_backend("torchvision", CPU) == "torchvision"


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use this machine's GPU")
def test_a_run_without_enough_memory(tmp_path: Path) -> None:
    """It ends in a sentence with the batch size, and the checkpoint before is kept."""
    run = Run(*SMALL, "--results_path", tmp_path / "run", prepare=OutOfMemory(tmp_path))
    run.end(2)
    assert "--batch_size 16" in run.err and "--batch_size 8 --accumulate 2" in run.err
    assert "570.86.15" in run.out
    assert list(checkpoint.checkpoints(tmp_path / "run")) == [4]
    Run(*SMALL, "--results_path", tmp_path / "run", "--resume", "auto").end()
