"""``launch.py preview``: a picture of the views of some images as training sees them, with predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from pipelines.errors import UserError
from stec.cli.flags import parse_some
from stec.cli.outputs import check_output
from stec.cli.train import parse_train
from stec.distributed.launcher import is_main_process
from stec.settings import check_ranges, setting
from stec.training.run import title


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Write a picture of the views of some images, with the commands in words; also takes all flags of training."""

    out: tyro.conf.Positional[Path]
    """Picture to write, ending in .png."""
    config: Path | None = None
    """config.json of a run: show what that run trained on."""
    epoch: int = setting(0, at_least=0)
    """Epoch, counted from 0, as in metrics.jsonl."""
    position: int = setting(0, at_least=0)
    """First position in the epoch, counted from 0."""
    count: int = setting(4, at_least=1, at_most=100)
    """Number of images."""
    ckpt_path: Path | None = None
    """Also show the crop box of view j that the inverse model of this run or file predicts."""

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of its range."""
        check_ranges(self)


def run(arguments: list[str]) -> None:
    """Write a picture of the views of some images as training sees them."""
    # After flags of training, which are not known here, it could not be distinguished from their values.
    if not arguments or (arguments[0].startswith("-") and not {"-h", "--help"} & set(arguments)):
        raise UserError("launch.py preview needs the name of the picture first: launch.py preview OUT.png ...")
    config, rest = parse_some(PreviewConfig, arguments, name="preview")
    config.validate()
    settings, _ = parse_train([*(["--config", str(config.config)] if config.config else []), *rest])
    check_output(config.out, suffixes=(".png",), inputs=(settings.data.data_dir,))
    if config.epoch >= settings.optimization.max_epochs:
        raise UserError(
            f"--epoch {config.epoch} is beyond the last one; give 0 to {settings.optimization.max_epochs - 1}."
        )

    import torch

    from pipelines.datasets.registry import open_data_set
    from pipelines.files import atomic_write
    from stec.console import Console
    from stec.evaluation.examples import examples
    from stec.evaluation.predictions import efference_copy
    from stec.evaluation.preview import png, sheet
    from stec.loaders import training_loader
    from stec.runs.run_record import read_run
    from stec.training.precision import resolve_precision
    from stec.weights.pretrained import read_trained

    console = Console(enabled=is_main_process())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inverse = None
    if config.ckpt_path is not None:
        trained = read_trained(config.ckpt_path, otherwise=settings.traits.stem, normalize=settings.model.normalize)
        model = trained.model("inverse_models").to(device)
        convention = trained.convention or settings.objective.affine
        inverse = model, efference_copy(model, convention, settings.traits.jitter_strength)
        if not model.inverse_models:
            raise UserError(
                f"{config.ckpt_path} holds no inverse model (SimCLR, encoders and linear probing have none); give the "
                f"folder or model.safetensors of an S-TEC run, or omit --ckpt_path."
            )
    with console.counting() as progress:
        data_set = open_data_set(
            settings.data.dataset,
            settings.data.location,
            limit_train=settings.data.limit_train,
            exif_orientation=bool(settings.data.exif_orientation),
            progress=progress,
        )
    loader = training_loader(
        settings.updated(batch_size=1, accumulate=1),
        data_set,
        device=device,
        precision=resolve_precision(settings.run.mixed_precision, device) if device.type == "cuda" else "no",
    )
    # A run drops the last, incomplete batch of an epoch.
    positions, where = loader.sampler.epoch_length, ""
    if config.config is not None and (config.config.parent / "starts.jsonl").is_file():
        loader.sampler.bad.know(config.config.parent / "bad-images.tsv")
        batch = (
            read_run(config.config.parent).global_batch_size
            or settings.optimization.batch_size * settings.optimization.accumulate
        )
        positions -= positions % batch
        where = f" · step {config.epoch * (positions // batch) + config.position // batch + 1} of the run"
    if config.position >= positions:
        raise UserError(f"--position {config.position} is beyond the epoch; give 0 to {positions - 1}.")
    shown = examples(
        loader,
        epoch=config.epoch,
        position=config.position,
        count=min(config.count, positions - config.position),
        classes=data_set.classes,
        inverse=inverse,
    )
    picture = sheet(
        f"{title(settings).split(' (')[0]} on {settings.data.dataset}",
        f"epoch {config.epoch}, position {config.position} and on{where} · seed {settings.run.seed} · views of "
        f"{shown[0].views.shape[1]} px, made by {loader.backend}",
        shown,
    )
    if is_main_process():
        atomic_write(config.out, png(picture))
    console.say(f"{len(shown)} image(s) shown in {config.out}")
