"""Training and evaluation from Python, as the command line does them: ``fit``, and the ``Run`` that it returns."""

from __future__ import annotations

import os
import threading
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import Interrupted, UserError
from pipelines.files import read_object
from stec.config import TrainConfig, with_settings
from stec.recipes import recipe as settings_of_recipe
from stec.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from stec.evaluation.evaluate import Evaluation, Measure
    from stec.models.encoder import ImageEncoder


def configure(recipe: str | None = None, **settings: Any) -> TrainConfig:
    """A configuration with the names and values of the flags: ``configure("cifar10-resnet18", data_dir="/data")``.

    As on the command line, the demo's recipe is used if no recipe is given, and no data set but the demo. Raises
    UserError for an unknown name, or a value of the wrong type or out of its range.
    """
    if recipe is None and settings.get("dataset", "demo") == "demo":
        recipe = "demo"
    config = with_settings(settings_of_recipe(recipe) if recipe else TrainConfig(), settings, "configure()")
    config.validate()
    return config


class Run:
    """A finished run, of which ``path`` is the folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def config(self) -> TrainConfig:
        """Its settings. Raises UserError if they cannot be read."""
        file = RunFolder(self.path).config
        return with_settings(TrainConfig(), read_object(file, "give the folder of a run"), str(file))

    @cached_property
    def results(self) -> dict[str, float]:
        """The content of ``results.json``. Raises UserError if the run is not finished."""
        return read_object(RunFolder(self.path).results, "let training go on to its end")

    @cached_property
    def encoder(self) -> ImageEncoder:
        """Its encoder, as ``load_encoder`` returns it. Raises UserError if the run is not finished."""
        from stec.weights.pretrained import load_encoder

        return load_encoder(self.path)

    def evaluate(self, *measures: Measure, seed: int = 0) -> Evaluation:
        """Measure the trained encoder on the test images of its data set, in float32, as ``launch.py eval`` does.

        Without ``measures`` these are all that the data set allows. ``parameters`` decodes the images' generative
        factors; the command between two views is decoded by the command line only. ``seed`` chooses the images of
        ``low_shot``. Raises UserError if the data is missing or a measure needs labels that it does not have.
        """
        from stec import gpus
        from stec.evaluation.evaluate import evaluate
        from stec.evaluation.images import open_evaluation_images
        from stec.loaders import evaluation_loader
        from stec.startup import start
        from stec.weights.pretrained import read_trained

        data, batch_size = self.config.data, self.config.optimization.batch_size
        accelerator, console, _ = start("no")
        trained = read_trained(self.path)
        model = trained.model("classifier").to(accelerator.device)
        with console.counting() as progress, gpus.memory_errors(batch_size, "evaluate with launch.py eval"):
            images = open_evaluation_images(
                data,
                trained,
                model.classifier,
                trained_on=data.dataset,
                measures=measures,
                accelerator=accelerator,
                progress=progress,
            )
            loader_of = partial(
                evaluation_loader,
                data=data,
                traits=self.config.traits,
                batch_size=batch_size,
                device=accelerator.device,
            )
            return evaluate(
                model.encoder,
                model.classifier,
                labeled=None if images.labeled is None else loader_of(images.labeled),
                test=loader_of(images.test),
                classes=len(images.classes),
                measures=images.measures,
                accelerator=accelerator,
                seed=seed,
            )


def fit(config: TrainConfig) -> Run:
    """Train, evaluate and write the files of a run, as ``launch.py`` does with these settings.

    In a notebook, a progress bar is updated in place. An interruption saves a checkpoint first, and raises
    KeyboardInterrupt; the run is resumed with its ``results_path`` and ``resume="auto"``. Call it from the main thread,
    which alone receives signals. Raises UserError for what the user can fix.
    """
    import torch

    from pipelines.decoder_messages import decoder_messages_dropped
    from stec.distributed.launcher import check_environment
    from stec.training import stops
    from stec.training.run import run_training

    if threading.current_thread() is not threading.main_thread():
        raise UserError("stec.fit was called in a thread, where it could not be interrupted; call it in the main one.")
    config.validate()
    check_environment(os.environ)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with decoder_messages_dropped(), stops.immediately(config.run.stop_exit_code):
            return Run(run_training(config).path)
    except Interrupted as interruption:
        raise KeyboardInterrupt(str(interruption)) from interruption
    finally:
        torch.use_deterministic_algorithms(deterministic)
