"""Encoders of other projects, in the layouts of their checkpoints, compare with the networks that wrote them."""

from __future__ import annotations

import argparse
import collections
import copy
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import Normalize

import launch
import stec
from pipelines.datasets import demo
from stec.config import ModelSettings, TrainConfig
from stec.evaluation.evaluate import Features, knn_votes, linear_probing_logits, score
from stec.models.model import Model
from stec.normalization import NORMALIZATIONS
from stec.training.initial_model import initial_model
from stec.weights.export import read_weights, write_safetensors
from tests.conftest import smooth_image

State = dict[str, Tensor]


@cache
def pixels() -> Tensor:
    """[4, 3, 32, 32] in [0, 1]."""
    images = np.stack([smooth_image(32, 32, n) for n in range(4)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def used(network: nn.Module) -> nn.Module:
    """The network with random biases, and statistics of images in its batch norm."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
        network.train()(pixels())
    return network.eval()


class Narrow(torchvision.models.ResNet):
    """torchvision's, with 8 instead of 64 channels in its first stage."""

    def __init__(self, block: type[Any], depths: tuple[int, int, int, int]) -> None:
        super().__init__(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        self.inplanes = 8
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            self._make_layer(block, 8 * 2**k, depth, stride=1 + (k > 0)) for k, depth in enumerate(depths)
        )
        self.fc = nn.Linear(64 * block.expansion, 5)


@cache
def narrow(arch: str = "resnet18") -> nn.Module:
    torch.manual_seed(0)
    if arch == "resnet18":
        return used(Narrow(torchvision.models.resnet.BasicBlock, (2, 2, 2, 2)))
    return used(Narrow(torchvision.models.resnet.Bottleneck, (3, 4, 6, 3)))


@cache
def torchvision_network(arch: str) -> nn.Module:
    torch.manual_seed(0)
    return used(torchvision.models.get_model(arch, num_classes=5))


@cache
def for_cifar() -> nn.Module:
    """torchvision's, changed as is usual for images of 32 px."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=5)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return used(network)


def features_of(network: nn.Module, images: Tensor, normalize: str) -> Tensor:
    """In double precision, of images that are normalized by torchvision."""
    network = copy.deepcopy(network).double()
    network.fc = nn.Identity()
    mean, deviation = NORMALIZATIONS[normalize] or ((0, 0, 0), (1, 1, 1))
    with torch.no_grad():
        return network(Normalize(mean, deviation)(images.double()))


def below(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def other(state: Mapping[str, Tensor]) -> State:
    """The state of a moving average."""
    return {name: tensor + 1 for name, tensor in state.items()}


def body(network: nn.Module) -> State:
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}


def children(network: nn.Module, names: str = "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool") -> State:
    """As lightly's examples number them."""
    return nn.Sequential(*(getattr(network, name) for name in names.split())).state_dict()


HEAD = {"0.weight": torch.ones(4, 512), "0.bias": torch.ones(4), "2.weight": torch.ones(3, 4)}

LAYOUTS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "torchvision": lambda network: network.state_dict(),
    "torchvision before counters": lambda network: {
        name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name
    },
    "timm's training script": lambda network: {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": other(network.state_dict()),
        "args": argparse.Namespace(lr=0.1, data=Path("/data"), seen={1, 2}, kept=frozenset("ab"), angle=1j),
        "state_dict_ema": network.state_dict(),
    },
    "Barlow Twins, VICReg": body,
    "lightly": lambda network: {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {
            **below("backbone.", children(network)),
            **below("projection_head.layers.", HEAD),
            **below("backbone_momentum.", other(children(network))),
            **below("projection_head_momentum.layers.", HEAD),
        },
        "lr_schedulers": [{"milestones": collections.Counter([3]), "best": np.float64(1)}],
    },
    "solo-learn": lambda network: {
        "state_dict": {
            **below("backbone.", body(network)),
            **below("classifier.", {"weight": torch.ones(5, 512), "bias": torch.ones(5)}),
            **below("momentum_backbone.", other(body(network))),
            **below("projector.", HEAD),
        },
        "hyper_parameters": collections.defaultdict(list, {"array": np.ones(3)}),
    },
    "solo-learn before 1.0": lambda network: {
        "state_dict": {
            **below("momentum_encoder.", other(body(network))),
            **below("encoder.", body(network)),
            **below("projector.", HEAD),
        }
    },
    "MoCo": lambda network: {
        "arch": "resnet18",
        "state_dict": {
            **below("module.encoder_q.", body(network)),
            **below("module.encoder_q.fc.", HEAD),
            **below("module.encoder_k.", other(body(network))),
            "module.queue": torch.ones(4, 8),
            "module.queue_ptr": torch.ones(1),
        },
    },
    "MoCo v3": lambda network: {
        "state_dict": {
            **below("module.base_encoder.", network.state_dict()),
            **below("module.momentum_encoder.", other(network.state_dict())),
            **below("module.predictor.", HEAD),
        }
    },
    "DINO": lambda network: {
        "student": other(below("module.backbone.", body(network))),
        "teacher": {**below("backbone.", body(network)), **below("head.mlp.", HEAD)},
        "args": argparse.Namespace(arch="resnet18"),
    },
    "SwAV": lambda network: {
        **below("module.", body(network)),
        **below("module.projection_head.", HEAD),
        "module.prototypes.weight": torch.ones(3, 4),
    },
    "compiled and wrapped": lambda network: {"model": below("_orig_mod.module.", network.state_dict())},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_those_of_the_network(layout: str, tmp_path: Path) -> None:
    network, path = narrow(), tmp_path / "checkpoint.pth"
    torch.save(LAYOUTS[layout](network), path)
    same(stec.load_encoder(path, normalize="imagenet"), network, "imagenet")


def same(encoder: nn.Module, network: nn.Module, normalize: str) -> None:
    """Rounding in double precision is far below any other difference."""
    images = pixels()
    with torch.no_grad():
        features = copy.deepcopy(encoder).double()(images.double())
    expected = features_of(network, images, normalize)
    assert float(expected.std(0).mean()) > 1e-3
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-10)


def test_others_of_these_networks(tmp_path: Path) -> None:
    """Bottlenecks, a safetensors file, the CIFAR stem, other normalizations."""
    torch.save(LAYOUTS["MoCo"](narrow("resnet50")), tmp_path / "moco.pth")
    same(stec.load_encoder(tmp_path / "moco.pth", normalize="none"), narrow("resnet50"), "none")
    save_file(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "timm.safetensors")
    assert stec.load_encoder(tmp_path / "timm.safetensors", normalize="imagenet").feature_dim == 512
    torch.save(for_cifar().state_dict(), tmp_path / "cifar.pth")
    same(stec.load_encoder(tmp_path / "cifar.pth", normalize="cifar10"), for_cifar(), "cifar10")
    # As many trainers for CIFAR, and lightly's own ResNet, name it.
    state = {name.replace("downsample", "shortcut"): tensor for name, tensor in body(for_cifar()).items()}
    torch.save({"net": None, "model": {**state, "linear.weight": torch.ones(5, 512)}}, tmp_path / "shortcut.ckpt")
    same(stec.load_encoder(tmp_path / "shortcut.ckpt", normalize="cifar100"), for_cifar(), "cifar100")
    torch.save(children(for_cifar()), tmp_path / "children.ckpt")
    same(stec.load_encoder(tmp_path / "children.ckpt", normalize="none"), for_cifar(), "none")


def test_models_of_ours_that_were_wrapped(tmp_path: Path) -> None:
    """Keep their heads, and need no normalization."""
    state = Model(ModelSettings(width=4, feat_dim=8), stem="cifar", classes=10).state_dict()
    for prefix in ("module.", "_orig_mod."):
        torch.save(below(prefix, state), tmp_path / "wrapped.pt")
        read = read_weights(tmp_path / "wrapped.pt")
        assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
        assert stec.load_encoder(tmp_path / "wrapped.pt").normalize == "none"


@pytest.fixture
def moco(tmp_path: Path) -> Path:
    torch.save(LAYOUTS["MoCo"](narrow()), tmp_path / "moco.pth")
    return tmp_path / "moco.pth"


def test_how_images_were_normalized_must_be_said(
    moco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    for arguments in (
        ["eval", "--dataset", "demo", "--ckpt_path", moco],
        ["embed", tmp_path / "x.npy", "--dataset", "demo", "--ckpt_path", moco],
        ["export", moco, tmp_path / "x.pth", "--format", "timm"],
        ["--ckpt_path", moco, "--width", "8", "--mixed_precision", "no", "--results_path", tmp_path / "run"],
    ):
        assert launch.main([*map(str, arguments)]) == 2
        assert "does not say how its images were normalized; set normalize (--normalize)" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_evaluation_is_that_of_the_network(
    moco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scores of its own features, of images normalized by torchvision."""
    monkeypatch.setitem(demo.IMAGES, "train", 256)
    monkeypatch.setitem(demo.IMAGES, "test", 64)
    out = tmp_path / "scores.json"
    arguments = "--dataset demo --measures knn linear_probing --normalize imagenet --num_workers 1"
    assert launch.main(["eval", "--ckpt_path", str(moco), "--json", str(out), *arguments.split()]) == 0
    assert "normalized as imagenet" in capsys.readouterr().out
    bank, queries = (
        Features(
            features=features_of(narrow(), torch.from_numpy(of.pixels).permute(0, 3, 1, 2) / 255, "imagenet").float(),
            labels=torch.from_numpy(of.labels),
        )
        for of in (demo.render(split="train"), demo.render(split="test"))
    )
    measured = json.loads(out.read_text())
    cpu = torch.device("cpu")
    votes, logits = (classify(bank, queries, 10, cpu) for classify in (knn_votes, linear_probing_logits))
    expected = [score(classified, queries.labels).accuracy for classified in (votes, logits)]
    found = [measured["measures"][name]["accuracy"] for name in ("knn20", "linear_probing")]
    assert measured["normalize"] == "imagenet"
    # One of 64 images may be classified differently.
    np.testing.assert_allclose(found, expected, atol=1.01 / 64)


def test_training_starts_from_them(moco: Path) -> None:
    """On images in [0, 1], which the encoder normalizes."""
    config = TrainConfig().updated(dataset="imagenet", width=8, ckpt_path=moco, normalize="imagenet", stop_gradient=2)
    model = initial_model(config, classes=5).eval()
    same(model.encoder, narrow(), "imagenet")


def test_training_keeps_the_normalization(moco: Path, tmp_path: Path) -> None:
    """Of weights that record it."""
    assert (
        launch.main(["export", str(moco), str(tmp_path / "hub"), "--format", "huggingface", "--normalize", "imagenet"])
        == 0
    )
    config = TrainConfig().updated(dataset="imagenet", width=8, ckpt_path=tmp_path / "hub/model.safetensors")
    with pytest.raises(stec.UserError, match="normalizes images by imagenet; add --normalize imagenet"):
        initial_model(config, classes=5)
    initial_model(config.updated(normalize="imagenet"), classes=5)


def test_exports_normalize(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with operators do it themselves, the others say it."""
    network, moco = torchvision_network("resnet18"), tmp_path / "moco.pth"
    torch.save(LAYOUTS["MoCo"](network), moco)
    for kind, name in (("torch_export", "x.pt2"), ("huggingface", "hub"), ("timm", "timm.pth")):
        flags = ["--format", kind, "--normalize", "imagenet"]
        assert launch.main(["export", str(moco), str(tmp_path / name), *flags]) == 0
    assert "normalized with mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)" in capsys.readouterr().out
    images = torch.nn.functional.interpolate(pixels()[:1], (224, 224))
    program = torch.export.load(tmp_path / "x.pt2").module()
    torch.testing.assert_close(program(images).double(), features_of(network, images, "imagenet"), rtol=1e-4, atol=1e-4)
    in_timm = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / "timm.pth"))
    same(in_timm.eval(), network, "none")

    same(stec.load_encoder(tmp_path / "hub"), network, "imagenet")
    monkeypatch.chdir(tmp_path / "hub")
    card = Path("README.md").read_text()
    assert "normalizes as imagenet" in card
    names: dict[str, nn.Module] = {}
    exec(re.search("```python\n(.*?)```", card, re.DOTALL)[1], names)
    same(names["model"], network, "imagenet")


def test_import_keeps_asking(moco: Path, tmp_path: Path) -> None:
    assert launch.main(["import", str(moco), str(tmp_path / "ours.safetensors")]) == 0
    with pytest.raises(stec.UserError, match="does not say how its images were normalized"):
        stec.load_encoder(tmp_path / "ours.safetensors")
    same(
        stec.load_encoder(tmp_path / "ours.safetensors", normalize="imagenet"),
        narrow(),
        "imagenet",
    )


def test_import_keeps_what_is_known(tmp_path: Path) -> None:
    """Of files of this project; but not where the weights lay that training started from."""
    ours = stec.Encoder("resnet18", "imagenet", 8).eval()
    metadata = {"config": {"dataset": "folder", "normalize": "imagenet", "ckpt_path": "/private/moco.pth"}, "step": 3}
    write_safetensors(ours.state_dict(), tmp_path / "run.safetensors", metadata)
    assert launch.main(["import", str(tmp_path / "run.safetensors"), str(tmp_path / "imported.safetensors")]) == 0
    run, imported = (stec.load_encoder(tmp_path / f"{name}.safetensors") for name in ("run", "imported"))
    assert torch.equal(imported(pixels()), run(pixels()))
    assert imported.transform(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape == (3, 224, 224)
    assert b"private" not in (tmp_path / "imported.safetensors").read_bytes()
    with pytest.raises(stec.UserError, match="normalizes images by imagenet; give --normalize imagenet"):
        stec.load_encoder(tmp_path / "imported.safetensors", normalize="clip")


def without_weights(name: str) -> State:
    """The state of one of timm's networks."""
    return timm.create_model(name, num_classes=0).state_dict()


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a vision transformer": (
        lambda: {"cls_token": torch.ones(1, 1, 8), "patch_embed.proj.weight": torch.ones(8, 3, 4, 4)},
        r"holds no encoder: no ResNet .* which are cls_token \[1, 1, 8\], patch_embed\.proj\.weight \[8, 3, 4, 4\];",
    ),
    "another stem": (
        lambda: without_weights("resnet18d"),
        r"holds no encoder: .* which are conv1\.0\.weight \[32, 3, 3, 3\]",
    ),
    "no first ReLU": (
        lambda: below("backbone.", children(for_cifar(), "conv1 bn1 layer1 layer2 layer3 layer4")),
        r"or their numbers 0, 1, 4 to 7\) .* which are backbone\.0\.weight \[64, 3, 3, 3\]",
    ),
    "other depths": (
        lambda: without_weights("resnet152"),
        r"bottleneck blocks and depths \(3, 8, 36, 3\), which is none of",
    ),
    "more operators": (
        lambda: without_weights("seresnet18"),
        r"does not fit the model \(encoder\.layer1\.0\.se\.fc1\.bias is unknown here;",
    ),
    "other widths": (
        lambda: (
            {k: v for k, v in body(narrow()).items() if "layer4" not in k}
            | {k: v[:9] for k, v in body(narrow()).items() if "layer4" in k and v.ndim}
        ),
        r"does not fit the model \(encoder\.layer4",
    ),
    "no weights": (
        lambda: {"epoch": 3, "network": {"a": torch.ones(1)}},
        r"holds no weights under .*state_dict or model",
    ),
    "nothing": (lambda: {}, r"its tensors, which are none;"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_recognized(case: str, tmp_path: Path) -> None:
    make, sentence = REFUSED[case]
    torch.save(make(), tmp_path / "x.pth")
    with pytest.raises(stec.UserError, match=sentence):
        stec.load_encoder(tmp_path / "x.pth", normalize="imagenet")


def test_of_two_encoders_one_must_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the line of Python that the refusal gives."""
    network = narrow()
    state = {**below("student_backbone.", children(network)), **below("teacher_backbone.", other(children(network)))}
    torch.save({"state_dict": state}, tmp_path / "dino.ckpt")
    with pytest.raises(
        stec.UserError, match=r"several encoders, .* student_backbone\. and teacher_backbone\."
    ) as raised:
        read_weights(tmp_path / "dino.ckpt")
    output = str(raised.value)
    monkeypatch.chdir(tmp_path)
    eval(output[output.index("torch.save(") :].rstrip("."), {"torch": torch, "state": state})
    same(stec.load_encoder(tmp_path / "encoder.pth", normalize="none"), network, "none")


def test_files_of_ours_need_no_normalization(tmp_path: Path) -> None:
    write_safetensors(body(for_cifar()), tmp_path / "encoder.safetensors", {})
    assert stec.load_encoder(tmp_path / "encoder.safetensors").normalize == "none"
