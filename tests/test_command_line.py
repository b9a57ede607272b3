"""Flags, recipes, config files, and what the user reads when one of them is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from stec.config import TrainConfig
from stec.recipes import RECIPES, recipe

ROOT = Path(__file__).parents[1]


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert launch.main([*arguments, "--print_config"]) == 0
    config: dict[str, object] = json.loads(capsys.readouterr().out)
    return config


def test_without_flags_it_is_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed_config(capsys) == recipe("demo").to_json()
    assert printed_config(capsys, "--max_epochs", "2") == dataclasses.replace(recipe("demo"), max_epochs=2).to_json()


def test_a_data_set_without_recipe_has_the_official_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, "--dataset", "cifar10", "--data_dir", "/data")
    assert (config["batch_size"], config["max_epochs"], config["optimizer"]) == (1024, 1000, "lars")
    assert config["data_dir"] == "/data"


def test_flags_beat_file_beats_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"feat_dim": 7, "batch_size": 8, "learning_rate": 2}))
    config = printed_config(
        capsys, "--recipe", "cifar10-resnet18", "--config", str(file), "--batch_size", "9", "--data_dir", "/d"
    )
    assert (config["temperature"], config["feat_dim"], config["batch_size"]) == (0.5, 7, 9)
    assert config["learning_rate"] == 2.0


def test_a_printed_config_is_a_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = printed_config(capsys, "--recipe", "cifar10-resnet18", "--data_dir", "/d", "--limit_train", "5")
    (tmp_path / "config.json").write_text(json.dumps(first))
    assert printed_config(capsys, "--config", str(tmp_path / "config.json")) == first


WRONG = {
    "unknown command": (["trian"], "trian is no command"),
    "unknown recipe": (["--recipe", "cifar10-resnet81"], "did you mean cifar10-resnet18"),
    "unknown data set": (["--dataset", "mnist"], "invalid choice 'mnist'"),
    "unknown architecture": (["--arch", "resnet19"], "invalid choice 'resnet19'"),
    "misspelt flag": (["--bach_size", "3"], "--batch_size"),
    "no data folder": (["--dataset", "cifar10"], "needs --data_dir"),
    "missing data": (["--dataset", "cifar10", "--data_dir", "/nowhere"], "/nowhere holds neither"),
    "missing config file": (["--config", "/nowhere.json"], "--config /nowhere.json cannot be read"),
    "zero epochs": (["--max_epochs", "0"], "--max_epochs 0 is too small"),
    "negative learning rate": (["--learning_rate", "-1"], "--learning_rate -1.0 is too small"),
    "no number": (["--learning_rate", "fast"], "could not convert string to float: 'fast'"),
    "no probability": (["--p_grayscale", "nan"], "--p_grayscale nan is no probability"),
    "huge seed": (["--seed", "99999999999999999999"], "--seed 99999999999999999999 is too large"),
    "nan": (["--temperature", "nan"], "--temperature nan makes no sense"),
    "no sizes": (
        ["--resolution_schedule", "abc"],
        "schedule abc is no pair of sizes in px; give two whole numbers such as 16:32.",
    ),
    "one size": (["--resolution_schedule", "16"], "--resolution_schedule 16 is no pair of sizes"),
    "sizes that shrink": (["--resolution_schedule", "32:16"], "--resolution_schedule 32:16 does not grow"),
    "sizes that stay": (["--resolution_schedule", "32:32"], "--resolution_schedule 32:32 does not grow"),
    "views of no size": (
        ["--resolution_schedule", "0:32"],
        "schedule 0:32 begins too small; begin at 16 px",
    ),
    "views that outgrow": (
        ["--resolution_schedule", "16:64"],
        "does not end at the size of the views, 16 px; let it",
    ),
    "views that stay small": (["--resolution_schedule", "16:24"], "or change that size by --view_size 24"),
    "unknown tracker": (
        ["--log_with", "tensorboard,tensorbord"],
        "--log_with tensorbord is no tracker; known are aim, clearml, comet_ml, dvclive, mlflow, swanlab, tensorboard,",
    ),
    "huge batch": (["--batch_size", "9000"], "only 8192 training images; use --batch_size 8192 or less"),
    "fp16 on a CPU": (["--mixed_precision", "fp16"], "needs a CUDA GPU"),
    "fewer processes than said": (["--gpus", "2"], "accelerate launch --multi_gpu --num_processes 2 launch.py"),
    "more images than there are": (["--limit_train", "10000"], "more than the 8192"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_told_in_a_sentence(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if case == "fp16 on a CPU":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    arguments, sentence = WRONG[case]
    if case != "unknown command":
        arguments = [*arguments, "--results_path", str(tmp_path / "run")]
    try:
        code = launch.main(arguments)
    except SystemExit as stop:  # tyro's own errors
        code = int(stop.code or 0)
    said = capsys.readouterr()
    assert code == 2
    plain = re.sub(r"[\s│]+", " ", said.out + said.err)
    assert sentence in plain
    assert "Traceback" not in plain
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"bach_size": 3}, "unknown key bach_size; did you mean batch_size?"),
        ({"batch_size": "many"}, "batch_size is 'many'; give a value of type int"),
        ({"use_solarization": 2}, "use_solarization is 2; give one of 0, 1"),
        ({"arch": None}, "arch is None; give one of 'resnet18', 'resnet50'"),
        ([], "holds no JSON object"),
    ],
)
def test_wrong_config_files(content: object, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert launch.main(["--config", str(tmp_path / "c.json"), "--print_config"]) == 2
    assert sentence in capsys.readouterr().err


def test_broken_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text('{"batch_size": ')
    assert launch.main(["--config", str(tmp_path / "c.json")]) == 2
    assert "is not valid JSON" in capsys.readouterr().err


def test_an_unwritable_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert launch.main(["--results_path", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, launch\ntry: launch.main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False")
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in done.stdout


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["recipes"]) == 0
    shown = capsys.readouterr().out
    for name in RECIPES:
        assert name in shown


EVAL = ["eval", "--dataset", "demo", "--arch", "resnet18", "--width", "4", "--ckpt_path"]


def test_evaluation_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert launch.main([*EVAL, str(tmp_path / "absent.ckpt")]) == 2
    assert "There is no file" in capsys.readouterr().err
    assert launch.main([*EVAL, str(tmp_path / "absent.ckpt"), "--batch_size", "0"]) == 2
    assert "--batch_size 0 is too small" in capsys.readouterr().err
    assert launch.main([*EVAL, str(tmp_path / "absent.ckpt"), "--json", str(tmp_path)]) == 2
    assert "name a file in an existing folder" in capsys.readouterr().err
    assert launch.main(["--recipe", "stl10-resnet18-linear-fit", "--gpus", "1"]) == 2
    assert "name its weights by --ckpt_path" in capsys.readouterr().err
