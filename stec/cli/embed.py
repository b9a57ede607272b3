"""``launch.py embed``: write the features of all images of a split to a file."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from stec.cli.encoder import EncoderConfig, read_encoder
from stec.cli.flags import parse
from stec.cli.outputs import check_output

if TYPE_CHECKING:
    from pipelines.datasets.images import ImageFiles

HOW_TO_CONTINUE = "the same command continues where it was"
STOPPED = 143
"""Exit code after SIGTERM, as a shell reports it: the features are not complete."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(EncoderConfig):
    """Write the features of all images of a split to a file. If it is stopped, the same command continues."""

    out: tyro.conf.Positional[Path]
    """File to write: .npy, for memory mapping, or .safetensors; labels, ids and names are in it or next to it."""
    split: Literal["train", "labeled", "test"] = "test"
    """train: the images of pre-training; labeled: those of linear probing (the same except for STL-10); test."""

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of its range."""
        super().validate()
        check_output(self.out, suffixes=(".npy", ".safetensors"), inputs=(self.ckpt_path,))


def run(arguments: list[str]) -> None:
    """Write the features of all images of a split to a file."""
    config = parse(EmbedConfig, arguments, name="embed")
    config.validate()

    from stec.training import stops

    with stops.immediately(STOPPED, HOW_TO_CONTINUE):
        embed_split(config)


def embed_split(config: EmbedConfig) -> None:
    """Write the file that the flags describe."""
    from pipelines.datasets.fingerprint import fingerprint
    from pipelines.datasets.images import ImageFiles
    from pipelines.datasets.registry import open_split
    from stec import gpus
    from stec.distributed import failures, processes
    from stec.evaluation.embed import embed, fingerprint_of_weights, is_complete
    from stec.loaders import evaluation_loader
    from stec.startup import start

    accelerator, console, precision = start(config.mixed_precision)

    trained, trained_on = read_encoder(config)
    encoder = trained.encoder
    with console.counting() as progress:
        images, classes = processes.main_process_first(
            accelerator,
            lambda: open_split(
                config.dataset,
                config.location,
                config.split,
                download=bool(config.download) and accelerator.is_main_process,
                exif_orientation=bool(config.exif_orientation),
                progress=progress,
            ),
        )
        loader = evaluation_loader(
            images, config, traits=config.traits, batch_size=config.batch_size, device=accelerator.device
        )
        about = {
            "dataset": config.dataset,
            "split": config.split,
            "classes": list(classes),
            "images": fingerprint(images),
            "weights": fingerprint_of_weights(encoder.state_dict()),
            "arch": trained.arch,
            **({} if trained.width is None else {"width": trained.width}),
            "trained_on": trained_on,
            "view_size": loader.size,
            "backend": loader.backend,
            "batch_size": config.batch_size,
            "precision": precision,
        }
        if trained.normalize != "none":
            about["normalize"] = trained.normalize
        if processes.on_main_process(accelerator, lambda: is_complete(config.out, about)):
            console.say(f"{config.out} is already complete.")
            return
        files = images if isinstance(images, ImageFiles) else None
        encoder.to(accelerator.device)
        started = time.perf_counter()
        with failures.shared(HOW_TO_CONTINUE), gpus.memory_errors(config.batch_size, "give a smaller one"):
            count = embed(
                encoder,
                loader,
                config.out,
                about,
                accelerator=accelerator,
                known_bad=files.faults if files else {},
                name_of=partial(_name_below, files) if files else None,
                progress=progress,
                report=lambda text: print(text, file=sys.stderr),
            )
    seconds = time.perf_counter() - started
    omitted = f", {len(images) - count} bad images omitted" if count < len(images) else ""
    console.say(f"{config.out}: {count} x {encoder.feature_dim} features in {seconds:.1f} s{omitted}")
    accelerator.end_training()


def _name_below(images: ImageFiles, image_id: int) -> str:
    """The path of an image, or its shard and member, below the folder of the split."""
    return images.name(image_id).removeprefix(f"{images.source}/")
