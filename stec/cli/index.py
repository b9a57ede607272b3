"""Index every split of a data set of image files or shards, and tell what it holds and which images are bad."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from stec.cli.flags import parse
from stec.cli.outputs import check_place
from stec.distributed.launcher import is_main_process
from stec.settings import Switch

if TYPE_CHECKING:
    from pipelines.datasets.cache import Split


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Index a data set of image files or tar shards, and tell what it holds and which images are bad."""

    data_dir: tyro.conf.Positional[Path]
    """Folder that holds train and val, or images."""
    verify: Literal["headers", "full"] = "headers"
    """full: decode every image, and write the list of bad ones."""
    exif_orientation: Switch = 0
    """1: sizes of images that are turned upright, as training takes them with the same flag."""
    bad: Path = Path("bad-images.tsv")
    """With --verify full: where that list goes, a line of name, tab, reason for each bad image."""


def run(arguments: list[str]) -> None:
    """Index every split of a data set of image files or shards, and tell what it holds and which images are bad."""
    config = parse(IndexConfig, arguments, name="index")
    check_place(config.bad, "--bad")

    from pipelines.datasets.cache import cache_file
    from pipelines.datasets.index import check_classes, check_labels, splits_below, turned
    from pipelines.datasets.remarks import remarks
    from pipelines.files import atomic_write
    from pipelines.splits import read_split, verified
    from stec.console import Console

    console = Console(enabled=is_main_process())
    splits: dict[str, Split] = {}
    facts = []
    with console.counting() as progress:
        for name, (root, kind) in splits_below(config.data_dir).items():
            started = time.perf_counter()
            split = read_split(root, kind, progress, check_files=True)
            if config.verify == "full":
                split = verified(split, progress)
            split = turned(split, bool(config.exif_orientation))
            check_labels(split)
            if name == "train":
                check_classes(split)
            kept = cache_file(root, kind)
            facts.append(
                {
                    **index_facts(split),
                    "seconds": f"{time.perf_counter() - started:.1f}",
                    "index": str(kept) if kept.exists() else f"{kept} could not be written",
                }
            )
            splits[name] = split
    rows = [[fact, *(of_split[fact] for of_split in facts)] for fact in facts[0]]
    console.table(f"Index of {config.data_dir}", ["", *splits], rows)
    for split in splits.values():
        for remark in remarks(split):
            console.say(remark)
    bad = [(split.images.name(n), why) for split in splits.values() for n, why in split.images.faults.items()]
    for name, why in bad[:10]:
        console.say(f"Bad image: {name} ({why})")
    if config.verify == "full":
        # A name may hold anything but a zero byte; a line of the list holds one name.
        lines = (f"{name}\t{why}".translate({10: " ", 13: " "}) + "\n" for name, why in bad)
        atomic_write(config.bad, "".join(lines).encode(errors="surrogateescape"))
        console.say(f"{len(bad)} bad images are listed in {config.bad}.")
    elif len(bad) > 10:
        console.say(f"... and {len(bad) - 10} more; --verify full lists them all.")


def index_facts(split: Split) -> dict[str, str]:
    """What ``launch.py index`` tells about a split."""
    import numpy as np

    images = split.images
    good = np.setdiff1d(np.arange(len(images)), list(images.faults))
    odd = good[images.needs_pillow[good]]
    kinds = Counter(Path(images.name(n)).suffix.lower() for n in odd.tolist()).most_common()
    by_area = images.sizes[good][np.argsort(images.sizes[good].prod(axis=1), kind="stable")]
    smallest, median, largest = (f"{height} x {width}" for height, width in by_area[[0, len(by_area) // 2, -1]])
    return {
        "layout": split.layout,
        "images": str(len(images)),
        "classes": str(len(split.classes)) if split.classes else "no labels",
        "bytes": str(images.size_bytes.sum()),
        "smallest image, px": smallest,
        "median image, px": median,
        "largest image, px": largest,
        "decoded by Pillow": ", ".join(f"{count} {kind}" for kind, count in kinds) or "0",
        "bad images": str(len(images.faults)),
    }
