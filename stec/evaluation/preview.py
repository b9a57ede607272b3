"""Pictures of commands: the source image with both crop boxes, the views, the values in words, and predictions."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.commands import Commands
from stec.config import TargetName
from stec.evaluation.predictions import TargetPredictions, crop_boxes, overlap
from stec.geometry import Convention, window_matrices, windows_of
from stec.targets import TARGETS

PANEL_PX = 288
"""Height and width of a panel: a multiple of 32, 96 and 144."""
COLORS = {"i": "#1769c4", "j": "#e07a00", "predicted": "#b5179e"}
"""Colors of view i, view j, and the predicted crop box of view j."""
NAMES = "ij"
JITTER = ("brightness", "contrast", "saturation", "hue_turns")

NO_BREAK = "\u00a0"

_PAPER, _INK, _FAINT = "#ffffff", "#1b1f24", "#6a737d"
_MARGIN, _GAP, _LINE, _SIZE = 36, 24, 20, 15
_NAME_WIDTH = 66
_WIDE = {"i": 6, "j": 4, "predicted": 4}
"""Widths of outlines: that of view i is wider, so that it is visible if both are the same."""
_ROOM = 0.14
"""Fraction of a panel's width on each side, for predicted crop boxes that extend beyond the image."""

Words = tuple[tuple[str, str], ...]
"""Names and values."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image as training sees it."""

    title: str
    source: Image.Image
    """The whole image, in RGB."""
    views: NDArray[np.uint8]
    """[V, H, W, 3]: views i and j, or the only one."""
    commands: Commands
    """Of this image alone: arrays are [1, V]."""
    predictions: Mapping[TargetName, TargetPredictions] | None = None
    """Predictions of an inverse model for this pair, by target."""
    convention: Convention = "official"
    """Of the predicted commands."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A picture with a table of words."""

    heading: str
    color: str | None
    """Color of the heading; None is the default."""
    image: Image.Image
    """PANEL_PX high and wide, RGBA: transparent where there is nothing."""
    words: Words


def panels(example: Example) -> list[Panel]:
    """The source with the crop boxes of the views, each view, and with predictions the predicted crop box."""
    source, commands = example.source, example.commands
    windows, flips = windows_of(window_matrices(commands)[0])
    canvas = _Canvas(source)
    canvas.windows({NAMES[v]: (window, bool(flips[v])) for v, window in enumerate(windows)})
    facts = (("image", example.title), ("size", f"{source.width} x {source.height} px"))
    shown = [Panel(heading="source", color=None, image=canvas.image, words=facts)]
    for v, view in enumerate(example.views):
        shown.append(
            Panel(
                heading=f"view {NAMES[v]}",
                color=COLORS[NAMES[v]],
                image=_Canvas(Image.fromarray(view)).image,
                words=in_words(commands, v),
            )
        )
    if example.predictions is not None:
        canvas = _Canvas(source, room=_ROOM, dim=0.5)
        outlines = {"i": (windows[0], bool(flips[0])), "j": (windows[1], bool(flips[1]))}
        words: Words = ()
        if "window" in example.predictions:
            of_window = example.predictions["window"]
            boxes = crop_boxes(of_window.predicted_bins, of_window.n_bins, commands, example.convention)
            best = crop_boxes(of_window.true_bins, of_window.n_bins, commands, example.convention)
            outlines["predicted"] = boxes.windows[0], bool(boxes.flips[0])
            words = _error_in_words(example, *outlines["j"], *outlines["predicted"], best.windows[0], of_window)
        canvas.windows(outlines)
        for name, of_target in example.predictions.items():
            if name != "window":
                words += _target_in_words(name, of_target)
        shown.append(Panel(heading="view j, as predicted", color=COLORS["predicted"], image=canvas.image, words=words))
    return shown


def in_words(commands: Commands, v: int) -> Words:
    """The executed command of view ``v`` of the first image of ``commands``."""

    def value(name: str) -> float:
        return float(getattr(commands, name)[0, v])

    fraction = value("width") * value("height") / (value("source_width") * value("source_height"))
    box = f"{_window(value('left'), value('top'), value('width'), value('height'))}, {fraction:.0%} of the image"
    steps = [
        f"hue {value(name):+.3f} turns" if name == "hue_turns" else f"{name} x {value(name):.2f}"
        for name in (JITTER[kind] for kind in commands.order[0, v])
    ]
    jitter = ", then ".join(step.replace(" ", NO_BREAK) for step in steps)
    return (
        ("crop box", box),
        ("flip", "left to right" if commands.flip[0, v] else "no"),
        ("jitter", jitter if commands.jitter[0, v] else "no"),
        ("gray", "yes" if commands.gray[0, v] else "no"),
        ("blur", f"sigma {value('sigma_px'):.2f} px" if commands.blur[0, v] else "no"),
        ("solarize", "yes" if commands.solarize[0, v] else "no"),
    )


