"""Exports, loaded by those for whom they are made: torchvision, timm, huggingface_hub."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import launch
import stec
from pipelines.datasets.fingerprint import fingerprint
from pipelines.datasets.images import ImageArray, ImageFiles
from pipelines.errors import UserError
from stec.config import ModelSettings
from stec.models.encoder import Encoder
from stec.models.model import Model
from stec.runs import checkpoint
from stec.weights.export import to_official_names, write_safetensors
from tests import hub
from tests.conftest import SHARED, smooth_image
from tests.runs import Run

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = Path(os.environ.get("STEC_PHOTOGRAPHS", SHARED / "data/imagenet_sample.tar"))
LARGEST_DIFFERENCE = 1e-10
SMALL = (
    "--limit_train 32 --batch_size 16 --width 4 --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 --max_epochs 2 "
    "--num_workers 1"
).split()


def export(source: Path, out: Path, kind: str, *flags: str) -> int:
    return launch.main(["export", str(source), str(out), "--format", kind, *flags])


def upright(images: list[Image.Image], size: int) -> Tensor:
    """[N, 3, size, size] in [0, 1]."""
    resized = [np.asarray(image.convert("RGB").resize((size, size))) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255


@cache
def generated() -> Tensor:
    """Smooth colors with grain, as photographs have."""
    grain = np.random.default_rng(0).normal(0, 8, (3, 64, 64, 3))
    pixels = [np.clip(smooth_image(64, 64, n) + grain[n], 0, 255).astype(np.uint8) for n in range(3)]
    return upright([Image.fromarray(image) for image in pixels], 64)


@cache
def photographs() -> Tensor:
    if not PHOTOGRAPHS.is_file():
        pytest.skip(f"no photographs at {PHOTOGRAPHS}; set STEC_PHOTOGRAPHS to a tar file of JPEGs")
    with tarfile.open(PHOTOGRAPHS) as archive:
        files = [member for member in archive if member.name.endswith(".JPEG")][:2]
        return upright([Image.open(archive.extractfile(file)) for file in files], 224)


IMAGES: dict[str, Callable[[], Tensor]] = {"generated": generated, "photographs": photographs}


def trained(arch: str, stem: str, width: int = 64) -> Encoder:
    """An encoder whose batch norm has seen images, and whose every parameter matters."""
    torch.manual_seed(0)
    encoder = Encoder(arch, stem, width)
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5) if name.endswith("weight") else nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        encoder.train()(generated())
    return encoder.eval()


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def common(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Encoder]:
    """An encoder such as torchvision has, too, and its file."""
    encoder = trained(request.param, "imagenet")
    path = tmp_path_factory.mktemp(request.param) / "encoder.safetensors"
    metadata = {"config": {"dataset": "imagenet", "arch": request.param, "ckpt_path": "/home/me/x.ckpt"}, "step": 7}
    write_safetensors(encoder.state_dict(), path, metadata)
    return request.param, path, encoder


def same_features(theirs: nn.Module, ours: Encoder, images: Tensor, what: str) -> None:
    """In double precision, whose rounding is far below any other difference."""
    with torch.no_grad():
        expected, features = (copy.deepcopy(model).double().eval()(images.double()) for model in (ours, theirs))
    difference = float((features - expected).abs().max())
    print(f"{what}: largest difference {difference:.2g} of features up to {float(expected.abs().max()):.2g}")
    assert float(expected.std(0).mean()) > 0.01, "images that look alike to the encoder would show nothing"
    assert difference <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_torchvision_loads_it(common: tuple[str, Path, Encoder], ending: str, images: str, tmp_path: Path) -> None:
    arch, source, encoder = common
    out = tmp_path / f"encoder.{ending}"
    assert export(source, out, "torchvision") == 0
    model = torchvision.models.get_model(arch)
    model.fc = nn.Identity()
    model.load_state_dict(load_file(out) if ending == "safetensors" else torch.load(out, weights_only=True))
    same_features(model, encoder, IMAGES[images](), f"torchvision {arch} {ending} {images}")


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_timm_loads_it(common: tuple[str, Path, Encoder], ending: str, images: str, tmp_path: Path) -> None:
    arch, source, encoder = common
    out = tmp_path / f"encoder.{ending}"
    assert export(source, out, "timm") == 0
    model = timm.create_model(arch, num_classes=0, checkpoint_path=str(out))
    pixels = IMAGES[images]()
    same_features(model, encoder, pixels, f"timm {arch} {ending} {images}")
    with torch.no_grad():
        pooled = model.double().eval().forward_features(pixels.double()).mean((2, 3))
        expected = copy.deepcopy(encoder).double()(pixels.double())
    assert (pooled - expected).abs().max() <= LARGEST_DIFFERENCE


def test_files_say_where_they_come_from(common: tuple[str, Path, Encoder], tmp_path: Path) -> None:
    arch, source, _ = common
    assert export(source, tmp_path / "x.safetensors", "timm", "--license", "mit") == 0
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["stec"])
    assert metadata["license"] == "mit" and metadata["step"] == 7
    assert metadata["encoder"]["stem"] == "imagenet" and metadata["encoder"]["view_size_px"] == 224
    assert metadata["config"] == {"dataset": "imagenet", "arch": arch, "ckpt_path": "x.ckpt"}


@pytest.mark.parametrize(("stem", "width"), [("cifar", 64), ("stl10", 64), ("imagenet", 64), ("cifar", 8)])
def test_a_folder_for_the_hub(stem: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixin's own methods load it, our function loads it, and so does the Python code that its card shows."""
    encoder = trained("resnet18", stem, width)
    data_set = {"cifar": "cifar10", "stl10": "stl10", "imagenet": "imagenet"}[stem]
    write_safetensors(encoder.state_dict(), tmp_path / "encoder.safetensors", {"config": {"dataset": data_set}})
    out = tmp_path / "exported"
    assert export(tmp_path / "encoder.safetensors", out, "huggingface") == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]

    from stec.weights.hub import HubEncoder

    loaded: dict[str, nn.Module] = {
        "load_encoder of the folder": stec.load_encoder(out),
        "load_encoder of its file": stec.load_encoder(out / "model.safetensors"),
        "from_pretrained": HubEncoder.from_pretrained(out, strict=True),
    }
    monkeypatch.chdir(out)
    code = re.search("```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    assert (code is not None) == (width == 64)
    if code is not None:
        names: dict[str, nn.Module] = {}
        exec(code[1], names)
        loaded["the card's code"] = names["model"]
    for what, model in loaded.items():
        assert not model.training
        same_features(model, encoder, generated()[..., ::2, ::2], f"huggingface {stem} {width}, {what}")
    loaded["from_pretrained"].save_pretrained(tmp_path / "again")
    for file in out.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    Run(*SMALL, "--results_path", folder).end()
    return folder


def test_a_run_as_a_folder_for_the_hub(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its card tells what the run's folder holds."""
    assert export(finished, tmp_path / "exported", "huggingface", "--license", "apache-2.0") == 0
    assert f'stec.load_encoder("{tmp_path / "exported"}")' in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "exported/README.md")
    results = json.loads((finished / "results.json").read_text())
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "stec")
    assert {"self-supervised-learning", "resnet"} <= set(card.data.tags)
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        "kNN (k = 20) top-1": results["knn20_after"],
        "linear probing top-1": results["linear_probing_after"],
        "online linear classifier top-1": results["online_classifier_after"],
    }
    start = json.loads((finished / "starts.jsonl").read_text())
    for known in ("--dataset demo", "--limit_train 32", "by S-TEC", start["data_fingerprint"], start["torch"]):
        assert known in card.content
    metadata = json.loads((tmp_path / "exported/config.json").read_text())["metadata"]
    assert metadata["results"] == results and metadata["environment"]["training_images"] == 32
    assert "command" not in metadata["environment"], "the command line holds paths"

    by_file, by_folder = stec.load_encoder(finished / "encoder.safetensors"), stec.load_encoder(finished)
    by_checkpoint = stec.load_encoder(finished / "checkpoint-00000004.pt")
    images = generated()
    for encoder in (by_file, by_folder, by_checkpoint, stec.load_encoder(tmp_path / "exported")):
        assert torch.equal(encoder(images), by_file(images))
    again = tmp_path / "of-an-exported-folder"
    assert export(tmp_path / "exported", again, "huggingface", "--license", "apache-2.0") == 0
    assert (again / "README.md").read_text() == (tmp_path / "exported/README.md").read_text()


