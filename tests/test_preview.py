"""Pictures of commands: that they show what a run trained on, and what its inverse model predicts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import launch
from pipelines.batch import Batch
from pipelines.commands import Commands, Policy, draw
from pipelines.datasets import demo
from pipelines.datasets.bad_list import BadList
from pipelines.datasets.images import ImageArray, ImageFiles
from pipelines.datasets.registry import DataSet
from pipelines.executors.torchvision import execute
from stec.config import ModelSettings, TrainConfig
from stec.evaluation.examples import examples
from stec.evaluation.predictions import (
    CropBoxes,
    TargetPredictions,
    confusion,
    crop_boxes,
    efference_copy,
    overlap,
    predictions,
    predictions_of_batches,
)
from stec.evaluation.preview import COLORS, PANEL_PX, Example, in_words, panels, sheet
from stec.geometry import (
    Convention,
    following_windows,
    relative_windows,
    window_matrices,
    windows_of,
)
from stec.loaders import training_loader
from stec.models.model import Model
from stec.objectives.inverse import EfferenceCopy, bin_centers, value_bins
from stec.targets import TARGETS
from stec.weights.pretrained import read_trained
from tests.runs import SMALL_DEMO

CPU = torch.device("cpu")


def some_commands(count: int = 64, *, size_px: int = 32, **policy: float) -> Commands:
    hw = np.broadcast_to(np.array([40, 60]), (count, 2))
    return draw(Policy(size=size_px, **policy), seed=3, epoch=0, first_position=0, image_hw=hw)


@pytest.mark.parametrize("convention", ["official", "exact", "egocentric"])
def test_a_command_leads_from_one_window_to_the_other(convention: Convention) -> None:
    commands = some_commands()
    theta = window_matrices(commands)
    found = following_windows(theta[:, 0], relative_windows(commands, convention=convention), convention)
    np.testing.assert_allclose(found, theta[:, 1], atol=1e-5)
    windows, flips = windows_of(found)
    pixels = windows * [60, 40, 60, 40]
    expected = np.stack([commands.left, commands.top, commands.width, commands.height], -1)[:, 1]
    np.testing.assert_allclose(pixels, expected, atol=1e-3)
    np.testing.assert_array_equal(flips, commands.flip[:, 1])


@pytest.mark.parametrize("n_bins", [2, 6, 7])
def test_the_middle_of_a_bin_lies_in_it(n_bins: int) -> None:
    bins = torch.arange(n_bins)[:, None, None].expand(n_bins, 2, 3)
    centers = bin_centers(bins, n_bins)
    assert torch.equal(value_bins(centers, n_bins), bins)
    # The first and the last are half a bin away from the ends of the range.
    np.testing.assert_allclose(centers[0, 0], [-2 + 2 / n_bins, -2 + 2 / n_bins, -0.5 + 0.5 / n_bins], rtol=1e-6)


def test_overlap() -> None:
    square = np.array([0.0, 0, 0.5, 0.5])
    assert overlap(square, square) == pytest.approx(1)
    assert overlap(square, square + np.array([0.25, 0, 0, 0])) == pytest.approx(1 / 3)
    assert overlap(square, square + np.array([0.6, 0, 0, 0])) == 0


class Oracle(torch.nn.Module):
    """An inverse model that is sure of given bins [N, 2, 3]."""

    def __init__(self, bins: torch.Tensor, n_bins: int) -> None:
        super().__init__()
        self.bins, self.n_bins = bins, n_bins

    def forward(self, features_i: torch.Tensor, _features_j: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(self.bins, self.n_bins).movedim(-1, 1).float()


def model_that_predicts(bins: torch.Tensor, n_bins: int) -> Model:
    model = Model(ModelSettings(width=4, manip_hidden_mlp=8, n_bins=n_bins), stem="cifar", classes=0).eval()
    model.inverse_models["window"] = Oracle(bins, n_bins)
    return model


def windows_predicted(
    model: Model, commands: Commands, convention: Convention = "official"
) -> tuple[TargetPredictions, CropBoxes, CropBoxes]:
    """The predicted bins, the crop boxes that follow from them, and those that follow from the true ones."""
    copy = EfferenceCopy(convention=convention)
    of_window = predictions(model, torch.zeros(len(commands), 2, 3, 32, 32), commands, copy)["window"]
    boxes, best = (
        crop_boxes(bins, of_window.n_bins, commands, convention)
        for bins in (of_window.predicted_bins, of_window.true_bins)
    )
    return of_window, boxes, best


@pytest.mark.parametrize("convention", ["official", "exact", "egocentric"])
def test_what_an_inverse_model_believes_becomes_a_window(convention: Convention) -> None:
    """Right bins lead to the true window up to a bin's width: the narrower the bins, the nearer."""
    commands = some_commands(area=(0.3, 1.0), aspect_ratio=(1.0, 1.0))
    true_windows, _ = windows_of(window_matrices(commands)[:, 1])
    # Beyond the outermost bins nothing can be predicted.
    command = relative_windows(commands, convention=convention)
    inside = (np.abs(command) <= [2, 2, 0.5]).all(axis=(1, 2))
    assert inside.sum() > 20
    true = value_bins(torch.from_numpy(command), 501)
    _, predicted, best = windows_predicted(model_that_predicts(true, 501), commands, convention)
    np.testing.assert_allclose(predicted.windows[inside], true_windows[inside], atol=0.012)
    np.testing.assert_array_equal(predicted.windows, best.windows)
    np.testing.assert_array_equal(predicted.flips, commands.flip[:, 1])
    assert min(overlap(a, b) for a, b in zip(predicted.windows[inside], true_windows[inside])) > 0.9
    # A window has no shear, whatever is predicted of it.
    sheared = true.clone()
    sheared[:, 0, 1] = sheared[:, 1, 0] = 400
    _, again, _ = windows_predicted(model_that_predicts(sheared, 501), commands, convention)
    np.testing.assert_array_equal(again.windows, predicted.windows)


