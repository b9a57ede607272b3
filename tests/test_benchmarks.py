"""Benchmarks: their figures are of what they say, and the files that they write can be read back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from benchmarks import (
    ablations,
    exactness,
    learning,
    nt_xent,
    quality,
    remote,
    report,
    roofline,
    scaling,
    stages,
    step,
    step_model,
    throughput,
)
from pipelines.datasets.images import ImageFiles
from pipelines.executors import torchvision as reference
from stec.cli.train import parse_train
from stec.console import Console
from stec.training.optim import Lars
from tests.runs import Run
from tests.test_data_sets import CIFAR10_FILES, random_batches, write_cifar10_binary, write_stl10

ROOT = Path(__file__).parents[1]
BRIEF = ["--batch_size", "4", "--workers", "1", "--repeats", "1", "--seconds", "0.01"]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that read 100 random images in CIFAR-10's layout."""
    root = tmp_path_factory.mktemp("cifar10")
    write_cifar10_binary(root, random_batches(CIFAR10_FILES, 10))
    return ["--dataset", "cifar10", "--data_dir", str(root)]


def run(
    main: Callable[[Sequence[str]], int], flags: list[str], folder: Path, picture: str = "--chart"
) -> dict[str, Any]:
    """What a benchmark writes as JSON; its picture is one."""
    assert main([*flags, "--json", str(folder / "f.json"), picture, str(folder / "f.png")]) == 0
    with Image.open(folder / "f.png") as image:
        image.load()
        assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 1, "something is drawn"
    written: dict[str, Any] = json.loads((folder / "f.json").read_text())
    assert written["machine"]["versions"].count("torch") and written["machine"]["date"]
    return written


def figures(written: dict[str, Any], repeats: int = 1) -> list[dict[str, list[float]]]:
    """The turns of each group of contenders."""
    groups = [part["turns"] for part in written["figures"]]
    assert all(len(values) == repeats for turns in groups for values in turns.values())
    return groups


def test_throughput_of_arrays(cifar10: list[str], tmp_path: Path) -> None:
    (speeds, main_thread) = figures(run(throughput.main, [*cifar10, *BRIEF], tmp_path))
    names = [name for contender, name in throughput.NAMES.items() if contender != "gpu"]
    assert list(speeds) == names and all(values[0] > 0 for values in speeds.values())
    total, *parts = (values[0] for values in main_thread.values())
    assert 0 < total < 1000 and sum(parts) == pytest.approx(total)


def test_throughput_of_files(photographs: ImageFiles, tmp_path: Path) -> None:
    flags = ["--dataset", "folder", "--data_dir", str(photographs.root), "--contenders", "v2", "compiled"]
    written = run(throughput.main, [*flags, *BRIEF], tmp_path)
    speeds, decoding, _ = figures(written)
    assert len(speeds) == 2 and len(decoding) == 3 and all(values[0] > 0 for values in decoding.values())
    assert "Decoding's share" in written["remarks"][0]


@pytest.mark.parametrize("kind", ["official", "v2"])
def test_the_baselines_draw_from_our_policy(cifar10: list[str], kind: Any) -> None:
    """Views of the right kind, and as different from the source as those of our own commands."""
    options = throughput.Options(dataset="cifar10", data_dir=Path(cifar10[-1]), batch_size=50, workers=1)
    torch.manual_seed(0)
    baseline = throughput.RandomViews(options.sampler().images, options.sampler().policy, kind)
    theirs = torch.stack([view for n in range(100) for view in baseline[n]])
    ours = exactness.make_views(
        options.sampler().images,
        options.sampler().policy,
        exactness.Options(views=200, workers=1),
        backend="dali",
    )
    assert theirs.shape == ours.shape and theirs.dtype == torch.float32
    assert float(theirs.min()) >= 0 and float(theirs.max()) <= 1
    # Contrast within views, colorfulness, and, for the size of the windows, how much neighbors differ.
    for measure in (
        lambda x: x.std(dim=(1, 2, 3)).mean(),
        lambda x: x.std(dim=1).mean(),
        lambda x: x.diff(dim=-1).abs().mean(),
    ):
        assert float(measure(theirs)) == pytest.approx(float(measure(ours)), rel=0.15)


