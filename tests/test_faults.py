"""After an interruption of any kind, a run resumes to the same result, and the cause is reported.

The faults are real: processes are killed, disks fill up, files are damaged.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from pipelines.errors import Interrupted, UserError
from stec import console
from stec.distributed import failures
from stec.runs import checkpoint
from stec.runs.run_folder import RunFolder
from stec.training.stops import StopRequests, immediately
from tests.runs import Prepare, Run, SignalAtStep, together

TOTAL_STEPS = 24
SMALL = (
    "--limit_train 128 --batch_size 16 --width 4 --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 --max_epochs 3 "
    "--log_every 3 --num_workers 1 --checkpoint_every_steps 1"
).split()


def start(
    folder: Path,
    *arguments: str | Path,
    prepare: Prepare | None = None,
    environment: dict[str, str] | None = None,
    settings: Sequence[str] = SMALL,
) -> Run:
    return Run(*settings, "--results_path", folder, *arguments, prepare=prepare, environment=environment)


def resume(folder: Path, *arguments: str | Path, code: int = 0, prepare: Prepare | None = None) -> str:
    return start(folder, "--resume", "auto", *arguments, prepare=prepare).end(code)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run that kept the checkpoint of every step."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    start(folder, "--keep_checkpoints", "100").end()
    assert list(checkpoint.checkpoints(folder)) == list(range(1, TOTAL_STEPS + 1))
    return folder


def cut(whole: Path, folder: Path, *steps: int) -> Path:
    """A copy of the run with these checkpoints only."""
    folder.mkdir()
    for name in ("config.json", "metrics.jsonl", "starts.jsonl"):
        shutil.copy(whole / name, folder)
    for step in steps:
        shutil.copy(checkpoint.checkpoint_path(whole, step), folder)
    return folder


class LocalError(UserError):
    """An error of one process that the others do not know."""

    def __init__(self, message: str) -> None:
        super().__init__(message, local=True)


TIMES = ("train_seconds", "wait_seconds", "environment")


def assert_same_outcome(folder: Path, whole: Path) -> None:
    """Weights, optimizer and random state are bit-equal, metrics are equal; only times differ."""
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    ours, theirs = (checkpoint.load(checkpoint.checkpoint_path(run, TOTAL_STEPS)) for run in (folder, whole))
    assert _bits({k: v for k, v in ours.items() if k not in TIMES}) == _bits(
        {k: v for k, v in theirs.items() if k not in TIMES}
    )
    # Each step is logged once, though the lines may combine other steps.
    for run in (folder, whole):
        assert sum(line["steps"] for line in metrics(run)) == metrics(run)[-1]["step"] == TOTAL_STEPS
    sums = [sum(line["loss"] * line["steps"] for line in metrics(run)) for run in (folder, whole)]
    assert math.isclose(*sums, rel_tol=1e-12)
    assert not list(folder.glob(".*.tmp"))


def _bits(value: Any) -> Any:
    """Nested containers with bytes in place of tensors, so that they can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: _bits(item) for key, item in value.items()}
    return [_bits(item) for item in value] if isinstance(value, list | tuple) else value


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- Killed ---


