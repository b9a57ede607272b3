"""The encoder outside of this project: as ONNX and torch.export programs, and the transform that makes its input."""

from __future__ import annotations

import io
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor, nn

import launch
import stec
from pipelines.datasets import demo
from pipelines.datasets.images import ImageArray, ImageFiles
from pipelines.datasets.registry import DATA_SETS
from pipelines.loader import EvaluationLoader
from stec.models.encoder import Encoder
from stec.weights.export import write_safetensors
from tests.conftest import smooth_image
from tests.test_docs import PAGES, fenced


def export(source: Path, out: Path, kind: str, *flags: str) -> int:
    return launch.main(["export", str(source), str(out), "--format", kind, *flags])


def file_of(folder: Path, data_set: str, width: int = 4, **settings: object) -> Path:
    """The file of an encoder whose batch norm has seen images of the data set."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", DATA_SETS[data_set].stem, width)
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5) if name.endswith("weight") else nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        encoder.train()(inputs(64))
    path = folder / f"{data_set}.safetensors"
    metadata = {"config": {"dataset": data_set, "arch": "resnet18", "ckpt_path": "/home/me/x.ckpt", **settings}}
    write_safetensors(encoder.state_dict(), path, metadata)
    return path


def inputs(size_px: int, count: int = 4) -> Tensor:
    """[count, 3, size_px, size_px] in [0, 1]: images of the demo set."""
    pixels = demo.load(split="test").pixels[:count]
    resized = [np.asarray(Image.fromarray(image).resize((size_px, size_px))) for image in pixels]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255


ENCODERS = [("cifar10", 16, 32), ("imagenet", 2, 48)]
"""Data set (which determines the stem), width, and the size of the images in px: views of 48 px change it only where
evaluation resizes."""


@pytest.mark.parametrize(("data_set", "width", "size_px"), ENCODERS)
def test_onnx_runtime_gives_the_same_features(data_set: str, width: int, size_px: int, tmp_path: Path) -> None:
    source, out = file_of(tmp_path, data_set, width, view_size=48), tmp_path / "encoder.onnx"
    assert export(source, out, "onnx") == 0
    session = onnxruntime.InferenceSession(out)
    encoder = stec.load_encoder(source)
    for count in (1, 3):
        images = inputs(size_px, count)
        (features,) = session.run(None, {"images": images.numpy()})
        expected = encoder(images).detach()
        assert features.shape == expected.shape and expected.std() > 0.01
        torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-4, atol=1e-4)
    assert session.get_inputs()[0].shape == ["batch", 3, size_px, size_px]
    with pytest.raises(Exception, match="Got invalid dimensions"):
        session.run(None, {"images": inputs(size_px + 1, 1).numpy()})
    (entry,) = onnx.load(out).metadata_props
    assert entry.key == "stec"
    check_metadata(json.loads(entry.value), size_px)


@pytest.mark.parametrize(("data_set", "width", "size_px"), ENCODERS)
def test_torch_export_gives_the_same_features(data_set: str, width: int, size_px: int, tmp_path: Path) -> None:
    source, out = file_of(tmp_path, data_set, width, view_size=48), tmp_path / "encoder.pt2"
    assert export(source, out, "torch_export") == 0
    extra_files = {"stec.json": ""}
    program = torch.export.load(out, extra_files=extra_files).module()
    encoder = stec.load_encoder(source)
    for count in (1, 3):
        images = inputs(size_px, count)
        torch.testing.assert_close(program(images), encoder(images), rtol=0, atol=1e-6)
    check_metadata(json.loads(extra_files["stec.json"]), size_px)


def check_metadata(metadata: dict[str, dict[str, object]], size_px: int) -> None:
    """The file says how to make its input, and does not say where it was made."""
    assert metadata["preprocessing"] == {
        "color": "RGB",
        "resize_shorter_side_px": {32: 32, 48: 256 * 48 // 224}[size_px],
        "center_crop_px": size_px,
        "value_range": [0, 1],
    }
    assert metadata["config"]["ckpt_path"] == "x.ckpt"


class Bessel(nn.Module):
    """An operator that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Branch(nn.Module):
    """A branch on values, which no tracer can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("module", "kind", "sentence"),
    [
        (Bessel, "onnx", "ONNX has no operator for prims.bessel_j0; use --format torch_export."),
        (Branch, "torch_export", "The encoder cannot be traced by torch.export (Could not guard on"),
    ],
)
def test_what_a_format_lacks_is_one_sentence(
    module: type[nn.Module],
    kind: str,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, forward = file_of(tmp_path, "demo"), Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, images: module()(forward(self, images)))
    assert export(source, tmp_path / ("x.onnx" if kind == "onnx" else "x.pt2"), kind) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert sentence in line and line.startswith("error: ")
    assert list(tmp_path.iterdir()) == [source]


def test_without_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = file_of(tmp_path, "demo")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export(source, tmp_path / "x.onnx", "onnx") == 2
    assert "needs the package onnxscript; run pip install -e '.[onnx]'" in capsys.readouterr().err
    assert export(source, tmp_path / "x.pt", "torch_export") == 2
    assert "x.pt must end in .pt2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def photographs_of(images: ImageFiles, traits_of: str, backend: str) -> EvaluationLoader:
    traits = DATA_SETS[traits_of]
    return EvaluationLoader(
        images,
        size=traits.view_size_px,
        resize_px=traits.resize_px,
        batch_size=16,
        backend=backend,
        device=torch.device("cpu"),
        workers=1 if backend == "dali" else 0,
    )


@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_the_transform_is_that_of_evaluation(backend: str, photographs: ImageFiles, tmp_path: Path) -> None:
    """On JPEG files of many sizes, some of them gray: as Pillow's image, and as uint8 tensor."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    transform = stec.load_encoder(file_of(tmp_path, "imagenet")).transform
    images = replace(photographs, labels=np.zeros(64, np.int64)).limited(16)
    (batch,) = photographs_of(images, "imagenet", backend).batches(np.arange(16))
    for n, expected in enumerate(batch.images):
        with Image.open(io.BytesIO(images.encoded(n).data)) as image:
            pixels = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
            view = transform(image)
        assert view.shape == (3, 224, 224) and view.dtype == torch.float32
        assert torch.equal(view, transform(torch.from_numpy(pixels.copy())))
        # DALI resizes with other intermediate rounding than Pillow.
        assert (view - expected).abs().max() * 255 <= (0 if backend == "torchvision" else 1.001)


