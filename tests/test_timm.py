"""Encoders of timm: as timm computes them, trained, resumed, exported, and started from timm's weights."""

from __future__ import annotations

import copy
import json
import re
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import Normalize, v2

import launch
import stec
from pipelines.datasets import demo
from pipelines.datasets.images import ImageArray
from pipelines.errors import UserError
from stec.config import ModelSettings, ObjectiveSettings, OptimizationSettings
from stec.models.encoder import NARROW
from stec.models.model import Model
from stec.models.timm_encoder import TimmEncoder, adapted_weights, facts_of, is_narrow
from stec.objectives.inverse import EfferenceCopy
from stec.objectives.objective import Objective
from stec.training.initial_model import initial_model
from stec.training.optim import make_optimizer
from stec.training.step import Step
from stec.weights.export import write_safetensors
from tests import hub
from tests.conftest import smooth_image
from tests.precision import assert_as_exact
from tests.runs import Run
from tests.test_export import at, hub_cache
from tests.test_faults import SignalAtStep
from tests.test_step import micro_batches

__all__ = ["hub_cache"]

SIZES = {"resnet10t": 32, "vit_tiny_patch16_224": 48, "convnext_atto": 32}
"""Small networks, one of each kind, with the size of their views in px."""
SMALL = (
    "--limit_train 32 --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 --max_epochs 2 --num_workers 1 "
    "--mixed_precision no --optimizer lars"
).split()


@cache
def images(size: int, count: int = 4) -> Tensor:
    """[count, 3, size, size] in [0, 1]."""
    return (
        torch.from_numpy(np.stack([smooth_image(size, size, n) for n in range(count)])).permute(0, 3, 1, 2).float()
        / 255
    )


def used(encoder: TimmEncoder, size: int) -> TimmEncoder:
    """The encoder with random scales and biases, and statistics of images in its batch norm, if it has any."""
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5) if name.endswith("weight") else nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        encoder.train()(images(size))
    return encoder.eval()


@cache
def an_encoder(name: str) -> TimmEncoder:
    torch.manual_seed(0)
    return used(TimmEncoder(f"timm/{name}", SIZES[name]), SIZES[name])


def in_timm(name: str, **options: Any) -> nn.Module:
    """timm's own network for the size of the views."""
    if name.startswith("vit"):
        options["img_size"] = SIZES[name]
    network: nn.Module = timm.create_model(name, num_classes=0, **options)
    return network.eval()