@pytest.mark.parametrize(("manip_lambda", "title"), [(0.0, "BYOL"), (1.0, "S-TEC with BYOL")])
def test_the_card_names_the_base_objective(manip_lambda: float, title: str, tmp_path: Path) -> None:
    """And a target network, whose accuracies are unknown."""
    weights = Encoder("resnet18", "cifar", 4).state_dict()
    state = {f"{part}encoder.{name}": of + 0 for name, of in weights.items() for part in ("", "target_network.")}
    metadata = {
        "config": {"dataset": "demo", "objective": "byol", "manip_lambda": manip_lambda},
        "results": {"knn20_after": 0.25},
    }
    write_safetensors(state, tmp_path / "model.safetensors", metadata)
    for which in ("online", "target"):
        flags = ["--format", "huggingface", "--weights", which]
        assert launch.main(["export", str(tmp_path / "model.safetensors"), str(tmp_path / which), *flags]) == 0
        card = (tmp_path / which / "README.md").read_text()
        assert f"# {title} resnet18 demo" in card and "SimCLR" not in card
        assert ("0.25" in card) == (which == "online") and ("target network" in card) == (which == "target")


def test_the_whole_model_as_a_file(finished: Path, tmp_path: Path) -> None:
    assert export(finished, tmp_path / "full.safetensors", "full") == 0
    model = load_file(tmp_path / "full.safetensors")
    trained = load_file(finished / "model.safetensors")
    assert {name.partition(".")[0] for name in model} == {"encoder", "projection", "inverse_models", "classifier"}
    assert model.keys() == trained.keys() and all(torch.equal(model[name], trained[name]) for name in model)
    with safe_open(tmp_path / "full.safetensors", "pt") as file:
        assert json.loads(file.metadata()["stec"])["results"]["knn20_after"] >= 0
    assert stec.load_encoder(tmp_path / "full.safetensors").feature_dim == 32


