"""What may be done with a finished run, as commands that can be copied."""

from __future__ import annotations

import sys
from pathlib import Path

from stec.config import TrainConfig


def next_steps(config: TrainConfig, folder: Path, *, classes: int, processes: int) -> list[tuple[str, list[str]]]:
    """Purposes and the words of their commands, for the run in ``folder``; without ``classes`` none evaluates it."""
    launch = sys.argv[0] if Path(sys.argv[0]).name == "launch.py" else "launch.py"
    alone = ["python", launch]
    together = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes), launch]
    data = ["--dataset", config.data.dataset]
    if config.data.data_dir is not None:
        data += ["--data_dir", str(config.data.data_dir)]
    # Where images are not resized for evaluation, the size of the views does not matter to it.
    if config.augmentation.view_size is not None and config.traits.resize_px is not None:
        data += ["--view_size", str(config.augmentation.view_size)]
    if config.data.exif_orientation:
        data += ["--exif_orientation", "1"]
    evaluate = ("evaluate it", [*alone, "eval", *data, "--ckpt_path", str(folder / "model.safetensors")])
    train = [*(alone if processes == 1 else together), "--config", str(folder / "config.json"), "--results_path"]
    simclr = ("train SimCLR to compare it with", [*train, f"{folder}-simclr", "--manip_lambda", "0"])
    longer = [*train, str(folder), "--resume", "auto"]
    longer += ["--max_epochs", str(2 * config.optimization.max_epochs), "--allow_changes", "1"]
    return [
        *([evaluate] if classes else []),
        *([simclr] if config.data.dataset == "demo" and config.objective.manip_lambda > 0 else []),
        ("see it as a page", [*alone, "report", str(folder), "--out", str(folder / "report.html")]),
        ("take it elsewhere", [*alone, "export", str(folder), str(folder / "huggingface"), "--format", "huggingface"]),
        ("train it longer", longer),
    ]
