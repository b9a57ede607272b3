"""What the inverse model predicts: the values of all targets, their losses, and where its features come from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import launch
from pipelines.commands import Commands, Policy, draw
from stec.config import ModelSettings, TargetName, TrainConfig, with_settings
from stec.geometry import relative_windows
from stec.models.model import Model
from stec.objectives.inverse import EfferenceCopy, inverse_loss, metric_name
from stec.targets import TARGETS, Pairs

CPU = torch.device("cpu")
STRENGTH = 0.5


def some_commands(count: int = 200) -> Commands:
    policy = Policy(size=48, jitter_strength=STRENGTH, p_blur=0.5, p_solarize=0.3)
    hw = np.broadcast_to(np.array([40, 60]), (count, 2))
    return draw(policy, seed=3, epoch=0, first_position=0, image_hw=hw)


def values_of(name: TargetName, commands: Commands, **options: Any) -> np.ndarray[Any, Any]:
    return TARGETS[name].values(Pairs(commands=commands, view_size_px=48, jitter_strength=STRENGTH, **options))


def test_values_are_computed_pair_by_pair() -> None:
    c = some_commands()
    found = {name: values_of(name, c) for name in TARGETS}
    for n in range(len(c)):
        for k, name in enumerate(("brightness", "contrast", "saturation")):
            i, j = getattr(c, name)[n].tolist()
            assert found["color"][n, 0, k] == pytest.approx((j - i) / (0.8 * STRENGTH), abs=1e-5)
        turns = float(c.hue_turns[n, 1]) - float(c.hue_turns[n, 0])
        assert found["color"][n, 0, 3] == pytest.approx(turns / (0.2 * STRENGTH), abs=1e-5)
        # A sigma of 0.1 to 2 px in views of 224 px; 0 without blur.
        sigma = (float(c.sigma_px[n, 1]) - float(c.sigma_px[n, 0])) / 48 * 224
        assert found["blur"][n, 0, 0] == pytest.approx(sigma, abs=1e-5)
        for name in ("solarize", "gray"):
            i, j = getattr(c, name)[n].tolist()
            assert (
                TARGETS[name].classes[int(found[name][n, 0, 0])]
                == {
                    (False, False): "none",
                    (True, False): "i only",
                    (False, True): "j only",
                    (True, True): "both",
                }[i, j]
            )
    np.testing.assert_array_equal(found["window"], relative_windows(c))
    assert {name: value.shape[1:] for name, value in found.items()} == {n: TARGETS[n].shape for n in TARGETS}
    # The units make values comparable: about all of the range from -2 to 2 is used.
    for name in ("color", "blur"):
        assert 1.2 < np.abs(found[name]).max() <= 2


def test_the_other_way_around() -> None:
    c = some_commands()
    swapped = Commands.unpack(c.pack()[:, ::-1])
    for name in TARGETS:
        other = values_of(name, c, from_view=1, to_view=0)
        np.testing.assert_array_equal(other, values_of(name, swapped))
        if TARGETS[name].loss == "regression":
            np.testing.assert_allclose(other, -values_of(name, c), atol=1e-6)
    assert (values_of("window", c, from_view=1, to_view=0) != values_of("window", c)).any()


def test_each_target_has_its_own_mask() -> None:
    c = some_commands()
    masks = {name: target.valid(c) for name, target in TARGETS.items()}
    np.testing.assert_array_equal(masks["window"], ~(c.solarize[:, 0] | c.solarize[:, 1]))
    np.testing.assert_array_equal(masks["color"], ~(c.gray[:, 0] | c.gray[:, 1]))
    assert all(masks[name].all() for name in ("blur", "solarize", "gray"))
    assert 0 < masks["window"].sum() < len(c) and 0 < masks["color"].sum() < len(c)


@pytest.mark.parametrize("both_ways", [False, True])
def test_micro_batches_are_put_together(both_ways: bool) -> None:
    """First all pairs from i to j, then all from j to i."""
    c = some_commands(50)
    copy = EfferenceCopy(weights=dict.fromkeys(TARGETS, 1.0), jitter_strength=STRENGTH, both_ways=both_ways)
    found = copy.values([c[:20], c[20:]], 48, CPU)
    assert list(found) == list(TARGETS)
    for name, (values, valid) in found.items():
        directions = [values_of(name, c)] + [values_of(name, c, from_view=1, to_view=0)] * both_ways
        np.testing.assert_array_equal(values, np.concatenate(directions))
        np.testing.assert_array_equal(valid, np.concatenate([TARGETS[name].valid(c)] * len(directions)))


def test_losses_of_classes_and_regression() -> None:
    """Against one pair at a time; invalid pairs, even infinite ones, do not count."""
    rng = np.random.default_rng(0)
    valid = rng.random(30) < 0.7
    outputs, classes = rng.normal(size=(30, 4, 1, 1)), rng.integers(0, 4, (30, 1, 1))
    included_pairs = zip(outputs[valid], classes[valid].ravel(), strict=True)
    expected = np.mean([np.log(np.exp(logits).sum()) - logits[k, 0, 0] for logits, k in included_pairs])
    indices = torch.from_numpy(classes.astype(np.float32))
    loss, accuracy = inverse_loss(torch.from_numpy(outputs), indices, torch.from_numpy(valid), TARGETS["gray"])
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert accuracy.item() == pytest.approx((outputs.argmax(1) == classes).mean(), rel=1e-6)

    outputs, values = rng.normal(size=(30, 1, 1, 4)), rng.normal(size=(30, 1, 4))
    outputs[~valid] = np.inf
    error = (outputs[:, 0] - values)[valid]
    included = torch.from_numpy(valid)
    loss, r2 = inverse_loss(torch.from_numpy(outputs), torch.from_numpy(values), included, TARGETS["color"])
    assert loss.item() == pytest.approx(np.square(error).mean(), rel=1e-12)
    of_entries = 1 - np.square(error).sum(0) / (values[valid].var(0) * valid.sum())
    assert r2.item() == pytest.approx(of_entries.mean(), rel=1e-9)
    # Nothing to predict: no score.
    constant = torch.full((30, 1, 4), 0.3, dtype=torch.float64)
    none = torch.zeros(30, 1, 1, 4, dtype=torch.float64)
    assert inverse_loss(none, constant, included, TARGETS["color"])[1] == 0
    loss, r2 = inverse_loss(none, constant, torch.zeros(30, dtype=torch.bool), TARGETS["color"])
    assert loss == 0 and r2 == 0


def test_metrics_are_named_after_their_target() -> None:
    assert [metric_name(kind, "window") for kind in ("loss", "score")] == ["inverse_loss", "inverse_accuracy"]
    assert [metric_name("score", name) for name in ("color", "gray")] == ["inverse_r2_color", "inverse_accuracy_gray"]


FULL: tuple[TargetName, ...] = ("window", "color", "blur", "solarize", "gray")


def test_both_ways_are_asked_in_one_batch() -> None:
    torch.manual_seed(0)
    settings = ModelSettings(width=4, manip_hidden_mlp=8, n_bins=5, predict=FULL)
    model = Model(settings, stem="cifar", classes=0, predict_both_ways=True).eval()
    h = torch.randn(3, 2, model.encoder.feature_dim)
    outputs = model.heads(h, h).inverse
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {
        "window": (6, 5, 2, 3),
        "color": (6, 1, 1, 4),
        "blur": (6, 1, 1, 1),
        "solarize": (6, 4, 1, 1),
        "gray": (6, 4, 1, 1),
    }
    for name, inverse_model in model.inverse_models.items():
        torch.testing.assert_close(outputs[name][:3], inverse_model(h[:, 0], h[:, 1]))
        torch.testing.assert_close(outputs[name][3:], inverse_model(h[:, 1], h[:, 0]))


def test_the_third_stage_feeds_the_inverse_model_alone() -> None:
    """Its pooled output; the gradient of the inverse model does not reach the fourth stage."""
    torch.manual_seed(0)
    settings = ModelSettings(width=4, hidden_mlp=8, manip_hidden_mlp=8, inverse_from="layer3")
    model = Model(settings, stem="cifar", classes=3).eval()
    third: list[torch.Tensor] = []
    model.encoder.layer3.register_forward_hook(lambda _module, _inputs, output: third.append(output))
    views = torch.rand(2, 2, 3, 32, 32)
    outputs = model(views)
    pooled = third[0].mean(dim=(2, 3)).view(2, 2, -1)
    expected = model.inverse_models["window"](pooled[:, 0], pooled[:, 1])
    torch.testing.assert_close(outputs.inverse["window"], expected)
    features = model.encoder(views.flatten(0, 1)).view(2, 2, -1)
    torch.testing.assert_close(outputs.class_logits, model.classifier(features))
    torch.testing.assert_close(outputs.projections, model.projection(features.flatten(0, 1)).view(2, 2, -1))
    F.cross_entropy(outputs.inverse["window"], torch.zeros(2, 2, 3, dtype=torch.int64)).backward()
    gradients = {name: p.grad is not None and bool(p.grad.any()) for name, p in model.encoder.named_parameters()}
    assert gradients["layer3.1.conv2.weight"] and not any(gradients[n] for n in gradients if n.startswith("layer4"))


def test_settings_of_targets_survive_json() -> None:
    config = TrainConfig().updated(predict=("gray", "window"), manip_weights=(0.25, 2.0), manip_lambda=1.0)
    config.validate()
    assert with_settings(TrainConfig(), config.to_json(), "config.json") == config
    assert config.target_weights == {"gray": 0.25, "window": 2.0}
    assert TrainConfig().updated(predict=FULL).target_weights == {n: TARGETS[n].weight for n in FULL}
    assert math.isclose(TARGETS["window"].weight, 1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--predict window color", "--p_color_jitter"),
        ("--predict blur", "--use_gaussian_blur"),
        ("--predict window solarize", "--use_solarization"),
        ("--predict gray gray", "gray gray"),
        ("--predict gray --manip_lambda 0", "--manip_lambda"),
        ("--predict window gray --manip_weights 1", "1 weights"),
        ("--predict window --manip_weights -1", "-1"),
        ("--manip_weights 1 2 --manip_lambda 0", "2 weights"),
    ],
)
def test_mistakes(flags: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    off = ["--p_color_jitter", "0"] if "color" in flags else []
    assert launch.main(["--recipe", "demo", *off, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_an_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch.main(["--predict", "sharpness"])
    assert stopped.value.code == 2 and "sharpness" in capsys.readouterr().err