def test_stages_of_arrays(cifar10: list[str], tmp_path: Path) -> None:
    through, alone = figures(run(stages.main, [*cifar10, *BRIEF], tmp_path))
    assert through["whole policy"][0] > 0 and "blur" not in through, "CIFAR-10's policy does not blur"
    assert {"crop, resize", "brightness", "hue", "gray", "output"} <= set(alone)
    assert all(0 < values[0] < 1000 for values in alone.values())


def test_stages_of_files(photographs: ImageFiles, tmp_path: Path) -> None:
    flags = ["--dataset", "folder", "--data_dir", str(photographs.root), *BRIEF]
    through, _ = figures(run(stages.main, flags, tmp_path))
    assert through["reading and decoding"][0] > 0 and {"blur", "solarize"} <= set(through)


def test_ablations(
    cifar10: list[str], photographs: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablations, "COUNTS", (1,))
    of_arrays = figures(run(ablations.main, [*cifar10, *BRIEF], tmp_path))
    flags = ["--dataset", "folder", "--data_dir", str(photographs.root), *BRIEF]
    of_files = figures(run(ablations.main, flags, tmp_path))
    assert "gathered into a batch" in of_arrays[-1] and "each crop box" in of_files[-1]


def test_nt_xent(tmp_path: Path) -> None:
    seconds, mib = figures(run(nt_xent.main, ["--views", "64", "--repeats", "1"], tmp_path))
    assert seconds.keys() == mib.keys() == {"whole matrix", "in chunks"}


def test_remote_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images are read in each way, and what was fetched is gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = "--images 16 --shards 4 --batch_size 4 --view_size 32 --shuffle_window 1 --repeats 1".split()
    (figures,) = run(remote.main, flags, tmp_path)["figures"]
    assert len(figures["turns"]) == 4 and min(value for values in figures["turns"].values() for value in values) > 0
    assert not list(tmp_path.rglob("*.tar"))


def test_the_step_model(capsys: pytest.CaptureFixture[str]) -> None:
    """On one GPU a step takes its arithmetic; on more, each part takes longer the more there are."""
    assert step_model.main(["--recipe", "cifar10-resnet18", "--compute_ms", "50", "--gpus", "1", "8", "1024"]) == 0
    assert "50.0" in capsys.readouterr().out
    options = step_model.Options(compute_ms=50)
    sizes = step_model.sizes_of(options)
    # torchvision's ResNet-50 without its classifier, and 53 of its batch norms.
    encoder = sum(p.numel() for name, p in torchvision.models.resnet50().named_parameters() if "fc" not in name)
    assert sizes.gradients > 4 * encoder and len(sizes.channels) > 53
    few, many = (step_model.step_ms(options, sizes, 210, gpus) for gpus in (8, 1024))
    assert all(few[part] < many[part] for part in few)


def test_alternatives_make_the_same_views(cifar10: list[str], photographs: ImageFiles) -> None:
    """What is compared does the same work."""
    arrays = throughput.PipelineOptions(dataset="cifar10", data_dir=Path(cifar10[-1]), batch_size=20).sampler()
    files = throughput.PipelineOptions(dataset="folder", data_dir=photographs.root, batch_size=8).sampler()
    assert torch.equal(next(ablations.by_gathering(arrays, 1)).movedim(-1, -3), next(ablations.by_loader(arrays, 1)))
    for part in ("the whole image", "the union of both crop boxes", "each crop box"):
        views = next(ablations.by_decoding(files, part, 1)).movedim(-1, -3)
        # At the borders of a part, chroma may be interpolated from within it alone.
        assert (views - next(ablations.by_loader(files, 1))).abs().mean() * 255 < 0.1