def in_double(module: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        features: Tensor = copy.deepcopy(module).double()(pixels.double())
    return features


def assert_same(theirs: nn.Module, ours: nn.Module, pixels: Tensor) -> None:
    """In double precision, whose rounding is far below any other difference."""
    expected = in_double(ours, pixels)
    assert float(expected.std(0).mean()) > 1e-3, "images that look alike to the encoder would show nothing"
    assert float((in_double(theirs, pixels) - expected).abs().max()) < 1e-10


# --- The network ---


@pytest.mark.parametrize("name", SIZES)
def test_features_are_timms_pooled_output(name: str) -> None:
    """With the same random numbers it is the same network."""
    torch.manual_seed(3)
    ours = TimmEncoder(f"timm/{name}", SIZES[name]).eval()
    torch.manual_seed(3)
    theirs = in_timm(name)
    pixels = images(SIZES[name])
    with torch.no_grad():
        expected = in_double(theirs, pixels)
        pooled = theirs.double().forward_head(theirs.forward_features(pixels.double()), pre_logits=True)
    assert torch.equal(pooled, expected)
    torch.testing.assert_close(in_double(ours, pixels), expected, rtol=0, atol=1e-10)
    assert ours.feature_dim == expected.shape[1]
    normalized = TimmEncoder(f"timm/{name}", SIZES[name], "imagenet").eval()
    normalized.load_state_dict(ours.state_dict())
    mean_and_deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert_same(nn.Sequential(Normalize(*mean_and_deviation), theirs), normalized, pixels)


def test_a_network_of_one_size_gets_images_of_others_resized() -> None:
    encoder = an_encoder("vit_tiny_patch16_224")
    for size in (20, 96):
        resized = v2.functional.resize(images(size).double(), [48, 48], antialias=True)
        torch.testing.assert_close(in_double(encoder, images(size)), in_double(encoder, resized))
    assert an_encoder("resnet10t").fixed_size_px is None


def test_a_network_of_any_size_may_have_an_argument_for_it() -> None:
    for name, fixed_size_px in (("repvgg_a0", None), ("swin_tiny_patch4_window7_224", 64), ("test_vit", 64)):
        assert facts_of(f"timm/{name}", 64).fixed_size_px == fixed_size_px, name
    assert facts_of("timm/test_vit", 160).fixed_size_px == 160, "the size that timm makes it for"


def test_the_patch_size_is_that_of_the_name() -> None:
    for patch in (16, 32):
        encoder = TimmEncoder(f"timm/vit_base_patch{patch}_224".replace("base", "small"), 64)
        assert encoder.network.pos_embed.shape[1] == 1 + (64 // patch) ** 2


@pytest.mark.parametrize("name", ["fasternet_t1", "ghostnet_050"])
def test_nothing_is_dropped_at_random(name: str) -> None:
    """Networks whose defaults have stochastic depth and dropout compute the same twice, in training as well."""
    theirs, ours = timm.create_model(name, num_classes=0), TimmEncoder(f"timm/{name}", 64)
    pixels = images(64)
    with torch.no_grad():
        assert not torch.equal(theirs(pixels), theirs(pixels)), "the network would show nothing"
        assert torch.equal(ours(pixels), ours(pixels))


def test_parameters_without_effect_are_not_trained() -> None:
    """DistributedDataParallel would wait for their gradients."""
    encoder = TimmEncoder("timm/efficientvim_m1", 64)
    encoder(images(64)).sum().backward()
    assert {name for name, p in encoder.named_parameters() if p.grad is None} == {"network.weights"}
    assert not encoder.network.weights.requires_grad


def test_narrow_convolutions_with_a_stride_are_not_channels_last() -> None:
    """For a fault of oneDNN, see ``NARROW``."""
    convolution = nn.Conv2d(NARROW - 1, 32, kernel_size=1, stride=2)
    assert is_narrow(nn.Sequential(convolution)) and not is_narrow(nn.Conv2d(NARROW - 1, 32, kernel_size=3, stride=2))
    assert not is_narrow(nn.Conv2d(NARROW, 32, kernel_size=1, stride=2))
    assert an_encoder("resnet10t").memory_format == torch.channels_last


# --- Training ---


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_parameters_are_grouped_by_shape(optimizer: Any) -> None:
    """Norms, biases and numbers are neither decayed nor adapted, whatever timm calls them."""
    settings = ModelSettings(arch="timm/vit_tiny_patch16_224", feat_dim=8)
    model = Model(settings, stem="cifar", view_size_px=32, classes=3)
    model.encoder.gain = nn.Parameter(torch.tensor(1.0))
    groups = make_optimizer(model, OptimizationSettings(optimizer=optimizer, weight_decay=1e-4)).param_groups
    group_of = {id(p): group for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (group_of[id(p)]["weight_decay"] > 0) == (p.ndim > 1), name
            if optimizer == "lars":
                assert group_of[id(p)]["adapt"] == (p.ndim > 1 and name != "classifier.weight"), name


@pytest.mark.parametrize("name", SIZES)
def test_micro_batches_give_the_gradient_of_the_whole_batch(name: str, demo_test_images: ImageArray) -> None:
    """With batch norm in evaluation mode, as its statistics depend on the micro-batch."""
    found = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        settings = ModelSettings(arch=f"timm/{name}", hidden_mlp=16, feat_dim=8)
        model = Model(settings, stem="cifar", view_size_px=32, classes=10).double()
        objective = Objective(ObjectiveSettings(manip_lambda=1.0, temperature=0.5))
        step = Step(model, objective, Accelerator(cpu=True), EfferenceCopy(weights={"window": 1.0}))
        model.train()
        model.encoder.eval()
        step(micro_batches(demo_test_images, accumulate=accumulate))
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    whole, cached = found
    assert whole.keys() == cached.keys() and sum(name.startswith("encoder.network.") for name in whole) > 20
    for name in whole:
        assert (cached[name] - whole[name]).norm() < 1e-6 * whole[name].norm() + 1e-9, name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a convolutional network."""
    folder = tmp_path_factory.mktemp("runs") / "resnet"
    Run("--arch", "timm/resnet10t", *SMALL, "--batch_size", "16", "--results_path", folder).end()
    return folder


@pytest.fixture(scope="module")
def finished_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a vision transformer with a target network, and gradient caching."""
    folder = tmp_path_factory.mktemp("runs") / "vit"
    flags = "--arch timm/vit_tiny_patch16_224 --view_size 32 --objective byol --accumulate 2 --batch_size 8"
    Run(*flags.split(), *SMALL, "--optimizer", "adamw", "--max_epochs", "1", "--results_path", folder).end()
    return folder


def test_a_resumed_run_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """With batch norm and LARS, the defaults of which have a state."""
    arguments = ["--arch", "timm/resnet10t", *SMALL, "--batch_size", "16", "--results_path", tmp_path / "run"]
    Run(*arguments, prepare=SignalAtStep(3, signal.SIGTERM)).end()
    assert "Resuming after step 3." in Run(*arguments, "--resume", "auto").end()
    assert (tmp_path / "run/model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_run_without_flags_of_resnets(finished: Path) -> None:
    """The demo's recipe has a narrow ResNet, whose width is not taken over."""
    config = json.loads((finished / "config.json").read_text())
    assert config["arch"] == "timm/resnet10t" and config["width"] == 64 and config["view_size"] == 16
    assert stec.configure("demo", arch="timm/resnet10t").model.width == 64
    names = load_file(finished / "model.safetensors").keys()
    assert {f"encoder.network.{name}" for name in in_timm("resnet10t").state_dict()} < names


def test_a_run_is_evaluated_and_shown(finished_vit: Path, tmp_path: Path) -> None:
    """By all commands that read one."""
    data = ("--dataset", "demo", "--ckpt_path", finished_vit)
    Run("eval", *data, "--measures", "knn", "rankme", "online_classifier").end()
    Run("embed", tmp_path / "features.npy", *data).end()
    pixels = torch.from_numpy(demo.load(split="test").pixels[:64]).permute(0, 3, 1, 2) / 255
    features = torch.from_numpy(np.load(tmp_path / "features.npy"))
    torch.testing.assert_close(features, stec.load_encoder(finished_vit)(pixels), rtol=1e-4, atol=1e-4)
    config = ("--config", finished_vit / "config.json", "--ckpt_path", finished_vit)
    Run("preview", tmp_path / "views.png", *config, "--count", "1").end()
    assert (tmp_path / "views.png").stat().st_size > 1000
    Run("report", finished_vit, "--out", tmp_path / "report.html", "--images", "32").end()
    assert len(re.findall("data:image/png", (tmp_path / "report.html").read_text())) > 3


def test_a_compiled_step_is_as_exact_as_a_plain_one() -> None:
    torch.manual_seed(0)
    encoder = used(TimmEncoder("timm/test_vit", 32), 32)
    # One block, since compiling takes that much less.
    encoder.network.blocks = encoder.network.blocks[:1]

    def one_step(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        module.zero_grad()
        features = module(images(32).to(dtype))
        features.square().mean().backward()
        return {"features": features.detach(), "gradient": module.network.patch_embed.proj.weight.grad.clone()}

    reference = one_step(copy.deepcopy(encoder).double(), torch.float64)
    plain = one_step(encoder, torch.float32)
    encoder.compile()
    assert_as_exact(one_step(encoder, torch.float32), plain, reference)


# --- Exports ---


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each encoder, as training writes it."""
    folder, paths = tmp_path_factory.mktemp("files"), {}
    for name, size in SIZES.items():
        paths[name] = folder / f"{name}.safetensors"
        config = {"dataset": "imagenet", "view_size": size, "arch": f"timm/{name}"}
        write_safetensors(an_encoder(name).state_dict(), paths[name], {"config": config, "step": 7})
    return paths


def export(source: Path, out: Path, kind: str, *flags: str) -> int:
    return launch.main(["export", str(source), str(out), "--format", kind, *flags])


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("name", SIZES)
def test_timm_loads_it(
    name: str, ending: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By ``create_model``, and by the printed line; into a network with a classifier as well."""
    out = tmp_path / f"encoder.{ending}"
    assert export(files[name], out, "timm") == 0
    assert_same(in_timm(name, checkpoint_path=str(out)), an_encoder(name), images(SIZES[name]))
    line = capsys.readouterr().out.partition("Load it with: ")[2].strip()
    assert_same(eval(line, {"timm": timm}).eval(), an_encoder(name), images(SIZES[name]))
    options = {"img_size": SIZES[name]} if name.startswith("vit") else {}
    classifier = timm.create_model(name, num_classes=5, **options).eval()
    left = timm.models.load_checkpoint(classifier, str(out), strict=False)
    assert not left.unexpected_keys and left.missing_keys and all("head" in n or "fc" in n for n in left.missing_keys)
    classifier.reset_classifier(0)
    assert_same(classifier, an_encoder(name), images(SIZES[name]))


@pytest.mark.parametrize("name", SIZES)
def test_a_folder_for_the_hub(
    name: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This project loads it, the mixin loads it, and so does the Python code that its card shows."""
    out = tmp_path / "exported"
    assert export(files[name], out, "huggingface", "--license", "mit") == 0
    from stec.weights.hub import HubTimmEncoder

    loaded: dict[str, nn.Module] = {
        "load_encoder": stec.load_encoder(out),
        "from_pretrained": HubTimmEncoder.from_pretrained(out, strict=True),
    }
    card = (out / "README.md").read_text()
    assert f"S-TEC timm/{name} imagenet" in card or name in card
    code = re.search("```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(out)
    names: dict[str, nn.Module] = {}
    exec(code[1], names)
    for module in (*loaded.values(), names["model"]):
        assert not module.training
        assert_same(module, an_encoder(name), images(SIZES[name]))
    loaded["from_pretrained"].save_pretrained(tmp_path / "again")
    for file in out.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_the_card_resizes_images_of_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the encoder does: the demo's images have 32 px, also if views have 48."""
    torch.manual_seed(0)
    encoder, source = used(TimmEncoder("timm/test_vit", 48), 48), tmp_path / "encoder.safetensors"
    config = {"dataset": "demo", "view_size": 48, "arch": "timm/test_vit", "normalize": "imagenet"}
    write_safetensors(encoder.state_dict(), source, {"config": config})
    assert export(source, tmp_path / "hub", "huggingface") == 0
    monkeypatch.chdir(tmp_path / "hub")
    names: dict[str, nn.Module] = {}
    exec(re.search("```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1], names)
    ours = stec.load_encoder(tmp_path / "hub")
    pixels = torch.stack([ours.transform(torch.zeros(3, 32, 32, dtype=torch.uint8)), images(32)[0]])
    assert_same(names["model"], ours, pixels)


@pytest.mark.parametrize(("name", "view_size"), [("resnet10t", 32), ("test_vit", 48)])
def test_programs(name: str, view_size: int, tmp_path: Path) -> None:
    """ONNX and torch.export, for images of 32 px, which the transformer resizes."""
    torch.manual_seed(0)
    encoder, source = used(TimmEncoder(f"timm/{name}", view_size), view_size), tmp_path / "encoder.safetensors"
    config = {"dataset": "demo", "view_size": view_size, "arch": f"timm/{name}"}
    write_safetensors(encoder.state_dict(), source, {"config": config})
    pixels = images(32)
    expected = encoder(pixels).detach()
    assert export(source, tmp_path / "encoder.onnx", "onnx") == 0
    (features,) = onnxruntime.InferenceSession(tmp_path / "encoder.onnx").run(None, {"images": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-4, atol=1e-4)
    assert export(source, tmp_path / "encoder.pt2", "torch_export") == 0
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    torch.testing.assert_close(program(pixels), expected, rtol=0, atol=1e-6)


def test_every_file_of_a_run_is_read(finished_vit: Path, tmp_path: Path) -> None:
    """Also imported, exported for timm, and exported for the Hub; the target network is another encoder."""
    (newest,) = sorted(finished_vit.glob("checkpoint-*.pt"))[-1:]
    assert launch.main(["import", str(newest), str(tmp_path / "imported.safetensors")]) == 0
    assert export(finished_vit, tmp_path / "timm.safetensors", "timm") == 0
    assert export(finished_vit, tmp_path / "full.safetensors", "full") == 0
    assert export(finished_vit, tmp_path / "target.pth", "timm", "--weights", "target") == 0
    before = torch.get_rng_state()
    expected = stec.load_encoder(finished_vit)(images(32))
    files = [finished_vit / "encoder.safetensors", finished_vit / "model.safetensors", newest]
    files += [tmp_path / f"{name}.safetensors" for name in ("imported", "timm", "full")]
    for file in files:
        assert torch.equal(stec.load_encoder(file)(images(32)), expected), file
    assert torch.equal(torch.get_rng_state(), before), "loading draws no random numbers"
    target = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, checkpoint_path=tmp_path / "target.pth"
    )
    assert not torch.allclose(target.eval()(images(32)), expected)


# --- Weights of timm ---


@cache
def with_classifier(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    network: nn.Module = timm.create_model(name, **options)
    return network.eval()


def test_training_starts_from_a_checkpoint_of_timm(tmp_path: Path) -> None:
    """Of images of 224 px, with a classifier, in the layout of timm's training script."""
    network = with_classifier("vit_tiny_patch16_224")
    torch.save({"arch": "vit_tiny_patch16_224", "state_dict": network.state_dict()}, tmp_path / "timm.pth")
    config = stec.configure(
        arch="timm/vit_tiny_patch16_224",
        view_size=32,
        init="pretrained",
        ckpt_path=str(tmp_path / "timm.pth"),
        normalize="inception",
    )
    overlay = {"file": str(tmp_path / "timm.pth")}
    theirs = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=32
    ).eval()
    normalized = nn.Sequential(Normalize((0.5,) * 3, (0.5,) * 3), theirs)
    assert_same(normalized, initial_model(config, 10).encoder.eval(), images(32))


def test_a_checkpoint_of_timm_is_evaluated(tmp_path: Path) -> None:
    network = with_classifier("resnet10t")
    save_file(network.state_dict(), tmp_path / "timm.safetensors")
    flags = f"--dataset demo --arch timm/resnet10t --ckpt_path {tmp_path / 'timm.safetensors'} --normalize imagenet"
    Run("embed", tmp_path / "features.npy", *flags.split()).end()
    assert np.load(tmp_path / "features.npy").shape == (64, 512)


def test_a_checkpoint_of_timm_is_loaded_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The size of a vision transformer's images may be another one."""
    source = tmp_path / "timm.pth"
    torch.save(with_classifier("vit_tiny_patch16_224").state_dict(), source)
    size = SIZES["vit_tiny_patch16_224"]
    overlay = {"file": str(source), "num_classes": 1000}
    theirs = in_timm("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay)
    normalized = nn.Sequential(Normalize((0.5,) * 3, (0.5,) * 3), theirs)
    encoder = stec.load_encoder(source, arch="timm/vit_tiny_patch16_224", normalize="inception", view_size_px=size)
    assert_same(normalized, encoder, images(size))
    assert encoder.transform(torch.zeros(3, 100, 100, dtype=torch.uint8)).shape == (3, size, size)
    flags = ["--arch", "timm/vit_tiny_patch16_224", "--normalize", "inception"]
    assert export(source, tmp_path / "hub", "huggingface", *flags, "--view_size", str(size)) == 0
    assert_same(normalized, stec.load_encoder(tmp_path / "hub"), images(size))
    assert export(source, tmp_path / "timm.safetensors", "timm", *flags) == 0
    at_224 = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=tmp_path / "timm.safetensors")
    assert all(
        torch.equal(value, at_224.state_dict()[name])
        for name, value in load_file(tmp_path / "timm.safetensors").items()
    )
    capsys.readouterr()
    for arch, names in (("resnet18", ["holds no encoder", "--arch timm/NAME"]), ("timm/resnet10t", ["--arch"])):
        assert export(source, tmp_path / "other.pth", "timm", "--arch", arch, "--normalize", "inception") == 2
        error = capsys.readouterr().err
        assert all(name in error for name in names) and error.count("\n") == 1, error
    assert export(tmp_path / "hub", tmp_path / "other.pth", "timm", "--arch", "timm/resnet10t") == 2
    assert "does not match --arch timm/resnet10t" in capsys.readouterr().err
    assert not (tmp_path / "other.pth").exists()


def test_training_starts_from_a_run_at_another_size(finished_vit: Path, tmp_path: Path) -> None:
    """The position embedding is adapted as timm does it."""
    assert export(finished_vit, tmp_path / "timm.safetensors", "timm") == 0
    overlay = {"file": str(tmp_path / "timm.safetensors"), "num_classes": 0}
    theirs = in_timm("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay)
    config = stec.Run(finished_vit).config.updated(ckpt_path=finished_vit, view_size=48)
    assert_same(theirs, initial_model(config, 10).encoder.eval(), images(48))
    export(finished_vit, tmp_path / "target.safetensors", "timm", "--weights", "target")
    theirs = in_timm(
        "vit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={**overlay, "file": str(tmp_path / "target.safetensors")},
    )
    assert_same(theirs, initial_model(config, 10).target_network.encoder.eval(), images(48))


@pytest.mark.parametrize("layout", ["DINO", "MoCo v3"])
def test_a_checkpoint_with_prefixes(layout: str, tmp_path: Path) -> None:
    """And heads, and a moving average."""
    network = with_classifier("test_vit")
    state = network.state_dict()
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    content: dict[str, Any] = {
        "DINO": {
            "student": {f"module.backbone.{name}": value for name, value in other.items()},
            "teacher": {f"module.backbone.{name}": value for name, value in state.items() if "head" not in name}
            | {"module.head.mlp.0.weight": torch.ones(2, 2)},
        },
        "MoCo v3": {
            "state_dict": {f"module.base_encoder.{name}": value for name, value in state.items() if "head" not in name}
            | {f"module.momentum_encoder.{name}": value for name, value in other.items()}
            | {"module.base_encoder.head.0.weight": torch.ones(2, 2), "module.predictor.0.weight": torch.ones(2, 2)}
        },
    }[layout]
    torch.save(content, tmp_path / "x.pth")
    encoder = stec.load_encoder(tmp_path / "x.pth", arch="timm/test_vit", normalize="none", view_size_px=160)
    network = copy.deepcopy(network)
    network.reset_classifier(0)
    assert_same(network, encoder, images(160))


def test_what_belongs_to_a_classifier_is_left_out() -> None:
    """Names that only the network with a classifier has, besides that of the classifier itself."""
    network = with_classifier("efficientvit_m0")
    weights = adapted_weights("timm/efficientvit_m0", 224, network.state_dict(), Path("x.pth"))
    assert "head.bn.weight" in network.state_dict() and "head.bn.weight" not in weights
    network.reset_classifier(0)
    theirs = timm.create_model("efficientvit_m0", num_classes=0).eval()
    theirs.load_state_dict(weights)
    pixels = images(224, 2)
    with torch.no_grad():
        assert torch.equal(theirs.forward_features(pixels), network.forward_features(pixels))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda state: state.pop("conv1.0.weight"),
            r"holds no weights of timm/resnet10t \(conv1.0.weight is missing\)",
        ),
        (lambda state: state.update({"queue": torch.ones(3)}), r"\(queue is unknown\); check --arch"),
        (lambda state: state.update({"conv1.0.weight": torch.ones(3)}), r"does not fit timm/resnet10t \(size mismatch"),
        (lambda state: state["conv1.0.weight"].fill_(torch.nan), "holds NaN or infinite values"),
    ],
)
def test_other_weights_are_refused(
    change: Callable[[dict[str, Tensor]], object], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name: tensor.clone() for name, tensor in with_classifier("resnet10t").state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "timm.pth")
    flags = ["--arch", "timm/resnet10t", "--ckpt_path", str(tmp_path / "timm.pth"), "--normalize", "imagenet"]
    assert launch.main(["eval", "--dataset", "demo", *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error) and error.count("\n") == 1, error


def test_timms_own_weights(tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched from a Hub on this machine, then from the cache."""
    network = with_classifier("resnet10t")
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    files = {"timm/resnet10t.c3_in1k/model.safetensors": (tmp_path / "weights.safetensors").read_bytes()}
    config = stec.configure("demo", arch="timm/resnet10t", init="pretrained", normalize="imagenet")
    with hub.serving(files) as address:
        at(address, monkeypatch)
        fetched = initial_model(config, 10)
    cached = initial_model(config, 10)
    for model in (fetched, cached):
        for name, tensor in model.encoder.network.state_dict().items():
            assert torch.equal(tensor, network.state_dict()[name]), name
    assert torch.equal(fetched.projection.hidden.weight, cached.projection.hidden.weight)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its tries
    with pytest.raises(UserError, match=r"could not get timm's weights of timm/resnet10t .* name a file of them"):
        initial_model(config, 10)


# --- Mistakes ---

WRONG = {
    "unknown name": ("--arch timm/resnet10x", "resnet10x is no network of timm; did you mean timm/resnet10t?"),
    "no name": ("--arch timm/", "--arch timm/ is no architecture; give one of resnet18,"),
    "unknown weights": ("--arch timm/resnet10t.mine", "that timm does not have; known are resnet10t.c3_in1k."),
    "a name on the Hub": ("--arch timm/hf-hub:x/y", "is no network of timm"),
    "no timm": ("--arch resnet10t", "--arch resnet10t is no architecture; did you mean resnet101?"),
    "patches": (
        "--arch timm/vit_tiny_patch16_224 --view_size 40",
        "patches of 16 px, which do not divide views of 40 px; give --view_size 32 or --view_size 48.",
    ),
    "small views": ("--arch timm/convnext_atto --view_size 16", "cannot encode views of 16 px ("),
    "small images": (
        "--arch timm/ghostnetv3_050 --view_size 64",
        "--dataset demo is evaluated at 32 px: --arch",
    ),
    "width": ("--arch timm/resnet10t --width 32", "--width 32 is for ResNets, but timm/resnet10t has"),
    "third stage": ("--arch timm/resnet10t --inverse_from layer3", "--inverse_from layer3 is for ResNets"),
    "growing views": (
        "--arch timm/vit_tiny_patch16_224 --view_size 32 --resolution_schedule 16:32",
        "--resolution_schedule 16:32 needs an encoder of images of any size",
    ),
    "not pooled": ("--arch timm/qwen3_vit_88m_enc --view_size 64", "[2, 4, 1024] instead of one vector for each image"),
    "pretrained ResNet": ("--arch resnet18 --init pretrained", "--init pretrained is for encoders of timm"),
    "normalization": (
        "--arch timm/vit_tiny_patch16_224 --init pretrained --view_size 32",
        "expect images normalized by inception; add --normalize inception.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_end_in_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, sentence = WRONG[case]
    assert launch.main([*arguments.split(), "--results_path", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and "Traceback" not in error, error
    assert not (tmp_path / "run").exists()


def test_torchvision_has_no_such_network(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(files["resnet10t"], tmp_path / "x.pth", "torchvision") == 2
    assert "is a timm/resnet10t, which no model of torchvision has; export it with" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_timm(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence; ResNets need no timm."""
    facts_of.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    for arguments in (["--arch", "timm/resnet10t"], ["eval", "--dataset", "demo", "--ckpt_path", str(finished)]):
        assert launch.main(arguments) == 2
        error = capsys.readouterr().err
        assert "need the package timm" in error and "pip install -e '.[timm]'" in error and error.count("\n") == 1
    assert Model(ModelSettings(width=4), stem="cifar", classes=3).encoder.feature_dim == 32
