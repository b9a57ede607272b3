"""Flags, recipes and config files, valid and invalid."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import launch
from pipelines.errors import UserError
from stec.cli.embed import EmbedConfig
from stec.cli.evaluate import EvalConfig
from stec.cli.export import ExportConfig
from stec.cli.flags import ALIASES, parse
from stec.cli.import_checkpoint import ImportConfig
from stec.cli.index import IndexConfig
from stec.cli.preview import PreviewConfig
from stec.cli.report import ReportConfig
from stec.config import TrainConfig, with_settings
from stec.recipes import RECIPES, recipe
from stec.settings import check_ranges, fields_of, settings_of
from tests.runs import Prepare, Run

ROOT = Path(__file__).parents[1]


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert launch.main([*arguments, "--print_config"]) == 0
    config: dict[str, object] = json.loads(capsys.readouterr().out)
    return config


def test_without_flags_it_is_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed_config(capsys) == recipe("demo").to_json()
    assert printed_config(capsys, "--max_epochs", "2") == recipe("demo").updated(max_epochs=2).to_json()


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
    "unknown architecture": (["--arch", "resnet19"], "--arch resnet19 is no architecture; did you mean resnet18?"),
    "misspelt flag": (["--bach_size", "3"], "--batch_size"),
    "no data folder": (["--dataset", "cifar10"], "needs --data_dir"),
    "missing data": (["--dataset", "cifar10", "--data_dir", "/nowhere"], "/nowhere holds neither"),
    "missing config file": (["--config", "/nowhere.json"], "--config /nowhere.json cannot be read"),
    "zero epochs": (["--max_epochs", "0"], "--max_epochs 0 is too small"),
    "negative learning rate": (["--learning_rate", "-1"], "--learning_rate -1.0 is too small"),
    "no number": (["--learning_rate", "fast"], "could not convert string to float: 'fast'"),
    "no probability": (["--p_grayscale", "nan"], "--p_grayscale nan"),
    "huge seed": (["--seed", "99999999999999999999"], "--seed 99999999999999999999 is too large"),
    "nan": (["--temperature", "nan"], "--temperature nan"),
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
        "does not end at the size of the views, 16 px",
    ),
    "views that stay small": (["--resolution_schedule", "16:24"], "or change that size by --view_size 24"),
    "unknown tracker": (
        ["--log_with", "tensorboard,tensorbord"],
        "--log_with tensorbord is no tracker; known are aim, clearml, comet_ml, dvclive, mlflow, swanlab, tensorboard,",
    ),
    "infinite learning rate": (["--learning_rate", "inf"], "--learning_rate inf is not finite"),
    "no path": (["--data_dir", ""], "--data_dir"),
    "no config file": (["--config", ""], "--config"),
    "another trainer's flag": (["--lr", "0.1"], "--learning_rate"),
    "another trainer's flag with =": (["--epochs=3"], "--max_epochs"),
    "one image": (["--limit_train", "1"], "train on 2 images or more"),
    "huge batch": (["--batch_size", "9000"], "only 8192 training images; use --batch_size 8192 or less"),
    "fp16 on a CPU": (["--mixed_precision", "fp16"], "needs a CUDA GPU"),
    "fewer processes than requested": (["--gpus", "2"], "accelerate launch --multi_gpu --num_processes 2 launch.py"),
    "more images than there are": (["--limit_train", "10000"], "more than the 8192"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_input_ends_in_one_sentence(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
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
    output = capsys.readouterr()
    assert code == 2
    plain = re.sub(r"[\s│]+", " ", output.out + output.err)
    assert sentence in plain
    assert "Traceback" not in plain
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"bach_size": 3}, "unknown key bach_size; did you mean batch_size?"),
        ({"batch_size": "many"}, "batch_size is 'many'; give a value of type int"),
        ({"use_solarization": 2}, "use_solarization is 2; give one of 0, 1"),
        ({"optimizer": None}, "optimizer is None; give one of 'lars', "),
        ({"executor": "dali"}, "unknown key executor"),
        ({"normalize": "mean"}, "normalize is 'mean'; give one of 'none', "),
        ({"predict": "window"}, "predict is 'window'; give a list"),
        ({"manip_weights": ["1"]}, "manip_weights is '1'; give a value of type float"),
        ([], "holds no JSON object"),
    ],
)
def test_wrong_config_files(content: object, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert launch.main(["--config", str(tmp_path / "c.json"), "--print_config"]) == 2
    assert sentence in capsys.readouterr().err


def test_every_choice_of_a_setting_is_read_from_a_file() -> None:
    """Also of one that may have no value."""
    read = 0
    for group in dataclasses.fields(TrainConfig):
        for name, declared in typing.get_type_hints(type(group.default)).items():
            is_union = types.NoneType in typing.get_args(declared)
            for kind in typing.get_args(declared) if is_union else (declared,):
                for value in typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ():
                    config = with_settings(TrainConfig(), {name: value}, "c.json")
                    assert value_of(config, name) == config.to_json()[name] == value
                    read += 1
    assert read > 60


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
    for field in fields_of(TrainConfig):
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
    assert "cannot be written" in capsys.readouterr().err
    assert launch.main(["--recipe", "stl10-resnet18-linear-probing", "--gpus", "1"]) == 2
    assert "name its weights by --ckpt_path" in capsys.readouterr().err


# --- Every flag of every command ---

NEEDED: dict[type, list[str]] = {
    TrainConfig: [],
    EvalConfig: ["--dataset", "demo", "--ckpt_path", "w"],
    EmbedConfig: ["~/a", "--dataset", "demo", "--ckpt_path", "w"],
    IndexConfig: ["~/a"],
    ImportConfig: ["~/a", "~/b"],
    ExportConfig: ["~/a", "~/b", "--format", "full"],
    PreviewConfig: ["~/a"],
    ReportConfig: ["~/a", "~/b"],
}
"""The arguments that each command's configuration needs; those with a tilde are its positional ones."""


