"""The examples run, reduce their loss and have fewer than 60 lines."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_learns(example: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        losses = runpy.run_path(str(example))["main"]()
    assert all(map(math.isfinite, losses))
    first, last = losses[0], sum(losses[-3:]) / 3
    assert last < 0.95 * first
    assert not list(tmp_path.iterdir())
    assert len(example.read_text().splitlines()) < 60
