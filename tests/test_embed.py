"""Features on disk equal those of a plain loop, also after interruptions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file
from torchvision import transforms

import launch
from pipelines.datasets import demo
from pipelines.splits import read_split
from stec.cli.embed import HOW_TO_CONTINUE
from stec.config import ModelSettings
from stec.evaluation.embed import DONE, PartialFeatures
from stec.models.model import Model
from stec.weights.export import write_safetensors
from tests.conftest import smooth_image
from tests.runs import SMALL_DEMO, Run, together

ROUNDING = 1e-5
"""Of the largest feature: what single precision loses in an encoder, many times over."""


def write_weights(path: Path, *, stem: str, trained_on: str, width: int, seed: int = 0) -> Model:
    """A random model as training would write it, with batch norms that are not the identity."""
    torch.manual_seed(seed)
    model = Model(ModelSettings(width=width), stem=stem, classes=10, stop_gradient=2)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    write_safetensors(model.state_dict(), path, {"config": {"dataset": trained_on, "arch": "resnet18", "width": width}})
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "narrow.safetensors"
    write_weights(path, stem="cifar", trained_on="demo", width=4)
    return path


@pytest.fixture(autouse=True)
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in SMALL_DEMO.items():
        monkeypatch.setitem(demo.IMAGES, split, count)


@pytest.fixture
def class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 pictures in three class folders, and a cache of its own for the index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for n in range(24):
        file = tmp_path / "data" / "train" / "abc"[n % 3] / f"{n}.{'png' if n % 4 == 0 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth_image(50 + n, 90 - n, seed=n)).save(file)
    return tmp_path / "data"


def small(out: Path, weights: Path, *more: str) -> list[str]:
    """Of the demo set's 256 training images, in 8 spans of 32."""
    small_spans = ["--batch_size", "2", "--split", "train", "--num_workers", "1"]
    return ["embed", str(out), "--dataset", "demo", "--ckpt_path", str(weights), *small_spans, *more]


@pytest.fixture(scope="module")
def whole(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "features.npy"
    Run(*small(out, weights)).end()
    return out


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.parent.glob(f"{out.stem}.*")}


def torchvision_features(model: Model, images: list[torch.Tensor], *, stem: str) -> torch.Tensor:
    """What torchvision's own ResNet-18 makes of the images, one by one, in double precision."""
    plain = torchvision.models.resnet18()
    plain.fc = torch.nn.Identity()
    if stem == "cifar":
        plain.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        plain.maxpool = torch.nn.Identity()
    plain.load_state_dict(model.encoder.state_dict())
    with torch.no_grad():
        return torch.cat([plain.double().eval()(image[None].double()) for image in images])