def test_an_official_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It does not say whether a max-pool follows its 7x7 convolution."""
    torch.manual_seed(0)
    model = Model(ModelSettings(feat_dim=8), stem="imagenet", classes=10).eval()
    torch.save({"state_dict": to_official_names(model.state_dict())}, tmp_path / "official.ckpt")
    assert export(tmp_path / "official.ckpt", tmp_path / "x.pth", "torchvision") == 2
    assert "add --stem imagenet (it does) or --stem stl10" in capsys.readouterr().err
    assert export(tmp_path / "official.ckpt", tmp_path / "x.pth", "torchvision", "--stem", "imagenet") == 0
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True))
    same_features(theirs, model.encoder, generated(), "official, by torchvision")
    encoder = stec.load_encoder(tmp_path / "official.ckpt", stem="stl10")
    assert isinstance(encoder.maxpool, nn.Identity)


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """Copies of the run that lack something."""
    for name, lost in {"running": ("model.safetensors", "results.json"), "evaluating": ("results.json",)}.items():
        shutil.copytree(finished, tmp_path / name)
        for file in lost:
            (tmp_path / name / file).unlink()
    shutil.copytree(finished, tmp_path / "longer")
    config = json.loads((finished / "config.json").read_text())
    (tmp_path / "longer/config.json").write_text(json.dumps({**config, "max_epochs": 9}))
    (tmp_path / "empty").mkdir()
    state = torch.load(finished / "checkpoint-00000004.pt", weights_only=True)
    checkpoint.save(tmp_path, 4, state, keep=9, keep_every_steps=None)
    whole = bytearray((tmp_path / "checkpoint-00000004.pt").read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "bit.pt").write_bytes(whole)
    torch.save({**state, "format_version": checkpoint.FORMAT_VERSION + 1}, tmp_path / "newer.pt")
    model = load_file(finished / "model.safetensors")
    later = {"dataset": "cifar10", "telepathy": 1}
    for name, metadata in {
        "setting": {"config": later, "environment": {"stec": "9.9"}},
        "data-set": {"config": {"dataset": "imagenet22k"}},
        "stem": {"encoder": {"stem": "patchify"}},
    }.items():
        write_safetensors(model, tmp_path / f"newer-{name}.safetensors", metadata)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    return tmp_path


WRONG: dict[str, tuple[str, str, str, str]] = {
    "still training": (
        "running",
        "x",
        "huggingface",
        "has no model.safetensors yet; let training go on",
    ),
    "which checkpoint": ("running", "x", "huggingface", "its newest checkpoint, {}/running/checkpoint-00000004.pt"),
    "still evaluating": ("evaluating", "x", "huggingface", "has no results.json yet"),
    "trained on": ("longer", "x", "huggingface", "is being trained on with another max_epochs"),
    "no run": ("empty", "x", "huggingface", "is no run's folder and holds no model.safetensors"),
    "nothing there": ("absent", "x", "huggingface", "There is no file or folder {}/absent"),
    "damaged": ("bit.pt", "x", "huggingface", "is damaged (its checksum"),
    "newer checkpoint": ("newer.pt", "x", "huggingface", "is a checkpoint of format 3, but this version knows 2"),
    "newer setting": ("newer-setting.safetensors", "x", "huggingface", "by stec 9.9 with the setting telepathy"),
    "newer data set": ("newer-data-set.safetensors", "x", "huggingface", "imagenet22k, a data set that this version"),
    "newer stem": ("newer-stem.safetensors", "x", "huggingface", "has the stem patchify"),
    "folder is there": ("finished", "there", "huggingface", "{}/there already exists"),
    "link is there": ("finished", "link", "huggingface", "{}/link already exists"),
    "no parent": ("finished", "no/where", "huggingface", "cannot be written; give a path in an existing folder"),
    "parent is a file": ("finished", "bit.pt/x", "huggingface", "cannot be written; give a path in an existing folder"),
    "unwritable": ("finished", "/proc/x", "huggingface", "/proc/x cannot be written ("),
    "unwritable file": ("finished", "/proc/x.safetensors", "full", "/proc/x.safetensors cannot be written ("),
    "name too long": ("finished", "x" * 300, "huggingface", "cannot be written (File name too long)"),
    "no ending": ("finished", "x", "torchvision", "{}/x must end in .safetensors or .pt or .pth"),
    "pickled whole model": ("finished", "x.pt", "full", "end in .safetensors."),
    "no stem, torchvision": (
        "finished",
        "x.pth",
        "torchvision",
        "is a resnet18 with the cifar stem (3x3 convolution, stride 1, no max-pool) and width 4 instead of 64, which "
        "no model of torchvision has; export it with --format huggingface or --format full.",
    ),
    "no stem, timm": ("finished", "x.pth", "timm", "which no model of timm has; export it with --format huggingface"),
    "no heads": ("finished/encoder.safetensors", "x.safetensors", "full", "holds only the encoder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_exported(
    case: str, unfinished: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, kind, sentence = WRONG[case]
    before = sorted(unfinished.rglob("*"))
    path = finished.parent / source.replace("finished", "run") if "finished" in source else unfinished / source
    assert export(path, unfinished / out, kind) == 2
    output = capsys.readouterr().err
    assert sentence.format(unfinished) in output, output
    assert output.startswith("error: ") and output.count("\n") == 1 and "Traceback" not in output
    assert sorted(unfinished.rglob("*")) == before


def test_no_license(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(finished, tmp_path / "x", "huggingface", "--license", "All mine") == 2
    assert "--license All mine is not a license" in capsys.readouterr().err


def test_without_huggingface_hub(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "stec.weights.hub", raising=False)
    assert export(finished, tmp_path / "x", "huggingface") == 2
    assert "pip install -e '.[export]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert stec.load_encoder(finished).feature_dim == 32, "what is here needs no Hub"


def test_a_full_disk_leaves_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full for the card, when the weights are there already; then a rest from before is no hindrance."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelCard, "save", full)
    assert export(finished, tmp_path / "x", "huggingface") == 2
    assert f"{tmp_path / 'x'} cannot be written (No space left on device)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / ".x.tmp").mkdir()
    (tmp_path / ".x.tmp/half").touch()
    assert export(finished, tmp_path / "x", "huggingface") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and not (tmp_path / "x/half").exists()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache, empty; no token and no network but what a test allows."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "cache"


def at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)


def test_a_push_and_back(finished: Path, tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixin's own ``push_to_hub``, and our ``load_encoder`` from there, then from the cache."""
    from stec.weights.hub import HubEncoder

    assert HubEncoder.push_to_hub is huggingface_hub.PyTorchModelHubMixin.push_to_hub
    assert export(finished, tmp_path / "exported", "huggingface") == 0
    files = {"other/model/README.md": b"# Something else\n"}
    with hub.serving(files) as address:
        at(address, monkeypatch)
        HubEncoder.from_pretrained(tmp_path / "exported").push_to_hub("me/efference", token="hf_x")
        for name in ("README.md", "config.json", "model.safetensors"):
            assert files[f"me/efference/{name}"] == (tmp_path / "exported" / name).read_bytes()
        fetched = stec.load_encoder("me/efference")
        with pytest.raises(UserError, match=r"no file or folder me/typo here, and there is no such model"):
            stec.load_encoder("me/typo")
        with pytest.raises(UserError, match=r"the model on the .* has no model\.safetensors"):
            stec.load_encoder("other/model")
    cached = stec.load_encoder("me/efference")
    for encoder in (fetched, cached):
        assert torch.equal(encoder(generated()), stec.load_encoder(finished)(generated()))


