"""What trackers hold, read back by their own means, against the run's metrics.jsonl."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import sys
import time
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
from pipelines.errors import UserError
from stec.config import TRACKERS
from stec.runs.run_folder import RunFolder
from stec.training import trackers
from tests.runs import Run

SMALL = (
    "--limit_train 64 --batch_size 16 --width 4 --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 --max_epochs 2 "
    "--log_every 1 --num_workers 1"
).split()
STEPS_PER_EPOCH, STEPS = 4, 8


def run(folder: Path, *arguments: str, prepare: Any = None, code: int = 0) -> Run:
    process = Run(*SMALL, "--results_path", folder, *arguments, prepare=prepare)
    process.end(code)
    return process


def power_cut() -> None:
    """Nothing comes after the line of step 7, nor a checkpoint after that of step 4."""
    append = RunFolder.append_metrics

    def appending(self: RunFolder, values: dict[str, Any]) -> None:
        append(self, values)
        if values["step"] == STEPS - 1:
            time.sleep(1.5)  # trackio writes every half second
            os._exit(9)

    patch.object(RunFolder, "append_metrics", appending).start()


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def in_trackio(folder: Path) -> list[tuple[str, int, dict[str, float]]]:
    """Run, step and metrics of each row."""
    with sqlite3.connect(folder / "trackio" / "stec.db") as database:
        rows = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    return [(run_id, step, json.loads(values)) for run_id, step, values in rows]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], list[int], Run]:
    """A run after a power cut and its continuation; the steps that either tracker had before that; the continuation."""
    folder = tmp_path_factory.mktemp("runs") / "followed"
    run(folder, "--log_with", "tensorboard,trackio", prepare=power_cut, code=9)
    before = [step for step, _ in in_tensorboard(folder)["loss"]], [step for _, step, _ in in_trackio(folder)]
    # Which trackers there are is not part of what a run is.
    resumed = run(folder, "--log_with", "trackio, tensorboard", "--resume", "auto")
    return folder, *before, resumed


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder: Path) -> dict[str, float]:
    return {f"results/{name}": value for name, value in json.loads((folder / "results.json").read_text()).items()}


def test_tensorboard_holds_each_line_once(followed: tuple[Path, list[int], list[int], Run]) -> None:
    folder, before, _, _ = followed
    assert before == list(range(1, STEPS - 1)), "there was nothing to log again"
    scalars = in_tensorboard(folder)
    for name in lines(folder)[0].keys() - {"step"}:
        steps, values = zip(*scalars.pop(name), strict=True)
        assert list(steps) == [line["step"] for line in lines(folder)] == list(range(1, STEPS + 1))
        np.testing.assert_allclose(values, [line[name] for line in lines(folder)], rtol=1e-6)  # it keeps float32
    expected: dict[str, Any] = {name: [(STEPS, pytest.approx(value))] for name, value in results(folder).items()}
    assert scalars == expected
    assert [path.is_dir() for path in (folder / "tensorboard").iterdir()] == [False, False], "one file for each start"


def test_trackio_holds_each_line_once(followed: tuple[Path, list[int], list[int], Run]) -> None:
    folder, _, before, _ = followed
    assert before == list(range(1, STEPS - 1)), "there was nothing to log again"
    rows = in_trackio(folder)
    assert len({run_id for run_id, _, _ in rows}) == 1
    expected = [(line.pop("step"), line) for line in lines(folder)]
    assert [(step, values) for _, step, values in rows] == [*expected, (STEPS, results(folder))]


def test_trackio_shows_it_by_its_own_means(
    followed: tuple[Path, list[int], list[int], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = followed
    assert "trackio" not in sys.modules, "its folder is read from the environment when it is loaded"
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    import trackio

    (shown,) = trackio.Api().runs(trackers.PROJECT)
    assert shown.name == folder.name
    config = json.loads((folder / "config.json").read_text())
    # What was given on the first start, as trackio keeps it, but for what each start may choose.
    assert {name: value for name, value in (shown.config or {}).items() if name in config} == config


def test_tensorboard_has_the_settings_beside_the_curves(followed: tuple[Path, list[int], list[int], Run]) -> None:
    folder, *_ = followed
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if v is not None}
    assert settings.keys() == config.keys()
    assert settings["learning_rate"].number_value == config["learning_rate"]
    assert settings["dataset"].string_value == "demo"


def test_it_is_said_how_to_look(followed: tuple[Path, list[int], list[int], Run]) -> None:
    folder, _, _, resumed = followed
    assert f"Watch by: tensorboard --logdir {folder}\n" in resumed.out
    assert f"Watch by: TRACKIO_DIR={folder.resolve()}/trackio trackio show --project stec\n" in resumed.out
    assert "*" not in resumed.out, "trackio's own words"


def full_disk() -> None:
    """TensorBoard's third flush fails."""
    from torch.utils.tensorboard import SummaryWriter

    flush, count = SummaryWriter.flush, iter(range(1000))

    def flushing(self: SummaryWriter) -> None:
        if next(count) >= 2:
            raise OSError(28, "No space left on device")
        flush(self)

    patch.object(SummaryWriter, "flush", flushing).start()


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    said = run(tmp_path / "run", "--log_with", "tensorboard,trackio", prepare=full_disk)
    assert said.out.count("warning: ") == 1
    assert "warning: tensorboard failed (OSError: [Errno 28] No space left on device) and gets nothing more" in said.out
    assert len(in_tensorboard(tmp_path / "run")["loss"]) == 3
    assert [step for _, step, _ in in_trackio(tmp_path / "run")] == [*range(1, STEPS + 1), STEPS]
    assert len(lines(tmp_path / "run")) == STEPS


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_tracker_that_cannot_start_is_a_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    said: list[str] = []
    accelerator = Accelerator(cpu=True)
    with pytest.raises(UserError, match=rf"--log_with {name} cannot be started \(FileExistsError: .* --resume auto\.$"):
        trackers.start(accelerator, [name], RunFolder(tmp_path), {}, after_step=0, say=said.append)
    assert accelerator.trackers == said == []


@pytest.mark.parametrize(
    ("name", "remedy"), [("trackio", "pip install -e '.[tracking]'"), ("wandb", "pip install wandb")]
)
def test_a_missing_package_is_told_before_anything_is_written(
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
        trackers.start(accelerator, ["wandb"], folder, {"width": 4}, after_step=step - 1, say=print)
        wandb_run = accelerator.trackers[0].tracker
        assert wandb_run.config["width"] == 4 and wandb_run.project == "stec"
        ids.append(wandb_run.id)
        with trackers.finished(accelerator):
            accelerator.log({"loss": 1.0}, step=step)
    assert ids[0] == ids[1]
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{ids[0]}"))) == 2
