"""Parity with the official implementation, through numbers computed with its code.

``STEC_GOLDEN`` names the file; every group in it is checked, so any file of the same layout can be used.
"""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.commands import Commands, Policy
from pipelines.datasets.registry import DATA_SETS
from pipelines.executors import torchvision as reference
from stec.config import ModelSettings, ObjectiveSettings, OptimizationSettings
from stec.geometry import relative_windows, window_matrices
from stec.models.model import Model
from stec.objectives.inverse import inverse_loss, value_bins
from stec.objectives.objective import Objective
from stec.objectives.simclr import nt_xent
from stec.training.optim import learning_rate_at, make_optimizer
from stec.weights.export import from_official_names, load_weights, read_weights, to_official_names

GOLDEN = Path(os.environ.get("STEC_GOLDEN", Path(__file__).parents[2] / "shared/golden/official_public.npz"))

pytestmark = pytest.mark.skipif(not GOLDEN.is_file(), reason=f"golden numbers not found at {GOLDEN}; set STEC_GOLDEN")


def groups(prefix: str) -> list[str]:
    """The names of the groups directly below ``prefix`` in the golden file."""
    if not GOLDEN.is_file():
        return ["absent"]
    with np.load(GOLDEN) as arrays:
        return sorted({name[len(prefix) + 1 :].split("/")[0] for name in arrays.files if name.startswith(prefix + "/")})


def load(prefix: str) -> SimpleNamespace:
    """The arrays of a group as attributes."""
    with np.load(GOLDEN) as arrays:
        return SimpleNamespace(
            **{name[len(prefix) + 1 :]: arrays[name] for name in arrays.files if name.startswith(prefix + "/")}
        )


def commands_of_windows(golden: SimpleNamespace) -> Commands:
    """Commands with the golden windows and flips and nothing else."""
    boxes = np.stack([golden.box_i_top_left_h_w, golden.box_j_top_left_h_w], 1).astype(np.int32)
    shape = boxes.shape[:2]
    off, one, zero = np.zeros(shape, bool), np.ones(shape, np.float32), np.zeros(shape, np.float32)
    return Commands(
        source_height=np.broadcast_to(golden.image_hw[:, :1].astype(np.int32), shape),
        source_width=np.broadcast_to(golden.image_hw[:, 1:].astype(np.int32), shape),
        top=boxes[..., 0],
        left=boxes[..., 1],
        height=boxes[..., 2],
        width=boxes[..., 3],
        flip=np.stack([golden.flip_i, golden.flip_j], 1),
        jitter=off,
        brightness=one,
        contrast=one,
        saturation=one,
        hue_turns=zero,
        order=np.zeros((*shape, 4), np.int32),
        gray=off,
        blur=off,
        sigma_px=zero,
        solarize=off,
    )


def test_geometry() -> None:
    """Window matrices and both official commands, to float32 rounding."""
    golden = load("geometry")
    commands = commands_of_windows(golden)
    theta = window_matrices(commands)
    np.testing.assert_allclose(theta[:, 0], golden.theta_i, atol=1e-6)
    np.testing.assert_allclose(theta[:, 1], golden.theta_j, atol=1e-6)
    np.testing.assert_allclose(relative_windows(commands), golden.from_i_to_j, rtol=1e-5, atol=1e-5)
    backwards = relative_windows(commands, from_view=1, to_view=0)
    np.testing.assert_allclose(backwards, golden.from_j_to_i, rtol=1e-5, atol=1e-5)


def test_inverse_loss() -> None:
    """Bins exactly; loss, masked loss and its gradient to 1e-12 (float64)."""
    golden = load("inverse")
    logits = torch.tensor(golden.logits, requires_grad=True)
    command = torch.tensor(golden.from_i_to_j)
    np.testing.assert_array_equal(value_bins(command, logits.shape[1]), golden.target_bins)

    loss, accuracy = inverse_loss(logits, command, torch.ones(len(logits), dtype=torch.bool))
    assert loss.item() == pytest.approx(golden.loss.item(), rel=1e-12)
    assert accuracy.item() == pytest.approx(golden.accuracy.item(), rel=1e-6)

    masked, _ = inverse_loss(logits, command, torch.tensor(~(golden.solarized_i | golden.solarized_j)))
    masked.backward()
    assert masked.item() == pytest.approx(golden.masked_loss.item(), rel=1e-12)
    np.testing.assert_allclose(logits.grad, golden.masked_loss_grad_logits, atol=1e-14)


