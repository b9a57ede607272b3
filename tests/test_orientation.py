"""Photographs with an EXIF orientation: used as stored, or upright in views, evaluation and previews."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import default_loader

import launch
from pipelines.batch import Batch
from pipelines.commands import Policy
from pipelines.datasets.headers import ORIENTATION
from pipelines.datasets.images import ImageFiles
from pipelines.datasets.notes import notes_on
from pipelines.datasets.registry import open_data_set
from pipelines.errors import UserError
from pipelines.loader import Backend, EvaluationLoader, Loader
from pipelines.sampler import Sampler
from pipelines.splits import read_split
from stec.cli.next_steps import next_steps
from stec.config import TrainConfig, with_settings
from stec.runs import checkpoint
from stec.runs.run_folder import open_run_folder
from tests.conftest import smooth_image

CPU = torch.device("cpu")
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description tiff:Orientation="8" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"/></rdf:RDF></x:xmpmeta>'
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def photographs(tmp_path: Path) -> tuple[Path, Path]:
    """Images of every orientation in several formats, and PNG copies that Pillow turned upright."""
    stored, turned = tmp_path / "stored", tmp_path / "turned"
    stored.mkdir()
    turned.mkdir()
    for n, (kind, value) in enumerate(itertools.product(("jpg", "png", "webp"), range(10))):
        exif = Image.Exif()
        exif[ORIENTATION] = value
        image = Image.fromarray(smooth_image(80 + n, 130 - n, n))
        image.save(stored / f"{kind} {value}.{kind}", exif=exif, quality=92)
    image.save(stored / "xmp.jpg", xmp=XMP)
    image.save(stored / "damaged.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    image.save(stored / "by itself.tif", tiffinfo={ORIENTATION: 6})
    image.save(stored / "plain.jpg")
    for path in stored.iterdir():
        with Image.open(path) as image:
            ImageOps.exif_transpose(image).convert("RGB").save(turned / f"{path.name}.png")
    return stored, turned


def opened(root: Path, exif_orientation: bool = False) -> ImageFiles:
    images = open_data_set("folder", root, exif_orientation=exif_orientation).train
    assert isinstance(images, ImageFiles)
    return images


def test_images_are_turned_as_pillow_turns_them(photographs: tuple[Path, Path]) -> None:
    stored, turned = photographs
    for _ in range(2):
        upright, expected = opened(stored, True), opened(turned)
        np.testing.assert_array_equal(upright.sizes, expected.sizes)
        for n in range(len(expected)):
            assert expected.path(n).name == f"{upright.path(n).name}.png"
            np.testing.assert_array_equal(
                np.asarray(upright.open(n)), np.asarray(expected.open(n)), err_msg=upright.path(n).name
            )
    limited = upright.limited(7)
    np.testing.assert_array_equal(limited.orientation, upright.orientation[np.arange(7) * len(upright) // 7])
    assert [limited.open(n).size[::-1] for n in range(7)] == [tuple(hw) for hw in limited.sizes.tolist()]
    as_stored = opened(stored)
    for n in range(len(as_stored)):
        np.testing.assert_array_equal(np.asarray(as_stored.open(n)), np.asarray(default_loader(as_stored.path(n))))


def first_batch(images: ImageFiles, backend: Backend, device: torch.device) -> Batch:
    sampler = Sampler(images, Policy(size=48), seed=3, batch_size=len(images))
    return next(Loader(sampler, backend=backend, device=device, workers=0).batches(0))


def evaluated(images: ImageFiles, backend: Backend, device: torch.device) -> torch.Tensor:
    options = {"size": 48, "resize_px": 56, "batch_size": len(images), "workers": 0}
    loader = EvaluationLoader(images, backend=backend, device=device, **options)
    return next(iter(loader.batches(np.arange(len(images))))).images


@pytest.mark.parametrize(
    ("backend", "device"),
    [("torchvision", CPU), ("dali", CPU), pytest.param("dali", torch.device("cuda", 0), marks=pytest.mark.gpu)],
)
def test_views_and_evaluation_match_turned_copies(
    photographs: tuple[Path, Path], backend: Backend, device: torch.device
) -> None:
    stored, turned = photographs
    upright, expected = opened(stored, True), opened(turned)
    # JPEG decoders of DALI on CPU, DALI on GPU and Pillow round differently.
    tolerance = 0 if backend == "torchvision" else 0.1 if device == CPU else 1.0
    batch, reference = (first_batch(images, backend, device) for images in (upright, expected))
    np.testing.assert_array_equal(batch.commands.pack(), reference.commands.pack())
    assert float((batch.views - reference.views).abs().mean(dim=(1, 2, 3, 4)).max() * 255) <= tolerance
    assert upright.needs_pillow.sum() == 2, "only these are decoded by Pillow"
    difference = evaluated(upright, backend, device) - evaluated(expected, backend, device)
    assert float(difference.abs().mean(dim=(1, 2, 3)).max() * 255) <= tolerance


def test_orientations_that_dali_does_not_read_need_pillow(photographs: tuple[Path, Path]) -> None:
    images = opened(photographs[0], True)
    names = {images.path(n).name for n in np.flatnonzero(images.needs_pillow)}
    assert names == {"xmp.jpg", "by itself.tif"}


def test_rotated_photographs_are_reported(photographs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    stored, turned = photographs
    for _ in range(2):
        # Orientations 2 to 8 in three formats, and one in XMP; not the TIFF, which Pillow turns.
        assert any("22 of 34 " in note for note in open_data_set("folder", stored).notes)
    assert not open_data_set("folder", stored, exif_orientation=True).notes
    assert not notes_on(read_split(turned, "loose images"))
    assert launch.main(["index", str(stored)]) == 0
    assert "--exif_orientation 1" in capsys.readouterr().out
    assert launch.main(["index", str(stored), "--exif_orientation", "1"]) == 0
    assert "--exif_orientation 1" not in capsys.readouterr().out


def test_a_preview_shows_upright_images(photographs: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ["--dataset", "folder", "--view_size", "48", "--backend", "torchvision", "--num_workers", "0"]
    sheets = []
    for n, (root, more) in enumerate(zip(photographs, (["--exif_orientation", "1"], []))):
        out = tmp_path / f"{n}.png"
        assert launch.main(["preview", str(out), *flags, "--data_dir", str(root), *more]) == 0
        # Only the names of the files differ.
        sheets.append(np.asarray(Image.open(out).convert("RGB")))
    assert sheets[0].shape == sheets[1].shape
    assert (sheets[0] != sheets[1]).mean() < 0.02


def test_the_flag_is_part_of_a_runs_identity(tmp_path: Path) -> None:
    """And is 0 in a checkpoint or a config.json without it."""
    config = TrainConfig().updated(results_path=tmp_path / "run", resume="auto")
    upright = config.updated(exif_orientation=1)
    assert config.identity() != upright.identity()
    commands = [words for _, words in next_steps(upright, tmp_path, classes=2, processes=1) if "eval" in words]
    assert "--exif_orientation" in commands[0]
    older = {name: value for name, value in config.to_json().items() if name != "exif_orientation"}
    assert with_settings(TrainConfig(), json.loads(json.dumps(older)), "config.json") == config
    folder = tmp_path / "run"
    folder.mkdir()
    environment = {"processes": 1, "precision": "no", "backend": "dali", "training_images": 5, "data_fingerprint": "x"}
    before = {name: value for name, value in config.identity().items() if name != "exif_orientation"}
    fields = {
        "model": {},
        "epoch_rows": [],
        "last_epoch": {},
        "identity": before,
        "environment": environment,
        "step": 1,
        "global_batch_size": config.optimization.batch_size,
    }
    state = {**dict.fromkeys(checkpoint.KEYS, 0), **fields}
    checkpoint.save(folder, 1, state, keep=1, keep_every_steps=None)
    with pytest.raises(UserError, match="--exif_orientation was 0 and is now 1"):
        open_run_folder(upright, environment)
    assert open_run_folder(config, environment).resumed is not None
