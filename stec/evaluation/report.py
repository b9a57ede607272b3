"""Runs side by side on one self-contained HTML page: no network, no other files."""

from __future__ import annotations

import base64
import html
import importlib.resources
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from PIL import Image
from plotly.offline import get_plotlyjs

from stec.config import TargetName, rule_on_resume
from stec.evaluation.predictions import TargetPredictions, confusion, r2
from stec.evaluation.preview import Example, panels, png
from stec.objectives.inverse import bin_centers
from stec.runs.run_folder import INVERSE_RESULTS, RESULTS
from stec.runs.run_record import RunRecord
from stec.targets import TARGETS, Target

POINTS = 1000
"""A curve with more points is averaged over equal ranges."""
THUMBNAIL_PX = 128
HOVER_CHARACTERS = 24
"""Characters per line of a run's name in the tooltip of a chart: as many as fit on a phone."""

RUN_COLORS = ("#3b7dd8", "#e07a00", "#2a9d6f", "#c23bae", "#8a6d3b", "#d1495b", "#6c63c7", "#5f6b76")

LEARNING = {
    "loss": "Loss",
    "contrastive_loss": "Contrastive loss",
    "byol_loss": "BYOL: squared distance of predictions and targets",
    "divergence": "ReLIC: divergence of the two views' distributions",
    "projection_spread": "Spread of the target network's projections (0 is collapsed)",
    "inverse_loss": "Inverse model: loss",
    "classifier_loss": "Online linear classifier: loss",
    "contrastive_accuracy": "Contrastive accuracy",
    "inverse_accuracy": "Inverse model: accuracy per entry",
    "inverse_loss_color": "Inverse model: squared error of colors",
    "inverse_r2_color": "Inverse model: R2 of colors",
    "inverse_loss_blur": "Inverse model: squared error of the blur's sigma",
    "inverse_r2_blur": "Inverse model: R2 of the blur's sigma",
    "inverse_loss_solarize": "Inverse model: loss of solarization",
    "inverse_accuracy_solarize": "Inverse model: accuracy of solarization",
    "inverse_loss_gray": "Inverse model: loss of gray",
    "inverse_accuracy_gray": "Inverse model: accuracy of gray",
    "classifier_accuracy": "Online linear classifier: accuracy on training views",
    "cross_view_accuracy": "Contrastive accuracy, among the other views j",
    "cross_view_entropy": "Entropy of the contrastive prediction, nats",
    "knn": "kNN (k = 20) on a subset of the test images: top-1",
    "rankme": "RankMe, the effective rank of the features",
    "learning_rate": "Learning rate",
}
PACE = {"images_per_second": "Images per second", "wait_fraction": "Fraction of time waiting for data"}


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """A test image and the images with the most similar features."""

    image: Image.Image
    name: str
    nearest: list[tuple[Image.Image, str, float]]
    """Image, name and cosine similarity, nearest first."""


