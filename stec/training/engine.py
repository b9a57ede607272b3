"""The training loop: fetch, forward, backward, step, log, save."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor

from pipelines.batch import PlainLoader, TwoViewLoader
from pipelines.errors import Interrupted, UserError
from pipelines.files import write_json
from stec import profiling
from stec.config import TrainConfig
from stec.console import Console
from stec.distributed.processes import on_main_process
from stec.evaluation.evaluate import Measure, evaluate
from stec.models.model import Model
from stec.objectives.objective import METRICS, Objective, Weights
from stec.profiling import StepProfile, part
from stec.runs import checkpoint
from stec.runs.background import Background
from stec.runs.run_folder import RunFolder
from stec.training.optim import learning_rate_factor, make_optimizer
from stec.training.step import Step
from stec.training.stops import StopRequests, exit_code
from stec.weights.export import load_weights, portable, read_weights, write_safetensors

T = TypeVar("T")

ISAS_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""Limits of ``ONEDNN_MAX_CPU_ISA`` below which oneDNN converts bfloat16 to float32 and back, slower than float32."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Everything the engine is fed with."""

    training: TwoViewLoader
    labeled: PlainLoader | None
    """What evaluation learns from; None, as ``test``, where nothing has labels."""
    test: PlainLoader | None
    classes: int
    """0 where nothing has labels: then there is no online linear classifier and no evaluation."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes what the device is fast at: bf16, else fp16 on a GPU, else no.

    Raises UserError for what the device cannot do.
    """
    if device.type == "cuda":
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # PyTorch offers no public question for these instructions.
        fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast_bf16 = fast_bf16 and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in ISAS_WITHOUT_BF16
    if precision == "auto":
        return "bf16" if fast_bf16 else "fp16" if device.type == "cuda" else "no"
    if precision == "fp16" and device.type != "cuda":
        raise UserError("--mixed_precision fp16 needs a CUDA GPU and there is none; use bf16 or no.")
    return precision


def initial_model(config: TrainConfig, classes: int) -> Model:
    """The model that training starts from, the same on every process: seeded, then loaded from ``ckpt_path`` if given.

    Raises UserError where the weights cannot be read or do not fit.
    """
    torch.manual_seed(config.run.seed)
    model = Model(
        arch=config.model.arch,
        stem=config.traits.stem,
        classes=classes,
        width=config.model.width,
        hidden_mlp=config.model.hidden_mlp,
        feat_dim=config.model.feat_dim,
        manip_hidden_mlp=config.model.manip_hidden_mlp,
        n_bins=config.model.n_bins,
        with_inverse_model=config.objective.manip_lambda > 0,
        stop_gradient=config.objective.stop_gradient,
    )
    if config.model.ckpt_path is not None:
        state = read_weights(config.model.ckpt_path)
        if config.model.reinitialize_supervised_head:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
        load_weights(model, state, config.model.ckpt_path, required=("encoder",))
    return model


