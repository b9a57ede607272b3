"""The training loop: fetch, forward, backward, step, evaluate, log, save."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any

from accelerate import Accelerator

from pipelines.errors import Interrupted, UserError
from pipelines.files import write_json
from stec.config import TrainConfig
from stec.console import Console
from stec.distributed.processes import on_main_process
from stec.loaders import Data
from stec.models.model import Model
from stec.models.target_network import momentum_at
from stec.objectives.inverse import EfferenceCopy
from stec.objectives.objective import Objective
from stec.profiling import StepProfile, part, start_profile
from stec.runs.run_folder import INVERSE_RESULTS, RunFolder
from stec.training.checkpoint_writer import CheckpointWriter, TrainingState
from stec.training.initial_model import compile_encoder
from stec.training.metrics_log import MetricsLog
from stec.training.monitor import Monitor
from stec.training.optim import learning_rate_at, make_optimizer
from stec.training.progress import Progress, Schedule
from stec.training.results import evaluate_before_and_after, export_weights
from stec.training.step import Step
from stec.training.stops import StopRequests, exit_code
from stec.weights.export import portable


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
    """Train to the end, export and evaluate; returns the content of ``results.json``.

    ``model`` is the ``initial_model``, ``resumed`` the checkpoint to resume from. Raises UserError if a loss is not
    finite or a file cannot be written, and Interrupted after a signal.
    """
    # --- Model, objective, optimizer ---
    accumulate = config.optimization.accumulate
    schedule = Schedule(
        epochs=config.optimization.max_epochs,
        steps_per_epoch=data.training.steps_per_epoch,
        global_batch_size=accumulate * config.optimization.batch_size * accelerator.num_processes,
    )
    if config.run.compile:
        compile_encoder(model.encoder, accelerator.device)
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config.optimization))
    if config.run.compile and model.target_network is not None:
        compile_encoder(model.target_network.encoder, accelerator.device)
    weights = config.target_weights
    copy = EfferenceCopy(
        weights=weights,
        convention=config.objective.affine,
        jitter_strength=config.traits.jitter_strength,
        both_ways=bool(config.objective.predict_both_ways),
    )
    compute_gradient = Step(model, Objective(config.objective, weights), accelerator, copy)
    progress = Progress()
    state = TrainingState(model=model, optimizer=optimizer, scaler=accelerator.scaler, progress=progress)
    if resumed is not None:
        try:
            state.load_state_dict(resumed)
        except RuntimeError as error:
            raise UserError(
                f"The checkpoint of step {resumed['step']} in {folder.path} does not fit the model of these settings; "
                f"resume with the run's own settings, or name another folder by --results_path."
            ) from error

    # --- The loop ---
    stops = StopRequests(timeout=timedelta(seconds=config.run.process_timeout_s))
    log = MetricsLog(
        schedule, progress, log_every=config.run.log_every, accelerator=accelerator, console=console, folder=folder
    )
    monitor = Monitor(model.encoder, data, schedule, progress, every=config.run.eval_every, accelerator=accelerator)
    checkpoints = CheckpointWriter(
        config,
        schedule,
        state,
        accelerator=accelerator,
        console=console,
        folder=folder,
        environment=environment,
        request_stop=stops.request,
    )
    profile = start_profile(config.run.profile, schedule.total_steps - progress.step, accelerator)
    model.train()
    with console.training(first_step=progress.step, total_steps=schedule.total_steps), stops, checkpoints:
        micro_batches = data.training.batches(progress.step * accumulate)
        log.restart_clock()
        while progress.step < schedule.total_steps:
            with log.waiting():
                batch = [next(micro_batches) for _ in range(accumulate)]
            metrics = compute_gradient(batch)
            learning_rate = learning_rate_at(
                progress.step, config.optimization, steps_per_epoch=schedule.steps_per_epoch
            )
            with part("optimizer"):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
                optimizer.zero_grad()
            if model.target_network is not None:
                with part("target network"):
                    model.update_target_network(
                        momentum_at(progress.step, schedule.total_steps, config.objective.target_momentum)
                    )
            progress.step += 1

            log.add(metrics, learning_rate)
            if monitor.due():
                with log.paused():
                    log.add_measured(monitor.measure())
            if log.due():
                with part("logging"):
                    log.write()
            with part("agreeing on stops"):
                stop = stops.after_step(last=progress.step == schedule.total_steps)
            if stop or checkpoints.due():
                with part("saving"):
                    log.write()  # first, as it raises if a loss is not finite
                    checkpoints.save(stopping=bool(stop))
            if profile is not None and profile.after_step():
                _write_profile(profile, folder, console)
            if stop:
                raise Interrupted(
                    f"Stopped after step {progress.step} of {schedule.total_steps}; resume by adding "
                    f"--results_path {folder.path} --resume auto.",
                    exit_code=exit_code(stop, config.run.stop_exit_code),
                )
        del micro_batches

    # --- Results ---
    metadata = {
        "config": config.identity(),
        "step": progress.step,
        "classes": data.classes,
        "environment": portable(environment),
    }
    on_main_process(accelerator, partial(export_weights, folder, model, metadata))
    with console.waiting("evaluating"):
        results = evaluate_before_and_after(config, data, model, accelerator)
    for name in INVERSE_RESULTS:
        metric = name.replace("inverse_model_", "inverse_")
        if metric in progress.last_epoch:
            results[name] = progress.last_epoch[metric]
    results["images_per_second"] = schedule.total_steps * schedule.global_batch_size / progress.train_seconds
    results["wait_fraction"] = progress.wait_seconds / progress.train_seconds
    if accelerator.is_main_process:
        write_json(folder.results, results)
    log.track({f"results/{name}": value for name, value in results.items()})
    return results


def _write_profile(profile: StepProfile, folder: RunFolder, console: Console) -> None:
    profile.write(folder.trace, folder.profile)
    console.table(
        f"{profile.steps} steps; trace in {folder.trace}, for https://ui.perfetto.dev",
        ["part", "ms", "of the step"],
        profile.table(),
    )