def test_confusion_counts_what_was_believed() -> None:
    n_bins = 5
    commands = some_commands(p_solarize=0.3)
    predicted = torch.from_numpy(np.random.default_rng(0).integers(0, n_bins, (64, 2, 3)))
    batch = Batch(
        views=torch.zeros(64, 2, 3, 32, 32),
        commands=commands,
        labels=torch.zeros(64, dtype=torch.int64),
        epoch=0,
        positions=np.arange(64),
        image_ids=np.arange(64),
    )
    model = model_that_predicts(predicted, n_bins)
    counts = confusion(predictions_of_batches(model, [batch, batch], EfferenceCopy())["window"])
    true = value_bins(torch.from_numpy(relative_windows(commands)), n_bins)
    expected = np.zeros((2, 3, n_bins, n_bins), np.int64)
    for n in range(64):
        for r, c in np.ndindex(2, 3):
            expected[r, c, true[n, r, c], predicted[n, r, c]] += 0 if commands.solarize[n].any() else 2
    assert 0 < commands.solarize.any(axis=1).sum() < 64
    np.testing.assert_array_equal(counts, expected)


# --- What is shown is what was trained on ---

SETTINGS = TrainConfig().updated(dataset="demo", batch_size=8, accumulate=2, num_workers=1, seed=7, use_gaussian_blur=1,
                       use_solarization=1, warmup_epochs=1, max_epochs=4, resolution_schedule="16:32")  # fmt: skip