def test_features_of_files_are_those_of_a_plain_torchvision_loop(class_folders: Path, tmp_path: Path) -> None:
    model = write_weights(tmp_path / "wide.safetensors", stem="imagenet", trained_on="imagenet", width=64)
    transform = transforms.Compose([transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor()])
    folder = torchvision.datasets.ImageFolder(str(class_folders / "train"), transform)
    expected = torchvision_features(model, [image for image, _ in folder], stem="imagenet").numpy()

    out = tmp_path / "out.safetensors"
    arguments = f"embed {out} --dataset imagenet --data_dir {class_folders} --split labeled --view_size 32".split()
    arguments += f"--ckpt_path {tmp_path / 'wide.safetensors'} --batch_size 5 --num_workers 0".split()
    assert launch.main([*arguments, "--backend", "torchvision"]) == 0
    made = load_file(out)
    assert {name: (values.dtype.str, values.shape) for name, values in made.items()} == {
        "features": ("<f4", (24, 512)),
        "labels": ("<i8", (24,)),
        "ids": ("<i8", (24,)),
    }
    np.testing.assert_allclose(made["features"], expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
    assert made["labels"].tolist() == folder.targets and made["ids"].tolist() == list(range(24))
    names = [str(Path(path).relative_to(class_folders / "train")) for path, _ in folder.samples]
    assert out.with_suffix(".names.txt").read_text().splitlines() == names
    assert not out.with_name("out.safetensors.partial").exists()

    out.unlink()
    assert launch.main([*arguments, "--backend", "dali"]) == 0
    # DALI's resized pixels are up to 1/255 away.
    np.testing.assert_allclose(load_file(out)["features"], expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("view_size", [32, 48])
def test_features_of_arrays_are_those_of_a_plain_loop(view_size: int, tmp_path: Path) -> None:
    """At another size than the data set's own, all of the image is resized."""
    model = write_weights(tmp_path / "wide.safetensors", stem="cifar", trained_on="cifar10", width=64)
    demo_set = demo.load(split="test")
    transform = transforms.Compose([transforms.Resize(view_size), transforms.ToTensor()])
    images = [transform(Image.fromarray(image)) for image in demo_set.pixels]
    expected = torchvision_features(model, images, stem="cifar").numpy()
    arguments = ["--dataset", "demo", "--ckpt_path", str(tmp_path / "wide.safetensors"), "--num_workers", "0"]
    assert launch.main(["embed", str(tmp_path / "out.npy"), *arguments, "--view_size", str(view_size)]) == 0
    made = np.load(tmp_path / "out.npy", mmap_mode="r")
    np.testing.assert_allclose(made, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
    np.testing.assert_array_equal(np.load(tmp_path / "out.labels.npy"), demo_set.labels)
    np.testing.assert_array_equal(np.load(tmp_path / "out.ids.npy"), np.arange(64))
    assert json.loads((tmp_path / "out.json").read_text())["classes"] == list(demo.CLASSES)


def test_two_processes_make_what_one_makes(whole: Path, weights: Path, tmp_path: Path) -> None:
    processes = together(2, *small(tmp_path / "features.npy", weights))
    for process in processes:
        process.end()
    assert "256 x 32 features" in processes[0].out and not processes[1].out
    found, expected = np.load(tmp_path / "features.npy"), np.load(whole)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
    assert files_of(tmp_path / "features.npy").keys() == files_of(whole).keys()


# --- Interrupted ---


@dataclass(frozen=True)
class SignalAtSpan:
    """Sends this process a signal, once, when it flushes the features of a span to disk."""

    span: int
    number: signal.Signals

    def __call__(self) -> None:
        write, flush, written = PartialFeatures.write, os.fsync, 0
        signals = iter([self.number])

        def signalled(descriptor: int) -> None:
            for number in signals:
                os.kill(os.getpid(), number)
            flush(descriptor)

        def writing(self_: PartialFeatures, *what: object) -> None:
            nonlocal written
            written += 1
            with patch.object(os, "fsync", signalled if written == self.span else flush):
                write(self_, *what)

        patch.object(PartialFeatures, "write", writing).start()


def complete(out: Path) -> set[int]:
    """The spans of 32 images that are complete on disk."""
    status = np.fromfile(out.with_name(f"{out.name}.partial") / "status", np.uint8)
    return {n for n, span in enumerate(status.reshape(-1, 32)) if (span == DONE).all()}


def test_killed_it_goes_on_to_the_same_bits(whole: Path, weights: Path, tmp_path: Path) -> None:
    """Twice while a span is written, the second time on two processes; no complete span is made again."""
    out = tmp_path / "features.npy"
    killed = Run(*small(out, weights), prepare=SignalAtSpan(3, signal.SIGKILL))
    killed.process.join(120)
    assert killed.process.exitcode == -signal.SIGKILL
    first = complete(out)
    assert first == {0, 1} and not out.exists()

    one, two = together(2, *small(out, weights), prepare=[None, SignalAtSpan(2, signal.SIGKILL)])
    two.process.join(120)
    assert "Process 1 died or does not answer; the same command continues" in one.end(code=2)
    second = complete(out)
    assert second > first and not out.exists()

    remade: list[int] = []
    write: Callable[..., None] = PartialFeatures.write

    def noted(self_: PartialFeatures, image_ids: NDArray[np.int64], *rows: object) -> None:
        remade.append(int(image_ids[0]) // 32)
        write(self_, image_ids, *rows)

    with patch.object(PartialFeatures, "write", noted):
        assert launch.main(small(out, weights)) == 0
    assert not set(remade) & second and len(remade) + len(second) == 8
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_stop_in_a_sentence(
    number: signal.Signals, code: int, whole: Path, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features.npy"
    stopped = Run(*small(out, weights), prepare=SignalAtSpan(3, number))
    stopped.end(code)
    assert stopped.err.endswith(f"; {HOW_TO_CONTINUE}.\n") and stopped.err.count("\n") == 1
    assert complete(out) and not out.exists()
    assert launch.main(small(out, weights)) == 0
    assert files_of(out) == files_of(whole)


def test_a_second_process_is_refused_while_the_first_lives(whole: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.npy"
    first = Run(*small(out, weights), prepare=SignalAtSpan(3, signal.SIGSTOP))
    while not (out.with_name(f"{out.name}.partial") / "about.json").exists() or len(complete(out)) < 2:
        assert first.process.is_alive()
        time.sleep(0.01)
    output = Run(*small(out, weights)).end(2)
    assert f"{out} is being made by process {first.process.pid} on {socket.gethostname()}; wait for it" in output
    first.process.kill()
    first.process.join()
    assert launch.main(small(out, weights)) == 0
    assert files_of(out) == files_of(whole)


def test_features_of_another_encoder_are_not_mixed_in(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features.safetensors"
    Run(*small(out, weights), prepare=SignalAtSpan(3, signal.SIGTERM)).end(143)
    before = complete(out)
    write_weights(tmp_path / "other.safetensors", stem="cifar", trained_on="demo", width=4, seed=1)
    assert launch.main(small(out, tmp_path / "other.safetensors")) == 2
    assert "(weights changed)" in capsys.readouterr().err
    assert launch.main(small(out, weights, "--batch_size", "3")) == 2
    assert "(batch_size changed)" in capsys.readouterr().err
    about = tmp_path / "features.safetensors.partial" / "about.json"
    settings = about.read_text()
    about.write_text("[]")
    assert launch.main(small(out, weights)) == 2
    assert f"{about} holds no JSON object; delete {about.parent}" in capsys.readouterr().err
    about.write_text(settings)
    assert complete(out) == before

    assert launch.main(small(out, weights)) == 0
    made = out.read_bytes()
    assert launch.main(small(out, weights)) == 0
    assert "is already complete" in capsys.readouterr().out
    assert launch.main(small(out, tmp_path / "other.safetensors")) == 2
    assert "exists and holds something else; delete it" in capsys.readouterr().err
    assert out.read_bytes() == made


def test_a_damaged_partial_file_is_reported(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "features.npy"
    Run(*small(out, weights), prepare=SignalAtSpan(4, signal.SIGTERM)).end(143)
    features = tmp_path / "features.npy.partial" / "features.npy"
    features.write_bytes(features.read_bytes()[:-1])
    assert launch.main(small(out, weights)) == 2
    assert f"{features.parent} is damaged" in capsys.readouterr().err
    shutil.rmtree(features.parent)
    assert launch.main(small(out, weights)) == 0


def test_bad_images_are_omitted(
    class_folders: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One that the index knows, and one that only decoding finds; the others' features are as without them."""
    arguments = f"--dataset folder --data_dir {class_folders} --split train --view_size 32 --batch_size 1".split()
    arguments += ["--ckpt_path", str(weights), "--num_workers", "1"]
    assert launch.main(["embed", str(tmp_path / "all.npy"), *arguments]) == 0
    names = (tmp_path / "all.names.txt").read_text().splitlines()
    bad = [3, 20]
    (class_folders / names[3]).write_bytes(b"no image")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    read_split(class_folders, "loose images")
    cut = class_folders / names[20]
    cut.write_bytes(cut.read_bytes()[:900])
    capsys.readouterr()
    assert launch.main(["embed", str(tmp_path / "rest.npy"), *arguments]) == 0
    output = capsys.readouterr()
    assert output.err.count("Bad image, omitted") == 1 and names[20] in output.err
    assert "22 x 32 features" in output.out and "2 bad images omitted" in output.out
    left = np.delete(np.arange(24), bad)
    np.testing.assert_array_equal(np.load(tmp_path / "rest.ids.npy"), left)
    np.testing.assert_array_equal(np.load(tmp_path / "rest.npy"), np.load(tmp_path / "all.npy")[left])
    assert (tmp_path / "rest.names.txt").read_text().splitlines() == [names[n] for n in left]


WRONG = {
    "another format": (["out.csv"], "out.csv must end in .npy or .safetensors"),
    "no such folder": (["no/out.npy"], "no/out.npy cannot be written"),
    "no weights": (["out.npy", "--ckpt_path", "absent.ckpt"], "There is no file or folder absent.ckpt"),
    "no data": (["out.npy", "--dataset", "cifar10"], "--dataset cifar10 needs --data_dir"),
    "no test images": (
        ["out.npy", "--dataset", "folder", "--data_dir", "."],
        "--dataset folder has no test images; name another --split or data set.",
    ),
    "another architecture": (["out.npy", "--arch", "resnet50"], "does not match --arch resnet50"),
    "no batches": (["out.npy", "--batch_size", "0"], "--batch_size 0 is too small"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_input_ends_in_one_sentence(
    case: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, sentence = WRONG[case]
    monkeypatch.chdir(tmp_path)
    assert launch.main(["embed", "--dataset", "demo", "--ckpt_path", str(weights), *arguments]) == 2
    output = capsys.readouterr().err
    assert sentence in output and "Traceback" not in output
    assert not list(tmp_path.iterdir())