@dataclass(kw_only=True)
class Look:
    """What is shown of a run's model and data."""

    examples: list[Example] = field(default_factory=list)
    predictions: Mapping[TargetName, TargetPredictions] = field(default_factory=dict)
    """Of the targets that the run's inverse model predicts, for pairs that training includes."""
    neighbors: list[Neighbors] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What is missing and why, one sentence each."""


def report(records: Sequence[RunRecord], looks: Sequence[Look]) -> str:
    """The report as an HTML document. Everything that comes from files is escaped."""
    names = _names(records)
    keys = "".join(
        f'<button type="button" aria-pressed="true" data-run="{n}">{_dot(n)}{_safe(name)}</button>'
        for n, name in enumerate(names)
    )
    sections = [
        _section("Runs", _facts(records, names) + _remarks(records, looks, names)),
        _section("Results", _results(records, names)),
        _section("Learning curves", _curves(records, names, LEARNING)),
        _section("Pace", _curves(records, names, PACE)),
        _section(
            "Views",
            _by_run(names, [_views(look.examples) for look in looks]),
            "The first positions of the first epoch: the source with both crop boxes (a double arrow means flipped), "
            "the views, and the crop box of view j that the inverse model predicts.",
        ),
        _section(
            "Predictions of the inverse model",
            _by_run(names, [_predictions(n, look.predictions) for n, look in enumerate(looks)]),
            "For each entry of what is predicted about view j relative to view i: of the pairs whose true bin is a "
            "row, the fraction that is predicted to be in each column, or predicted and true values. Crop boxes have "
            "no shear.",
        ),
        _section(
            "kNN",
            _by_run(names, [_neighbors(look.neighbors) for look in looks]),
            "Test images, and the labeled images with the most similar features (cosine).",
        ),
        _section("Settings", _settings(records, names)),
    ]
    content = {
        "title": _safe("Report of " + ", ".join(names)),
        "plotly": get_plotlyjs(),
        "navigation": f'<nav aria-label="runs">{keys}</nav>' if len(names) > 1 else "",
        "body": "".join(sections),
    }
    template = importlib.resources.files("stec.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda name: content[name[1]], template)


def _safe(text: object) -> str:
    return html.escape(str(text))


def _names(records: Sequence[RunRecord]) -> list[str]:
    """Folder names, or whole paths where two folders are called the same."""
    names = [record.path.resolve().name for record in records]
    return names if len(set(names)) == len(names) else [str(record.path) for record in records]


def _dot(run: int) -> str:
    return f'<i class="dot" style="background:{RUN_COLORS[run % len(RUN_COLORS)]}"></i>'


def _section(heading: str, content: str, explanation: str = "") -> str:
    if not content:
        return ""
    return f"<section><h2>{heading}</h2>{explanation and f'<p>{explanation}</p>'}{content}</section>"


def _by_run(names: Sequence[str], contents: Sequence[str]) -> str:
    """The content of each run under its name; only the first one is unfolded."""
    shown = [n for n, content in enumerate(contents) if content]
    return "".join(
        f'<details data-of="{n}"{" open" if n == shown[0] else ""}><summary>{_dot(n)}{_safe(names[n])}</summary>'
        f"{contents[n]}</details>"
        for n in shown
    )


# --- Tables ---


def _table(names: Sequence[str], rows: Iterable[tuple[str, Sequence[str], str]]) -> str:
    """A table with rows of a name, one HTML cell per run, and a CSS class."""
    head = "".join(f'<th scope="col" data-of="{n}">{_dot(n)}{_safe(name)}</th>' for n, name in enumerate(names))
    body = "".join(
        f'<tr class="{kind}"><th scope="row">{_safe(name)}</th>'
        + "".join(f'<td data-of="{n}">{cell}</td>' for n, cell in enumerate(cells))
        + "</tr>"
        for name, cells, kind in rows
    )
    return f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    def of(name: str) -> list[str]:
        return [_safe(record.environment.get(name, "-")) for record in records]

    rows = [("state", [_safe(record.progress) for record in records])]
    rows.append(("starts", [str(record.starts) for record in records]))
    rows.append(("images per step", [str(record.global_batch_size or "-") for record in records]))
    for label, name in (
        ("training images", "training_images"),
        ("processes", "processes"),
        ("device", "device"),
        ("precision", "precision"),
        ("pipeline", "backend"),
        ("S-TEC trainer", "stec"),
        ("PyTorch", "torch"),
    ):
        rows.append((label, of(name)))
    return _table(names, [(label, cells, "") for label, cells in rows])


def _remarks(records: Sequence[RunRecord], looks: Sequence[Look], names: Sequence[str]) -> str:
    return "".join(
        f'<aside data-of="{n}"><h3>{_dot(n)}Missing in {_safe(names[n])}</h3><ul>'
        + "".join(f"<li>{_safe(remark)}</li>" for remark in remarks)
        + "</ul></aside>"
        for n, (record, look) in enumerate(zip(records, looks))
        if (remarks := [*record.remarks, *look.remarks])
    )


def _results(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Results before and after training; the best run is bold."""
    rows: list[tuple[str, Sequence[str], str]] = []

    def add(label: str, name: str, form: str, before: str | None = None) -> None:
        values = [record.results.get(name) for record in records]
        known = [value for value in values if value is not None]
        if not known:
            return
        cells = []
        for record, value in zip(records, values):
            cell = "-" if value is None else format(value, form)
            if value is not None and value == max(known) and len(set(known)) > 1 and name != "wait_fraction":
                cell = f"<strong>{cell}</strong>"
            if before in record.results:
                cell += f" <small>from {record.results[before]:{form}}</small>"
            cells.append(cell)
        rows.append((label, cells, ""))

    for name, label in RESULTS.items():
        add(label, f"{name}_after", ".1%", f"{name}_before")
    for name, label in INVERSE_RESULTS.items():
        add(label, name, ".1%")
    add("images/s, whole training", "images_per_second", ",.0f")
    add("fraction of time waiting for data", "wait_fraction", ".1%")
    return _table(names, rows) if rows else ""