def loader_of(settings: TrainConfig, images: ImageArray | ImageFiles, **where: int):  # type: ignore[no-untyped-def]
    data_set = DataSet(train=images, labeled=images, test=None, classes=tuple("abcdefghij"))
    return training_loader(settings, data_set, device=CPU, precision="no", **where)


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_views_are_the_bits_that_were_trained_on(
    backend: str, demo_test_images: ImageArray, photographs: ImageFiles
) -> None:
    """Also of the second process, and where views are smaller than in the end."""
    for images in (demo_test_images.limited(40), photographs):
        settings = SETTINGS.updated(backend=backend)
        trained = loader_of(settings, images, process_index=1, num_processes=2)
        shown_by = loader_of(settings.updated(batch_size=1, accumulate=1), images)
        chunk = 2 * trained.sampler.micro_batches_per_epoch + 1
        batch = next(trained.batches(chunk))
        assert batch.epoch == 2 and batch.positions[0] == 24
        shown = examples(shown_by, epoch=2, position=24, count=8, classes=())
        for n, example in enumerate(shown):
            # A picture has eight bits of a view's 32, but the commands all of them.
            bits = (batch.views[n] * 255).round().byte().movedim(1, -1).numpy()
            np.testing.assert_array_equal(example.views, bits)
            np.testing.assert_array_equal(example.commands.pack(), batch.commands[n : n + 1].pack())
            assert example.source.tobytes() == images.open(int(batch.image_ids[n])).tobytes()
            policy = trained.sampler.policy_of(chunk)
            for v in range(2):
                expected = execute(example.source, batch.commands, policy, n, v)
                assert (batch.views[n, v] - expected).abs().mean() < 1 / 255


def test_a_bad_image_is_replaced_as_in_training(photographs: ImageFiles, tmp_path: Path) -> None:
    settings = SETTINGS.updated(accumulate=1, max_bad_fraction=0.5, resolution_schedule=None)
    first = next(loader_of(settings, photographs).batches(0)).image_ids
    listed = tmp_path / "bad-images.tsv"
    BadList(listed).add(photographs, [photographs.bad(int(first[3]), "it was bad")])
    trained = loader_of(settings, photographs)
    trained.sampler.bad.know(listed)
    batch = next(trained.batches(0))
    assert batch.image_ids[3] != first[3]
    shown_by = loader_of(settings.updated(batch_size=1), photographs)
    shown_by.sampler.bad.know(listed)
    shown = examples(shown_by, epoch=0, position=3, count=1, classes=())[0]
    assert shown.source.tobytes() == photographs.open(int(batch.image_ids[3])).tobytes()
    assert listed.read_text().count("\n") == 1


def test_the_end_of_an_epoch_is_not_passed(demo_test_images: ImageArray) -> None:
    loader = loader_of(SETTINGS.updated(batch_size=1, accumulate=1), demo_test_images.limited(40))
    assert len(examples(loader, epoch=1, position=38, count=5, classes=())) == 2


# --- Pictures ---


def one_example(commands: Commands) -> Example:
    source = Image.new("RGB", (60, 40), "#204060")
    return Example(title="a", source=source, views=np.zeros((2, 32, 32, 3), np.uint8), commands=commands)


def color_of(name: str) -> list[int]:
    return [*bytes.fromhex(COLORS[name][1:]), 255]


def test_windows_stand_where_they_were_cut() -> None:
    """The outermost pixels of each color are those of the window, to one pixel of the panel."""
    commands = next(
        c for n in range(64)
        if (c := some_commands()[n : n + 1]).left[0, 1] + c.width[0, 1] < c.left[0, 0] or c.top[0, 0] > c.top[0, 1] + 4
    )  # fmt: skip
    source, view_i, view_j = panels(one_example(commands))
    assert [panel.heading for panel in (source, view_i, view_j)] == ["source", "view i", "view j"]
    pixels = np.asarray(source.image)
    scale = PANEL_PX / 60
    margin = (PANEL_PX - 40 * scale) / 2
    for v, name in enumerate("ij"):
        y, x = np.nonzero((pixels == color_of(name)).all(axis=-1))
        left, top = commands.left[0, v] * scale, commands.top[0, v] * scale + margin
        right, bottom = left + commands.width[0, v] * scale, top + commands.height[0, v] * scale
        assert abs(x.min() - left) <= 1 and abs(x.max() + 1 - right) <= 1
        assert abs(y.min() - top) <= 1 and abs(y.max() + 1 - bottom) <= 1