@pytest.mark.parametrize("data_set", ["demo", "stl10"])
def test_images_that_evaluation_uses_as_they_are(data_set: str, tmp_path: Path) -> None:
    """Are unchanged; others are resized, and their center cropped."""
    size_px = DATA_SETS[data_set].view_size_px
    transform = stec.load_encoder(file_of(tmp_path, data_set, view_size=48)).transform
    images = ImageArray(pixels=np.stack([smooth_image(size_px, size_px, n) for n in range(3)]), labels=np.arange(3))
    loader = EvaluationLoader(
        images, size=48, resize_px=None, batch_size=3, backend="auto", device=torch.device("cpu"), workers=0
    )
    (batch,) = loader.batches(np.arange(3))
    for n, expected in enumerate(batch.images):
        assert torch.equal(transform(images.open(n)), expected)
    assert transform(Image.fromarray(smooth_image(50, 80, 0))).shape == (3, size_px, size_px)


def test_encoders_that_were_not_loaded_have_no_transform() -> None:
    with pytest.raises(stec.UserError, match=r"load one by stec\.load_encoder"):
        _ = Encoder("resnet18", "cifar", 4).transform


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"preprocessing": {"resize": 3}}, "describes its images in another way than this version"),
        ({"encoder": {"normalize": ["imagenet"]}}, "has the normalization"),
    ],
)
def test_metadata_of_another_version(metadata: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_safetensors(Encoder("resnet18", "cifar", 4).state_dict(), tmp_path / "x.safetensors", metadata)
    with pytest.raises(stec.UserError, match=sentence):
        stec.load_encoder(tmp_path / "x.safetensors")


def test_the_hub_has_the_preprocessing(tmp_path: Path) -> None:
    """Of the folder, by our loader and the mixin's, and in the card."""
    from stec.weights.hub import HubEncoder

    assert export(file_of(tmp_path, "imagenet", view_size=64), tmp_path / "exported", "huggingface") == 0
    text = ModelCard.load(tmp_path / "exported/README.md").content
    assert "the shorter side of an image is resized to 73 px and the center of 64 px is cropped" in text
    for encoder in (stec.load_encoder(tmp_path / "exported"), HubEncoder.from_pretrained(tmp_path / "exported")):
        assert encoder.transform(Image.new("RGB", (100, 80))).shape == (3, 64, 64)
    assert export(tmp_path / "exported", tmp_path / "again", "huggingface") == 0
    assert (tmp_path / "again/README.md").read_bytes() == (tmp_path / "exported/README.md").read_bytes()


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands, and the Python code that uses what they write."""
    file_of(tmp_path, "imagenet", view_size=48).rename(tmp_path / "encoder.safetensors")
    Image.fromarray(smooth_image(50, 80, 0)).save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    commands, page = (
        fenced(PAGES["docs/deploy.md"])[0],
        PAGES["docs/deploy.md"].replace("runs/mine", "encoder.safetensors"),
    )
    for command in commands.replace("runs/mine", "encoder.safetensors").splitlines():
        assert launch.main(shlex.split(command)[2:]) == 0
    images = inputs(48)
    expected = stec.load_encoder("encoder.safetensors")(images)
    with_onnx, with_torch, with_stec = fenced(page, "python")
    for code, given in ((with_onnx, images.numpy()), (with_torch, images)):
        names: dict[str, Any] = {"images": given}
        exec(code, names)
        torch.testing.assert_close(torch.as_tensor(names["features"]), expected, rtol=1e-4, atol=1e-4)
        assert names["preprocessing"]["center_crop_px"] == 48
    names = {}
    exec(with_stec, names)
    assert names["features"].shape == (1, 32)