def value_of(config: Any, name: str) -> Any:
    return {field.name: value for field, value in settings_of(config)}[name]


PATH_FLAGS = [
    (kind, field.name)
    for kind in NEEDED
    for field in fields_of(kind)
    if "Path" in str(field.type) and "Positional" not in str(field.type)
]


@pytest.mark.parametrize(("kind", "name"), PATH_FLAGS)
def test_a_path_flag_knows_the_home_folder_and_is_not_empty(
    kind: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config: Any
    for argument in ([f"--{name}=~/x"], [f"--{name}", "~/x"]):
        config = parse(kind, [*NEEDED[kind], *argument], name="")
        assert value_of(config, name) == Path("/home/me/x")
    assert value_of(parse(kind, [*NEEDED[kind], f"--{name}", "."], name=""), name) == Path()
    with pytest.raises(SystemExit) as stop:
        parse(kind, [*NEEDED[kind], f"--{name}", ""], name="")
    assert stop.value.code == 2


@pytest.mark.parametrize("kind", [kind for kind, needed in NEEDED.items() if "~/a" in needed])
def test_positional_paths_too(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = [word for word in NEEDED[kind] if word.startswith("~/")]
    config: Any = parse(kind, NEEDED[kind], name="")
    values = [getattr(config, field.name) for field in dataclasses.fields(kind) if "Positional" in str(field.type)]
    flat = [path for value in values for path in (value if isinstance(value, tuple) else [value])]
    assert flat == [Path("/home/me") / word[2:] for word in given]
    for word in given:
        with pytest.raises(SystemExit) as stop:
            parse(kind, ["" if argument == word else argument for argument in NEEDED[kind]], name="")
        assert stop.value.code == 2


@pytest.mark.parametrize("name", [name for kind, name in PATH_FLAGS if kind is TrainConfig])
def test_paths_in_config_files_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert value_of(with_settings(TrainConfig(), {name: "~/x"}, "c.json"), name) == Path("/home/me/x")
    for empty in ("", "  ", "\0"):
        with pytest.raises(UserError, match=name):
            with_settings(TrainConfig(), {name: empty}, "c.json")


@pytest.mark.parametrize("name", [field.name for field in fields_of(TrainConfig) if field.type == "float"])
def test_numbers_are_finite(name: str) -> None:
    for value in (math.inf, -math.inf, math.nan):
        with pytest.raises(UserError, match=f"--{name} "):
            TrainConfig().updated(**{name: value}).validate()
        with pytest.raises(UserError, match=f"--{name} "):
            check_ranges(with_settings(TrainConfig(), json.loads(json.dumps({name: value})), "c.json"))


def test_flags_of_other_trainers_are_hinted_at() -> None:
    known = {kind: {field.name for field in fields_of(kind)} for kind in NEEDED}
    for alias, ours in ALIASES.items():
        kinds = [kind for kind in NEEDED if ours in known[kind] and alias not in known[kind]]
        assert kinds
        for kind in kinds:
            for flag in (f"--{alias}", f"--{alias.replace('_', '-')}=1", f"-{alias}"):
                with pytest.raises(UserError, match=f"--{ours} "):
                    parse(kind, [*NEEDED[kind], flag], name="")


@pytest.mark.parametrize("command", ["", *launch.COMMANDS])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        launch.main([*command.split(), flag])
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--version"]) == 0
    import stec

    assert stec.__version__ in capsys.readouterr().out


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z_]+", text))


def rejected(tmp_path: Path) -> dict[str, list[str]]:
    """Commands whose weights are rejected."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "torchvision.pth")
    run = tmp_path / "run"
    run.mkdir()
    (run / "starts.jsonl").write_text("{}\n")
    other = tmp_path / "other"
    other.mkdir()
    found = {}
    for name, source in {"stem": tmp_path / "torchvision.pth", "unfinished": run, "empty": other}.items():
        found[f"eval {name}"] = ["eval", "--dataset", "demo", "--ckpt_path", str(source)]
        found[f"embed {name}"] = ["embed", str(tmp_path / "o.npy"), "--dataset", "demo", "--ckpt_path", str(source)]
        found[f"export {name}"] = ["export", str(source), str(tmp_path / "x.pth"), "--format", "torchvision"]
    found["import folder"] = ["import", str(run), str(tmp_path / "x.safetensors")]
    found["report no run"] = ["report", str(other)]
    return found


def test_errors_name_flags_that_the_command_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for case, arguments in rejected(tmp_path).items():
        with pytest.raises(SystemExit):
            launch.main([arguments[0], "--help"])
        own = flags_in(capsys.readouterr().out)
        assert launch.main(arguments) == 2, case
        output = capsys.readouterr().err
        assert output.startswith("error: ") and flags_in(output) <= own, (case, output)


# --- Inputs ---


def test_inputs_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "results.json", "model.safetensors", "starts.jsonl", "checkpoint-00000004.pt"):
        (run / name).write_text(name)
    weights, data = tmp_path / "weights.safetensors", tmp_path / "data"
    weights.write_text("weights")
    data.mkdir()
    (data / "1.png").write_text("image")
    (run / "linked.json").symlink_to(weights)
    evaluate = ["eval", "--dataset", "folder", "--data_dir", data, "--ckpt_path"]
    shown = ["--dataset", "folder", "--data_dir", data]
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    rejected_commands: list[list[Any]] = [
        [*evaluate, weights, "--json", weights],
        [*evaluate, weights, "--json", run / "linked.json"],
        [*evaluate, run, "--json", run / "results.json"],
        [*evaluate, run / "model.safetensors", "--json", run / "config.json"],
        [*evaluate, run, "--json", run / "checkpoint-00000004.pt"],
        [*evaluate, weights, "--json", data / "1.png"],
        ["import", weights, weights],
        ["import", weights, run / "model.safetensors"],
        ["preview", data / "1.png", *shown],
    ]
    for arguments in rejected_commands:
        assert launch.main(list(map(str, arguments))) == 2
        assert "would overwrite" in capsys.readouterr().err, arguments
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before
    # Output of an earlier call may be overwritten.
    (run / "evaluation.json").write_text("{}")
    EvalConfig(dataset="demo", ckpt_path=run, json=run / "evaluation.json").validate()


# --- Launchers ---

ALL = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "RANK"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({name: value for name, value in ALL.items() if name != "MASTER_PORT"}, "MASTER_PORT"),
        ({"RANK": "x"}, "RANK"),
        ({**ALL, "RANK": ""}, "RANK"),
        ({**ALL, "WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({**ALL, "MASTER_PORT": "http"}, "MASTER_PORT"),
        ({**ALL, "LOCAL_WORLD_SIZE": "1.5"}, "LOCAL_WORLD_SIZE"),
        ({**ALL, "RANK": "2"}, "WORLD_SIZE"),
    ],
)
def test_an_incomplete_launcher_environment(
    environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [*ALL, "LOCAL_WORLD_SIZE"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.main(["recipes"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error") and named in output.err


@pytest.mark.parametrize(
    "environment", [{}, {"MASTER_ADDR": "h", "MASTER_PORT": "1"}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}]
)
def test_one_process_needs_no_environment(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.main(["recipes"]) == 0


FOLLOWER = """
import os, pathlib, signal, sys, time
from stec.distributed.launcher import exit_with_launcher
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "stopped").touch()
    sys.exit()