def test_words_say_what_was_executed() -> None:
    commands = some_commands(1)
    values = {
        "top": 5, "left": 3, "height": 20, "width": 30, "flip": True, "jitter": True, "brightness": 1.25,
        "contrast": 0.5, "saturation": 1.5, "hue_turns": -0.05, "gray": True, "blur": True, "sigma_px": 0.75,
        "solarize": True, "order": np.array([3, 0, 2, 1]),
    }  # fmt: skip
    for name, value in values.items():
        getattr(commands, name)[0, 1] = value
    assert dict(in_words(commands, 1)) == {
        "crop box": "30 x 20 px at left 3, top 5, 25% of the image",
        "flip": "left to right",
        "jitter": "hue -0.050 turns, then brightness x 1.25, then saturation x 1.50, then contrast x 0.50".replace(
            " ", "\u00a0"
        ).replace(",\u00a0then\u00a0", ", then "),
        "gray": "yes",
        "blur": "sigma 0.75 px",
        "solarize": "yes",
    }


def test_the_predicted_crop_box_is_drawn_and_measured() -> None:
    commands = some_commands(1, area=(0.3, 0.6))
    true = value_bins(torch.from_numpy(relative_windows(commands)), 501)
    of_window, _, _ = windows_predicted(model_that_predicts(true, 501), commands)
    *_, predicted = panels(replace(one_example(commands), predictions={"window": of_window}))
    assert predicted.heading == "view j, as predicted"
    assert (np.asarray(predicted.image) == color_of("predicted")).all(axis=-1).sum() > 100
    words = dict(predicted.words)
    assert words["bins"] == "6 of 6 correct" and "wrongly" not in words["flip"]
    assert int(re.match("[0-9]+", words["overlap"])[0]) > 90
    # The largest translation, and the other sign of the scale.
    wrong = of_window.predicted_bins.copy()
    wrong[0, 0, 2], wrong[0, 0, 0] = 500, 500 - wrong[0, 0, 0]
    far = replace(of_window, predicted_bins=wrong)
    words = dict(panels(replace(one_example(commands), predictions={"window": far}))[-1].words)
    assert "px too far right" in words["center"] and "wrong" in words["flip"]
    assert words["bins"] == "4 of 6 correct"


def test_a_sheet_has_a_row_for_each_image() -> None:
    example = one_example(some_commands(1))
    one, two = (sheet("S-TEC", "here", [example] * count) for count in (1, 2))
    assert one.width == two.width and two.height - one.height > PANEL_PX


def test_all_that_is_predicted_is_described_within_its_panel() -> None:
    """Values of every target; no text reaches into the space between two panels, or beyond the picture."""
    settings = ModelSettings(width=4, manip_hidden_mlp=8, predict=tuple(TARGETS))
    model = Model(settings, stem="cifar", classes=0).eval()
    rows = []
    for seed in range(4):
        commands = draw(
            Policy(size=32, p_blur=1.0, p_solarize=0.5), seed=seed, epoch=0, first_position=0,
            image_hw=np.array([[40, 60]]),
        )  # fmt: skip
        values = predictions(model, torch.rand(1, 2, 3, 32, 32), commands, efference_copy(model, "official", 1.0))
        rows.append(replace(one_example(commands), predictions=values))
        words = dict(panels(rows[-1])[-1].words)
        assert {"color", "blur", "solarize", "gray", "bins"} <= words.keys()
        sigma = (commands.sigma_px[0, 1] - commands.sigma_px[0, 0]) / 32 * 224
        assert f"({sigma:+.2f})" in words["blur"]
        said, _, true = words["solarize"].partition(", wrong: ")
        solarized = commands.solarize[0].tolist()
        expected = {(0, 0): "none", (1, 0): "i only", (0, 1): "j only", (1, 1): "both"}[tuple(map(int, solarized))]
        assert (true or said) == expected
    picture = np.asarray(sheet("S-TEC", "here", rows))
    assert picture.shape[1] == 2 * 36 + 4 * PANEL_PX + 3 * 24
    below_title = picture[116:]
    for k in range(3):
        gap = below_title[:, 36 + (k + 1) * (PANEL_PX + 24) - 22 : 36 + (k + 1) * (PANEL_PX + 24) - 2]
        assert (gap == 255).all()
    assert (below_title[:, -34:] == 255).all() and (below_title[-20:] == 255).all()


