"""Training and evaluation from Python, in a program and in a notebook's kernel, against the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel
from safetensors.torch import load_file

import launch
import stec
import stec.api
from pipelines.datasets import demo
from tests.conftest import smooth_image
from tests.runs import SMALL_DEMO
from tests.test_docs import PAGES, fenced

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "limit_train": 64,
    "batch_size": 16,
    "width": 4,
    "feat_dim": 8,
    "manip_hidden_mlp": 16,
    "hidden_mlp": 16,
    "max_epochs": 2,
    "num_workers": 1,
    "mixed_precision": "no",
}


@pytest.fixture(autouse=True, scope="module")
def small_demo() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for split, count in SMALL_DEMO.items():
            patch.setitem(demo.IMAGES, split, count)
        yield


@pytest.fixture(scope="module")
def run(small_demo: None, tmp_path_factory: pytest.TempPathFactory) -> stec.Run:
    return stec.fit(stec.configure(**SMALL, results_path=str(tmp_path_factory.mktemp("api") / "run")))


def test_it_trains_as_the_command_line(run: stec.Run, tmp_path: Path) -> None:
    """To the same weights, results and settings."""
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    assert launch.main([*flags, "--results_path", str(tmp_path / "run")]) == 0
    weights, expected = (load_file(path / "model.safetensors") for path in (run.path, tmp_path / "run"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    there = stec.Run(tmp_path / "run")
    assert there.config == run.config.updated(results_path=tmp_path / "run")
    timed = ("images_per_second", "wait_fraction")
    here, results = ({k: v for k, v in of.results.items() if k not in timed} for of in (run, there))
    assert here == results and "knn20_after" in results


def test_it_evaluates_as_the_command_line(run: stec.Run, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    assert launch.main(["eval", "--dataset", "demo", "--ckpt_path", str(run.path), "--json", str(out)]) == 0
    measured = json.loads(out.read_text())["measures"]
    evaluation = run.evaluate()
    assert measured.pop("rankme")["rankme"] == pytest.approx(evaluation.rankme)
    factors = measured.pop("parameters")["factors"]
    assert {name: of.ridge for name, of in evaluation.factors.items()} == pytest.approx(
        {name: of["ridge"] for name, of in factors.items()}, abs=1e-3
    )
    assert {name: of.accuracy for name, of in evaluation.scores.items()} == pytest.approx(
        {name: of["accuracy"] for name, of in measured.items()}
    )
    assert list(run.evaluate("knn").scores) == ["knn20"]


def test_the_encoder_is_the_trained_one(run: stec.Run) -> None:
    expected = load_file(run.path / "encoder.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.encoder.state_dict().items())
    assert run.encoder.transform(torch.from_numpy(smooth_image(40, 50, 0)).permute(2, 0, 1)).shape == (3, 32, 32)


def test_the_folder_is_free_after_the_run(run: stec.Run) -> None:
    """Another process may resume it while this one goes on; and so may this one, in another precision."""
    program = "import sys, pathlib, pipelines.files as f; f.lock(pathlib.Path(sys.argv[1]), str)"
    subprocess.run([sys.executable, "-c", program, run.path / ".lock"], check=True, cwd=ROOT)
    with pytest.raises(stec.UserError, match="already holds a run"):
        stec.fit(run.config)
    subprocess.run([sys.executable, "-c", program, run.path / ".lock"], check=True, cwd=ROOT)
    longer = stec.fit(run.config.updated(max_epochs=3, resume="auto", allow_changes=1, mixed_precision="bf16"))
    assert longer.path == run.path and longer.config.optimization.max_epochs == 3


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code, on fewer images."""
    (code,) = (block for block in fenced(PAGES["docs/install.md"], "python") if "stec.fit" in block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stec.api, "configure", partial(stec.configure, **{**SMALL, "max_epochs": 1}))
    names: dict[str, Any] = {"images": torch.zeros(2, 3, 32, 32)}
    exec(code.replace("max_epochs=9, ", ""), names)
    assert names["features"].shape == (2, 32) and (tmp_path / "runs/mine/results.json").is_file()
    assert set(names["evaluation"].scores) == {"linear_probing", "knn20"}


