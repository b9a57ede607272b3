"""Which shards are in a remote folder, and what they need of the cache."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipelines.datasets.cache import cache_folder
from pipelines.datasets.images import UNLABELED, ImageFiles, Names
from pipelines.datasets.listing import Listing, format_counts, is_hidden, kind_of
from pipelines.datasets.parquet import SPLIT_NAMES, SUFFIX, count_row_groups, names_of_split
from pipelines.datasets.shard_cache import RemoteShard, ShardCache
from pipelines.datasets.urls import RemoteFolder, attempt, list_files, open_folder, sentence
from pipelines.errors import UserError

REQUESTS = 16
"""Questions for sizes that are asked at a time."""
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "Last-Modified", "updated", "mtime")
"""What entries of fsspec's file systems hold that changes with a file, the best first."""


def shard_names(names: Iterable[str], kind: str) -> list[str]:
    """Those of the names of a folder's files that are shards, sorted as local ones.

    Parquet files count if there is no tar shard; with ``kind`` ``train`` or ``val``, those of that split.
    """
    visible = sorted(name for name in names if not is_hidden(name))
    shards = [name for name in visible if name.lower().endswith(".tar") and kind not in SPLIT_NAMES]
    return shards or names_of_split([name for name in visible if name.lower().endswith(SUFFIX)], kind)


def find_shards(folder: RemoteFolder, kind: str) -> ShardCache:
    """The shards directly in a folder. Raises UserError if there is none, or the cache is smaller than one."""
    entries = list_files(folder)
    names = shard_names(entries, kind)
    if not names:
        but = f", but {format_counts(Counter(map(kind_of, entries)))}" if entries else ""
        raise UserError(
            f"{folder} holds no shards (*.tar, *.parquet){but}; at a URL, images are read from shards, which launch.py "
            f"pack writes."
        )
    files, _ = open_folder(folder)

    def shard(name: str) -> RemoteShard:
        entry = entries[name]
        path = entry["name"]
        if entry.get("size") is None:
            try:
                entry = attempt(lambda: files.info(path))
            except Exception as error:
                raise sentence(folder / name, error) from error
        if entry.get("size") is None:
            raise UserError(f"The server of {folder / name} does not tell its size; use another server.")
        return RemoteShard(path=path, stamp=(_version(entry), int(entry["size"])))

    with ThreadPoolExecutor(REQUESTS) as pool:
        shards = dict(zip(names, pool.map(shard, names)))
    largest = max(shards, key=lambda name: shards[name].stamp[1])
    size = shards[largest].stamp[1]
    if size > folder.cache_bytes:
        raise UserError(
            f"--cache_gb {folder.cache_gb:g} is less than the shard {folder / largest} ({size / 1e9:.3g} GB); give "
            f"{_at_least_gb(size)} or more."
        )
    cache_dir = folder.cache_dir or cache_folder() / "shards"
    cache = ShardCache(remote=folder, folder=cache_dir.absolute(), shards=shards)
    with cache.locked():  # Fails now if it ever does.
        return cache


def list_remote(shards: ShardCache) -> Listing:
    """The listing of shards; Parquet files are fetched for the numbers of their row groups."""
    names = list(shards.shards)
    in_parquet = names[0].lower().endswith(SUFFIX)
    if in_parquet:
        counts = {}
        for name in names:
            with shards.opened(name) as (_, path):
                counts[name] = count_row_groups(path, shards.url(name))
        names = [name for name in names for _ in range(counts[name])]
    return Listing(
        layout="Parquet" if in_parquet else "shards",
        files=Names.of([os.fsencode(name) for name in names]),
        labels=np.full(len(names), UNLABELED, np.int64),
        classes=(),
        watched={name: shard.stamp for name, shard in shards.shards.items()},
        skipped={},
    )


def require_room(images: ImageFiles, shuffle_window: int) -> None:
    """Raise UserError if remote shards that are shuffled together do not fit in the cache (0: all are).

    Each would be fetched again and again.
    """
    if images.shards is None:
        return
    used = {os.fsdecode(images.files[n]) for n in np.unique(images.shard_of).tolist()}
    sizes = sorted((images.shards.shards[name].stamp[1] for name in used), reverse=True)
    # A window of row groups may be one of each file.
    count = len(sizes) if images.in_parquet else shuffle_window or len(sizes)
    needed, folder = sum(sizes[:count]), images.shards.remote
    if needed > folder.cache_bytes:
        remedy = "pack them as tar shards" if images.in_parquet else "a smaller --shuffle_window"
        raise UserError(
            f"--cache_gb {folder.cache_gb:g} is less than the {needed / 1e9:.3g} GB of the {min(count, len(sizes))} "
            f"shards of {folder} that are shuffled together; give --cache_gb {_at_least_gb(needed)}, or {remedy}."
        )


def _at_least_gb(size: int) -> str:
    return f"{-(-size // 10**6) / 1000:g}"


def _version(entry: Mapping[str, Any]) -> int:
    version = next((entry[key] for key in VERSIONS if entry.get(key)), "")
    return int(hashlib.sha256(str(version).encode()).hexdigest()[:13], 16)
