"""Names that earlier versions wrote to files, and what they are called now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

RENAMED_SETTINGS = {"max_bad_share": "max_bad_fraction"}
REMOVED_SETTINGS = {"executor": "fused"}
"""Settings that exist no more, each with the only value that a file may give it."""
RENAMED_RESULTS = {
    "linear_fit_before": "linear_probing_before",
    "linear_fit_after": "linear_probing_after",
    "probe_before": "online_classifier_before",
    "probe_after": "online_classifier_after",
    "wait_share": "wait_fraction",
}
RENAMED_METRICS = {
    "wait_share": "wait_fraction",
    "discrimination": "contrastive_loss",
    "discrimination_accuracy": "contrastive_accuracy",
    "contrast_accuracy": "cross_view_accuracy",
    "contrast_entropy": "cross_view_entropy",
    "manipulation": "inverse_loss",
    "manipulation_accuracy": "inverse_accuracy",
    "supervised": "classifier_loss",
    "supervised_accuracy": "classifier_accuracy",
}
RENAMED_PARAMETERS = {"probe.": "classifier.", "inverse_model.": "inverse_models.window."}
"""Prefixes of their names."""
EPOCH_ROW = ("loss", *list(RENAMED_METRICS.values())[1:])
"""The order of the metrics of a step in the checkpoints of 0.1.0."""


def with_current_names(values: Mapping[str, T], renamed: Mapping[str, str]) -> dict[str, T]:
    """``values`` with the keys of 0.1.0 replaced, in the same order."""
    return {renamed.get(name, name): value for name, value in values.items()}


def with_current_parameter_names(state: Mapping[str, T]) -> dict[str, T]:
    """A state dict in which 0.1.0's ``probe`` is the ``classifier``, and its inverse model that of windows, in the same
    order."""
    return {
        next(
            (new + name.removeprefix(old) for old, new in RENAMED_PARAMETERS.items() if name.startswith(old)), name
        ): value
        for name, value in state.items()
    }


def checkpoint_with_current_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint with the parameters and metrics of 0.1.0 renamed."""
    rows = [row if isinstance(row, dict) else dict(zip(EPOCH_ROW, row, strict=True)) for row in state["epoch_rows"]]
    return {
        **state,
        "model": with_current_parameter_names(state["model"]),
        "epoch_rows": rows,
        "last_epoch": with_current_names(state["last_epoch"], RENAMED_METRICS),
    }