# --- The command ---


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "IMAGES", SMALL_DEMO)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    settings = SETTINGS.updated(resolution_schedule=None, width=4)
    (folder / "config.json").write_text(json.dumps(settings.to_json()))
    (folder / "starts.jsonl").write_text(json.dumps({"processes": 3, "training_images": 256}) + "\n")
    return folder


def test_the_command_writes_a_picture(
    small_demo: None, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "model.safetensors"
    model = Model(ModelSettings(width=4, manip_hidden_mlp=8, n_bins=4), stem="cifar", classes=10)
    identity = {"config": {"arch": "resnet18", "width": 4, "dataset": "demo", "affine": "exact"}}
    save_file(model.state_dict(), weights, {"stec": json.dumps(identity)})
    trained = read_trained(weights)
    assert trained.convention == "exact" and trained.model("inverse_models").inverse_models["window"].n_bins == 4
    picture = tmp_path / "views.png"
    flags = ["--config", str(run_folder / "config.json"), "--epoch", "1", "--position", "239", "--count", "2"]
    assert launch.main(["preview", str(picture), *flags, "--ckpt_path", str(weights)]) == 0
    # The run's epoch ends with position 239: 3 processes of 2 passes of 8 images leave 16 of 256 out.
    assert "1 image(s) shown in" in capsys.readouterr().out
    with Image.open(picture) as shown:
        assert shown.format == "PNG" and shown.width > 4 * PANEL_PX
    assert sorted(path.name for path in run_folder.iterdir()) == ["config.json", "starts.jsonl"]


def test_mistakes_are_told_in_a_sentence(
    small_demo: None, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simclr = tmp_path / "simclr.safetensors"
    model = Model(ModelSettings(width=4), stem="cifar", classes=10, with_inverse_model=False)
    save_file(model.state_dict(), simclr)
    ours = ["--config", str(run_folder / "config.json")]
    out = str(tmp_path / "views.png")
    for arguments, sentence in [
        ([out, *ours, "--position", "240"], "--position 240 is beyond the epoch; give 0 to 239."),
        ([out, "--dataset", "demo", "--position", "256"], "--position 256 is beyond the epoch; give 0 to 255."),
        ([out, *ours, "--epoch", "4"], "--epoch 4 is beyond the last one; give 0 to 3."),
        ([out, "--position", "-1"], "--position -1 is too small"),
        ([out, "--count", "0"], "--count 0 is too small"),
        ([out, *ours, "--ckpt_path", str(simclr)], "holds no inverse model"),
        ([out, "--ckpt_path", str(tmp_path / "absent.pt")], "There is no file"),
        ([out, *ours, "--ckpt_path", str(run_folder)], "is not finished: it has no model.safetensors yet"),
        ([out, "--config", str(tmp_path / "absent.json")], "cannot be read"),
        ([out, "--dataset", "cifar10"], "needs --data_dir"),
        (["views.jpg"], "views.jpg"),
        (["--dataset", "demo", out], "needs the name of the picture first"),
        ([], "needs the name of the picture first"),
        ([str(tmp_path / "nowhere" / "a.png")], "nowhere/a.png"),
    ]:
        assert launch.main(["preview", *arguments]) == 2, arguments
        output = capsys.readouterr().err
        assert sentence in output and output.count("\n") == 1
    assert not Path(out).exists()
