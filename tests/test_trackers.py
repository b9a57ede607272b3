"""The logs of trackers, compared with the run's metrics.jsonl."""

from __future__ import annotations

import importlib.util
import json
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import launch
from stec.config import TRACKERS
from stec.runs import checkpoint
from stec.runs.run_folder import RunFolder
from stec.training import trackers
from tests.runs import Run, SignalAtStep

SMALL = (
    "--limit_train 64 --batch_size 16 --width 4 --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 --max_epochs 2 "
    "--log_every 1 --num_workers 1"
).split()
STEPS = 8
"""Four in each of two epochs."""


def run(folder: Path, *arguments: str, prepare: Any = None, code: int = 0) -> Run:
    environment = {"TRACKIO_DIR": str(folder.parent / "trackio")}
    process = Run(*SMALL, "--results_path", folder, *arguments, prepare=prepare, environment=environment)
    process.end(code)
    return process


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def in_trackio(folder: Path) -> list[tuple[str, int, dict[str, float]]]:
    """Run, step and metrics of each row."""
    with sqlite3.connect(folder.parent / "trackio" / "stec.db") as database:
        rows = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    return [(run_id, step, json.loads(values)) for run_id, step, values in rows]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A run that resumed from step 4 after it had logged 6 steps, and its second process."""
    folder = tmp_path_factory.mktemp("runs") / "resumed"
    run(folder, "--log_with", "tensorboard,trackio", prepare=SignalAtStep(6, signal.SIGTERM))
    assert [step for step, _ in in_tensorboard(folder)["loss"]] == list(range(1, 7))
    checkpoint.checkpoint_path(folder, 6).unlink()
    # A resumed run may have other trackers.
    return folder, run(folder, "--log_with", "trackio, tensorboard", "--resume", "auto")


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder: Path) -> dict[str, float]:
    return {f"results/{name}": value for name, value in json.loads((folder / "results.json").read_text()).items()}


def test_tensorboard_shows_each_line_once(resumed: tuple[Path, Run]) -> None:
    folder, _ = resumed
    scalars = in_tensorboard(folder)
    for name in lines(folder)[0].keys() - {"step"}:
        steps, values = zip(*scalars.pop(name), strict=True)
        assert list(steps) == [line["step"] for line in lines(folder)] == list(range(1, STEPS + 1))
        np.testing.assert_allclose(values, [line[name] for line in lines(folder)], rtol=1e-6)  # it stores float32
    expected: dict[str, Any] = {name: [(STEPS, pytest.approx(value))] for name, value in results(folder).items()}
    assert scalars == expected


def test_trackio_continues_the_run(resumed: tuple[Path, Run]) -> None:
    """The steps that are computed again are there twice, as trackio cannot drop them."""
    folder, _ = resumed
    rows = in_trackio(folder)
    assert len({run_id for run_id, _, _ in rows}) == 1
    assert [step for _, step, _ in rows] == [*range(1, 7), *range(5, STEPS + 1), STEPS]
    last = {step: values for _, step, values in rows[:-1]}
    assert last == {line.pop("step"): line for line in lines(folder)}
    assert rows[-1][2] == results(folder)


def test_trackio_shows_the_settings(resumed: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = resumed
    assert "trackio" not in sys.modules, "it reads the environment variable at its import"
    monkeypatch.setenv("TRACKIO_DIR", str(folder.parent / "trackio"))
    import trackio

    (shown,) = trackio.Api().runs(trackers.PROJECT)
    assert shown.name == folder.name
    config = json.loads((folder / "config.json").read_text())
    assert (shown.config or {})["learning_rate"] == config["learning_rate"]


def test_tensorboard_has_the_settings(resumed: tuple[Path, Run]) -> None:
    folder, _ = resumed
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if v is not None}
    starts = [EventAccumulator(str(path)) for path in (folder / "tensorboard").iterdir() if path.is_dir()]
    sessions = []
    for events in starts:
        events.Reload()
        if "_hparams_/session_start_info" in events.summary_metadata:
            content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
            sessions.append(HParamsPluginData.FromString(content).session_start_info.hparams)
    assert len(sessions) == 2, "one of each start"
    for settings in sessions:
        assert settings.keys() == config.keys()
        assert settings["learning_rate"].number_value == config["learning_rate"]


def test_the_command_that_shows_the_log_is_printed(resumed: tuple[Path, Run]) -> None:
    folder, second = resumed
    assert f"tensorboard --logdir {folder}\n" in second.out


def full_disk() -> None:
    """TensorBoard's third flush fails: that of the settings is the first."""
    from torch.utils.tensorboard import SummaryWriter

    flush, count = SummaryWriter.flush, iter(range(1000))

    def flushing(self: SummaryWriter) -> None:
        if next(count) >= 2:
            raise OSError(28, "No space left on device")
        flush(self)

    patch.object(SummaryWriter, "flush", flushing).start()


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    process = run(tmp_path / "run", "--log_with", "tensorboard,trackio", prepare=full_disk)
    assert process.out.count("warning: ") == 1
    assert "tensorboard failed (OSError: [Errno 28] No space left on device)" in process.out
    assert len(in_tensorboard(tmp_path / "run")["loss"]) == 2
    assert [step for _, step, _ in in_trackio(tmp_path / "run")] == [*range(1, STEPS + 1), STEPS]
    assert len(lines(tmp_path / "run")) == STEPS


def test_a_tracker_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    """Here because there is a file in place of its folder."""
    (tmp_path / "tensorboard").touch()
    process = run(tmp_path, "--log_with", "tensorboard", code=2)
    assert "error: --log_with tensorboard cannot be started (FileExistsError: " in process.err
    assert not checkpoint.checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"), [("trackio", "pip install -e '.[tracking]'"), ("wandb", "pip install wandb")]
)
def test_a_missing_package_is_reported_before_anything_is_written(
    name: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert launch.main([*SMALL, "--results_path", str(tmp_path / "run"), "--log_with", f"tensorboard,{name}"]) == 2
    assert capsys.readouterr().err == f"error: --log_with {name} needs its package; {remedy}, or leave {name} out.\n"
    assert not (tmp_path / "run").exists()


def test_accelerate_knows_the_known_ones() -> None:
    assert set(TRACKERS) <= set(LOGGER_TYPE_TO_CLASS)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_keeps_its_run_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for step in (1, 2):
        accelerator = Accelerator(cpu=True)
        folder = RunFolder(tmp_path)
        trackers.start(accelerator, ["wandb"], folder, {"width": 4}, after_step=step - 1, report=print)
        wandb_run = accelerator.trackers[0].tracker
        assert wandb_run.config["width"] == 4 and wandb_run.project == "stec"
        ids.append(wandb_run.id)
        with trackers.finished(accelerator, print):
            accelerator.log({"loss": 1.0}, step=step)
    assert ids[0] == ids[1]
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{ids[0]}"))) == 2
