"""The files in ``configs/`` start what their names describe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image

from tests.conftest import smooth_image

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


@pytest.mark.parametrize(
    ("name", "machines", "processes", "kind"),
    [
        ("cpu", 1, 1, "NO"),
        ("cpu-2", 1, 2, "MULTI_GPU"),
        ("gpu", 1, 1, "NO"),
        ("gpu-8", 1, 8, "MULTI_GPU"),
        ("gpu-2x8", 2, 16, "MULTI_GPU"),
    ],
)
def test_accelerate_reads_them(name: str, machines: int, processes: int, kind: str) -> None:
    """Accelerate's reader rejects unknown keys."""
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes, config.distributed_type) == (machines, processes, kind)
    assert config.use_cpu == (name == "cpu")


@pytest.mark.parametrize(("name", "processes"), [("cpu", 1), ("cpu-2", 2)])
def test_cpu_configs_run(name: str, processes: int, tmp_path: Path) -> None:
    """On images without labels, so that nothing is evaluated."""
    for n in range(16):
        Image.fromarray(smooth_image(40, 50, n)).save(tmp_path / f"{n}.png")
    flags = f"--dataset folder --data_dir {tmp_path} --view_size 32 --batch_size 8 --width 4 --max_epochs 1"
    flags += f" --warmup_epochs 0 --results_path {tmp_path / 'run'}"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    launcher += ["--main_process_port", "0"]
    command = [*launcher, str(ROOT / "launch.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{processes} process(es) on cpu" in done.stdout


@pytest.mark.parametrize(
    ("training_exits_with", "job_exits_with", "requeued"), [(0, 0, False), (85, 0, True), (2, 2, False)]
)
def test_the_slurm_job_is_requeued_after_a_stop(
    training_exits_with: int, job_exits_with: int, requeued: bool, tmp_path: Path
) -> None:
    """With scripts in place of scontrol, srun and python: two tasks, of which the second returns the exit code."""
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$1" = show ] && echo first && exit\necho "$@" >> "$LOG"\n')
    (tmp_path / "python").write_text(
        '#!/bin/sh\necho "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $@" >> "$LOG"\nexit $((RANK * CODE))\n'
    )
    (tmp_path / "srun").write_text(
        "#!/bin/sh\nshift\nexport SLURM_NTASKS=2 SLURM_NNODES=1\n"
        'SLURM_PROCID=0 SLURM_LOCALID=0 "$@"\nSLURM_PROCID=1 SLURM_LOCALID=1 exec "$@"\n'
    )
    for name in ("scontrol", "python", "srun"):
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "any",
        "LOG": str(log),
        "CODE": str(training_exits_with),
    }
    done = subprocess.run(["bash", str(CONFIGS / "slurm.sh"), "--seed", "3"], env=environment)
    assert done.returncode == job_exits_with
    launched = "first launch.py --seed 3 --resume auto --stop_exit_code 85"
    expected = [f"0 0 2 {launched}", f"1 1 2 {launched}", *(["requeue 7"] if requeued else [])]
    assert log.read_text().splitlines() == expected
