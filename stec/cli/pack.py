"""``launch.py pack``: write images of any kind as tar shards, large ones scaled down, and index them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import tyro

from pipelines.cpus import available_cpus
from pipelines.errors import Interrupted, UserError
from stec.cli.flags import parse
from stec.cli.outputs import check_output, write_bad_list
from stec.distributed.launcher import is_main_process
from stec.settings import check_ranges, setting


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Write the images of a folder as tar shards, and index them; a repeated call continues an interrupted one."""

    source: tyro.conf.Positional[Path]
    """Folder of images, class folders, tar shards, Parquet files, or train and val; or of CIFAR or STL-10, unpacked."""
    dest: tyro.conf.Positional[Path]
    """New folder for the shards."""
    max_side: int = setting(0, at_least=0)
    """Scale images whose shorter side is longer, in px, down to it, as JPEG; 0: write all images as they are."""
    quality: int = setting(95, at_least=1, at_most=100)
    """JPEG quality of the images that are scaled down."""
    images_per_shard: int = setting(1000, at_least=1)
    """Images in a shard."""
    num_workers: int = setting(available_cpus(), at_least=1)
    """Threads; default: all cores. The shards do not depend on it."""
    bad: Path = Path("bad-images.tsv")
    """File for the list of images that cannot be used and are left out, a line with name, tab and reason for each."""

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of its range."""
        check_ranges(self)


def run(arguments: list[str]) -> None:
    """Write the images of a folder as tar shards, and index them."""
    config = parse(PackConfig, arguments, name="pack")
    config.validate()
    check_output(config.bad, "--bad")
    source, dest = config.source.resolve(), config.dest.resolve()
    if dest.is_relative_to(source) or source.is_relative_to(dest):
        raise UserError(f"{config.dest} and {config.source} are one in the other; name a folder elsewhere.")
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{config.dest} is a file; name a new folder for the shards.")
    if not dest.parent.is_dir():
        raise UserError(f"{config.dest} cannot be made; give a path in an existing folder.")

    from pipelines.datasets.notes import notes_on_files
    from pipelines.pack import Packer, Packing, open_source
    from pipelines.splits import read_split
    from stec.console import Console

    console = Console(enabled=is_main_process())
    packing = Packing(max_side=config.max_side, quality=config.quality, images_per_shard=config.images_per_shard)
    with console.counting() as progress:
        parts = open_source(config.source, progress)
        packer = Packer(parts, config.dest, packing)
        try:
            packer.write(config.num_workers, progress)
        except KeyboardInterrupt:
            raise Interrupted(
                f"Stopped; {len(packer.missing)} shards are missing. Repeat the command to continue.", exit_code=130
            ) from None
        indexes = {part.name: read_split(config.dest / part.name, part.kind, progress) for part in parts}
    columns = ["", "images", "shards", "classes", "bytes of images"]
    rows = []
    for name, index in indexes.items():
        images = index.images
        numbers = len(images), len(images.files), len(index.classes), int(images.size_bytes.sum())
        rows.append([name or "all images", *map(str, numbers)])
    for note in (*(note for part in parts for note in part.notes), *chain(*map(notes_on_files, indexes.values()))):
        console.say(note)
    console.table(f"Shards in {config.dest}", columns, rows)
    if packer.bad:
        write_bad_list(config.bad, sorted(packer.bad.items()))
        console.say(f"{len(packer.bad)} bad images were left out; they are listed in {config.bad}.")