@dataclass(frozen=True)
class KilledWhileSaving:
    """kill -9 of this process at the nth time (``times``) of an operation on a checkpoint in ``folder``.

    ``flush``: when half of its temporary file is written; ``rename``: before the file is renamed, ``renamed``: after
    that; ``remove``: before an old checkpoint is deleted.
    """

    folder: Path
    operation: str
    times: int

    def __call__(self) -> None:
        flush, rename, remove, count = os.fsync, Path.replace, Path.unlink, 0

        def reached(operation: str, path: Path) -> bool:
            nonlocal count
            count += operation == self.operation and path.match("*checkpoint-*")
            return operation == self.operation and count == self.times

        def kill() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def flushing(descriptor: int) -> None:
            for path in self.folder.glob(".checkpoint-*.tmp"):
                if os.path.samestat(os.fstat(descriptor), path.stat()) and reached("flush", path):
                    os.ftruncate(descriptor, path.stat().st_size // 2)
                    kill()
            flush(descriptor)

        def renaming(path: Path, target: Path) -> Path:
            if reached("rename", path):
                kill()
            result = rename(path, target)
            if reached("renamed", path):
                kill()
            return result

        def removing(path: Path, missing_ok: bool = False) -> None:
            if reached("remove", path):
                kill()
            remove(path, missing_ok)

        patch.object(os, "fsync", flushing).start()
        patch.object(Path, "replace", renaming).start()
        patch.object(Path, "unlink", removing).start()


def test_killed_at_any_moment(whole: Path, tmp_path: Path) -> None:
    """kill -9 in each part of saving and at other steps; all checkpoints are complete, and the result is the same."""
    folder, rng = tmp_path / "run", random.Random(0)
    for operation, times in (("flush", 2), ("rename", 1), ("renamed", 2), ("remove", 1), ("flush", 1)):
        newest = max(checkpoint.checkpoints(folder), default=0)
        run = start(folder, "--resume", "auto", prepare=KilledWhileSaving(folder, operation, times))
        run.process.join(120)
        assert run.process.exitcode == -signal.SIGKILL
        saved = checkpoint.checkpoints(folder)
        for path in saved.values():
            checkpoint.load(path)
        unsaved = operation in ("flush", "rename")
        assert len(list(folder.glob(".checkpoint-*.tmp"))) == unsaved
        if operation != "remove":
            assert max(saved, default=0) == newest + times - unsaved
    for _ in range(2):
        run = start(folder, "--resume", "auto", prepare=SignalAtStep(rng.randint(1, 3), signal.SIGKILL))
        run.process.join(120)
        assert run.process.exitcode == -signal.SIGKILL
        for path in checkpoint.checkpoints(folder).values():
            checkpoint.load(path)
    resume(folder)
    assert_same_outcome(folder, whole)


# --- Requests to stop ---


@dataclass(frozen=True)
class SignalAtStepAndWhileSaving(SignalAtStep):
    """And again while that step is saved; if the signal is Ctrl-C, the disk hangs then."""

    def __call__(self) -> None:
        super().__call__()
        save, flush = checkpoint.save, os.fsync

        def signalled(descriptor: int) -> None:
            os.kill(os.getpid(), self.number)
            if self.number == signal.SIGINT:
                time.sleep(1000)
            flush(descriptor)

        def saving(folder: Path, step: int, *args: Any, **kwargs: Any) -> None:
            with patch.object(os, "fsync", signalled if step == self.step else flush):
                save(folder, step, *args, **kwargs)

        patch.object(checkpoint, "save", saving).start()


@pytest.mark.parametrize(
    ("number", "flags", "code"),
    [
        (signal.SIGTERM, [], 0),
        (signal.SIGUSR1, ["--stop_exit_code", "85"], 85),
        (signal.SIGINT, ["--stop_exit_code", "85"], 130),
    ],
)
def test_a_signal_saves_and_stops(
    number: signal.Signals, flags: list[str], code: int, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    output = start(folder, *flags, "--checkpoint_every_steps", "100", prepare=SignalAtStep(11, number)).end(code)
    assert "Stopped after step 11 of 24" in output and f"--results_path {folder} --resume auto." in output
    assert list(checkpoint.checkpoints(folder)) == [8, 11]
    resume(folder)
    assert_same_outcome(folder, whole)


def test_a_signal_at_the_last_step_postpones_evaluation(whole: Path, tmp_path: Path) -> None:
    folder = cut(whole, tmp_path / "run", 23)
    output = resume(folder, prepare=SignalAtStep(1, signal.SIGTERM))
    assert "Stopped after step 24 of 24" in output and not (folder / "results.json").exists()
    resume(folder)
    assert_same_outcome(folder, whole)
    assert (folder / "results.json").exists()


def test_repeated_signals(whole: Path, tmp_path: Path) -> None:
    """Launcher and scheduler may both send SIGTERM, so a second one is ignored; a second Ctrl-C stops immediately."""
    folder = tmp_path / "terminated"
    output = start(folder, prepare=SignalAtStepAndWhileSaving(5, signal.SIGTERM)).end()
    assert "Stopped after step 5 of 24" in output
    assert list(checkpoint.checkpoints(folder)) == [4, 5]
    folder = tmp_path / "interrupted"
    output = start(folder, prepare=SignalAtStepAndWhileSaving(5, signal.SIGINT)).end(130)
    assert "Stopped immediately" in output
    assert list(checkpoint.checkpoints(folder)) == [3, 4]
    resume(folder)
    assert_same_outcome(folder, whole)


def test_a_second_signal_does_not_interrupt_the_cleanup() -> None:
    """A launcher that ends after the first signal sends another one."""
    cleaned_up = []

    def stopped(by: signal.Signals) -> None:
        try:
            os.kill(os.getpid(), by)
            time.sleep(10)
        finally:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            time.sleep(0.01)
            cleaned_up.append(by)

    for number, code in ((signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGINT, 130)):
        with pytest.raises(Interrupted) as raised, immediately(85):
            stopped(number)
        assert raised.value.exit_code == code
    assert len(cleaned_up) == 3


def test_no_library_swallows_an_interruption() -> None:
    def library() -> None:
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(Interrupted), immediately(0):
        library()


# --- Several processes ---


def start_two(folder: Path, *arguments: str | Path, prepare: Sequence[Prepare | None]) -> list[Run]:
    return together(2, *SMALL, "--batch_size", "8", "--results_path", folder, *arguments, prepare=prepare)


def test_a_signal_to_one_process_stops_all(tmp_path: Path) -> None:
    """They agree on the step; another number of processes resumes to nearly equal weights.

    The learning rate is small, because training amplifies rounding errors in a network of this size.
    """
    plain = ["--optimizer", "sgd", "--learning_rate", "0.000001", "--mixed_precision", "no", "--max_epochs", "1"]
    plain += ["--log_every", "100"]
    folder = tmp_path / "run"
    both = start_two(folder, *plain, prepare=[None, SignalAtStep(3, signal.SIGUSR1)])
    output = [run.end() for run in both]
    assert "Stopped after step 4 of 8" in output[0] and "Stopped" not in output[1]
    assert list(checkpoint.checkpoints(folder)) == [3, 4]
    resume(folder, *plain)
    start(tmp_path / "whole", *plain).end()
    ours, theirs = (checkpoint.load(checkpoint.checkpoint_path(run, 8)) for run in (folder, tmp_path / "whole"))
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=1e-4)
    assert math.isclose(ours["last_epoch"]["loss"], theirs["last_epoch"]["loss"], rel_tol=1e-4)


@dataclass(frozen=True)
class Raise:
    """An error of this process at a step."""

    step: int
    error: Exception

    def __call__(self) -> None:
        after_step, steps = StopRequests.after_step, 0

        def raising(self_: StopRequests, *, last: bool) -> int:
            nonlocal steps
            steps += 1
            if steps == self.step:
                raise self.error
            return after_step(self_, last=last)

        patch.object(StopRequests, "after_step", raising).start()


@pytest.mark.parametrize(
    ("fault", "code", "sentence"),
    [
        (SignalAtStep(3, signal.SIGKILL), -signal.SIGKILL, "Process 1 died or does not answer"),
        (SignalAtStep(3, signal.SIGSTOP), None, "Process 1 died or does not answer"),
        (Raise(3, LocalError("x.jpg cannot be read.")), 2, "Process 1 failed: x.jpg cannot be read; fix that"),
        (Raise(3, MemoryError("no memory")), 1, "Process 1 failed: MemoryError: no memory; fix that"),
    ],
    ids=["killed", "hangs", "error", "bug"],
)
def test_one_process_fails(fault: Prepare, code: int | None, sentence: str, tmp_path: Path) -> None:
    """The others also end, with one sentence that names the process and, if it reported one, its error."""
    folder = tmp_path / "run"
    both = start_two(folder, "--process_timeout_s", "8", prepare=[None, fault])
    output = both[0].end(2)
    assert f"error: {sentence}" in output and "--resume auto." in output
    if code is None:
        both[1].process.kill()
    both[1].process.join(60)
    assert both[1].process.exitcode == code or code is None
    # The main process may have saved the step of the failure before it detected it.
    assert list(checkpoint.checkpoints(folder))[-1] in (2, 3)


def test_the_store_works_outside_of_collectives() -> None:
    """``_get_default_store`` is not public: if PyTorch changes it, failures must be reported in another way."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        failures._store().set("failed", "Process 0 failed")
        assert failures._store().get("failed") == b"Process 0 failed"
    finally:
        dist.destroy_process_group()


def test_the_main_process_dies(tmp_path: Path) -> None:
    """And with it the store that connects the processes."""
    both = start_two(tmp_path / "run", prepare=[SignalAtStep(3, signal.SIGKILL)])
    output = both[1].end(2)
    assert "error on process 1: Process 0, which connects the processes, died" in output


# --- The disk is full ---


@dataclass(frozen=True)
class SmallDisk:
    """A disk that can be full: a small file system if one can be mounted, else a limit of the size of a file."""

    folder: Path
    mounted: bool

    FREE_BYTES = 100_000

    def __call__(self) -> None:
        """Fill it; a run frees it when it has printed that it could not save."""
        self.fill()
        say = console.Console.say

        def say_and_free(self_: console.Console, text: str) -> None:
            say(self_, text)
            if text.startswith("warning"):
                self.free()

        patch.object(console.Console, "say", say_and_free).start()

    def fill(self) -> None:
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.FREE_BYTES, resource.RLIM_INFINITY))
            return
        room = shutil.disk_usage(self.folder).free
        (self.folder / "other").write_bytes(bytes(max(0, room - self.FREE_BYTES)))

    def free(self) -> None:
        if self.mounted:
            (self.folder / "other").unlink()
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    yield SmallDisk(folder, mounted)
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run(whole: Path, small_disk: SmallDisk) -> None:
    folder = cut(whole, small_disk.folder / "run", 7, 8)
    output = resume(folder, prepare=small_disk, code=2)
    assert f"error: {folder}/checkpoint-00000009.pt cannot be written (" in output
    assert ("No space left on device" in output) == small_disk.mounted
    assert "Training stopped after step 10;" in output and f"--results_path {folder} --resume auto." in output
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoint-00000007.pt",
        "checkpoint-00000008.pt",
        "config.json",
        "metrics.jsonl",
        "starts.jsonl",
    ]
    if small_disk.mounted:
        small_disk.free()
    resume(folder)
    assert_same_outcome(folder, whole)


def test_training_continues_with_a_full_disk_if_requested(whole: Path, small_disk: SmallDisk) -> None:
    folder = cut(whole, small_disk.folder / "run", 8)
    output = resume(folder, "--on_save_error", "continue", prepare=small_disk)
    assert f"warning: {folder}/checkpoint-00000009.pt cannot be written (" in output
    assert_same_outcome(folder, whole)


def test_a_failed_save_is_noticed_before_the_next_one(whole: Path, small_disk: SmallDisk) -> None:
    folder = cut(whole, small_disk.folder / "run", 8)
    output = resume(folder, "--checkpoint_every_steps", "4", prepare=small_disk, code=2)
    assert f"error: {folder}/checkpoint-00000012.pt cannot be written (" in output
    assert re.search(r"Training stopped after step 1[345];", output)


def test_metrics_wait_for_a_full_disk(small_disk: SmallDisk) -> None:
    """No line is lost or incomplete."""
    if not small_disk.mounted:
        pytest.skip("no file system can be mounted here")
    folder = RunFolder(small_disk.folder)
    long = {"step": 1, "filler": "x" * 3000}
    folder.append_metrics(long)
    small_disk.fill()
    (small_disk.folder / "rest").write_bytes(bytes(shutil.disk_usage(small_disk.folder).free))
    for step in (2, 3):
        folder.append_metrics({**long, "step": step})
    assert [line["step"] for line in metrics(small_disk.folder)] == [1]
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(No space left on device\)"):
        folder.flush_metrics()
    small_disk.free()
    folder.append_metrics({**long, "step": 4})
    assert [line["step"] for line in metrics(small_disk.folder)] == [1, 2, 3, 4]


# --- Checkpoints are damaged ---


def damages(content: bytes) -> Iterator[bytes]:
    """The content truncated, emptied, zeroed at the end as after a power failure, and with single bits flipped."""
    yield b""
    yield content[:1]
    yield content[: len(content) // 2]
    yield content[:-1]
    yield content[:-4096] + bytes(4096)
    rng = random.Random(1)
    for position in (0, len(content) - 1, len(content) - 40, *(rng.randrange(len(content)) for _ in range(50))):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        yield bytes(flipped)


def test_any_damage_is_detected(whole: Path, tmp_path: Path) -> None:
    content = checkpoint.checkpoint_path(whole, 8).read_bytes()
    path = tmp_path / "checkpoint-00000008.pt"
    for damaged in damages(content):
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.DamagedCheckpoint):
            checkpoint.load(path)
    path.write_bytes(content)
    assert checkpoint.load(path)["step"] == torch.load(path, weights_only=True)["step"] == 8


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(whole: Path, tmp_path: Path) -> None:
    folder = cut(whole, tmp_path / "run", 6, 7, 8)
    for step, change in ((7, lambda old: old[:-100]), (8, lambda old: bytes([old[0] ^ 1]) + old[1:])):
        path = checkpoint.checkpoint_path(folder, step)
        path.write_bytes(change(path.read_bytes()))
    output = resume(folder)
    assert "checkpoint-00000008.pt is damaged (its checksum" in output
    assert "checkpoint-00000007.pt is damaged (its end is missing)" in output
    assert "Resuming after step 6." in output
    assert_same_outcome(folder, whole)
    assert (folder / "checkpoint-00000008.pt.damaged").exists()


def test_no_undamaged_checkpoint_is_left(whole: Path, tmp_path: Path) -> None:
    folder = cut(whole, tmp_path / "run", 8)
    checkpoint.checkpoint_path(folder, 8).write_bytes(b"")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    output = resume(folder, code=2)
    assert f"checkpoints in {folder} are damaged (checkpoint-00000008.pt: " in output
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    assert after == before


# --- Results without their checkpoints ---


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize(
    ("missing", "flags"),
    [
        ([], ["--resume", "auto"]),
        ([], ["--resume", "auto", "--width", "8", "--allow_changes", "1"]),
        (["results.json"], ["--resume", "auto"]),
        (["model.safetensors"], ["--resume", "auto"]),
        (["model.safetensors", "results.json", "config.json", "metrics.jsonl"], ["--resume", "auto"]),
        (["config.json"], []),
        (["config.json", "starts.jsonl", "metrics.jsonl", "results.json"], []),
        (["config.json", "model.safetensors", "encoder.safetensors", "results.json"], []),
    ],
    ids=["all", "another width", "no results", "no model", "encoder alone", "no config", "model alone", "metrics"],
)
def test_results_are_not_trained_again_without_checkpoints(
    missing: list[str], flags: list[str], whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoint-*", *missing))
    before = files_in(folder)
    output = start(folder, *flags).end(2)
    assert str(folder) in output and "--results_path" in output
    assert files_in(folder) == before


def test_a_run_without_checkpoint_starts_again_and_reports_it(whole: Path, tmp_path: Path) -> None:
    folder = cut(whole, tmp_path / "run")
    output = resume(folder)
    assert f"metrics up to step {TOTAL_STEPS}" in output
    assert_same_outcome(folder, whole)


# --- Two runs, one folder ---


def test_a_second_run_is_refused_while_the_first_lives(whole: Path, tmp_path: Path) -> None:
    folder = cut(whole, tmp_path / "run", 8)
    first = start(folder, "--resume", "auto", prepare=SignalAtStep(4, signal.SIGSTOP))
    while 10 not in checkpoint.checkpoints(folder):
        assert first.process.is_alive()
        time.sleep(0.01)
    output = resume(folder, code=2)
    assert f"The run in {folder} is being trained by process {first.process.pid} on {socket.gethostname()};" in output
    first.process.kill()
    first.process.join()
    resume(folder)
    assert_same_outcome(folder, whole)


# --- The data is gone ---


@dataclass(frozen=True)
class TakeAway:
    """Removes the data after the first line of metrics has been written."""

    data: Path

    def __call__(self) -> None:
        append = RunFolder.append_metrics

        def appending(self_: RunFolder, values: Any) -> None:
            append(self_, values)
            if self.data.exists():
                self.data.rename(self.data.with_name("unmounted"))

        patch.object(RunFolder, "append_metrics", appending).start()


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_the_data_disappears(backend: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        for n in range(count):
            file = data / split / f"class{n % 2}" / f"{n}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(file)
    settings = ["--dataset", "imagenet", "--data_dir", str(data), "--batch_size", "4", "--warmup_epochs", "1"]
    settings += ["--width", "4", "--log_every", "1", "--max_epochs", "2", "--backend", backend, "--num_workers", "0"]
    settings += ["--checkpoint_every_steps", "1", "--optimizer", "adam"]
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(name: str, prepare: Prepare | None = None) -> Run:
        return start(tmp_path / name, "--resume", "auto", prepare=prepare, environment=environment, settings=settings)

    run("undisturbed").end()
    output = run("disturbed", TakeAway(data)).end(2)
    assert output.count("error: ") == 1 and str(data) in output.split("error: ")[1]
    saved = checkpoint.checkpoints(tmp_path / "disturbed")
    assert saved and all(checkpoint.load(path) for path in saved.values())
    assert not (tmp_path / "disturbed" / "bad-images.tsv").exists()
    output = run("disturbed").end(2)
    assert f"--data_dir {data} must hold the folders train and val" in output
    (tmp_path / "unmounted").rename(data)
    run("disturbed").end()
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("disturbed", "undisturbed"))
    assert ours.read_bytes() == theirs.read_bytes()


# --- The clock jumps ---


def jumping_clocks() -> None:
    """Each reading of a clock is off by up to years."""
    rng = random.Random(0)
    now, precise = time.time, time.perf_counter
    time.time = lambda: max(0.0, now() + rng.uniform(-1e9, 1e9))
    time.perf_counter = lambda: precise() + rng.choice([0.0, rng.uniform(-1e9, 1e9)])


def test_clocks_that_jump_change_nothing(whole: Path, tmp_path: Path) -> None:
    folder = cut(whole, tmp_path / "run", 7, 8)
    os.utime(checkpoint.checkpoint_path(folder, 7), (2**32, 2**32))
    output = resume(folder, prepare=jumping_clocks)
    assert "Resuming after step 8." in output
    assert_same_outcome(folder, whole)
    for line in metrics(folder):
        assert all(math.isfinite(value) for value in line.values())
        assert line["images_per_second"] > 0 and 0 <= line["wait_fraction"] <= 1
    results = json.loads((folder / "results.json").read_text())
    assert results["images_per_second"] > 0 and 0 <= results["wait_fraction"] <= 1


# --- Settings ---


def test_changed_settings_are_refused_or_recorded(whole: Path, tmp_path: Path) -> None:
    folder = cut(whole, tmp_path / "run", 8)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = ["--learning_rate", "0.5", "--max_epochs", "2"]
    output = resume(folder, *changed, code=2)
    assert "--learning_rate was 0.003 and is now 0.5, --max_epochs was 3 and is now 2;" in output
    for flags in ([], ["--allow_changes", "1"]):
        output = resume(folder, "--feat_dim", "9", *flags, code=2)
        assert "even --allow_changes 1 does not allow that of --feat_dim" in output
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before

    output = resume(folder, *changed, "--allow_changes", "1")
    sentence = "Changed, as --allow_changes 1 allows: --learning_rate was 0.003 and is now 0.5."
    assert sentence in output
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [start["after_step"] for start in starts] == [0, 8]
    assert starts[0]["notes"] == [] and sentence in starts[1]["notes"]
    written = json.loads((folder / "config.json").read_text())
    assert (written["learning_rate"], written["max_epochs"], written["allow_changes"]) == (0.5, 2, 0)
    assert metrics(folder)[-1]["step"] == 16


def test_which_checkpoints_are_kept(whole: Path, tmp_path: Path) -> None:
    """The newest ones, and those of every second epoch; within an epoch one every three steps."""
    folder = cut(whole, tmp_path / "run", 8)
    shutil.copy(checkpoint.checkpoint_path(whole, 8), tmp_path)
    flags = ["--checkpoint_every_steps", "3", "--keep_checkpoints", "3", "--keep_every", "2"]
    resume(folder, *flags)
    assert list(checkpoint.checkpoints(folder)) == [16, 19, 22, 24]
    assert_same_outcome(folder, whole)