def test_exactness(cifar10: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solarize, largest = reference.solarize, []

    def watched(views: torch.Tensor) -> torch.Tensor:
        largest.append(float(views.max()))
        return solarize(views)

    monkeypatch.setattr(reference, "solarize", watched)
    flags = ["--cifar10", cifar10[-1], "--views", "40", "--workers", "1"]
    (rows,) = run(exactness.main, flags, tmp_path, "--picture")["rows"].values()
    assert all(row["mean"] <= row["largest"] for row in rows)
    means = {row["what"]: row["mean"] for row in rows if row["device"] == "CPU"}
    assert len(means) == 8 and means["solarize alone"] == means["gray alone"] == 0
    assert largest and min(largest) > 0.9, "it is given views that are not solarized yet"
    # The torchvision of the comparison leaves the hue as it is, too.
    assert means["jitter 0.5, hue off"] < 0.05 and 0 < means["jitter 1"] < 0.05


def test_exactness_tells_of_an_exceeded_limit() -> None:
    comparison = exactness.Comparison(policy=exactness.Policy(), limit=0.5)
    ours, theirs = torch.zeros(4, 3, 8, 8), torch.full((4, 3, 8, 8), 1 / 255)
    row = exactness.Row.of("shifted by one", "ours", comparison, ours, theirs)
    assert row.mean == pytest.approx(1) and row.largest == pytest.approx(1) and not row.kept
    assert "EXCEEDED" in row.cells()[-1]
    assert exactness.Row.of("same", "ours", comparison, ours, ours).kept


def test_contenders_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []

    def contender(name: str) -> Callable[[], float]:
        def turn() -> float:
            calls.append(name)
            return float(len(calls))

        return turn

    turns = report.take_turns({n: contender(n) for n in "ab"}, repeats=2, console=Console(enabled=False))
    assert "".join(calls) == "ababab"
    assert turns == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    (a, b) = report.Figures(title="", unit="", turns=turns).rows()
    assert a == ["a", "4", "3", "5", "1.00"] and b == ["b", "5", "4", "6", "1.25"]


WRONG = {
    "no data folder": (throughput.main, ["--dataset", "cifar10"], "needs --data_dir"),
    "no batch": (throughput.main, ["--batch_size", "0"], "--batch_size 0 must be more than 0"),
    "no time": (ablations.main, ["--seconds", "0"], "--seconds 0.0 must be more than 0"),
    "no turns": (stages.main, ["--repeats", "0"], "--repeats 0 must be more than 0"),
    "no views": (exactness.main, ["--views", "0"], "--views 0 must be more than 0"),
    "no GPUs": (step_model.main, ["--compute_ms", "69", "--gpus", "0", "1"], "--gpus 0 1 must be more than 0"),
    "no arithmetic": (step_model.main, ["--compute_ms", "0"], "--compute_ms 0.0 must be more than 0"),
    "a node of no GPUs": (step_model.main, ["--compute_ms", "69", "--gpus_per_node", "0"], "--gpus_per_node 0 must be"),
    "nothing trained": (roofline.main, ["--recipes", "stl10-resnet18-linear-probing"], "does not train its encoder"),
    "no turns of NT-Xent": (nt_xent.main, ["--repeats", "0"], "--repeats 0 must be more than 0"),
    "no features": (nt_xent.main, ["--feat_dim", "0"], "--feat_dim 0 must be more than 0"),
    "an odd number of views": (nt_xent.main, ["--views", "4", "5"], "--views 4 5 must be even"),
    "a batch of one": (step.main, ["--batch_size", "1"], "--batch_size 1 is too small"),
    "no such folder": (stages.main, ["--chart", "missing/c.png"], "missing/c.png cannot be written"),
}


@pytest.mark.parametrize(("main", "flags", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_ends_in_one_sentence(
    main: Callable[[Sequence[str]], int], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_batch_beyond_the_data_set_ends_in_one_sentence(
    cifar10: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughput.main([*cifar10, *BRIEF, "--batch_size", "101"]) == 2
    assert "only 100 training images" in capsys.readouterr().err


def generations(process_id: int) -> int:
    """How many there are below a process."""
    try:
        children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    except FileNotFoundError:
        return 0
    return max((1 + generations(int(child)) for child in children), default=0)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_ctrl_c_ends_in_one_sentence(cifar10: list[str], tmp_path: Path) -> None:
    """While a DataLoader works in a process of its own; nothing of it goes on."""
    flags = [*cifar10, *BRIEF, "--seconds", "600", "--contenders", "official", "--json", str(tmp_path / "f.json")]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.throughput", *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # The server that forks, the contender's process, the DataLoader's workers.
    measuring = wait_for(lambda: generations(process.pid) >= 3)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert measuring and process.returncode == 130
    assert error == "Interrupted; nothing was written.\n"
    assert not (tmp_path / "f.json").exists()

    def all_ended() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    assert wait_for(all_ended, seconds=30)


def test_the_step(cifar10: list[str], tmp_path: Path) -> None:
    flags = [
        *cifar10,
        "--width",
        "4",
        "--batch_size",
        "8",
        "--steps",
        "2",
        "--repeats",
        "1",
        "--workers",
        "1",
        "--baseline",
        "--copy",
    ]
    speeds, memory, parts, optimizers = figures(run(step.main, flags, tmp_path))
    assert list(speeds) == list(memory) == list(step.NAMES.values())
    assert all(values[0] > 0 for values in speeds.values())
    assert parts["step"][0] == max(values[0] for values in parts.values()) and parts["saving"] == [0]
    assert optimizers.keys() == {"SGD, torch, foreach", "LARS"}


def test_the_step_on_images_without_labels(tmp_path: Path) -> None:
    write_stl10(tmp_path)
    small = "--width 4 --batch_size 2 --steps 1 --repeats 1 --workers 1 --no_optimizers".split()
    speeds, _, parts = figures(run(step.main, ["--dataset", "stl10", "--data_dir", str(tmp_path), *small], tmp_path))
    assert speeds[step.NAMES["real"]][0] > 0 and parts["classifier loss"] == [0] and parts["base objective"][0] > 0


def test_the_plain_lars_is_ours() -> None:
    """What the plain loop does a parameter after the other is what training does at once."""
    outcomes = []
    for kind in (step.OfficialLars, Lars):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2, bias=False)
        optimizer = kind(layer.parameters(), lr=0.5, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        outcomes.append(layer.weight.detach())
    torch.testing.assert_close(*outcomes)


def test_scaling(tmp_path: Path) -> None:
    flags = "--width 4 --processes 1 2 --global_batch 8 --local_batch 4 --steps 1 --views 64 --shares 4 --repeats 1"
    fixed_global, fixed_local, gathers, shares = figures(run(scaling.main, flags.split(), tmp_path))
    assert len(fixed_global) == len(fixed_local) == 2
    assert gathers.keys() == {"64 views"} and shares.keys() == {"16 of 64 views"}


def test_the_counted_operations_are_the_published_ones() -> None:
    """torchvision's documentation has 4.09 billion multiplications for an image of 224 px, classifier included."""
    layers = roofline.encoder_layers("imagenet-resnet50")
    multiplications = sum(layer.forward_flops for layer in layers.values()) / 2 / 2 + 2048 * 1000
    assert multiplications == pytest.approx(4.09e9, rel=2e-3)
    # 3 x 3 x 64 of them for each of 64 channels of 56 x 56 pixels, two views; and as much for either gradient.
    layer = layers["layer1.0.conv2"]
    assert layer.forward_flops == layer.backward_flops / 2 == 2 * 2 * 9 * 64 * 64 * 56 * 56
    # In and out, 64 channels each, in 2 bytes.
    assert layer.forward_bytes == 2 * 2 * 2 * 64 * 56 * 56


def test_the_roofline(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--recipes", "cifar10-resnet18", "--batch_size", "64"]) == 0
    assert "which nobody measured" in capsys.readouterr().out


def test_quality(cifar10: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths are trained from the same start; runs that have ended are read and not made again."""
    made = []

    def launched(arguments: Sequence[str]) -> None:
        made.append(list(arguments))
        Run(*arguments).end()

    monkeypatch.setattr(quality, "run_launch", launched)
    flags = ["--data_dir", cifar10[-1], "--runs", str(tmp_path / "runs"), "--images", "40", "--seeds", "2"]
    flags += [
        "--objectives",
        "stec",
        "--max_epochs",
        "2",
        "--width",
        "4",
        "--batch_size",
        "8",
        "--learning_rate",
        "0.1",
    ]
    written = [tmp_path / "f.json", tmp_path / "f.md"]
    output = ["--json", str(written[0]), "--markdown", str(written[1])]
    assert quality.main([*flags, *output]) == 0
    assert len(made) == 4
    accuracies = json.loads(written[0].read_text())["accuracies"]
    assert {len(values) for of_kind in accuracies.values() for values in of_kind.values()} == {2}
    assert "| S-TEC, fp32 (no) |" in written[1].read_text() and " ± " in written[1].read_text()
    assert quality.main([*flags, *output]) == 0 and len(made) == 4
    assert quality.main([*flags, "--learning_rate", "0.2"]) == 2


def test_agreement_is_judged_by_the_deviation() -> None:
    near = quality.Comparison.of("S-TEC", "online_classifier", [0.50, 0.52, 0.54], [0.51, 0.53, 0.55])
    far = quality.Comparison.of("S-TEC", "online_classifier", [0.50, 0.51, 0.52], [0.60, 0.61, 0.62])
    assert near.agrees and not far.agrees and near.deviation == pytest.approx(0.02)
    assert quality.Comparison.of("S-TEC", "online_classifier", [0.5], [0.5]).agrees is None


def test_learning_reads_what_runs_measured(tmp_path: Path) -> None:
    """Runs that have ended are not made again; a cell is the mean and the deviation of the seeds."""
    r2 = {"ridge": 0.1, "mlp": 0.2, "ridge_shuffled": 0.0, "mlp_shuffled": 0.0}
    options = learning.Options(runs=tmp_path)
    copies: tuple[learning.Copy, ...] = ("alone", "full")
    for seed, accuracy in enumerate((0.3, 0.4)):
        for copy in copies:
            of_run = learning.Run(objective="byol", copy=copy, seed=seed)
            folder = of_run.folder(options).path
            folder.mkdir(parents=True)
            config, _ = parse_train(of_run.arguments(options))
            (folder / "config.json").write_text(json.dumps(config.to_json()))
            (folder / "results.json").write_text("{}")
            commands = {"x scale": r2, "hue": r2, "gray": {**r2, "mlp": 0.6}}
            measures = {
                "knn20": {"accuracy": accuracy},
                "linear_probing": {"accuracy": accuracy + 0.1},
                "rankme": {"rankme": 7.5},
                "parameters": {"commands": commands, "factors": {"x": r2, "scale": {**r2, "mlp": 0.4}}},
            }
            (folder / "eval.json").write_text(json.dumps({"measures": measures}))
    files = {name: tmp_path / f"table.{name}" for name in ("json", "markdown", "chart")}
    flags = ["--runs", str(tmp_path), "--seeds", "2", "--objectives", "byol", "--copies", "alone", "full"]
    assert learning.main([*flags, *(word for name, file in files.items() for word in (f"--{name}", str(file)))]) == 0
    written = json.loads(files["json"].read_text())["measures"]
    assert {kind: [one["kNN"] for one in of_kind] for kind, of_kind in written.items()} == {
        "byol, alone": [0.3, 0.4],
        "byol, full": [0.3, 0.4],
    }
    lines = files["markdown"].read_text().splitlines()
    columns, cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[2], lines[4]))
    row = dict(zip(columns, cells, strict=True))
    assert row["kNN"] == "35.0 ± 7.1" and row["linear probing"] == "45.0 ± 7.1" and row["RankMe"] == "7.50 ± 0.00"
    assert row["R2 of gray"] == "0.60 ± 0.00" and row["R2 of factors"] == "0.30 ± 0.00" and "R2 of blur" not in row
    with Image.open(files["chart"]) as chart:
        assert chart.format == "PNG" and chart.width > 800
    assert learning.main([*flags, "--flags=--learning_rate 0.1"]) == 2
