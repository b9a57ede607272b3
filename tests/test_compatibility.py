"""Files written by version 0.1.0 are resumed, evaluated, exported and reported.

``data/0.1.0`` is a run of that version on the demo set, on a CPU::

    python launch.py --dataset demo --width 1 --feat_dim 4 --hidden_mlp 4 --manip_hidden_mlp 4 --n_bins 2
    --limit_train 64 --batch_size 16 --max_epochs 2 --warmup_epochs 0 --manip_lambda 1 --num_workers 1
    --mixed_precision no --optimizer sgd --learning_rate 0.01 --view_size 16 --log_every 1 --checkpoint_every_steps 2
    --keep_checkpoints 3 --max_bad_share 0.5 --results_path run

Of its checkpoints, the one in the middle of the second epoch is kept.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import launch
import stec
from stec.cli.train import parse_train
from stec.runs.run_record import read_run
from tests.runs import Run

OLD = Path(__file__).parent / "data" / "0.1.0"
CHECKPOINT = "checkpoint-00000006.pt"


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """The run as it was after step 6 of 8."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "starts.jsonl", CHECKPOINT):
        shutil.copy(OLD / name, folder / name)
    lines = (OLD / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:6]))
    return folder


def test_an_old_run_resumes(interrupted: Path, tmp_path: Path) -> None:
    """To the weights and metrics of a run that this version trains from the beginning, up to rounding."""
    config = str(OLD / "config.json")
    Run("--config", config, "--results_path", interrupted, "--resume", "auto").end()
    Run("--config", config, "--results_path", tmp_path / "new").end()
    resumed, trained = (load_file(folder / "model.safetensors") for folder in (interrupted, tmp_path / "new"))
    assert resumed.keys() == trained.keys()
    for name, tensor in trained.items():
        # Machines round differently, which grows over 8 steps.
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-2, atol=1e-3, msg=name)
    old_then_new, new = (read_run(folder) for folder in (interrupted, tmp_path / "new"))
    assert [line["step"] for line in old_then_new.metrics] == [line["step"] for line in new.metrics]
    for line, expected in zip(old_then_new.metrics, new.metrics, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        assert expected.keys() <= line.keys()
    assert old_then_new.results["inverse_model_accuracy"] == pytest.approx(
        new.results["inverse_model_accuracy"], abs=0.02
    )


@pytest.mark.parametrize("name", ["model.safetensors", CHECKPOINT])
def test_old_weights_are_evaluated(name: str, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    arguments = ["eval", "--dataset", "demo", "--ckpt_path", str(OLD / name), "--json", str(out)]
    assert launch.main([*arguments, "--measures", "online_classifier"]) == 0
    measures = json.loads(out.read_text())["measures"]
    results = json.loads((OLD / "results.json").read_text())
    if name == "model.safetensors":
        assert measures["online_classifier"]["accuracy"] == pytest.approx(results["probe_after"], abs=0.01)


def test_old_weights_are_exported(tmp_path: Path) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = stec.load_encoder(OLD / "encoder.safetensors")(images)
    source = tmp_path / "run"
    shutil.copytree(OLD, source)
    (source / CHECKPOINT).unlink()  # older than the weights
    assert launch.main(["export", str(source), str(tmp_path / "hub"), "--format", "huggingface"]) == 0
    torch.testing.assert_close(stec.load_encoder(tmp_path / "hub")(images), expected)
    assert (
        launch.main(["export", str(source / "model.safetensors"), str(tmp_path / "f.safetensors"), "--format", "full"])
        == 0
    )
    assert "classifier.weight" in load_file(tmp_path / "f.safetensors")


def test_an_old_run_is_read_with_the_present_names() -> None:
    record = read_run(OLD)
    assert record.config is not None and record.config.data.max_bad_fraction == 0.5
    assert {"online_classifier_after", "linear_probing_before", "wait_fraction"} <= record.results.keys()
    names = {"contrastive_loss", "inverse_loss", "inverse_accuracy", "classifier_loss", "wait_fraction"}
    assert all(names <= line.keys() for line in record.metrics) and len(record.metrics) == 8
    assert np.isfinite([line["loss"] for line in record.metrics]).all()


def test_an_old_flag_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--max_bad_share", "0.25", "--print_config"]) == 0
    assert json.loads(capsys.readouterr().out)["max_bad_fraction"] == 0.25


def test_a_removed_setting_is_read(tmp_path: Path) -> None:
    """With the value that all runs have now."""
    (tmp_path / "config.json").write_text(json.dumps({"executor": "fused", "width": 8}))
    config, _ = parse_train(["--config", str(tmp_path / "config.json")])
    assert config.model.width == 8
