"""Whole runs on shards at a URL: the commands of docs/data.md, stops, and the fraction of time spent waiting."""

from __future__ import annotations

import json
import shlex
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Run
from tests.servers import serving
from tests.test_docs import PAGES, fenced
from tests.test_faults import SignalAtStep
from tests.test_index import write_shards

SMALL = "--view_size 32 --width 4 --batch_size 8 --max_epochs 2 --warmup_epochs 0 --num_workers 1 --log_every 1".split()
VARYING = ("images_per_second", "wait_fraction")


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_remote_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's commands, with a slow server and a stop in the middle, train the weights of a local folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "indexes"))
    data = tmp_path / "data"
    write_shards(data / "train", shards=5, per_shard=8)
    write_shards(data / "val", shards=2, per_shard=8)
    local, remote, cache = tmp_path / "local", tmp_path / "remote", tmp_path / "cache"
    Run("--dataset", "imagenet", "--data_dir", data, "--manip_lambda", "1", *SMALL, "--results_path", local).end()
    with serving(data) as server:
        page = "\n".join(fenced(PAGES["docs/data.md"]))
        names = {"https://HOST/DATA": server.url, "/local/cache": str(cache)}
        lines = [line for line in page.splitlines() if "HOST/DATA" in line]
        index, train, evaluate = (
            [names.get(word, word).replace("REMOTE_RUN", str(remote)) for word in shlex.split(line)] for line in lines
        )
        Run(*index[index.index("launch.py") + 1 :]).end()
        for path in cache.glob("*.tar"):
            path.unlink()
        server.fetched.clear()
        server.seconds[""] = 0.7
        train = [*train[train.index("launch.py") + 1 :], *SMALL]
        Run(*train, prepare=SignalAtStep(3, signal.SIGTERM)).end()
        Run(*train, "--resume", "auto").end()
        assert server.fetched == {f"train-{n:03d}.tar": 1 + (n < 2) for n in range(5)}
        assert "RankMe" in Run(*evaluate[2:]).end()
    for line, other in zip(metrics(remote), metrics(local), strict=True):
        assert {key: value for key, value in line.items() if key not in VARYING} == {
            key: value for key, value in other.items() if key not in VARYING
        }
    assert (remote / "encoder.safetensors").read_bytes() == (local / "encoder.safetensors").read_bytes()
    assert json.loads((remote / "config.json").read_text())["data_dir"] == server.url


def test_waiting_for_shards_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step reads another shard, which takes longer than a step, and the cache holds two."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "indexes"))
    data = write_shards(tmp_path / "data", shards=6, per_shard=8)
    cache_gb = 2 * max(path.stat().st_size for path in data.iterdir()) / 1e9
    with serving(data) as server:
        flags = ["--dataset", "folder", "--data_dir", server.url, "--cache_gb", f"{cache_gb:.9f}"]
        Run("index", server.url, *flags[-2:]).end()
        server.seconds[""] = 0.5
        Run(*flags, *SMALL, "--max_epochs", "1", "--shuffle_window", "1", "--results_path", tmp_path / "run").end()
    # The first step waits for the pipeline, and some shards are fetched meanwhile.
    fractions = [line["wait_fraction"] for line in metrics(tmp_path / "run")]
    assert len(fractions) == 6 and statistics.median(fractions[1:]) > 0.5, fractions
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["wait_fraction"] > 0.5