def optimizer_of(config: TrainConfig, model: Model) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over what of the model is trained."""
    return make_optimizer(
        model,
        config.optimization.optimizer,
        learning_rate=config.optimization.learning_rate,
        weight_decay=config.optimization.weight_decay,
        nesterov=bool(config.optimization.nesterov),
    )


def objective_of(config: TrainConfig) -> Objective:
    """The objective with the weights and the temperature of the settings."""
    return Objective(
        Weights(
            discrimination=config.objective.discrimination_lambda,
            manipulation=config.objective.manip_lambda,
            supervised=config.objective.supervised_lambda,
        ),
        temperature=config.objective.temperature,
    )


def train(
    config: TrainConfig,
    data: Data,
    model: Model,
    *,
    accelerator: Accelerator,
    console: Console,
    folder: RunFolder,
    environment: Mapping[str, Any],
    resumed: dict[str, Any] | None,
) -> dict[str, float]:
    """Train to the end, evaluate, export; returns what ``results.json`` holds.

    ``model`` is the ``initial_model``, ``resumed`` a checkpoint to go on from. Raises UserError on a non-finite
    loss and where the disk refuses, and Interrupted when a signal asked for it.
    """
    global_batch_size = config.optimization.accumulate * config.optimization.batch_size * accelerator.num_processes
    steps_per_epoch = data.training.steps_per_epoch
    total_steps = config.optimization.max_epochs * steps_per_epoch

    # --- Model, objective, optimizer ---
    step, train_seconds, wait_seconds = 0, 0.0, 0.0
    if resumed is not None:
        try:
            model.load_state_dict(resumed["model"])
        except RuntimeError as error:
            raise UserError(
                f"The checkpoint of step {resumed['step']} in {folder.path} does not fit the model that the settings "
                f"make; go on with the run's own, or name another folder by --results_path."
            ) from error
        step, train_seconds, wait_seconds = resumed["step"], resumed["train_seconds"], resumed["wait_seconds"]
    if config.run.compile:
        _check_compiler(accelerator.device)
        # Left to itself, the compiler makes narrow encoders channels-last, too, and they hang (see encoder.NARROW).
        model.encoder.compile(options={"layout_optimization": model.encoder.memory_format == torch.channels_last})
    optimizer = optimizer_of(config, model)
    backward = Step(model, objective_of(config), accelerator, affine=config.objective.affine)
    optimizer = accelerator.prepare_optimizer(optimizer)
    if resumed is not None:
        optimizer.load_state_dict(resumed["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(resumed["scaler"])
        # Nothing in training draws from it (see commands.py); a layer that does will go on as it would have.
        torch.set_rng_state(resumed["rng"])

    def learning_rate(at_step: int) -> float:
        if config.optimization.lr_scheduler == "none":
            return config.optimization.learning_rate
        warmup_steps = config.optimization.warmup_epochs * steps_per_epoch
        return config.optimization.learning_rate * learning_rate_factor(
            at_step, warmup_steps=warmup_steps, total_steps=total_steps
        )

    # --- Logging and saving ---
    unlogged: list[Tensor] = []
    epoch_rows: list[list[float]] = resumed["epoch_rows"] if resumed is not None else []
    last_epoch: dict[str, float] = resumed["last_epoch"] if resumed is not None else {}
    since_log = time.perf_counter()
    since_log_wait = 0.0

    def log() -> None:
        """Bring the metrics of the steps since the last call to the host: the only host sync of the loop."""
        nonlocal since_log, since_log_wait, train_seconds, wait_seconds, last_epoch
        if not unlogged:
            return
        rows = accelerator.reduce(torch.stack(unlogged), "mean").tolist()  # host sync
        first_step = step - len(rows)
        unlogged.clear()
        _check_finite(rows, first_step, steps_per_epoch, global_batch_size, folder)
        seconds = _seconds_since(since_log)
        waited = min(since_log_wait, seconds)
        since_log, since_log_wait = time.perf_counter(), 0.0
        train_seconds += seconds
        wait_seconds += waited
        values: dict[str, float] = {
            "step": step,
            "epoch": (step - 1) // steps_per_epoch,
            "steps": len(rows),
            **_means(rows),
            "learning_rate": learning_rate(step - 1),
            "images_per_second": len(rows) * global_batch_size / seconds,
            "wait_fraction": waited / seconds,
        }
        if accelerator.is_main_process:
            folder.append_metrics(values)
        accelerator.log({name: value for name, value in values.items() if name != "step"}, step=step)
        epoch_rows.extend(rows)
        end_of_epoch = step % steps_per_epoch == 0
        if end_of_epoch:
            last_epoch = _means(epoch_rows)
            epoch_rows.clear()
        console.report(
            {**values, **last_epoch} if end_of_epoch else values,
            epochs=config.optimization.max_epochs,
            eta_seconds=(total_steps - step) * train_seconds / step,
            end_of_epoch=end_of_epoch,
        )

    def save(*, stopping: bool) -> None:
        """Begin to write a checkpoint of the steps so far; never one with a non-finite loss behind it.

        When ``stopping``, and after the last step, it is there on return.
        """
        log()
        finish_saving()
        if accelerator.is_main_process:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "rng": torch.get_rng_state(),
                "identity": config.identity(),
                "environment": environment,
                "epoch_rows": epoch_rows,
                "last_epoch": last_epoch,
                "global_batch_size": global_batch_size,
                "train_seconds": train_seconds,
                "wait_seconds": wait_seconds,
            }
            # A copy, as training goes on while it is written.
            copied = recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), state)
            saving.start(partial(write, step, copied))
        if stopping or step == total_steps:
            finish_saving(stopping=stopping)

    def write(at_step: int, state: dict[str, Any]) -> None:
        folder.flush_metrics()
        checkpoint.save(
            folder.path,
            at_step,
            state,
            keep=config.run.keep_checkpoints,
            keep_every_steps=config.run.keep_every * steps_per_epoch if config.run.keep_every is not None else None,
        )

    def finish_saving(*, stopping: bool = False) -> None:
        """Wait for the checkpoint that is being written, and learn on all processes how it went."""

        def outcome() -> str:
            try:
                saving.finish()
            except UserError as error:
                if config.run.on_save_error == "continue" and not stopping:
                    return f"warning: {error} Training goes on without this checkpoint."
                raise UserError(
                    f"{error} Training stopped after step {step}; the checkpoints before are whole, so go on by adding "
                    f"--results_path {folder.path} --resume auto."
                ) from error
            return ""

        warning = on_main_process(accelerator, outcome)
        if warning:
            console.say(warning)

    def saving_failed() -> None:
        if config.run.on_save_error == "stop":
            stops.ask()

    # --- The loop ---
    model.train()
    if config.run.profile and total_steps - step < config.run.profile + profiling.WARM_UP_STEPS:
        raise UserError(
            f"--profile {config.run.profile} needs {config.run.profile + profiling.WARM_UP_STEPS} steps with its warm-"
            f"up, but there are only {total_steps - step}; profile fewer or train longer."
        )
    profiled = (
        StepProfile(config.run.profile, accelerator.device)
        if config.run.profile and accelerator.is_main_process
        else None
    )
    stops = StopRequests(timeout=timedelta(seconds=config.run.process_timeout_s))
    saving = Background(saving_failed)
    with console.training(first_step=step, total_steps=total_steps), stops, saving:
        chunks = data.training.batches(step * config.optimization.accumulate)
        since_log = time.perf_counter()
        while step < total_steps:
            started_waiting = time.perf_counter()
            with part("wait for data"):
                batch = [next(chunks) for _ in range(config.optimization.accumulate)]
            since_log_wait += _seconds_since(started_waiting)

            unlogged.append(backward(batch))
            with part("optimizer"):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)
                optimizer.step()
                optimizer.zero_grad()
            step += 1

            if step % config.run.log_every == 0 or step % steps_per_epoch == 0:
                with part("logging"):
                    log()
            with part("agreeing on stops"):
                stop = stops.after_step(last=step == total_steps)
            if stop or _checkpoint_due(config, step, steps_per_epoch, total_steps):
                with part("saving"):
                    save(stopping=bool(stop))
            if profiled is not None and profiled.after_step():
                profiled.write(folder.trace, folder.profile)
                console.table(
                    f"{config.run.profile} steps; trace in {folder.trace}, for https://ui.perfetto.dev",
                    ["part", "ms", "of the step"],
                    profiling.table(profiled.milliseconds()),
                )
            if stop:
                raise Interrupted(
                    f"Stopped after step {step} of {total_steps}; go on by adding "
                    f"--results_path {folder.path} --resume auto.",
                    exit_code=exit_code(stop, config.run.stop_exit_code),
                )
        del chunks

    # --- Results ---
    metadata = {
        "config": config.identity(),
        "step": step,
        "classes": data.classes,
        "environment": portable(environment),
    }

    def export() -> None:
        folder.results.unlink(missing_ok=True)  # of a shorter run: of other weights
        write_safetensors(model.state_dict(), folder.model, metadata)
        write_safetensors(model.encoder.state_dict(), folder.encoder, metadata)

    on_main_process(accelerator, export)
    # Evaluation mode and other batch sizes would be compiled anew, for a minute or more.
    with console.waiting("evaluating"), torch.compiler.set_stance("force_eager"):
        results = _evaluate(config, data, model, accelerator)
    if model.inverse_model is not None:
        results["inverse_model_accuracy"] = last_epoch["manipulation_accuracy"]
    results["images_per_second"] = total_steps * global_batch_size / train_seconds
    results["wait_fraction"] = wait_seconds / train_seconds
    if accelerator.is_main_process:
        write_json(folder.results, results)
    accelerator.log({f"results/{name}": value for name, value in results.items()}, step=step)
    return results


def _check_compiler(device: torch.device) -> None:
    """Raise UserError where PyTorch could not compile for a CPU."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"--compile 1 needs a C++ compiler, but there is no {compiler}; install it, name another one by the "
            f"environment variable CXX, or leave --compile out."
        )


