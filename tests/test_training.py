"""Complete runs through the command line."""

from __future__ import annotations

import gzip
import json
import math
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from stec.runs import checkpoint
from stec.runs.run_folder import INVERSE_RESULTS
from stec.training.precision import resolve_precision
from stec.weights.pretrained import load_encoder
from tests.conftest import smooth_image
from tests.runs import Run, SignalAtStep, together

ROOT = Path(__file__).parents[1]
SMALL = (
    "--limit_train 160 --batch_size 32 --width 4 --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 --max_epochs 2 "
    "--log_every 2 --num_workers 1"
).split()


def run_on(processes: int, *arguments: str | Path) -> str:
    """Run on several processes through Accelerate's launcher; returns the output."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launcher += ["--main_process_port", "0"]
    command = [*launcher, str(ROOT / "launch.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
    process = Run(*SMALL, *arguments)
    process.end(code)
    return process.out, process.err


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run and its output."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    out, _ = run("--results_path", folder)
    return folder, out


def test_a_run_leaves_everything_behind(finished: tuple[Path, str]) -> None:
    folder, out = finished
    for expected in ("kNN (k = 20) top-1", "inverse model", "fraction of time waiting for data", str(folder)):
        assert expected in out
    assert out.count("epoch 1/2 ") == out.count("epoch 2/2 ") == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoint-00000005.pt",
        "checkpoint-00000010.pt",
        "config.json",
        "encoder.safetensors",
        "metrics.jsonl",
        "model.safetensors",
        "results.json",
        "starts.jsonl",
    ]
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10]
    assert [line["steps"] for line in lines] == [2, 2, 1, 1, 2, 2]
    results = json.loads((folder / "results.json").read_text())
    assert all(0 <= results[name] <= 1 for name in ("knn20_before", "linear_probing_after", "inverse_model_accuracy"))


def test_exported_weights_are_the_trained_ones(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    model, encoder = load_file(folder / "model.safetensors"), load_file(folder / "encoder.safetensors")
    trained = torch.load(folder / "checkpoint-00000010.pt", weights_only=True)["model"]
    assert model.keys() == trained.keys()
    for name, tensor in model.items():
        assert torch.equal(tensor, trained[name])
    assert {f"encoder.{name}" for name in encoder} == {name for name in model if name.startswith("encoder.")}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["stec"])["step"] == 10


def test_the_same_run_twice_is_bit_equal_also_if_it_is_evaluated_meanwhile(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """In weights, optimizer, random state and metrics; an evaluation of the last weights is that of ``eval``."""
    folder, _ = finished
    second = tmp_path / "second"
    out, _ = run("--results_path", second, "--eval_every", "1")
    for name in ("model.safetensors", "encoder.safetensors"):
        assert (second / name).read_bytes() == (folder / name).read_bytes()
    for step in (5, 10):
        states = [torch.load(run / f"checkpoint-{step:08d}.pt", weights_only=True) for run in (folder, second)]
        for name in ("model", "optimizer", "rng", "epoch_rows", "last_epoch"):
            torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0)
    lines = metrics(second)
    assert [line["step"] for line in lines if {"knn", "rankme"} <= line.keys()] == [5, 10]
    varying = ("images_per_second", "wait_fraction", "knn", "rankme")
    for line, expected in zip(lines, metrics(folder), strict=True):
        assert {k: v for k, v in line.items() if k not in varying} == {
            k: v for k, v in expected.items() if k not in varying
        }
    assert lines[-1]["knn"] == json.loads((second / "results.json").read_text())["knn20_after"]
    assert f"RankMe {lines[-1]['rankme']:.1f}" in out and f"kNN {lines[-1]['knn']:.2f}" in out
    evaluation = "eval --dataset demo --measures rankme --mixed_precision auto --ckpt_path".split()
    Run(*evaluation, second, "--json", tmp_path / "eval.json").end()
    measured = json.loads((tmp_path / "eval.json").read_text())["measures"]["rankme"]["rankme"]
    assert lines[-1]["rankme"] == pytest.approx(measured, rel=1e-5)


def test_a_run_can_be_repeated_from_its_config(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    command = [sys.executable, ROOT / "launch.py", "--config", folder / "config.json", "--results_path", tmp_path / "x"]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_ctrl_c_saves_and_resuming_changes_nothing(finished: tuple[Path, str], tmp_path: Path) -> None:
    """A run that was stopped in the middle of an epoch ends with the same bits, and every step is logged once."""
    folder, _ = finished
    interrupted = tmp_path / "interrupted"
    stopped = Run(*SMALL, "--results_path", interrupted, prepare=SignalAtStep(3, signal.SIGINT))
    stopped.end(130)
    assert stopped.err.startswith("Stopped after step 3 of 10") and "--resume auto" in stopped.err
    assert list(checkpoint.checkpoints(interrupted)) == [3]
    assert not list(interrupted.glob(".*.tmp"))

    out, _ = run("--results_path", interrupted, "--resume", "auto")
    assert "Resuming after step" in out
    assert (interrupted / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sum(line["steps"] for line in metrics(interrupted)) == 10


@pytest.mark.parametrize("recipe", ["demo-byol", "demo-relic"])
def test_a_killed_run_with_a_target_network_ends_with_the_same_bits(recipe: str, tmp_path: Path) -> None:
    """With all that the inverse model can predict. The target network is exported on request, and differs."""
    copy = "--predict window color blur solarize gray --use_gaussian_blur 1 --use_solarization 1".split()
    options = ["--recipe", recipe, *SMALL, *copy, "--predict_both_ways", "1", "--inverse_from", "layer3"]
    Run(*options, "--results_path", tmp_path / "whole").end()
    killed = ["--results_path", tmp_path / "killed", "--checkpoint_every_steps", "2"]
    Run(*options, *killed, prepare=SignalAtStep(4, signal.SIGKILL)).end(-signal.SIGKILL)
    Run(*options, *killed, "--resume", "auto").end()
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert {name for name in results if name.startswith("inverse_model")} == set(INVERSE_RESULTS)

    exported = []
    for weights in ("online", "target"):
        out = tmp_path / weights
        Run("export", tmp_path / "whole", out, "--format", "huggingface", "--weights", weights).end()
        exported.append(load_encoder(out).conv1.weight)
    assert torch.equal(exported[0], whole["encoder.conv1.weight"])
    assert torch.equal(exported[1], whole["target_network.encoder.conv1.weight"])
    assert not torch.equal(*exported)


def test_an_existing_run_is_not_overwritten(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = {path: path.read_bytes() for path in folder.iterdir()}
    _, err = run("--results_path", folder, code=2)
    assert "already holds a run" in err and "--resume auto" in err
    _, err = run("--results_path", folder, "--resume", "auto", "--learning_rate", "0.5", code=2)
    assert "--learning_rate was 0.003 and is now 0.5" in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_resumed_run_keeps_precision_and_metrics(finished: tuple[Path, str], tmp_path: Path) -> None:
    """The precision of ``auto`` is checked; a damaged metrics file loses only its damaged lines."""
    folder, _ = finished
    resumed = tmp_path / "resumed"
    shutil.copytree(folder, resumed)
    (resumed / "checkpoint-00000010.pt").unlink()
    (resumed / "checkpoint-best.pt").write_text("the user's own")
    lines = (resumed / "metrics.jsonl").read_text().splitlines()
    (resumed / "metrics.jsonl").write_text("\n".join(["no json", "5", *lines[:3], '{"step": 9']))
    _, err = run("--results_path", resumed, "--resume", "auto", "--backend", "torchvision", code=2)
    assert "--backend was auto and is now torchvision" in err
    run("--results_path", resumed, "--resume", "auto")
    assert (resumed / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert [line["step"] for line in metrics(resumed)] == [2, 4, 5, 6, 8, 10]
    assert (resumed / "checkpoint-best.pt").exists()
    results = [json.loads((path / "results.json").read_text()) for path in (folder, resumed)]
    assert results[0]["inverse_model_accuracy"] == results[1]["inverse_model_accuracy"]

    state = torch.load(folder / "checkpoint-00000010.pt", weights_only=True)
    state["environment"]["precision"] = "fp8"
    (resumed / "config.json").unlink()
    checkpoint.save(resumed, 10, state, keep=2, keep_every_steps=None)
    _, err = run("--results_path", resumed, code=2)
    assert "already holds a run" in err
    _, err = run("--results_path", resumed, "--resume", "auto", code=2)
    assert "--mixed_precision was resolved to fp8 and is now resolved to" in err


def test_a_run_resumes_with_another_number_of_processes(finished: tuple[Path, str], tmp_path: Path) -> None:
    """If the global batch remains 32; otherwise the error names both."""
    folder, _ = finished
    resumed = tmp_path / "resumed"
    shutil.copytree(folder, resumed)
    (resumed / "checkpoint-00000010.pt").unlink()
    before = {path: path.read_bytes() for path in resumed.iterdir()}
    _, err = run("--results_path", resumed, "--resume", "auto", "--batch_size", "16", code=2)
    assert {path: path.read_bytes() for path in resumed.iterdir()} == before
    assert "has a global batch of 32, but --batch_size 16 on 1 process(es) makes 16" in err
    out = run_on(2, *SMALL, "--results_path", resumed, "--resume", "auto", "--batch_size", "16")
    assert "Resuming after step 5." in out
    assert [line["step"] for line in metrics(resumed)] == [2, 4, 5, 6, 8, 10]


def test_stl10_trains_the_online_classifier_on_labeled_images(tmp_path: Path) -> None:
    """Pre-training on unlabeled images, then linear probing, with fewer labeled images than unlabeled ones."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("unlabeled", 40), ("train", 12), ("test", 20)):
        rng.integers(0, 256, (count, 3, 96, 96), np.uint8).tofile(folder / f"{split}_X.bin")
        if split != "unlabeled":
            rng.integers(1, 11, count).astype(np.uint8).tofile(folder / f"{split}_y.bin")
    stl10 = [*"--dataset stl10 --limit_train 32 --batch_size 16 --warmup_epochs 1 --data_dir".split(), tmp_path]
    both = ["--use_solarization", "1", "--use_gaussian_blur", "1", "--manip_lambda", "0.3"]
    run(*stl10, *both, "--results_path", tmp_path / "run")
    assert all(math.isfinite(line["classifier_loss"]) for line in metrics(tmp_path / "run"))
    weights = ["--ckpt_path", tmp_path / "run" / "model.safetensors", "--stop_gradient", "2"]
    run(*stl10, *weights, "--results_path", tmp_path / "probing")


