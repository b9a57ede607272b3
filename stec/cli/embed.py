"""Write an encoder's features of all images of a split to a file."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from pipelines.errors import UserError
from stec.cli.encoder import EncoderConfig, read_encoder
from stec.cli.flags import parse
from stec.cli.outputs import check_place

if TYPE_CHECKING:
    from pipelines.datasets.images import ImageFiles

GOING_ON = "the same command goes on from the parts that are done"
STOPPED = 143
"""Exit code after SIGTERM, as a shell gives it: the features are not complete."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(EncoderConfig):
    """Write an encoder's features of all images of a split to a file. Stopped, the same command goes on."""

    out: tyro.conf.Positional[Path]
    """File to write: .safetensors, or .npy to map into memory; labels, ids and names stand in it or beside it."""
    split: Literal["train", "labeled", "test"] = "test"
    """train: what pre-training sees; labeled: what classifiers are fitted to (the same, but for STL-10); test."""

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of its range."""
        super().validate()
        if self.out.suffix not in (".safetensors", ".npy"):
            raise UserError(f"{self.out} must end in .safetensors or .npy, the formats that are written.")
        check_place(self.out, inputs=(self.ckpt_path,))


def run(arguments: list[str]) -> None:
    """Write an encoder's features of all images of a split to a file."""
    config = parse(EmbedConfig, arguments, name="embed")
    config.validate()

    from stec.training import stops

    with stops.immediately(STOPPED, GOING_ON):
        embed_split(config)


def embed_split(config: EmbedConfig) -> None:
    """From a configuration to the file."""
    from pipelines.datasets.fingerprint import fingerprint
    from pipelines.datasets.images import ImageFiles
    from pipelines.datasets.registry import open_split
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
                config.data_dir,
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
            "width": trained.width,
            "trained_on": trained_on,
            "view_size": loader.size,
            "backend": loader.backend,
            "batch_size": config.batch_size,
            "precision": precision,
        }
        if processes.on_main_process(accelerator, lambda: is_complete(config.out, about)):
            console.say(f"{config.out} is complete already.")
            return
        files = images if isinstance(images, ImageFiles) else None
        encoder.to(accelerator.device)
        started = time.perf_counter()
        with failures.shared(GOING_ON):
            count = embed(
                encoder,
                loader,
                config.out,
                about,
                accelerator=accelerator,
                known_bad=files.faults if files else {},
                name_of=partial(_name_below, files) if files else None,
                progress=progress,
                say=lambda text: print(text, file=sys.stderr),
            )
    seconds = time.perf_counter() - started
    left_out = f", {len(images) - count} bad ones left out" if count < len(images) else ""
    console.say(f"{config.out}: {count} x {encoder.feature_dim} features in {seconds:.1f} s{left_out}")
    accelerator.end_training()


def _name_below(images: ImageFiles, image_id: int) -> str:
    """An image's path, or shard and member, below the split's folder."""
    return images.name(image_id).removeprefix(f"{images.root}/")