def test_errors_are_exceptions(tmp_path: Path) -> None:
    def raises(sentence: str) -> Any:
        return pytest.raises(stec.UserError, match=sentence)

    with raises(r"configure\(\) has the unknown key bach_size; did you mean batch_size"):
        stec.configure(bach_size=3)
    with raises(r"configure\(\): max_epochs is 'many'; give a value of type int"):
        stec.configure(max_epochs="many")
    with raises("temperature 0 is too small|temperature 0.0 is too small"):
        stec.configure(temperature=0)
    with raises("did you mean cifar10-resnet18"):
        stec.configure("cifar10-resnet81")
    with raises("needs --data_dir"):
        stec.fit(stec.configure("cifar10-resnet18", results_path=tmp_path / "run"))
    with raises("is no run|cannot be read|give the folder of a run"):
        _ = stec.Run(tmp_path / "absent").config
    with raises("There is no file or folder"):
        _ = stec.Run(tmp_path / "absent").encoder
    assert not list(tmp_path.iterdir())
    assert stec.configure("cifar10-resnet18").data.dataset == "cifar10"
    assert stec.configure(dataset="folder").optimization.batch_size == 1024


def test_it_is_not_called_in_a_thread() -> None:
    errors: list[str] = []

    def call() -> None:
        try:
            stec.fit(stec.configure(**SMALL))
        except stec.UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "in the main one" in errors[0]


@dataclass
class Cell:
    """What a notebook has received of a cell."""

    reply: dict[str, Any] = field(default_factory=dict)
    printed: str = ""
    bars: list[str] = field(default_factory=list)
    """The text of each state of the progress bar."""


@dataclass
class Notebook:
    manager: KernelManager
    client: BlockingKernelClient

    def execute(self, code: str, interrupt: bool = False) -> Cell:
        """Run a cell; with ``interrupt``, interrupt the kernel when the bar has moved."""
        cell = Cell()

        def collect(message: dict[str, Any]) -> None:
            kind, content = message["header"]["msg_type"], message["content"]
            html = content.get("data", {}).get("text/html", "")
            if kind == "stream":
                cell.printed += content["text"]
            elif kind in ("display_data", "update_display_data") and "<progress" in html:
                cell.bars.append(content["data"]["text/plain"])
                if interrupt and len(cell.bars) == 3:
                    self.manager.interrupt_kernel()
            elif kind == "display_data":
                cell.printed += content["data"]["text/plain"]

        cell.reply = self.client.execute_interactive(code, timeout=120, output_hook=collect)["content"]
        return cell


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    folder = tmp_path_factory.mktemp("notebook")
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder), env=environment)
    try:
        yield Notebook(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_notebook(notebook: Notebook) -> None:
    """The page's cells: a bar that fills, results, an interruption that can be resumed, an error as an exception."""
    first = notebook.execute(
        f"from pipelines.datasets import demo; demo.IMAGES.update({SMALL_DEMO}); small = {SMALL}\n"
        "import stec; config = stec.configure(**small, log_every=1, results_path='run'); run = stec.fit(config)"
    )
    assert first.reply["status"] == "ok", first
    percentages = [int(bar.partition("%")[0]) for bar in first.bars]
    assert percentages[0] == 0 and percentages[-1] == 100 and percentages == sorted(percentages)
    assert len(percentages) >= 3, "a state at the beginning and at the end of each epoch"
    assert "loss" in first.bars[-1] and "epoch 2/2" in first.bars[-1]
    assert "Results on the test images" in first.printed

    second = notebook.execute("print(sorted(run.evaluate('knn').scores), run.encoder.feature_dim, run.path)")
    assert "['knn20'] 32 run" in second.printed, second

    interrupted = notebook.execute(
        "config = stec.configure(**{**small, 'max_epochs': 3000}, results_path='long'); stec.fit(config)",
        interrupt=True,
    )
    assert interrupted.reply["ename"] == "KeyboardInterrupt", interrupted
    assert "--results_path long --resume auto" in interrupted.reply["evalue"]
    resumed = notebook.execute(
        "from pathlib import Path; import json\n"
        "done = json.loads(Path('long/metrics.jsonl').read_text().splitlines()[-1])\n"
        "again = stec.fit(config.updated(resume='auto', allow_changes=1, max_epochs=int(done['epoch']) + 2))\n"
        "print(again)"
    )
    assert resumed.reply["status"] == "ok" and "Run('long')" in resumed.printed, resumed
    assert not resumed.bars[0].startswith("0%")

    wrong = notebook.execute("stec.fit(stec.configure('cifar10-resnet18', data_dir='/nowhere'))")
    assert wrong.reply["ename"] == "UserError" and "/nowhere holds neither" in wrong.reply["evalue"]
