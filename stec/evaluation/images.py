"""The images on which an encoder is evaluated, and the measures that they and its weights allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from pipelines.datasets.images import Images
from pipelines.datasets.registry import DATA_SETS, Progress, SplitName, open_split
from pipelines.errors import UserError
from stec.config import ImageSettings
from stec.distributed import processes
from stec.evaluation.evaluate import MEASURES, UNLABELED_MEASURES, Measure
from stec.weights.pretrained import Trained


@dataclass(frozen=True, kw_only=True)
class EvaluationImages:
    """Opened images, and what is measured on them."""

    test: Images
    """All images, if the data set has no labels."""
    labeled: Images | None
    """None if there are none, or no measure needs them."""
    classes: tuple[str, ...]
    """Names of the classes of the labels."""
    measures: tuple[Measure, ...]
    omitted: dict[Measure, str]
    """Measures that were not asked for by name and are impossible, with the reasons."""


def open_evaluation_images(
    data: ImageSettings,
    trained: Trained,
    classifier: nn.Linear | None,
    *,
    trained_on: str,
    measures: Sequence[Measure],
    accelerator: Accelerator,
    progress: Progress,
) -> EvaluationImages:
    """Open what the ``measures`` need; without any, these are all that weights and data allow.

    ``classifier`` is the online linear classifier of ``trained``, and ``trained_on`` the data set that it knows.
    Raises UserError if images are missing, or a measure is impossible that was asked for.
    """

    def open_images(split: SplitName) -> tuple[Images, tuple[str, ...]]:
        return open_split(
            data.dataset,
            data.location,
            split,
            download=bool(data.download) and accelerator.is_main_process,
            exif_orientation=bool(data.exif_orientation),
            progress=progress,
        )

    opened: list[tuple[Images, tuple[str, ...]]] = []

    def reason_without_labeled() -> str:
        try:
            opened.append(open_images("labeled"))
        except UserError as error:
            return str(error)
        return ""

    requested = measures or MEASURES
    has_labels = "labeled" in DATA_SETS[data.dataset].splits
    test, classes = processes.main_process_first(accelerator, lambda: open_images("test" if has_labels else "train"))
    labeled: Images | None = None
    reasons = dict.fromkeys(MEASURES, "")
    if not has_labels:
        without = f"--dataset {data.dataset} has no labels; use --measures {' '.join(UNLABELED_MEASURES)}."
        reasons |= {measure: without for measure in MEASURES if measure not in UNLABELED_MEASURES}
    elif not set(requested) <= {"online_classifier", "rankme"}:
        reason = processes.on_main_process(accelerator, reason_without_labeled)
        reasons |= {measure: reason for measure in MEASURES if measure != "rankme"}
        if not reason:
            labeled, known = opened[0] if opened else open_images("labeled")
            if known[: len(classes)] != classes:
                raise UserError(f"The test images in {data.data_dir} have other classes than the labeled ones.")
            classes = known
    if has_labels:
        reasons["online_classifier"] = _reason_without_classifier(
            trained, classifier, trained_on, data.dataset, len(classes)
        )
    possible = tuple(measure for measure in requested if not reasons[measure])
    omitted = {measure: reasons[measure] for measure in requested if reasons[measure]}
    if omitted and (measures or not possible):
        measure, reason = next(iter(omitted.items()))
        raise UserError(f"{measure} cannot be measured: {reason}")
    return EvaluationImages(test=test, labeled=labeled, classes=classes, measures=possible, omitted=omitted)


def _reason_without_classifier(
    trained: Trained, classifier: nn.Linear | None, trained_on: str, dataset: str, classes: int
) -> str:
    """The reason why the file's online linear classifier cannot be evaluated; empty if it can."""
    if classifier is None:
        return f"{trained.path} holds no online linear classifier; use --measures linear_probing."
    if trained_on != dataset:
        return (
            f"The online linear classifier of {trained.path} was trained on {trained_on}; use --measures "
            f"linear_probing."
        )
    known = classifier.out_features
    if known != classes:
        return f"The online linear classifier of {trained.path} has {known} classes, but {dataset} has {classes}."
    return ""
