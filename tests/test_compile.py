"""A compiled encoder trains as one that is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.runs import Run

SMALL = (
    "--limit_train 64 --batch_size 16 --width 4 --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 --max_epochs 1 "
    "--log_every 1 --num_workers 1 --mixed_precision no --optimizer sgd --learning_rate 0.0005"
).split()


@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_a_compiled_run_learns_the_same(tmp_path: Path) -> None:
    """With an encoder so narrow that it hangs in memory formats that the compiler likes."""
    losses = []
    for flags in ([], ["--compile", "1"]):
        folder = tmp_path / f"run{len(flags)}"
        run = Run(*SMALL, *flags, "--results_path", folder)
        run.process.join(600)  # a minute of compiling, more where other tests run beside
        run.end()
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert len(losses[0]) == 4 and losses[0][0] != losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