@pytest.mark.parametrize("group", groups("nt_xent"))
def test_nt_xent(group: str) -> None:
    """Loss, accuracies, entropy and gradients; the official code works in float32 from the similarities on."""
    golden = load(f"nt_xent/{group}")
    z_i, z_j = torch.tensor(golden.z_i, requires_grad=True), torch.tensor(golden.z_j, requires_grad=True)
    loss, accuracy, cross_view_accuracy, cross_view_entropy = nt_xent(z_i, z_j, float(group.removeprefix("t")))
    loss.backward()
    assert loss.item() == pytest.approx(golden.loss.item(), rel=1e-6)
    assert accuracy.item() == pytest.approx(golden.accuracy.item(), rel=1e-6)
    assert cross_view_accuracy.item() == pytest.approx(golden.contrast_accuracy.item(), rel=1e-6)
    assert cross_view_entropy.item() == pytest.approx(golden.contrast_entropy.item(), rel=1e-6)
    np.testing.assert_allclose(z_i.grad, golden.grad_z_i, atol=1e-7)
    np.testing.assert_allclose(z_j.grad, golden.grad_z_j, atol=1e-7)


@pytest.mark.parametrize("size", groups("blur"))
def test_blur(size: str) -> None:
    """The reference executor's blur against the official kernel, to float32 rounding."""
    golden = load(f"blur/{size}")
    policy = Policy(size=int(size))
    assert policy.blur_window_px == golden.kernel_size
    images = golden.image if "image" in vars(golden) else golden.image_uint8 / np.float32(255)
    expected, every = (golden.blurred, 1) if "blurred" in vars(golden) else (golden.blurred_every_4th, 4)
    for image, sigma, blurred in zip(images, golden.sigma, expected, strict=True):
        ours = reference.blur(torch.from_numpy(image), float(sigma), policy)
        np.testing.assert_allclose(ours[:, ::every, ::every], blurred, atol=1e-6)


def test_solarize() -> None:
    golden = load("solarize")
    np.testing.assert_array_equal(reference.solarize(torch.from_numpy(golden.image)), golden.solarized)


@pytest.mark.parametrize("group", groups("schedule"))
def test_schedule(group: str) -> None:
    """Warm-up and cosine at every step, to 1e-12."""
    warmup, total = map(int, re.fullmatch(r"warmup(\d+)_total(\d+)", group).groups())
    golden = getattr(load("schedule"), group)
    settings = OptimizationSettings(learning_rate=1.0, warmup_epochs=warmup, max_epochs=total)
    ours = [learning_rate_at(step, settings, steps_per_epoch=1) for step in range(len(golden))]
    np.testing.assert_allclose(ours, golden, atol=1e-12)


def golden_seed() -> int:
    with np.load(GOLDEN) as arrays:
        return int(arrays["seed"])


def golden_model(tag: str, golden: SimpleNamespace) -> Model:
    arch, data_set = tag.split("_")
    settings = ModelSettings(arch=arch, feat_dim=64)
    return Model(settings, stem=DATA_SETS[data_set].stem, classes=golden.eval_logits_view_i.shape[1])


def golden_weights(model: Model, seed: int) -> dict[str, torch.Tensor]:
    """The weights of the golden file's README, computed from the official name of each entry of the state dict."""
    official = {}
    for name, tensor in to_official_names(model.state_dict()).items():
        if name.endswith("num_batches_tracked"):
            official[name] = tensor
            continue
        a = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(tuple(tensor.shape))
        if name.endswith("running_var"):
            a = 1 + 0.1 * np.abs(a)
        elif name.endswith("running_mean"):
            a = 0.1 * a
        elif a.ndim >= 2:
            a = a / np.sqrt(np.prod(a.shape[1:]))
        elif name.endswith("weight"):
            a = 1 + 0.1 * a
        elif name == "projection.model.bn_output.bias":
            a = 0 * a
        else:
            a = 0.01 * a
        official[name] = torch.from_numpy(a.astype(np.float32)).double()
    return from_official_names(official)


