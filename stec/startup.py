"""Set up Accelerate, the precision, the threads and the console: the first step of any command that computes."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from pipelines.errors import UserError
from stec import gpus
from stec.console import Console
from stec.distributed.launcher import choose_precision, cpus_of_process, is_single_process_of_several
from stec.training.precision import resolve_precision


def start(
    mixed_precision: str, process_timeout_s: int = 1800, deterministic: bool = False
) -> tuple[Accelerator, Console, str]:
    """Accelerate, the console and the resolved precision. Raises UserError if the device or launcher prevents it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        gpus.check_capability(device)
    requested, of_launcher = choose_precision(mixed_precision)
    precision = resolve_precision(requested, device)
    # Accelerate still passes this option by its old name.
    warnings.filterwarnings("ignore", message=r".*broadcast_buffers.*is deprecated", category=FutureWarning)
    # Accelerate would keep the precision of the first of several trainings and evaluations in one program.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=process_timeout_s)),
        ],
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"Accelerate is set to {accelerator.gradient_accumulation_steps} gradient accumulation steps, which would "
            f"change the contrastive loss; set --gradient_accumulation_steps 1 for accelerate launch, and use "
            f"--accumulate of launch.py."
        )
    # Shapes are constant for many steps, so trying cuDNN's algorithms pays off; the choice may differ between runs.
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # Read when cuBLAS starts; without a fixed workspace the order of its sums may vary.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling new memory would only help code that reads it before writing.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu":
        # By default, accelerate launch limits each process to one thread.
        torch.set_num_threads(cpus_of_process())
    console = Console(enabled=accelerator.is_main_process)
    reason = gpus.reason_for_cpu()
    if reason is not None:
        console.say(reason)
    if requested != mixed_precision:
        console.say(f"Precision {precision}, as set for accelerate launch (mixed_precision).")
    elif of_launcher not in ("", precision):
        console.say(
            f"Precision {precision} (--mixed_precision {mixed_precision}); the mixed_precision {of_launcher} of "
            f"accelerate launch is ignored."
        )
    if is_single_process_of_several(accelerator.num_processes):
        console.say(
            "accelerate launch was asked for several processes, but started only one, as it does without GPUs; for two "
            "use accelerate launch --config_file configs/cpu-2.yaml, or add --multi_gpu and omit --cpu."
        )
    return accelerator, console, precision
