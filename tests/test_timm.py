"""Encoders of timm: as timm computes them, trained, resumed, exported, and started from timm's weights."""

from __future__ import annotations

import copy
import json
import re
import signal
import subprocess
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
from pipelines.datasets.images import ImageArray
from pipelines.errors import UserError
from stec.config import ModelSettings, ObjectiveSettings, OptimizationSettings
from stec.models.encoder import NARROW
from stec.models.model import Model
from stec.models.timm_encoder import TimmEncoder, adapted_weights, facts_of
from stec.objectives.inverse import EfferenceCopy
from stec.objectives.objective import Objective
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

ROOT = Path(__file__).parents[1]
SIZES = {"resnet10t": 32, "vit_tiny_patch16_224": 48, "convnext_atto": 32}
"""Small networks, one of each kind, with the size of their views in px."""
SMALL = (
    "--limit_train 32 --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 --max_epochs 2 --num_workers 1 "
    "--mixed_precision no"
).split()


@cache
def images(size: int, count: int = 4) -> Tensor:
    """[count, 3, size, size] in [0, 1]."""
    return torch.from_numpy(np.stack([smooth_image(size, size, n) for n in range(count)])).permute(
        0, 3, 1, 2
    ).float() / 255


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


def test_the_patch_size_is_that_of_the_name() -> None:
    for patch in (16, 32):
        encoder = TimmEncoder(f"timm/vit_base_patch{patch}_224".replace("base", "small"), 64)
        assert encoder.network.pos_embed.shape[1] == 1 + (64 // patch) ** 2


@pytest.mark.parametrize("name", ["fasternet_t0", "ghostnet_050"])
def test_nothing_is_dropped_at_random(name: str) -> None:
    """Networks whose defaults have stochastic depth and dropout compute the same twice, in training as well."""
    theirs, ours = timm.create_model(name, num_classes=0), TimmEncoder(f"timm/{name}", 64)
    pixels = images(64)
    with torch.no_grad():
        assert not torch.equal(theirs(pixels), theirs(pixels)), "the network would show nothing"
        assert torch.equal(ours(pixels), ours(pixels))


def test_parameters_without_effect_are_not_trained() -> None:
    """DistributedDataParallel would wait for their gradients."""
    encoder = TimmEncoder("timm/crossvit_tiny_240", 240) if False else an_encoder("convnext_atto")
    encoder(images(32)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())
    encoder.zero_grad(set_to_none=True)


def test_narrow_convolutions_with_a_stride_are_not_channels_last() -> None:
    """For a fault of oneDNN, see ``NARROW``."""
    wide, narrow = an_encoder("resnet10t"), TimmEncoder("timm/test_resnet", 32)
    assert wide.memory_format == torch.channels_last
    strided = [
        m for m in narrow.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride == (2, 2)
    ]
    is_narrow = any(min(m.in_channels, m.out_channels) < NARROW for m in strided)
    assert (narrow.memory_format == torch.contiguous_format) == is_narrow


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
    """A run of a vision transformer with a target network, and gradient caching, stopped and resumed."""
    folder = tmp_path_factory.mktemp("runs") / "vit"
    flags = "--arch timm/vit_tiny_patch16_224 --view_size 32 --objective byol --accumulate 2 --batch_size 8"
    arguments = [*flags.split(), *SMALL, "--optimizer", "adamw", "--resume", "auto", "--results_path", folder]
    Run(*arguments, prepare=SignalAtStep(3, signal.SIGTERM)).end()
    assert "Resuming after step 3." in Run(*arguments).end()
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


@pytest.mark.parametrize("run", ["finished", "finished_vit"])
def test_a_run_is_evaluated_and_shown(
    run: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all commands that read one; views of 16 and 32 px, images of 32 px."""
    folder: Path = request.getfixturevalue(run)
    encoder = stec.load_encoder(folder)
    Run("eval", "--dataset", "demo", "--ckpt_path", folder, "--measures", "knn", "rankme", "online_classifier").end()
    Run("embed", tmp_path / "features.npy", "--dataset", "demo", "--ckpt_path", folder).end()
    features = np.load(tmp_path / "features.npy")
    assert features.shape == (64, encoder.feature_dim)
    config = ("--config", folder / "config.json", "--ckpt_path", folder)
    Run("preview", tmp_path / "views.png", *config, "--count", "1").end()
    assert (tmp_path / "views.png").stat().st_size > 1000
    Run("report", folder, "--out", tmp_path / "report.html", "--images", "32").end()
    assert len(re.findall("data:image/png", (tmp_path / "report.html").read_text())) > 3


def test_a_compiled_step_is_as_exact_as_a_plain_one() -> None:
    encoder = copy.deepcopy(an_encoder("vit_tiny_patch16_224"))
    # Two blocks instead of twelve, as compiling takes that much less.
    encoder.network.blocks = encoder.network.blocks[:2]

    def one_step(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        module.zero_grad()
        features = module(images(48).to(dtype))
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


@pytest.mark.parametrize("size", [48, 32])
@pytest.mark.parametrize("name", SIZES)
def test_programs(name: str, size: int, files: dict[str, Path], tmp_path: Path) -> None:
    """ONNX and torch.export, also for images that the encoder resizes, as the demo set's are."""
    if size == SIZES[name] or not name.startswith("vit"):
        source = files[name]
        size = SIZES[name]
    else:
        source = tmp_path / "encoder.safetensors"
        config = {"dataset": "demo", "view_size": SIZES[name], "arch": f"timm/{name}"}
        write_safetensors(an_encoder(name).state_dict(), source, {"config": config})
    pixels = images(size)
    expected = an_encoder(name)(pixels).detach()
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
    target = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, checkpoint_path=tmp_path / "target.pth")
    assert not torch.allclose(target.eval()(images(32)), expected)


# --- Weights of timm ---


@cache
def with_classifier(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    network: nn.Module = timm.create_model(name, **options)
    return network.eval()


def test_training_starts_from_a_checkpoint_of_timm(tmp_path: Path) -> None:
    """Of images of 224 px, with a classifier, in the layout of timm's training script; with a rate of 0 it stays."""
    network = with_classifier("vit_tiny_patch16_224")
    torch.save({"arch": "vit_tiny_patch16_224", "state_dict": network.state_dict()}, tmp_path / "timm.pth")
    flags = "--arch timm/vit_tiny_patch16_224 --view_size 32 --batch_size 16 --init pretrained --normalize inception"
    flags += f" --ckpt_path {tmp_path / 'timm.pth'} --learning_rate 0 --results_path {tmp_path / 'run'}"
    Run(*flags.split(), *SMALL).end()
    overlay = {"file": str(tmp_path / "timm.pth")}
    theirs = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=32
    ).eval()
    normalized = nn.Sequential(Normalize((0.5,) * 3, (0.5,) * 3), theirs)
    assert_same(normalized, stec.load_encoder(tmp_path / "run"), images(32))


def test_a_checkpoint_of_timm_is_evaluated(tmp_path: Path) -> None:
    network = with_classifier("resnet10t")
    save_file(network.state_dict(), tmp_path / "timm.safetensors")
    flags = f"--dataset demo --arch timm/resnet10t --ckpt_path {tmp_path / 'timm.safetensors'} --normalize imagenet"
    Run("embed", tmp_path / "features.npy", *flags.split()).end()
    assert np.load(tmp_path / "features.npy").shape == (64, 512)


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
        (lambda state: state.pop("conv1.0.weight"), r"holds no weights of timm/resnet10t \(conv1.0.weight is missing\)"),
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
    from stec.training.initial_model import initial_model

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
    "width": ("--arch timm/resnet10t --width 32", "--width 32 is for ResNets, but timm/resnet10t has"),
    "third stage": ("--arch timm/resnet10t --inverse_from layer3", "--inverse_from layer3 is for ResNets"),
    "growing views": (
        "--arch timm/vit_tiny_patch16_224 --view_size 32 --resolution_schedule 16:32",
        "--resolution_schedule 16:32 needs an encoder of images of any size",
    ),
    "not pooled": ("--arch timm/qwen3_vit_88m_enc --view_size 64", "[2, 4, 1024] instead of one vector for each image"),
    "other statistics": ("--arch timm/resnetv2_50d_evos", ""),
    "pretrained ResNet": ("--arch resnet18 --init pretrained", "--init pretrained is for encoders of timm"),
    "normalization": (
        "--arch timm/vit_tiny_patch16_224 --init pretrained --view_size 32",
        "expect images normalized by inception; add --normalize inception.",
    ),
}


@pytest.mark.parametrize("case", [case for case in WRONG if WRONG[case][1]])
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


def test_statistics_that_are_not_synchronized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evolved norms compute them in their own way."""
    from timm.layers import EvoNorm2dB0
    from timm.models import resnet

    monkeypatch.setitem(facts_of.__wrapped__.__globals__, "_check_name", lambda arch: None)
    original = resnet.resnet10t
    monkeypatch.setattr(
        "timm.models._factory.model_entrypoint",
        lambda name: lambda **options: original(norm_layer=lambda n, **_: EvoNorm2dB0(n), **options),
    )
    with pytest.raises(UserError, match="normalizes by EvoNorm2dB0, whose statistics"):
        facts_of("timm/evolved", 32)


def test_without_timm(finished: Path) -> None:
    """One sentence; ResNets need no timm."""
    code = "import sys; sys.modules['timm'] = None; import launch; sys.exit(launch.main(sys.argv[1:]))"
    for arguments in (["--arch", "timm/resnet10t"], ["eval", "--dataset", "demo", "--ckpt_path", str(finished)]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "need the package timm" in done.stderr and "pip install -e '.[timm]'" in done.stderr
    command = [sys.executable, "-c", code, "--print_config"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=120)