def _means(rows: list[list[float]]) -> dict[str, float]:
    """The mean of each metric over steps."""
    return dict(zip(METRICS, np.mean(rows, axis=0).tolist(), strict=True))


def _check_finite(
    rows: list[list[float]], first_step: int, steps_per_epoch: int, global_batch_size: int, folder: RunFolder
) -> None:
    losses = [row[METRICS.index("loss")] for row in rows]
    if np.isfinite(losses).all():
        return
    bad = int(np.argmin(np.isfinite(losses)))
    epoch, step_in_epoch = divmod(first_step + bad, steps_per_epoch)
    first = step_in_epoch * global_batch_size
    raise UserError(
        f"The loss became {losses[bad]} at step {first_step + bad + 1} (epoch {epoch + 1}, positions {first} to "
        f"{first + global_batch_size - 1}); nothing of it was saved. Lower --learning_rate or use --mixed_precision "
        f"no, and go on from the checkpoint before by --results_path {folder.path} --resume auto or start anew."
    )


def _checkpoint_due(config: TrainConfig, step: int, steps_per_epoch: int, total_steps: int) -> bool:
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    if step_in_epoch > 0:
        return step_in_epoch % config.run.checkpoint_every_steps == 0
    kept_for_good = config.run.keep_every is not None and epoch % config.run.keep_every == 0
    return epoch % config.run.checkpoint_every == 0 or kept_for_good or step == total_steps


def _seconds_since(start: float) -> float:
    """Never 0 or less, whatever the clock does: rates are divided by it."""
    return max(time.perf_counter() - start, 1e-6)


def _evaluate(config: TrainConfig, data: Data, trained: Model, accelerator: Accelerator) -> dict[str, float]:
    """kNN, linear probing and online classifier for the trained model and for the one that training started from."""
    if data.test is None or data.labeled is None:
        return {}
    started = initial_model(config, data.classes).to(accelerator.device)
    measures: tuple[Measure, ...] = (
        ("online_classifier",)
        if config.objective.stop_gradient == 2
        else ("online_classifier", "linear_probing", "knn")
    )
    results: dict[str, float] = {}
    for when, model in (("before", started), ("after", trained)):
        scores = evaluate(
            model.encoder,
            model.classifier,
            labeled=data.labeled,
            test=data.test,
            classes=data.classes,
            measures=measures,
            accelerator=accelerator,
        )
        results |= {f"{name}_{when}": score.accuracy for name, score in scores.items()}
    return results