def _target_in_words(name: TargetName, predicted: TargetPredictions) -> Words:
    """The predicted entries of a target beside the true ones, of the first pair."""
    target = TARGETS[name]
    if target.loss == "classes":
        said, true = (target.classes[int(values[0, 0, 0])] for values in (predicted.predicted, predicted.true))
        return ((name, said if said == true else f"{said}, wrong: {true}"),)
    entries = [
        f"{entry} {said:+.2f} ({true:+.2f})".replace(" ", NO_BREAK)
        for entries, rows in zip(target.entries, zip(predicted.predicted[0], predicted.true[0]))
        for entry, said, true in zip(entries, *rows)
    ]
    note = "" if predicted.valid[0] else ", not in training"
    return ((name, ", ".join(entries) + note),)


def _error_in_words(
    example: Example,
    true: NDArray[np.float64],
    flipped: bool,
    predicted: NDArray[np.float64],
    predicted_flip: bool,
    best: NDArray[np.float64],
    of_window: TargetPredictions,
) -> Words:
    """The difference between the predicted and the true crop box of view j; ``best`` follows from the true bins."""
    height, width = example.source.height, example.source.width
    pixels = np.array([width, height, width, height])
    x, y = (predicted[:2] + predicted[2:] / 2 - true[:2] - true[2:] / 2) * pixels[:2]
    ratio = predicted[2:] / true[2:]
    right = int((of_window.true_bins[0] == of_window.predicted_bins[0]).sum())
    words = [
        ("crop box", _window(*(predicted * pixels).round().tolist())),
        (
            "center",
            f"{abs(x):.1f} px too far {'right' if x > 0 else 'left'}, {abs(y):.1f} px {'down' if y > 0 else 'up'}",
        ),
        ("size", f"width x {ratio[0]:.2f}, height x {ratio[1]:.2f} of the true one"),
        (
            "flip",
            ("left to right" if predicted_flip else "no") + ("" if predicted_flip == flipped else ", wrong"),
        ),
        ("overlap", f"{overlap(predicted, true):.0%} of the union ({overlap(best, true):.0%} with all bins correct)"),
        ("bins", f"{right} of 6 correct"),
    ]
    if example.commands.solarize.any():
        words.append(("note", "solarized pairs are excluded from training"))
    return tuple(words)


def _window(left: float, top: float, width: float, height: float) -> str:
    return f"{width:.0f} x {height:.0f} px at left {left:.0f}, top {top:.0f}"


