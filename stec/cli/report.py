"""``launch.py report``: runs side by side on one HTML page: curves, results, settings, views and predictions."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from pipelines.datasets.urls import RemoteFolder
from pipelines.errors import UserError
from stec.cli.flags import parse
from stec.cli.outputs import check_output
from stec.config import TrainConfig
from stec.settings import check_ranges, setting

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pipelines.datasets.registry import DataSet
    from stec.evaluation.report import Look, Neighbors
    from stec.models.model import Model
    from stec.objectives.inverse import EfferenceCopy
    from stec.runs.run_record import RunRecord

BATCH_SIZE = 64
EXAMPLES, QUERIES, NEIGHBORS = 3, 6, 5


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write an HTML page that shows runs side by side, also unfinished ones."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path = Path("report.html")
    """Page to write."""
    images: int = setting(1024, at_least=1)
    """Number of pairs of training views for the predictions, and of images among which neighbors are searched."""
    data_dir: Path | RemoteFolder | None = None
    """Folder or URL that holds the data set, if it has moved."""

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of its range."""
        if not self.runs:
            raise UserError("launch.py report needs the folder of a run: launch.py report RUN [RUN ...].")
        check_ranges(self)
        check_output(self.out, "--out", suffixes=(".html", ".htm"), inputs=self.runs)
        if importlib.util.find_spec("plotly") is None:
            raise UserError("launch.py report needs plotly, which is not installed; run pip install plotly.")


def run(arguments: list[str]) -> None:
    """Write a page that shows runs side by side."""
    config = parse(ReportConfig, arguments, name="report")
    config.validate()

    from pipelines.files import atomic_write
    from stec.runs.run_record import read_run
    from stec.startup import start

    records = [read_run(path) for path in config.runs]
    accelerator, console, _ = start("no")

    from stec.evaluation.report import report

    looks = []
    for record in records:
        with console.waiting(f"reading {record.path}"):
            looks.append(look_into(record, config, accelerator))
        for remark in (*record.remarks, *looks[-1].remarks):
            console.say(f"{record.path}: {remark}")
    if accelerator.is_main_process:
        # File names may be invalid Unicode.
        atomic_write(config.out, report(records, looks).encode(errors="replace"))
    console.say(f"The report is in {config.out.resolve()}")
    accelerator.end_training()


def look_into(record: RunRecord, wanted: ReportConfig, accelerator: Accelerator) -> Look:
    """Views, predictions and neighbors of a run, as far as its model and data are available."""
    from pipelines.datasets.registry import open_data_set
    from stec.evaluation.examples import examples
    from stec.evaluation.predictions import efference_copy, predictions_of_batches
    from stec.evaluation.report import Look
    from stec.loaders import training_loader
    from stec.weights.pretrained import read_trained

    look = Look()
    if record.config is None:
        return look
    settings = record.config.updated(data_dir=wanted.data_dir or record.config.data.data_dir, accumulate=1)
    model: tuple[Model, EfferenceCopy] | None = None
    try:
        if record.weights is not None:
            trained = read_trained(
                record.weights, otherwise=settings.traits.stem, stem_set_by="the dataset in config.json"
            )
            of_run = trained.model("inverse_models").to(accelerator.device)
            convention = trained.convention or settings.objective.affine
            model = of_run, efference_copy(of_run, convention, settings.traits.jitter_strength)
        else:
            look.remarks.append("There are no weights yet: predictions and neighbors are omitted.")
    except UserError as error:
        look.remarks.append(f"{error} Predictions and neighbors are omitted.")
    try:
        data_set = open_data_set(
            settings.data.dataset,
            settings.data.location,
            limit_train=settings.data.limit_train,
            exif_orientation=bool(settings.data.exif_orientation),
        )
        batch_size = min(BATCH_SIZE, len(data_set.train), wanted.images)
        one_by_one, batches = (
            training_loader(settings.updated(batch_size=size), data_set, device=accelerator.device, precision="no")
            for size in (1, batch_size)
        )
        for loader in (one_by_one, batches):
            loader.sampler.bad.know(record.path / "bad-images.tsv")
        inverse = model if model is not None and len(model[0].inverse_models) else None
        look.examples = examples(
            one_by_one, epoch=0, position=0, count=EXAMPLES, classes=data_set.classes, inverse=inverse
        )
        if inverse is not None:
            steps = min(batches.steps_per_epoch, wanted.images // batch_size)
            of_steps = itertools.islice(batches.batches(0), steps)
            look.predictions = predictions_of_batches(inverse[0], of_steps, inverse[1])
        elif model is not None:
            look.remarks.append("The run has no inverse model, so there are no predictions.")
        if model is not None:
            look.neighbors = neighbors(model[0], settings, data_set, wanted.images, accelerator)
            if not look.neighbors:
                look.remarks.append("The data set has no test images, so there are no neighbors.")
    except UserError as error:
        look.remarks.append(f"The data cannot be shown: {error}")
    return look


def neighbors(
    model: Model, settings: TrainConfig, data_set: DataSet, limit: int, accelerator: Accelerator
) -> list[Neighbors]:
    """Some test images, each with its nearest among at most ``limit`` labeled images."""
    from stec.evaluation.evaluate import evenly_spread, extract_features, nearest
    from stec.evaluation.report import Neighbors
    from stec.loaders import evaluation_loader

    if data_set.test is None or data_set.labeled is None:
        return []
    loader_of = partial(
        evaluation_loader,
        data=settings.data,
        traits=settings.traits,
        batch_size=BATCH_SIZE,
        device=accelerator.device,
    )
    bank_ids = evenly_spread(len(data_set.labeled), limit)
    query_ids = evenly_spread(len(data_set.test), QUERIES)
    bank, queries = (
        extract_features(model.encoder, loader_of(images), accelerator, image_ids)
        for images, image_ids in ((data_set.labeled, bank_ids), (data_set.test, query_ids))
    )
    similarity, rows = nearest(bank, queries, NEIGHBORS, accelerator.device)
    rows_of_page = []
    for n, image_id in enumerate(query_ids.tolist()):
        rows_of_page.append(
            Neighbors(
                image=data_set.test.open(image_id),
                name=data_set.classes[int(queries.labels[n])],
                nearest=[
                    (data_set.labeled.open(int(bank_ids[row])), data_set.classes[int(bank.labels[row])], float(value))
                    for row, value in zip(rows[n].tolist(), similarity[n])
                ],
            )
        )
    return rows_of_page
