"""Commands for a finished run, printed at its end."""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.datasets.urls import RemoteFolder
from stec.config import TrainConfig


def next_steps(config: TrainConfig, folder: Path, *, classes: int, processes: int) -> list[tuple[str, list[str]]]:
    """Descriptions and command lines (as words) for the run in ``folder``; with ``classes`` 0, none for evaluation."""
    launch = sys.argv[0] if Path(sys.argv[0]).name == "launch.py" else "launch.py"
    alone = ["python", launch]
    together = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes), launch]
    data = ["--dataset", config.data.dataset]
    if config.data.data_dir is not None:
        data += ["--data_dir", str(config.data.data_dir)]
    if isinstance(config.data.data_dir, RemoteFolder):
        data += ["--cache_dir", str(config.data.cache_dir)] if config.data.cache_dir is not None else []
        data += ["--cache_gb", f"{config.data.cache_gb:g}"]
    # If images are not resized for evaluation, it does not depend on the size of the views.
    if config.augmentation.view_size is not None and config.traits.resize_px is not None:
        data += ["--view_size", str(config.augmentation.view_size)]
    if config.data.exif_orientation:
        data += ["--exif_orientation", "1"]
    evaluate = ("evaluate", [*alone, "eval", *data, "--ckpt_path", str(folder / "model.safetensors")])
    train = [*(alone if processes == 1 else together), "--config", str(folder / "config.json"), "--results_path"]
    simclr = ("train SimCLR for comparison", [*train, f"{folder}-simclr", "--manip_lambda", "0"])
    longer = [*train, str(folder), "--resume", "auto"]
    longer += ["--max_epochs", str(2 * config.optimization.max_epochs), "--allow_changes", "1"]
    return [
        *([evaluate] if classes else []),
        *([simclr] if config.data.dataset == "demo" and config.objective.manip_lambda > 0 else []),
        ("create a report", [*alone, "report", str(folder), "--out", str(folder / "report.html")]),
        ("export", [*alone, "export", str(folder), str(folder / "huggingface"), "--format", "huggingface"]),
        ("train longer", longer),
    ]