class _Canvas:
    """A square with an image as large as possible, and ``room`` around it (a fraction of the side)."""

    def __init__(self, picture: Image.Image, *, room: float = 0.0, dim: float = 0.0) -> None:
        self.image = Image.new("RGBA", (PANEL_PX, PANEL_PX))
        side = PANEL_PX * (1 - 2 * room)
        scale = side / max(picture.size)
        self.size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        self.corner = (PANEL_PX - self.size[0]) // 2, (PANEL_PX - self.size[1]) // 2
        # Small images are shown with visible pixels.
        filtering = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
        shown = picture.resize(self.size, filtering)
        if dim:
            shown = Image.blend(shown, Image.new("RGB", self.size, "white"), dim)
        self.image.paste(shown, self.corner)
        self.draw = ImageDraw.Draw(self.image)

    def windows(self, windows: dict[str, tuple[NDArray[np.float64], bool]]) -> None:
        """Draw crop boxes (left, top, width, height, as fractions of the image; whether flipped), by their names."""
        boxes = {name: self._box(window, name) for name, (window, _) in windows.items()}
        for name, box in boxes.items():
            if name == "predicted":
                self._dashes(box, COLORS[name])
            else:
                self.draw.rectangle(box, outline=COLORS[name], width=_WIDE[name])
        for name, (_, flipped) in windows.items():
            self._tag(boxes[name], name, flipped)

    def _box(self, window: NDArray[np.float64], name: str) -> tuple[int, int, int, int]:
        """The first and the last pixel of a crop box; its lines are drawn inside."""
        x, y = (
            [self.corner[k] + round(float(share) * self.size[k]) for share in (window[k], window[k] + window[k + 2])]
            for k in (0, 1)
        )
        smallest = 2 * _WIDE[name]
        return x[0], y[0], max(x[1], x[0] + smallest) - 1, max(y[1], y[0] + smallest) - 1

    def _dashes(self, box: tuple[int, int, int, int], color: str) -> None:
        left, top, right, bottom = box
        wide = _WIDE["predicted"]
        self.draw.rectangle(box, outline="white", width=wide)
        dash = 10
        for x in range(left, right + 1, 2 * dash):
            end = min(x + dash, right)
            self.draw.rectangle((x, top, end, top + wide - 1), fill=color)
            self.draw.rectangle((x, bottom - wide + 1, end, bottom), fill=color)
        for y in range(top, bottom + 1, 2 * dash):
            end = min(y + dash, bottom)
            self.draw.rectangle((left, y, left + wide - 1, end), fill=color)
            self.draw.rectangle((right - wide + 1, y, right, end), fill=color)

    def _tag(self, box: tuple[int, int, int, int], name: str, flipped: bool) -> None:
        """The name of view i is in the upper left corner of its crop box, the name of view j in the lower right of
        its own, the name of the predicted one above the upper right; a double arrow marks a flipped view."""
        font = ImageFont.load_default(14)
        text = round(font.getlength(name))
        width, height = text + 12 + (24 if flipped else 0), 20
        left = box[0] if name == "i" else box[2] - width + 1
        top = {"i": box[1], "j": box[3] - height + 1, "predicted": box[1] - height}[name]
        left = min(max(left, 0), PANEL_PX - width)
        top = min(max(top, 0), PANEL_PX - height)
        self.draw.rectangle((left, top, left + width - 1, top + height - 1), fill=COLORS[name])
        self.draw.text((left + 6, top + height / 2), name, fill="white", font=font, anchor="lm")
        if flipped:
            middle, start = top + height // 2, left + text + 10
            self.draw.polygon([(start, middle), (start + 7, middle - 5), (start + 7, middle + 5)], fill="white")
            self.draw.polygon([(start + 18, middle), (start + 11, middle - 5), (start + 11, middle + 5)], fill="white")


def sheet(title: str, subtitle: str, examples: Sequence[Example]) -> Image.Image:
    """An RGB picture with a title and one row of panels per example."""
    rows = [panels(example) for example in examples]
    large, small, bold = (ImageFont.load_default(size) for size in (26, _SIZE, 18))
    wrapped = [[_wrap(panel.words, small) for panel in row] for row in rows]
    heights = [_LINE + 14 + PANEL_PX + 10 + _LINE * max(map(len, texts)) + _GAP for texts in wrapped]
    top = _MARGIN + 44 + 36
    width = 2 * _MARGIN + len(rows[0]) * (PANEL_PX + _GAP) - _GAP
    picture = Image.new("RGB", (width, top + sum(heights) + _MARGIN - _GAP), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=large)
    draw.text((_MARGIN, _MARGIN + 38), subtitle, fill=_FAINT, font=small)
    for row, texts, height in zip(rows, wrapped, heights):
        for k, (panel, lines) in enumerate(zip(row, texts)):
            left = _MARGIN + k * (PANEL_PX + _GAP)
            draw.text((left, top), panel.heading, fill=panel.color or _INK, font=bold)
            picture.paste(panel.image, (left, top + _LINE + 8), panel.image)
            below = top + _LINE + 8 + PANEL_PX + 12
            for n, (name, text) in enumerate(lines):
                draw.text((left, below + n * _LINE), name, fill=_FAINT, font=small)
                draw.text((left + _NAME_WIDTH, below + n * _LINE), text, fill=_INK, font=small)
        top += height
    return picture


def png(picture: Image.Image) -> bytes:
    """The picture encoded as PNG."""
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def _wrap(words: Words, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[tuple[str, str]]:
    """Lines of name and text that fit into a panel; a name is given in its first line only."""
    lines = []
    for name, value in words:
        line = ""
        for word in value.split(" "):
            longer = f"{line} {word}".strip(" ")
            if line and font.getlength(longer.replace(NO_BREAK, " ")) > PANEL_PX - _NAME_WIDTH:
                lines.append((name, line))
                name, longer = "", word
            line = longer
        lines.append((name, line))
    # The font lacks this space.
    return [(name, line.replace(NO_BREAK, " ")) for name, line in lines]
