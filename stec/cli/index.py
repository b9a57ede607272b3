"""``launch.py index``: index every split of a data set of image files or shards, and print its facts and bad images."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from pipelines.datasets.urls import RemoteFolder
from stec.cli.flags import parse
from stec.cli.outputs import check_output, write_bad_list
from stec.distributed.launcher import is_main_process
from stec.settings import Switch, check_ranges, setting, with_cache

if TYPE_CHECKING:
    from pipelines.datasets.cache import SplitIndex


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Index a data set of image files, tar shards or Parquet files, and print its facts and its bad images."""

    data_dir: tyro.conf.Positional[Path | RemoteFolder]
    """Folder that holds train and val, or images; or the URL of one with shards."""
    cache_dir: Path | None = None
    """Local folder into which shards of a URL are fetched; default: ~/.cache/stec/shards."""
    cache_gb: float = setting(RemoteFolder.cache_gb, above=0)
    """The most that --cache_dir holds, in units of 10^9 bytes."""
    verify: Literal["headers", "full"] = "headers"
    """full: decode every image, and write a list of the bad ones."""
    exif_orientation: Switch = 0
    """1: print sizes of images turned upright, as in training with the same flag."""
    bad: Path = Path("bad-images.tsv")
    """With --verify full: file for the list of bad images, a line with name, tab and reason for each."""


def run(arguments: list[str]) -> None:
    """Index every split of a data set of image files or shards, and print its facts and its bad images."""
    config = parse(IndexConfig, arguments, name="index")
    check_ranges(config)
    check_output(config.bad, "--bad")

    from pipelines.datasets.cache import cache_file
    from pipelines.datasets.image_folders import apply_orientation, check_classes, check_labels, splits_below
    from pipelines.datasets.notes import notes_on
    from pipelines.splits import read_split, verify_split
    from stec.console import Console

    console = Console(enabled=is_main_process())
    splits: dict[str, SplitIndex] = {}
    facts = []
    with console.counting() as progress:
        location = with_cache(config.data_dir, config.cache_dir, config.cache_gb)
        for name, (root, kind) in splits_below(location).items():
            started = time.perf_counter()
            index = read_split(root, kind, progress, check_files=True)
            if config.verify == "full":
                index = verify_split(index, progress)
            index = apply_orientation(index, bool(config.exif_orientation))
            check_labels(index)
            if name == "train":
                check_classes(index)
            file = cache_file(root, kind)
            facts.append(
                {
                    **index_facts(index),
                    "seconds": f"{time.perf_counter() - started:.1f}",
                    "index": str(file) if file.exists() else f"{file} could not be written",
                }
            )
            splits[name] = index
    rows = [[fact, *(of_split[fact] for of_split in facts)] for fact in facts[0]]
    console.table(f"Index of {config.data_dir}", ["", *splits], rows)
    for index in splits.values():
        for note in notes_on(index):
            console.say(note)
    bad = [(index.images.name(n), reason) for index in splits.values() for n, reason in index.images.faults.items()]
    for name, reason in bad[:10]:
        console.say(f"Bad image: {name} ({reason})")
    if config.verify == "full":
        write_bad_list(config.bad, bad)
        console.say(f"{len(bad)} bad images are listed in {config.bad}.")
    elif len(bad) > 10:
        console.say(f"... and {len(bad) - 10} more; --verify full lists them all.")


def index_facts(index: SplitIndex) -> dict[str, str]:
    """Names and values that ``launch.py index`` prints of a split."""
    import numpy as np

    images = index.images
    good = np.setdiff1d(np.arange(len(images)), list(images.faults))
    by_pillow = good[images.needs_pillow[good]]
    kinds = Counter(Path(images.name(n)).suffix.lower() for n in by_pillow.tolist()).most_common()
    by_area = images.sizes[good][np.argsort(images.sizes[good].prod(axis=1), kind="stable")]
    smallest, median, largest = (f"{height} x {width}" for height, width in by_area[[0, len(by_area) // 2, -1]])
    return {
        "layout": index.layout,
        "images": str(len(images)),
        "classes": str(len(index.classes)) if index.classes else "no labels",
        "bytes": str(images.size_bytes.sum()),
        "smallest image, px": smallest,
        "median image, px": median,
        "largest image, px": largest,
        "decoded by Pillow": ", ".join(f"{count} {kind}" for kind, count in kinds) or "0",
        "bad images": str(len(images.faults)),
    }
