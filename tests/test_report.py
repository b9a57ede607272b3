"""The report of runs, as a browser shows it, and of runs that are unfinished, damaged or hostile."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import launch
from pipelines.datasets import demo
from stec.config import ModelSettings, TargetName, TrainConfig
from stec.evaluation.evaluate import Features, evenly_spread, nearest
from stec.evaluation.predictions import TargetPredictions
from stec.evaluation.report import RUN_COLORS, Look, Neighbors, _thinned, report
from stec.models.model import Model
from stec.runs.run_record import read_run
from stec.targets import TARGETS
from stec.weights.export import write_safetensors
from tests.runs import SMALL_DEMO

pytest.importorskip("plotly")

SETTINGS = TrainConfig().updated(
    width=4,
    manip_hidden_mlp=8,
    manip_lambda=1.0,
    batch_size=16,
    warmup_epochs=0,
    max_epochs=4,
    num_workers=1,
    feat_dim=8,
    hidden_mlp=8,
)


def some_predictions(rng: np.random.Generator, n_bins: int) -> dict[TargetName, TargetPredictions]:
    """Random ones of every target."""
    by_target: dict[TargetName, TargetPredictions] = {}
    for name, target in TARGETS.items():
        shape, outputs = (300, *target.shape), target.outputs(n_bins)
        true, predicted = rng.integers(0, outputs, (2, *shape))
        values = (rng.normal(size=shape) if target.loss == "regression" else true).astype(np.float32)
        by_target[name] = TargetPredictions(
            true=values,
            predicted=values + rng.normal(size=shape).astype(np.float32),
            valid=np.ones(300, np.bool_),
            n_bins=outputs,
            true_bins=true,
            predicted_bins=predicted,
        )
    return by_target


def write_run(folder: Path, *, steps: int = 40, finished: bool = True, **changed: object) -> Path:
    """A run's files as training leaves them, without the training."""
    folder.mkdir()
    settings = SETTINGS.updated(**changed)
    (folder / "config.json").write_text(json.dumps(settings.to_json()))
    (folder / "starts.jsonl").write_text(
        json.dumps({"after_step": 0, "processes": 1, "device": "cpu", "training_images": 256, "stec": "0"}) + "\n"
    )
    lines = []
    for step in range(2, steps + 1, 2):
        lines.append(
            {
                "step": step,
                "epoch": (step - 1) // 16,
                "steps": 2,
                "loss": 9 - step / 10,
                "contrastive_loss": 4 - step / 20,
                "contrastive_accuracy": step / 100,
                "inverse_loss": 1.8 * (settings.objective.manip_lambda > 0),
                "inverse_accuracy": step / 80 * (settings.objective.manip_lambda > 0),
                "classifier_loss": 2.3,
                "classifier_accuracy": 0.1,
                "learning_rate": 0.001,
                "images_per_second": 100.0 + step,
                "wait_fraction": 0.25,
                **({"knn": step / 100, "rankme": step / 2} if step % 16 == 0 else {}),
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "results.json").write_text(json.dumps({"knn20_before": 0.11, "knn20_after": 0.5 + steps / 1000}))
        torch.manual_seed(0)
        model = Model(
            ModelSettings(width=4, feat_dim=8, hidden_mlp=8, manip_hidden_mlp=8),
            stem="cifar",
            classes=10,
            with_inverse_model=settings.objective.manip_lambda > 0,
        )
        write_safetensors(model.state_dict(), folder / "model.safetensors", {"config": settings.identity()})
    return folder


@pytest.fixture(autouse=True)
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "IMAGES", SMALL_DEMO)


# --- What a folder tells ---


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "run", steps=64))
    assert record.remarks == [] and record.progress == "finished, step 64 of 64"
    assert len(record.metrics) == 32 and record.steps_per_epoch == 16
    assert record.weights == tmp_path / "run" / "model.safetensors"


