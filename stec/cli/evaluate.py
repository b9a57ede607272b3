"""``launch.py eval``: measure a trained encoder and its online linear classifier on the test images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.datasets.registry import DATA_SETS
from stec.cli.encoder import EncoderConfig, read_encoder
from stec.cli.flags import parse
from stec.cli.outputs import check_output
from stec.config import AugmentationSettings, TrainConfig, with_settings
from stec.settings import setting

if TYPE_CHECKING:
    from pipelines.commands import Policy
    from stec.evaluation.decoding import R2
    from stec.evaluation.evaluate import Score
    from stec.weights.pretrained import Trained

CLASSES_SHOWN = 20
"""With more classes, only the worst and the best are in the table; ``--json`` has all."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(EncoderConfig):
    """Evaluate a trained encoder and its online linear classifier on the test images."""

    measures: tuple[Literal["online_classifier", "linear_probing", "low_shot", "knn", "rankme", "parameters"], ...] = ()
    """Measures: the file's online linear classifier; linear probing on the labeled images; low-shot, on 10 % and 1 % of
    them; kNN; RankMe, the effective rank of features; R2 of the command decoded from pairs of views, and of the demo
    set's generative factors. The last two need no labels. Default: all that weights and data allow."""
    seed: int = setting(0, at_least=0)
    """Seed of the images of low_shot."""
    json: Path | None = None
    """Also write the results to this file."""

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of its range."""
        super().validate()
        if self.json is not None:
            # No data set contains such files.
            data_dir = None if self.json.suffix == ".json" else self.data_dir
            check_output(self.json, "--json", inputs=(self.ckpt_path, data_dir))


def run(arguments: list[str]) -> None:
    """Print the measures; the last line is the accuracy of the online linear classifier, if it is measured."""
    config = parse(EvalConfig, arguments, name="eval")
    config.validate()

    from pipelines.files import write_json
    from stec import gpus
    from stec.evaluation.evaluate import evaluate
    from stec.evaluation.images import open_evaluation_images
    from stec.evaluation.parameters import FIT_SEED, TEST_SEED, decode_commands
    from stec.loaders import evaluation_loader, pair_loader
    from stec.startup import start

    accelerator, console, precision = start(config.mixed_precision)
    trained, trained_on = read_encoder(config)
    model = trained.model("classifier")
    with console.counting() as progress:
        images = open_evaluation_images(
            config,
            trained,
            model.classifier,
            trained_on=trained_on,
            measures=config.measures,
            accelerator=accelerator,
            progress=progress,
        )
    model.to(accelerator.device)
    kind = "test images" if "labeled" in DATA_SETS[config.dataset].splits else "images"
    normalized = "" if trained.normalize == "none" else f", normalized as {trained.normalize}"
    console.say(
        f"{config.ckpt_path} on the {len(images.test)} {kind} of {config.dataset}, precision {precision}{normalized}"
    )
    for measure, reason in images.omitted.items():
        console.say(f"Not measured: {measure}. {reason}")
    loader_of = partial(
        evaluation_loader, data=config, traits=config.traits, batch_size=config.batch_size, device=accelerator.device
    )
    with console.waiting("evaluating"), gpus.memory_errors(config.batch_size, "give a smaller one"):
        evaluation = evaluate(
            model.encoder,
            model.classifier,
            labeled=None if images.labeled is None else loader_of(images.labeled),
            test=loader_of(images.test),
            classes=len(images.classes),
            measures=images.measures,
            accelerator=accelerator,
            seed=config.seed,
        )
        commands: dict[str, R2] = {}
        policy = pair_policy(config, trained, trained_on)
        if "parameters" in images.measures:
            pairs_of = partial(
                pair_loader, data=config, policy=policy, views_per_batch=config.batch_size, device=accelerator.device
            )
            commands = decode_commands(
                model.encoder,
                None if images.labeled is None else pairs_of(images.labeled, seed=FIT_SEED),
                pairs_of(images.test, seed=TEST_SEED),
                trained.convention or "official",
                accelerator,
            )
    scores = evaluation.scores
    if scores:
        console.table("On the test images", ["", *map(column, scores)], table(scores, images.classes))
    for title, decoded in (
        ("R2 of the command from view i to view j, decoded from both views", commands),
        ("R2 of the generative factors, decoded from the image", evaluation.factors),
    ):
        if decoded:
            console.table(title, ["", "ridge", "MLP", "ridge, shuffled", "MLP, shuffled"], r2_rows(decoded))
    if evaluation.rankme is not None:
        console.say(f"RankMe {evaluation.rankme:.1f} of {model.encoder.feature_dim} features")
    classifier = scores.get("online_classifier")
    summary = (
        {}
        if classifier is None
        else {name: getattr(classifier, name) for name in ("loss", "top5_accuracy", "accuracy")}
    )
    if config.json is not None and accelerator.is_main_process:
        facts = {
            "dataset": config.dataset,
            "ckpt_path": str(config.ckpt_path),
            "trained_on": trained_on,
            "normalize": trained.normalize,
        }
        written: dict[str, Any] = {
            name: {**dataclasses.asdict(of), "class_accuracies": by_name(of, images.classes)}
            for name, of in scores.items()
        }
        if evaluation.rankme is not None:
            written["rankme"] = {"rankme": evaluation.rankme, "features": model.encoder.feature_dim}
        if "parameters" in images.measures:
            written["parameters"] = {
                "policy": dataclasses.asdict(policy),
                "commands": {name: dataclasses.asdict(of) for name, of in commands.items()},
                "factors": {name: dataclasses.asdict(of) for name, of in evaluation.factors.items()},
            }
        write_json(config.json, {**facts, "test_images": len(images.test), **summary, "measures": written})
    for name, value in summary.items():
        console.say(f"{name} {value:.4f}")
    accelerator.end_training()


def pair_policy(config: EvalConfig, trained: Trained, trained_on: str) -> Policy:
    """The policy of the pairs of views: that of the encoder's training, otherwise that of the data set's recipes."""
    from stec.loaders import policy_of

    switch = int(config.traits.blur_and_solarize)
    names = {field.name for field in dataclasses.fields(AugmentationSettings)} - {"resolution_schedule"}
    settings = {name: value for name, value in trained.metadata.get("config", {}).items() if name in names}
    if config.view_size is not None or trained_on != config.dataset:
        settings["view_size"] = config.view_size
    defaults = {"dataset": config.dataset, "use_gaussian_blur": switch, "use_solarization": switch}
    return policy_of(with_settings(TrainConfig(), {**defaults, **settings}, str(trained.path)))


def column(name: str) -> str:
    """The column heading of a score."""
    if name.startswith("knn"):
        return f"kNN, k {name[3:]}"
    return name.replace("_percent", " %").replace("linear_probing_", "low-shot ").replace("_", " ")


def table(scores: Mapping[str, Score], classes: Sequence[str]) -> list[list[str]]:
    """Rows of the final table, with one column per score."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    of_all = scores.values()
    rows = [
        ["top-1", *(percent(score.accuracy) for score in of_all)],
        ["top-5", *(percent(score.top5_accuracy) for score in of_all)],
        ["loss", *("-" if score.loss is None else f"{score.loss:.3f}" for score in of_all)],
        ["labeled images", *("-" if score.labeled_images is None else str(score.labeled_images) for score in of_all)],
    ]
    shown = {name: [score.class_accuracies[k] for score in of_all] for k, name in enumerate(classes)}
    if len(classes) > CLASSES_SHOWN:
        measured = [[value for value in score.class_accuracies if value is not None] for score in of_all]
        shown = {
            "worst class": [min(values) for values in measured],
            "best class": [max(values) for values in measured],
        }
    return rows + [[name, *map(percent, values)] for name, values in shown.items()]


def r2_rows(decoded: Mapping[str, R2]) -> list[list[str]]:
    """Rows of a table of R2; what rounds to -0 is 0."""
    return [
        [name, *(f"{round(value, 3) + 0.0:.3f}" for value in dataclasses.astuple(r2))] for name, r2 in decoded.items()
    ]


def by_name(score: Score, classes: Sequence[str]) -> dict[str, float | None]:
    return dict(zip(classes, score.class_accuracies, strict=True))
