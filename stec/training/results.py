"""The results of a run: the exported weights and the final evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from stec.config import TrainConfig
from stec.evaluation.evaluate import Measure, evaluate
from stec.loaders import Data
from stec.models.model import Model
from stec.runs.run_folder import RunFolder
from stec.training.initial_model import initial_model
from stec.weights.export import write_safetensors


def export_weights(folder: RunFolder, model: Model, metadata: Mapping[str, Any]) -> None:
    """Write the trained weights of the model and of its encoder."""
    # Results that a shorter run left are of other weights.
    folder.results.unlink(missing_ok=True)
    write_safetensors(model.state_dict(), folder.model, metadata)
    write_safetensors(model.encoder.state_dict(), folder.encoder, metadata)


def evaluate_before_and_after(
    config: TrainConfig, data: Data, trained: Model, accelerator: Accelerator
) -> dict[str, float]:
    """Evaluate the trained model and the one that training started from: kNN, linear probing, online classifier."""
    if data.test is None or data.labeled is None:
        return {}
    initial = initial_model(config, data.classes).to(accelerator.device)
    measures: tuple[Measure, ...] = ("online_classifier",)
    if config.objective.stop_gradient != 2:
        measures += ("linear_probing", "knn")
    results: dict[str, float] = {}
    for when, model in (("before", initial), ("after", trained)):
        evaluation = evaluate(
            model.encoder,
            model.classifier,
            labeled=data.labeled,
            test=data.test,
            classes=data.classes,
            measures=measures,
            accelerator=accelerator,
        )
        results |= {f"{name}_{when}": score.accuracy for name, score in evaluation.scores.items()}
    return results
