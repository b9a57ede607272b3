"""The command that measures what only a GPU can tell: how it runs checks, and those that run on a CPU as well."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, report
from benchmarks.gpu_check import CHECKS, Check, Options, check_all
from pipelines.errors import UserError
from stec.console import Console

QUIET = Console(enabled=False)


def passes() -> tuple[str, gpu_check.Rows]:
    return "fine", [{"what": "a | b", "value": 3}]


def fails() -> tuple[str, gpu_check.Rows]:
    raise AssertionError("3 differ")


def dies() -> tuple[str, gpu_check.Rows]:
    os._exit(7)


def hangs(pid_file: Path) -> tuple[str, gpu_check.Rows]:
    """Starts another process that is not to outlive this one."""
    pid_file.write_text(str(os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60")))
    time.sleep(60)
    raise AssertionError


SMALL = {
    "passes": Check(run=passes, limit_s=60, needs_gpu=False),
    "fails": Check(run=fails, limit_s=60, needs_gpu=False),
    "dies": Check(run=dies, limit_s=60, needs_gpu=False),
    "gpu": Check(run=passes, limit_s=60),
}


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_check_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(out=tmp_path / "report")
    checks = {**SMALL, "hangs": Check(run=partial(hangs, tmp_path / "pid"), limit_s=5, needs_gpu=False)}
    with pytest.raises(UserError):
        check_all(Options(out=tmp_path / "report", checks=("nothing",)), QUIET, SMALL)
    with pytest.raises(UserError):
        check_all(Options(out=tmp_path / "missing" / "report"), QUIET, SMALL)
    results = check_all(options, QUIET, checks)
    outcomes = {name: result.outcome for name, result in results.items()}
    skipped = "passed" if torch.cuda.is_available() else "skipped"
    assert outcomes == {
        "passes": "passed",
        "fails": "failed",
        "dies": "failed",
        "gpu": skipped,
        "hangs": "timed out",
    }
    assert "3 differ" in results["fails"].summary and "7" in results["dies"].summary
    assert not is_running(int((tmp_path / "pid").read_text()))
    written = json.loads((tmp_path / "report.json").read_text())
    assert {name: result["outcome"] for name, result in written["results"].items()} == outcomes
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|")]
    assert "| a \\| b | 3 |" in rows

    def not_again(check: Check) -> gpu_check.Result:
        assert check is not SMALL["passes"]
        return gpu_check.Result(outcome="passed")

    monkeypatch.setattr(gpu_check, "run_apart", not_again)
    again = check_all(options, QUIET, checks)
    assert again["passes"] == results["passes"]
    assert {result.outcome for result in again.values()} == {"passed"}


@pytest.mark.parametrize("content", [{}, {"machine": 1}, {"results": {"passes": {"bad": 1}}}, {"results": 3}])
def test_a_file_that_is_no_report_is_kept(content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"machine": report.machine(), **content} if "results" in content else content))
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"report\.json"):
        check_all(Options(out=tmp_path / "report"), QUIET, SMALL)
    assert file.read_bytes() == before


def test_the_command_ends_in_25_minutes() -> None:
    assert sum(check.limit_s for check in CHECKS.values()) <= 25 * 60


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small checks on the CPU, where PyTorch's queries of the GPU's memory would fail."""
    monkeypatch.setattr(gpu_check, "GPU", torch.device("cpu"))
    for name, value in {
        "ORDER_STEPS": 2,
        "BUSY_SIZE": 8,
        "SECONDS_PER_SPEED": 0.05,
        "NUM_PHOTOGRAPHS": 8,
        "PHOTOGRAPHS_PER_BATCH": 4,
        "THREADS": (1,),
        "HARDWARE_LOADS": (0.5,),
        "PROFILED_RECIPE": "demo",
        "PROFILED_BATCH_SIZE": 8,
        "PROFILED_STEPS": 1,
        "REBUILD_STEPS": 6,
    }.items():
        monkeypatch.setattr(gpu_check, name, value)
    for name, result in {"synchronize": None, "empty_cache": None, "mem_get_info": (10**9, 2 * 10**9)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)


@pytest.mark.parametrize("name", ["environment", "kernels", "order", "bad_images", "throughput", "rebuilds"])
def test_checks_pass_on_the_cpu(on_cpu: None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    summary, rows = CHECKS[name].run()
    assert summary and (rows or name in ("order", "rebuilds"))


def test_a_wrong_order_is_found(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = gpu_check._batches

    def one_is_wrong(*arguments: Any, **options: Any) -> Any:
        for batch in batches(*arguments, **options):
            batch.views[3] = batch.views[4]
            yield batch

    monkeypatch.setattr(gpu_check, "_batches", one_is_wrong)
    with pytest.raises(AssertionError, match="wrong place"):
        gpu_check.order()


def test_the_profile_of_a_step(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _, rows = gpu_check.step_profile()
    assert {row["what"]: row["per step"] for row in rows}["ms a step"] > 0