@pytest.fixture
def custom_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 40 pictures without labels, one of which is truncated, and a separate cache for the index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for n in range(40):
        file = folder / ("more" if n % 3 else "") / f"{n}.{'png' if n % 4 == 0 else 'jpg'}"
        Image.fromarray(smooth_image(40 + n, 90 - n, seed=n)).save(file)
    cut = folder / "more" / "7.jpg"
    cut.write_bytes(cut.read_bytes()[:900])
    return folder


FOLDER = (
    "--dataset folder --manip_lambda 1 --view_size 32 --limit_train 40 --batch_size 8 --max_epochs 1 --warmup_epochs 0"
).split()


def test_a_folder_of_images_needs_no_labels_and_may_have_bad_images(custom_dataset: Path, tmp_path: Path) -> None:
    """There is no online classifier, and of the evaluations RankMe alone; the bad image is listed once, also after a
    resume."""
    run_folder = tmp_path / "run"
    arguments = [*FOLDER, "--data_dir", custom_dataset, "--results_path", run_folder, "--max_bad_fraction", "0.05"]
    out, err = run(*arguments, "--eval_every", "1")
    assert "knn" not in metrics(run_folder)[-1] and metrics(run_folder)[-1]["rankme"] > 1
    assert "40 training images (1 of them bad), no labels" in out and "online_classifier" not in out
    assert err.count("more/7.jpg") == 1
    assert (run_folder / "bad-images.tsv").read_text().count("\n") == 1
    results = json.loads((run_folder / "results.json").read_text())
    assert results.keys() == {"inverse_model_accuracy", "images_per_second", "wait_fraction"}
    assert not any(name.startswith("classifier") for name in load_file(run_folder / "model.safetensors"))

    before = (run_folder / "model.safetensors").read_bytes()
    for left in ("checkpoint-00000005.pt", "model.safetensors", "encoder.safetensors", "results.json"):
        (run_folder / left).unlink()
    out, err = run(*arguments, "--resume", "auto")
    assert "40 training images (1 of them bad)" in out and "7.jpg" not in err
    assert (run_folder / "model.safetensors").read_bytes() == before

    _, err = run(*arguments[:-4], "--results_path", tmp_path / "x", code=2)
    assert "1 of 40 training images are bad" in err and "more than --max_bad_fraction 0.01" in err


