"""A compiled encoder trains like one that is not compiled."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stec.architectures import ARCHITECTURES
from stec.models.encoder import Encoder
from tests.precision import assert_as_exact, exact, images_for, one_step
from tests.runs import Run

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++"),
]

WIDTH, BATCH, SIZE = 4, 4, 16
"""A narrow encoder, which hangs in memory formats that the compiler chooses by default."""


def make_shallow() -> None:
    """One block per stage instead of two, since compiling takes that much less."""
    ARCHITECTURES["resnet18"] = replace(ARCHITECTURES["resnet18"], depths=(1, 1, 1, 1))


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "resnet18", ARCHITECTURES["resnet18"])
    make_shallow()


def test_a_compiled_step_is_as_exact_as_a_plain_one(shallow: None) -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", "cifar", WIDTH)
    images = images_for(encoder, 2 * BATCH, SIZE)
    reference, plain = one_step(exact(encoder), images), one_step(encoder, images)
    encoder.compile(options={"layout_optimization": False})  # as in training, for an encoder of this width
    assert_as_exact(one_step(encoder, images), plain, reference)


def test_a_compiled_run(tmp_path: Path) -> None:
    flags = f"--width {WIDTH} --batch_size {BATCH} --view_size {SIZE} --limit_train 16 --max_epochs 1 --warmup_epochs 0"
    flags += " --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 --log_every 1 --num_workers 1 --mixed_precision no"
    run = Run(*flags.split(), "--compile", "1", "--results_path", tmp_path / "run", prepare=make_shallow)
    run.process.join(600)  # compiling takes a minute, more if other tests run at the same time
    run.end()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