signal.signal(signal.SIGTERM, stop)
exit_with_launcher()
(folder / "started").write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can send a signal when the parent exits")
@pytest.mark.parametrize("parent", ["launcher", "shell"])
def test_training_stops_when_its_launcher_is_killed_but_not_when_a_shell_is(parent: str, tmp_path: Path) -> None:
    (tmp_path / "follower.py").write_text(FOLLOWER)
    script = [str(tmp_path / "follower.py"), str(tmp_path)]
    command = {
        "launcher": [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", *script],
        "shell": ["bash", "-c", f'"{sys.executable}" {" ".join(script)}; true'],
    }[parent]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        wait_for(tmp_path / "started")
        process.kill()
    follower = int((tmp_path / "started").read_text())
    try:
        if parent == "launcher":
            wait_for(tmp_path / "stopped")
        else:
            time.sleep(0.5)
            assert not (tmp_path / "stopped").exists()
            os.kill(follower, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(follower, signal.SIGKILL)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and (path.name == "stopped" or path.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


SMALL = "--limit_train 32 --batch_size 16 --width 4 --feat_dim 8 --manip_hidden_mlp 16 --max_epochs 1".split()
SMALL += ["--warmup_epochs", "0"]


@pytest.mark.parametrize(
    ("launchers", "flags", "precision", "printed"),
    [
        ("bf16", [], "bf16", "mixed_precision"),
        ("no", ["--mixed_precision", "bf16"], "bf16", "mixed_precision no"),
        ("bf16", ["--mixed_precision", "no"], "no", "mixed_precision bf16"),
    ],
)
def test_the_launchers_precision(
    launchers: str, flags: list[str], precision: str, printed: str, tmp_path: Path
) -> None:
    """Used if no flag is given; otherwise a line reports that it is ignored. Missing processes are reported, too."""
    environment = {"ACCELERATE_MIXED_PRECISION": launchers, "MASTER_ADDR": "127.0.0.1"}
    output = Run(*SMALL, *flags, "--results_path", tmp_path / "run", environment=environment).end()
    assert json.loads((tmp_path / "run" / "starts.jsonl").read_text())["precision"] == precision
    line = next(line for line in output.splitlines() if line.startswith("Precision "))
    assert f"Precision {precision}" in line and printed in line
    assert "configs/cpu-2.yaml" in output


def test_a_precision_of_the_launcher_that_is_not_supported(tmp_path: Path) -> None:
    environment = {"ACCELERATE_MIXED_PRECISION": "fp8"}
    assert "mixed_precision fp8" in Run("--results_path", tmp_path / "run", environment=environment).end(2)
    assert not (tmp_path / "run").exists()


# --- Output streams ---


@pytest.mark.parametrize("arguments", [["recipes"], ["--help"], ["eval", "--help"], ["--bogus"], ["trian"]])
def test_output_to_a_closed_pipe_is_no_error(arguments: list[str]) -> None:
    for target in ("closed pipe", "/dev/full"):
        if target == "/dev/full":
            if not Path(target).exists():
                continue
            end = os.open(target, os.O_WRONLY)
        else:
            reader, end = os.pipe()
            os.close(reader)
        command = [sys.executable, "launch.py", *arguments]
        helpful = set(arguments) & {"--help", "recipes"}
        done = subprocess.run(command, cwd=ROOT, stdout=end, stderr=subprocess.PIPE if helpful else end)
        os.close(end)
        assert done.returncode == (0 if helpful else 2)
        assert not done.stderr


def without_readers() -> None:
    reader, end = os.pipe()
    os.close(reader)
    for descriptor in (1, 2):
        os.dup2(end, descriptor)


def ascii_only() -> None:
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="ascii", errors="strict")


@pytest.mark.parametrize("prepare", [without_readers, ascii_only])
def test_a_run_is_saved_if_its_output_cannot_be_written(prepare: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "läuft"
    Run(*SMALL, "--results_path", folder, prepare=prepare).end()
    assert "online_classifier_after" in json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_tables_in_other_encodings(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for arguments in (["recipes"], ["--help"]):
        command = [sys.executable, "launch.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
        text = done.stdout.decode(encoding)
        assert text.isascii() and "?" not in text and "demo" in text and not done.stderr