@pytest.mark.parametrize(
    ("file", "content", "remark"),
    [
        ("metrics.jsonl", '{"step": 2, "loss": 1}\n{"step": 4, "lo\n[]\n{"step": "x"}\n{"step": 6, "loss": null}\n',
         "4 of 5 lines of metrics.jsonl are damaged and ignored."),
        ("metrics.jsonl", "", "metrics.jsonl is empty."),
        ("metrics.jsonl", '{"step": 1e999, "loss": 1}\n', "1 of 1 lines of metrics.jsonl are damaged and ignored."),
        ("config.json", '{"batch_size": 16, "color_space": "lab", "zoom": 2}',
         "config.json has settings that this version does not know (color_space, zoom)"),
        ("config.json", '{"batch_size": "many"}',
         "config.json: batch_size is 'many'; give a value of type int. What depends on the settings is omitted."),
        ("config.json", "[]", "config.json holds no JSON object; what depends on it is omitted."),
        ("results.json", "{", "results.json is not valid JSON ("),
        ("results.json", None, "There is no results.json: the run is not finished."),
        ("starts.jsonl", None, "starts.jsonl cannot be read (No such file or directory)."),
        ("starts.jsonl", "\x00\xff", "1 of 1 lines of starts.jsonl are damaged and ignored."),
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_said_and_the_rest_is_shown(
    file: str, content: str | None, remark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "model.safetensors").unlink()
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    record = read_run(folder)
    assert len(record.remarks) == 1 and record.remarks[0].startswith(remark)
    assert remark.split("'")[0] in report([record], [Look()])


def test_lines_that_a_killed_process_left_behind_do_not_count_twice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=6)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1}\n{"step": 6, "loss": 2}\n')
    assert [(line["step"], line["loss"]) for line in read_run(folder).metrics] == [(2, 8.8), (4, 1), (6, 2)]


def test_long_curves_become_means() -> None:
    points = np.stack([np.arange(5000.0), np.arange(5000.0) ** 2], axis=1)
    x, y = _thinned(points)
    assert len(x) == 1000
    np.testing.assert_allclose(x[:2], [2, 7])
    np.testing.assert_allclose(y[0], np.mean([0, 1, 4, 9, 16]))
    x, y = _thinned(points[:3])
    np.testing.assert_array_equal(y, [0, 1, 4])


def test_what_is_measured_once_per_epoch_has_a_point_per_epoch(tmp_path: Path) -> None:
    """kNN in percent, and RankMe as it is."""
    page = report([read_run(write_run(tmp_path / "run", finished=False))], [Look()])
    for caption, values, unit in (("kNN", [0.16, 0.32], "~%"), ("RankMe", [8, 16], None)):
        (drawn,) = re.findall(rf'<figcaption>{caption}.*?<script type="application/json">(.*?)</script>', page)
        figure = json.loads(drawn)
        x, y = (np.frombuffer(base64.b64decode(figure["data"][0][axis]["bdata"])) for axis in "xy")
        assert x.tolist() == [1, 2] and y.tolist() == values
        assert figure["layout"]["yaxis"].get("tickformat") == unit


def test_nearest_by_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (Features(features=torch.randn(n, 5, generator=generator), labels=torch.zeros(n)) for n in (30, 4))
    similarity, rows = nearest(bank, queries, 3, torch.device("cpu"))
    for n, query in enumerate(queries.features.numpy().astype(np.float64)):
        keys = bank.features.numpy().astype(np.float64)
        cosine = keys @ query / np.linalg.norm(keys, axis=1) / np.linalg.norm(query)
        assert rows[n].tolist() == np.argsort(-cosine)[:3].tolist()
        np.testing.assert_allclose(similarity[n], np.sort(cosine)[::-1][:3], rtol=1e-5)
    assert evenly_spread(10, 5).tolist() == [0, 2, 4, 6, 8] and evenly_spread(3, 9).tolist() == [0, 1, 2]


# --- The page ---