def test_shards_of_images(custom_dataset: Path, tmp_path: Path) -> None:
    """The same images in tar shards lead to the same weights, if all of them are shuffled."""
    (custom_dataset / "more" / "7.jpg").unlink()
    files = sorted(path for path in custom_dataset.rglob("*") if path.is_file())
    (tmp_path / "shards").mkdir()
    # The index has the files of a folder before those of its subfolders.
    files = sorted(files, key=lambda path: (str(path.parent), path.name))
    for k in range(4):
        with tarfile.open(tmp_path / "shards" / f"{k}.tar", "w") as archive:
            for n, path in list(enumerate(files))[10 * k : 10 * k + 10]:
                archive.add(path, f"{n:03d}{path.suffix}")
    arguments = [*FOLDER, "--limit_train", "39", "--shuffle_window", "0"]
    for name, data_dir in (("loose", custom_dataset), ("shards", tmp_path / "shards")):
        run(*arguments, "--data_dir", data_dir, "--results_path", tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors") for name in ("loose", "shards")]
    one, two = (load_file(file) for file in weights)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_is_not_resumed_on_other_images(custom_dataset: Path, tmp_path: Path) -> None:
    """As many, but one is another one."""
    arguments = [*FOLDER, "--max_bad_fraction", "0.1", "--data_dir", custom_dataset, "--results_path", tmp_path / "run"]
    Run(*arguments, prepare=SignalAtStep(2, signal.SIGTERM)).end()
    (custom_dataset / "0.png").unlink()
    Image.fromarray(smooth_image(64, 64, seed=99)).save(custom_dataset / "other.png")
    assert "--data_dir held other training images" in Run(*arguments, "--resume", "auto").end(2)
    changed = Run(*arguments, "--resume", "auto", "--allow_changes", "1").end()
    assert "--data_dir held other training images" in changed and "Resuming after step 2." in changed


def test_gradient_accumulation_of_the_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    _, err = run("--results_path", tmp_path / "run", code=2)
    assert "4 gradient accumulation steps" in err


def test_compiling_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    _, err = run("--results_path", tmp_path / "run", "--compile", "1", code=2)
    assert "--compile 1 needs a C++ compiler, but there is no no-such-compiler" in err


def test_a_profile(tmp_path: Path) -> None:
    """The parts of a step add up to the step, and the trace has them."""
    out, err = run("--results_path", tmp_path / "run", "--profile", "4")
    assert "profiler" not in err  # the library prints nothing
    parts = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert "4 steps; trace in" in out and "backward" in out
    step = parts.pop("step")
    assert step == pytest.approx(sum(ms for name, ms in parts.items() if "within" not in name))
    assert parts["encoder"] > 0 and parts["backward"] > 0 and parts["other"] < 0.5 * step
    with gzip.open(tmp_path / "run" / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert {name: names.count(name) for name in ("encoder", "heads", "base objective", "optimizer")} == dict.fromkeys(
        ("encoder", "heads", "base objective", "optimizer"), 4
    )
    assert not list((tmp_path / "run").glob(".*.tmp"))
    _, err = run("--results_path", tmp_path / "short", "--profile", "100", code=2)
    assert "--profile 100 needs 103 steps" in err and "only 10" in err


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """The error names the step and its positions, and no checkpoint holds the weights after it."""
    _, err = run("--results_path", tmp_path / "run", "--learning_rate", "1e30", "--optimizer", "sgd", code=2)
    assert "The loss became" in err and "positions" in err
    assert not list((tmp_path / "run").glob("*.pt")) + list((tmp_path / "run").glob("*.safetensors"))


def test_simclr_runs_without_an_inverse_model(tmp_path: Path) -> None:
    out, _ = run(
        "--results_path", tmp_path / "run", "--manip_lambda", "0", "--max_epochs", "1", "--backend", "torchvision"
    )
    assert "SimCLR" in out
    assert "inverse_model_accuracy" not in json.loads((tmp_path / "run" / "results.json").read_text())
    assert not any(name.startswith("inverse") for line in metrics(tmp_path / "run") for name in line)


def test_several_processes_train_and_evaluate_together(tmp_path: Path) -> None:
    """One of them prints and writes, and evaluation counts every image once on 1, 2 and 3 processes."""
    flags = ["--max_epochs", "1", "--gpus", "2", "--eval_every", "1"]
    out = run_on(2, *SMALL, "--results_path", tmp_path / "run", *flags)
    assert "2 process(es)" in out and out.count("epoch 1/1 ") == 1
    (line,) = metrics(tmp_path / "run")
    assert line["step"] == 2 and line["rankme"] > 1
    assert line["knn"] == json.loads((tmp_path / "run" / "results.json").read_text())["knn20_after"]
    evaluation = "eval --dataset demo --width 4 --measures online_classifier linear_probing knn --ckpt_path".split()
    evaluation.append(str(tmp_path / "run" / "model.safetensors"))
    results = []
    for count in (1, 2, 3):
        evaluating = together(count, *evaluation, "--json", tmp_path / f"{count}.json")
        for process in evaluating:
            process.end()
        assert [bool(process.out) for process in evaluating] == [True] + [False] * (count - 1)
        results.append(evaluating[0].out.splitlines()[-3:])
    alone = results[0]
    assert results == [alone] * 3
    assert alone[-1].startswith("accuracy 0.") and len(alone[-1]) == len("accuracy 0.6680")
    written = json.loads((tmp_path / "2.json").read_text())
    assert f"accuracy {written['accuracy']:.4f}" == alone[-1]


def test_linear_probing_trains_only_the_classifier(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    weights = folder / "model.safetensors"
    flags = "--stop_gradient 2 --reinitialize_supervised_head 1 --optimizer sgd --learning_rate 0.1 --feat_dim 99"
    out, _ = run("--results_path", tmp_path / "probing", "--ckpt_path", weights, *flags.split())
    assert "Linear probing" in out
    before, after = load_file(weights), load_file(tmp_path / "probing" / "model.safetensors")
    assert {name.split(".")[0] for name in after} == {"encoder", "classifier"}
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_training_starts_from_given_weights(finished: tuple[Path, str], tmp_path: Path) -> None:
    """With a learning rate of 0 they remain the same, except for the statistics of batch norm."""
    folder, _ = finished
    weights = folder / "checkpoint-00000010.pt"
    run("--results_path", tmp_path / "run", "--ckpt_path", weights, "--learning_rate", "0", "--max_epochs", "1")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    for name in before:
        assert torch.equal(before[name], after[name]) or "running" in name or "num_batches" in name, name
    _, err = run("--results_path", tmp_path / "x", "--ckpt_path", weights, "--arch", "resnet50", code=2)
    assert "does not fit the model" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("limit", "precision"),
    [("AVX2", "no"), ("avx512_core", "no"), ("AVX512_CORE_BF16", "bf16"), ("AVX512_CORE_AMX", "bf16"), ("ALL", "bf16")],
)
def test_bf16_is_chosen_only_within_the_instructions_that_may_be_used(
    limit: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert resolve_precision("auto", torch.device("cpu")) == precision
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="reads Linux's flags of x86")
def test_the_instruction_sets_are_those_of_the_processor() -> None:
    """The functions of ``torch.cpu`` are not public: if PyTorch changes them, ``auto`` needs another way to ask."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    assert torch.cpu._is_avx512_bf16_supported() == ("avx512_bf16" in flags)
    assert torch.cpu._is_amx_tile_supported() == ("amx_tile" in flags)