@pytest.mark.parametrize("tag", groups("model"))
def test_an_imported_checkpoint_gives_the_official_logits(tag: str, tmp_path: Path) -> None:
    """An official ``.ckpt`` of the golden weights, read as ``eval`` reads it, in float32: to 1e-4 of the largest."""
    golden = load(f"model/{tag}")
    model = golden_model(tag, golden)
    official = {
        name: tensor.float() for name, tensor in to_official_names(golden_weights(model, golden_seed())).items()
    }
    torch.save({"state_dict": official, "epoch": 999}, tmp_path / "official.ckpt")
    load_weights(model, read_weights(tmp_path / "official.ckpt"), tmp_path, required=("encoder", "classifier"))
    with torch.no_grad():
        logits = model.eval().classifier(model.encoder(torch.from_numpy(golden.view_i)))
    np.testing.assert_allclose(
        logits, golden.eval_logits_view_i, rtol=0, atol=1e-4 * np.abs(golden.eval_logits_view_i).max()
    )


@pytest.mark.parametrize("tag", groups("model"))
def test_whole_model(tag: str) -> None:
    """Features, gradients and three training steps of the whole model in float64.

    Relative tolerance 1e-6, because both compute the similarities of NT-Xent in float32.
    """
    golden = load(f"model/{tag}")
    model = golden_model(tag, golden).double()
    model.load_state_dict(golden_weights(model, golden_seed()))
    views = torch.from_numpy(np.stack([golden.view_i, golden.view_j], 1)).double()
    command, labels = torch.from_numpy(golden.from_i_to_j).double(), torch.from_numpy(golden.labels)
    valid = torch.ones(len(labels), dtype=torch.bool)

    model.eval()
    with torch.no_grad():
        features = model.encoder(views[:, 0])
        logits = model.classifier(features)
    np.testing.assert_allclose(features, golden.eval_features_view_i, rtol=1e-9)
    np.testing.assert_allclose(logits, golden.eval_logits_view_i, rtol=1e-9, atol=1e-9)

    model.train()
    objective = Objective(ObjectiveSettings(manip_lambda=1.0, temperature=0.5))
    settings = OptimizationSettings(learning_rate=4.0, weight_decay=1e-6, warmup_epochs=2, max_epochs=6)
    optimizer = make_optimizer(model, settings)
    parameters = to_official_names(dict(model.named_parameters()))
    for step, row in enumerate(golden.steps_loss_discrimination_manipulation_manipacc_supervised_lr):
        loss, metrics = objective(model(views), labels, {"window": (command, valid)})
        names = ("contrastive_loss", "inverse_loss", "inverse_accuracy", "classifier_loss")
        ours = [metrics[name].item() for name in names]
        np.testing.assert_allclose([loss.item(), *ours], row[:5], rtol=1e-6)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings, steps_per_epoch=1)
            assert group["lr"] == pytest.approx(row[5], rel=1e-12)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, norm in zip(golden.param_names, golden.grad_norms, strict=True):
                if name in parameters and parameters[name].grad is not None:
                    assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-5, abs=1e-7), name
                else:
                    assert not norm > 0, name
        optimizer.step()
    for name, norm in zip(golden.param_names, golden.param_norms_after_3_steps, strict=True):
        if name in parameters:
            assert parameters[name].norm().item() == pytest.approx(norm, rel=1e-6, abs=1e-7), name
    model.eval()
    with torch.no_grad():
        logits = model.classifier(model.encoder(views[:, 0]))
    np.testing.assert_allclose(logits, golden.eval_logits_view_i_after_3_steps, rtol=1e-5, atol=1e-6)