class Elements(HTMLParser):
    """Names of the elements of a page, and its texts outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        if self.names and self.names[-1] != "script":
            self.texts.append(data)


HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"


def test_nothing_that_came_from_files_becomes_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / HOSTILE.replace("/", ""))
    settings = json.loads((folder / "config.json").read_text()) | {HOSTILE: HOSTILE, "dataset": HOSTILE}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "starts.jsonl").write_text(json.dumps({"device": HOSTILE, "processes": HOSTILE}) + "\n")
    picture = Image.new("RGB", (32, 32))
    look = Look(
        neighbors=[Neighbors(image=picture, name=HOSTILE, nearest=[(picture, HOSTILE, 0.5)])], remarks=[HOSTILE]
    )
    made = Elements(report([read_run(folder)], [look]))
    assert made.names.count("img") == 2 and not [name for name, _ in made.attributes if name == "onerror"]
    assert sum(HOSTILE in text for text in made.texts) >= 4


def test_mistakes_are_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    (tmp_path / "no run").mkdir()
    for arguments, sentence in [
        ([str(tmp_path / "no run")], f"{tmp_path / 'no run'} is no run"),
        ([str(folder), str(tmp_path / "absent")], f"{tmp_path / 'absent'} is no run"),
        ([], "needs the folder of a run"),
        ([str(folder), "--out", str(tmp_path)], f"--out {tmp_path}"),
        ([str(folder), "--out", str(tmp_path / "nowhere" / "r.html")], "nowhere/r.html"),
        ([str(folder), "--images", "0"], "--images 0 is too small"),
    ]:
        assert launch.main(["report", *arguments]) == 2
        output = capsys.readouterr().err
        assert sentence in output and output.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))


def test_data_that_cannot_be_reached_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", dataset="cifar10", data_dir=tmp_path / "gone")
    out = tmp_path / "report.html"
    assert launch.main(["report", str(folder), "--out", str(out)]) == 0
    assert "The data cannot be shown" in capsys.readouterr().out
    shown = Elements(out.read_text())
    assert "Learning curves" in shown.texts and "kNN" not in shown.texts


# --- In a browser ---

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
).split()


@pytest.fixture(scope="module")
def browser():  # type: ignore[no-untyped-def]
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The report of three runs: S-TEC, SimCLR, and one that has only begun."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "IMAGES", SMALL_DEMO)
    runs = [
        write_run(folder / "stec", steps=64),
        write_run(folder / "simclr", manip_lambda=0.0, seed=5),
        write_run(folder / "a name that is much longer than those of all others, for phones", finished=False),
    ]
    out = folder / "report.html"
    assert launch.main(["report", *map(str, runs), "--out", str(out), "--images", "64"]) == 0
    yield out
    patch.undo()


@pytest.fixture(scope="module")
def crowded_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one run for each color, with long names, a single point, and values of every magnitude."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    records, looks = [], []
    for n in range(len(RUN_COLORS)):
        record = read_run(write_run(folder / f"resnet50-batch-1024-temperature-0.1-and-more-{n}", finished=False))
        record.environment = {}
        record.metrics = [
            {
                "step": 9973 * step,
                "loss": 1e7 / step,
                "contrastive_loss": n + 1,
                "inverse_loss": 1e-7 * step,
                "inverse_accuracy": 1e-4 * rng.random(),
                "learning_rate": 1e-5 / step,
                "images_per_second": 123456 + step,
            }
            for step in range(1, 30 if n else 2)
        ]
        records.append(record)
        bins = (2, 9, 32)[n % 3]
        looks.append(Look(predictions=some_predictions(rng, bins) if n < 3 else {}))
    out = folder / "report.html"
    out.write_text(report(records, looks))
    return out


def opened(browser, file: Path, **options: object):  # type: ignore[no-untyped-def]
    """The page, and what it asked for or complained of."""
    page = browser.new_page(**options)
    events: list[str] = []
    page.on("request", lambda request: events.append(request.url) if not request.url.startswith("data:") else None)
    page.on("console", lambda message: events.append(message.text))
    page.on("pageerror", lambda error: events.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 10")
    return page, events


def test_the_page_needs_nothing_else_and_its_buttons_hide_a_run(browser, page_file: Path) -> None:  # type: ignore[no-untyped-def]
    page, events = opened(browser, page_file)
    headings = page.locator("h2").all_inner_texts()
    assert headings == [
        "Runs", "Results", "Learning curves", "Pace", "Views", "Predictions of the inverse model",
        "kNN", "Settings",
    ]  # fmt: skip
    loss = page.locator("figure", has=page.get_by_text("Loss", exact=True))
    assert loss.locator(".scatterlayer .trace").count() == 3
    cells = page.locator('td[data-of="0"]:visible').count()
    assert cells > 10
    button = page.get_by_role("button", name="stec", exact=True)
    button.click()
    assert loss.locator(".scatterlayer .trace").count() == 2
    assert page.locator('td[data-of="0"]:visible').count() == 0 and button.get_attribute("aria-pressed") == "false"
    button.click()
    assert loss.locator(".scatterlayer .trace").count() == 3
    assert page.locator('td[data-of="0"]:visible').count() == cells
    # Only S-TEC has an inverse model: six entries.
    assert page.locator(".heatmaplayer .hm").count() == 6
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    marked = page.locator("tr.differs th").all_inner_texts()
    assert sorted(marked) == ["manip_lambda", "seed"]
    assert page.locator("td strong").all_inner_texts() == ["56.4%"]
    assert events == [page_file.as_uri()]
    page.close()


def test_dark_scheme(browser, page_file: Path) -> None:  # type: ignore[no-untyped-def]
    page, events = opened(browser, page_file, color_scheme="light")

    def brightness(selector: str, style: str) -> float:
        color = page.locator(selector).first.evaluate(f"(part) => getComputedStyle(part).{style}")
        return sum(map(float, color[4:-1].split(","))) / 3

    def brightnesses() -> list[float]:
        parts = (
            ("body", "backgroundColor"),
            ("section", "backgroundColor"),
            ("body", "color"),
            (".xtick text", "fill"),
        )
        return [brightness(*part) for part in parts]

    paper, card, ink, ticks = brightnesses()
    assert min(paper, card) > 200 and max(ink, ticks) < 130
    page.emulate_media(color_scheme="dark")
    paper, card, ink, ticks = brightnesses()
    assert max(paper, card) < 60 and min(ink, ticks) > 130
    assert events == [page_file.as_uri()]
    page.close()


LAYOUT_FAULTS = """() => {
  const faults = [], box = (part) => part.getBoundingClientRect();
  const beyond = (a, b) => a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
  const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const shown = (parts) => [...parts].filter((part) => part.checkVisibility());
  const overlaps = (parts, what) => parts.forEach((a, n) => parts.slice(0, n).forEach((b) => {
    if (overlap(box(a), box(b))) faults.push(`${what}: ${a.textContent.slice(0, 40)}, ${b.textContent.slice(0, 40)}`);
  }));
  const channels = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  const luminance = (color) => channels(color).reduce((sum, c, n) => sum + c * [.2126, .7152, .0722][n], .05);
  const figures = shown(document.querySelectorAll(".charts figure"));
  for (const figure of figures) {
    const caption = figure.querySelector("figcaption").textContent, drawings = figure.querySelectorAll(".main-svg");
    const fault = (what) => faults.push(`${caption}: ${what}`);
    if (!drawings.length) fault("not drawn");
    if (box(figure).width < 200) fault("too narrow");
    for (const drawing of drawings) {
      if (beyond(box(drawing), box(figure))) fault("beyond its box");
      if (Math.abs(box(drawing).width - box(figure).width) > 1) fault("not as wide as its box");
    }
    const texts = shown(figure.querySelectorAll(".main-svg :not(.hovertext) > text"))
      .filter((text) => text.textContent.trim());
    if (texts.length < 4) fault("without ticks");
    for (const text of texts) if (beyond(box(text), box(drawings[0]))) fault(`${text.textContent} is cut off`);
    overlaps(texts, `texts of ${caption}`);
    for (const point of figure.querySelectorAll(".point")) {
      if (beyond(box(point), box(drawings[0])) || point.closest("[clip-path]")) fault("a point is cut off");
    }
    const card = luminance(getComputedStyle(figure.closest("section")).backgroundColor);
    const stands = (color, least) => {
      const pair = [luminance(color), card];
      if (Math.max(...pair) / Math.min(...pair) < least) fault(`${color} is too faint`);
    };
    for (const text of texts) stands(getComputedStyle(text).fill, 4.5);
    for (const curve of figure.querySelectorAll(".js-line")) stands(getComputedStyle(curve).stroke, 3);
  }
  overlaps(shown(document.querySelectorAll("figure, h2, h3, summary")), "overlap");
  if (document.documentElement.scrollWidth > innerWidth) faults.push("the page scrolls sideways");
  return [figures.length, faults];
}"""


@pytest.mark.parametrize(
    ("pages", "width"),
    [("page_file", 1300), *[("crowded_file", width) for width in (390, 1000, 1300, 1920)]],
)
def test_charts_fit_their_boxes(browser, pages: str, width: int, request: pytest.FixtureRequest) -> None:  # type: ignore[no-untyped-def]
    """As loaded, unfolded, in other windows, and with a run hidden; with texts and curves that can be read."""
    page, events = opened(browser, request.getfixturevalue(pages), viewport={"width": width, "height": 900})

    def drawn() -> int:
        """The number of charts, all of them without fault."""
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            count, faults = page.evaluate(LAYOUT_FAULTS)
            assert faults == []
        return count

    count = drawn()
    page.evaluate("document.querySelectorAll('details').forEach((part) => part.open = true)")
    unfolded = drawn()
    assert unfolded >= count > 6
    for other in (700, 1600):
        page.set_viewport_size({"width": other, "height": 900})
        assert drawn() == unfolded
    button = page.locator("button[data-run]").first
    button.click()
    assert drawn() == unfolded - (6 if pages == "page_file" else 13)  # those of its inverse model
    page.set_viewport_size({"width": 800, "height": 900})
    button.click()
    assert drawn() == unfolded
    assert len(events) == 1
    page.close()


def test_the_name_of_a_long_run_fits_beside_the_pointer(browser, crowded_file: Path) -> None:  # type: ignore[no-untyped-def]
    page, _ = opened(browser, crowded_file, viewport={"width": 390, "height": 900})
    chart = page.locator("figure", has=page.get_by_text("Contrastive loss")).locator(".main-svg").first
    for part in (0.2, 0.5, 0.9):
        area = chart.bounding_box()
        chart.hover(position={"x": area["width"] * part, "y": area["height"] / 2}, force=True)
        label = page.locator(".hovertext")
        label.wait_for()
        inner, outer = label.bounding_box(), chart.bounding_box()
        assert outer["x"] <= inner["x"] and inner["x"] + inner["width"] <= outer["x"] + outer["width"]
        assert re.search(r"resnet50-.*-and-\s*more-\d", label.text_content())
    page.close()


def test_on_a_phone_nothing_reaches_beyond_the_screen(browser, page_file: Path) -> None:  # type: ignore[no-untyped-def]
    page, _ = opened(browser, page_file, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("window.innerWidth") == 390
    # Charts fit, tables scroll.
    widest = page.evaluate("Math.max(...[...document.querySelectorAll('.main-svg')].map((s) => s.clientWidth))")
    assert 250 < widest <= 390
    assert page.evaluate("[...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)")
    # What was folded away when its charts were drawn fits once it is unfolded.
    page.evaluate("document.querySelectorAll('details').forEach((part) => part.open = true)")
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()