def _settings(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Differing settings first, marked if the weights depend on them; the others are folded."""
    known = list(dict.fromkeys(name for record in records for name in record.settings))
    differing, equal = [], []
    for name in known:
        values = [record.settings.get(name, "not set") for record in records if record.settings]
        cells = [_safe(record.settings.get(name, "not set")) if record.settings else "-" for record in records]
        if all(value == values[0] for value in values):
            equal.append((name, cells, ""))
        else:
            differing.append((name, cells, "" if rule_on_resume().get(name) == "free" else "differs"))
    differing.sort(key=lambda row: row[2], reverse=True)
    explanation = "<p>Marked: settings that the weights depend on.</p>"
    shown = explanation + _table(names, differing) if differing else ""
    if equal:
        heading = f"{len(equal)} settings that are the same" if len(records) > 1 else f"{len(equal)} settings"
        shown += f"<details><summary>{heading}</summary>{_table(names, equal)}</details>"
    return shown


# --- Charts ---


def _chart(figure: go.Figure, caption: str) -> str:
    # Colors that depend on the browser's color scheme are in the style of the page.
    figure.update_layout(
        template="none",
        margin={"l": 8, "r": 16, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        showlegend=False,
        # On a phone, dragging over a chart scrolls the page.
        dragmode=False,
        hoverlabel={"align": "left"},
    )
    axes = {"gridcolor": "rgba(128,128,128,.22)", "zeroline": False, "automargin": True, "title_standoff": 8}
    figure.update_xaxes(**axes, ticklabelstandoff=3)
    figure.update_yaxes(**axes, ticklabelstandoff=5)
    # Plotly escapes <, > and / in its JSON.
    drawn = f'<div class="chart"><script type="application/json">{figure.to_json()}</script></div>'
    return f"<figure><figcaption>{_safe(caption)}</figcaption>{drawn}</figure>"


def _curves(records: Sequence[RunRecord], names: Sequence[str], metrics: dict[str, str]) -> str:
    """One chart per metric, one curve per run. A loss that is always 0 was not trained."""
    in_epochs = all(record.steps_per_epoch for record in records if record.metrics)
    charts = []
    for metric, caption in metrics.items():
        figure = go.Figure()
        for n, record in enumerate(records):
            lines = [(line["step"], line[metric]) for line in record.metrics if metric in line]
            if not any(value for _, value in lines):
                continue
            x, y = _thinned(np.array(lines, np.float64))
            name = "<br>".join(_safe(part) for part in textwrap.wrap(names[n], HOVER_CHARACTERS))
            if in_epochs:
                x = x / (record.steps_per_epoch or 1)
            figure.add_trace(
                go.Scatter(
                    x=x,
                    y=y,
                    mode="lines" if len(x) > 1 else "markers",
                    meta=n,
                    line={"color": RUN_COLORS[n % len(RUN_COLORS)], "width": 2},
                    hoverlabel={"bgcolor": RUN_COLORS[n % len(RUN_COLORS)]},
                    cliponaxis=False,
                    name=name,
                    hovertemplate="%{y}, "
                    + ("epoch %{x:.2f}" if in_epochs else "step %{x:.0f}")
                    + "<br>%{fullData.name}<extra></extra>",
                )
            )
        if not figure.data:
            continue
        is_fraction = "accuracy" in metric or metric.endswith(("fraction", "knn"))
        figure.update_xaxes(rangemode="tozero", title="epoch" if in_epochs else "step")
        figure.update_yaxes(hoverformat=".1%" if is_fraction else ".4g", tickformat="~%" if is_fraction else None)
        if metric not in PACE:
            figure.update_yaxes(exponentformat="e")
        if is_fraction or metric in PACE or metric == "learning_rate":
            figure.update_yaxes(rangemode="tozero")
        charts.append(_chart(figure, caption))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _thinned(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The columns of points [N, 2], or of their means over POINTS ranges."""
    ranges = np.array_split(points, POINTS) if len(points) > POINTS else [points[n : n + 1] for n in range(len(points))]
    means = np.array([points_of_range.mean(axis=0) for points_of_range in ranges])
    return means[:, 0], means[:, 1]


def _predictions(run: int, by_target: Mapping[TargetName, TargetPredictions]) -> str:
    """A chart for each entry of each target: true against predicted bins, classes or values."""
    content = []
    for name, predicted in by_target.items():
        target = TARGETS[name]
        chart = _scatter if target.loss == "regression" else _confusion
        charts = "".join(chart(run, target, predicted, (row, column)) for row, column in np.ndindex(*target.shape))
        content.append(f'<h3>{name}</h3><p>{len(predicted.true)} pairs.</p><div class="charts three">{charts}</div>')
    return "".join(content)


def _confusion(run: int, target: Target, predicted: TargetPredictions, entry: tuple[int, int]) -> str:
    (row, column), n_bins = entry, predicted.n_bins
    counts = confusion(predicted)[row, column]
    bins = torch.arange(n_bins)[:, None, None].expand(n_bins, *target.shape)
    names = target.classes or bin_centers(bins, n_bins, target)[:, row, column].tolist()
    gap = 2 if n_bins <= 16 else 0
    color = RUN_COLORS[run % len(RUN_COLORS)]
    totals = counts.sum(axis=1, keepdims=True)
    number = "" if target.classes else ":.3g"
    figure = go.Figure(
        go.Heatmap(
            x=names,
            y=names,
            z=np.where(totals > 0, counts / np.maximum(totals, 1), np.nan),
            customdata=counts,
            zmin=0,
            zmax=1,
            colorscale=[[0, f"{color}26"], [1, color]],
            showscale=False,
            xgap=gap,
            ygap=gap,
            hovertemplate=f"true %{{y{number}}}, predicted %{{x{number}}}:"
            "<br>%{z:.0%} (%{customdata} pairs)<extra></extra>",
            hoverlabel={"bgcolor": color},
        )
    )
    figure.update_xaxes(title="predicted", showgrid=False, ticks="outside", tickangle=0)
    figure.update_yaxes(title="true", showgrid=False, ticks="outside")
    right = np.trace(counts) / max(counts.sum(), 1)
    return _chart(figure, f"{target.entries[row][column]}: {right:.0%} correct")


def _scatter(run: int, target: Target, predicted: TargetPredictions, entry: tuple[int, int]) -> str:
    row, column = entry
    true, values = (x[:POINTS, row, column] for x in (predicted.true, predicted.predicted))
    color = RUN_COLORS[run % len(RUN_COLORS)]
    figure = go.Figure(
        go.Scatter(
            x=values,
            y=true,
            mode="markers",
            cliponaxis=False,
            marker={"color": color, "size": 4, "opacity": 0.5},
            hovertemplate="true %{y:.3g}, predicted %{x:.3g}<extra></extra>",
            hoverlabel={"bgcolor": color},
        )
    )
    figure.update_xaxes(title="predicted")
    figure.update_yaxes(title="true")
    return _chart(figure, f"{target.entries[row][column]}: R2 {r2(predicted)[row, column]:.2f}")


# --- Pictures ---


def _picture(picture: Image.Image, description: str) -> str:
    """An image element with an embedded picture; small ones are shown with visible pixels."""
    content = base64.b64encode(png(picture)).decode()
    small = ' class="pixels"' if max(picture.size) < 100 else ""
    return (
        f'<img{small} src="data:image/png;base64,{content}" width="{picture.width}" height="{picture.height}" '
        f'alt="{_safe(description)}">'
    )


def _views(examples: Sequence[Example]) -> str:
    rows = []
    for example in examples:
        figures = []
        for panel in panels(example):
            words = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(value)}</dd>" for name, value in panel.words)
            color = f' style="color:{panel.color}"' if panel.color else ""
            figures.append(
                f"<figure><figcaption{color}>{_safe(panel.heading)}</figcaption>"
                f"{_picture(panel.image, f'{panel.heading}: {example.title}')}<dl>{words}</dl></figure>"
            )
        rows.append(f'<div class="panels">{"".join(figures)}</div>')
    return "".join(rows)


def _neighbors(rows: Sequence[Neighbors]) -> str:
    lines = []
    for row in rows:
        figures = [f'<figure class="query">{_thumbnail(row.image, row.name)}<figcaption>{_safe(row.name)}</figcaption>']
        for picture, name, similarity in row.nearest:
            same = ' class="same"' if name == row.name else ""
            figures.append(
                f"<figure{same}>{_thumbnail(picture, name)}<figcaption>{_safe(name)} <small>{similarity:.2f}</small>"
                f"</figcaption>"
            )
        lines.append(f'<div class="neighbors">{"</figure>".join(figures)}</figure></div>')
    return f'<div class="scroll">{"".join(lines)}</div>' if lines else ""


def _thumbnail(picture: Image.Image, name: str) -> str:
    small = picture.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return _picture(small, name)