def test_no_network(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as classifier:
        classifier.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{classifier.getsockname()[1]}"
    at(refused, monkeypatch)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its tries
    with pytest.raises(UserError, match=r"^There is no file or folder me/mine here, and the .* cannot be reached"):
        stec.load_encoder("me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE must not be set"):
        stec.load_encoder("me/mine")
    for path in ("mine", "runs/mine/", "a/b/c", "/a/b", "me/mine.safetensors", "../mine", "x" * 300):
        with pytest.raises(UserError, match=r"There is no file or folder .*; give a run's folder"):
            stec.load_encoder(path)


def test_loading_draws_no_random_numbers(finished: Path) -> None:
    before = torch.get_rng_state()
    stec.load_encoder(finished)
    assert torch.equal(torch.get_rng_state(), before)


def test_importing_the_package_is_quick() -> None:
    code = "import sys, stec; print([name for name in ('torch', 'huggingface_hub', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'load_decoder'"):
        _ = stec.load_decoder  # type: ignore[attr-defined]


def test_fingerprints(photographs: ImageFiles, tmp_path: Path) -> None:
    """The same for the same images, wherever they lie and however they are stored; another for others."""
    pixels = np.stack([smooth_image(8, 6, n) for n in range(5)])
    labels = np.arange(5)
    array = ImageArray(pixels=pixels, labels=labels)
    planes = ImageArray(pixels=np.ascontiguousarray(pixels.transpose(0, 3, 2, 1)), labels=labels, layout="CWH")
    moved = replace(photographs, root=tmp_path)
    assert fingerprint(array) == fingerprint(planes)
    assert fingerprint(photographs) == fingerprint(moved)
    others = [
        ImageArray(pixels=pixels, labels=labels[::-1].copy()),
        ImageArray(pixels=pixels ^ (np.arange(5) == 3)[:, None, None, None].astype(np.uint8), labels=labels),
        array.limited(4),
        ImageArray(pixels=pixels.reshape(5, 6, 8, 3), labels=labels),
        photographs,
        photographs.limited(32),
        replace(photographs, size_bytes=photographs.size_bytes + 1),
    ]
    prints = [fingerprint(images) for images in (array, *others)]
    assert len(set(prints)) == len(prints)
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in prints)
