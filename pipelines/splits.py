"""The index of a split: files are listed, scanned by several processes, and the result is cached."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from pipelines.cpus import available_cpus
from pipelines.datasets.bad_list import BadList
from pipelines.datasets.cache import PartialIndex, SplitIndex, cache_file, read_cache, write_cache
from pipelines.datasets.headers import ROW_DTYPE, ScanResult
from pipelines.datasets.images import UNLABELED, ImageFiles
from pipelines.datasets.listing import (
    Listing,
    Stamp,
    format_counts,
    list_class_folders,
    list_loose_images,
    read_files,
    stamp,
    stamp_of_image,
)
from pipelines.datasets.parquet import list_parquet, read_row_group
from pipelines.datasets.registry import Progress, no_progress
from pipelines.datasets.remote import find_shards, list_remote
from pipelines.datasets.row_groups import row_group_numbers
from pipelines.datasets.shard_cache import ShardCache
from pipelines.datasets.shards import list_shards, read_shard
from pipelines.datasets.urls import RemoteFolder
from pipelines.errors import BadImage, UserError
from pipelines.worker_process import begin_work

T = TypeVar("T")
R = TypeVar("R")

Kind = Literal["class folders", "loose images", "train", "val"]
"""How to read a folder without shards; ``train`` and ``val`` are a split among Parquet files by their names."""

FILES_PER_CHUNK = 1024
IMAGES_PER_CHUNK = 256
"""For decoding, which takes longer."""
FEW_FILES, FEW_BYTES = 2000, 10**8
"""Fewer are scanned in this process, as starting others takes a second."""


def read_split(
    root: Path | RemoteFolder, kind: Kind, progress: Progress = no_progress, *, check_files: bool = False
) -> SplitIndex:
    """The index of the images below ``root``, from the cache if nothing has changed since it was written.

    A file that was replaced by one of the same name is only detected with ``check_files``, which reads the status of
    every file. Remote shards are listed each time, and fetched once to be scanned. An interrupted scan is continued.
    Images have a fault if they cannot be read now or runs listed them as bad. Raises UserError if a URL cannot be read,
    there are no images, none of them can be read, or layouts are mixed.
    """
    file = cache_file(root, kind)
    shards = find_shards(root, kind) if isinstance(root, RemoteFolder) else None
    folder = shards.folder if shards is not None else root
    assert isinstance(folder, Path)
    index = read_cache(file, folder, shards)
    if index is None or (check_files and _files_changed(index)):
        try:
            listing = list_remote(shards) if shards is not None else list_shards(folder) or list_parquet(folder, kind)
            if listing is None:
                listing = list_class_folders(folder) if kind == "class folders" else list_loose_images(folder)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); make it readable.") from error
        partial_index = PartialIndex(file.with_suffix(".partial"), root, listing)
        try:
            scanned = _scan(folder, listing, partial_index, progress, shards)
            index = _assemble(folder, listing, scanned, shards)
        finally:
            partial_index.close()
        if write_cache(file, index):
            partial_index.delete()
    bad_list = file.with_suffix(".bad.tsv")
    images = replace(index.images, index_file=file, bad_list=bad_list)
    return _with_faults(replace(index, images=images), BadList(bad_list).faults(images))


def verify_split(index: SplitIndex, progress: Progress = no_progress) -> SplitIndex:
    """Decode every image; returns the index with a fault for each that cannot be decoded, and lists them as bad."""
    images = index.images
    assert images.bad_list is not None, "read_split gives every index a list"
    # Faults in the index are those of headers; faults in the list may be outdated or due to a lack of memory.
    listed = BadList(images.bad_list).faults(images)
    unlisted = replace(images, faults={n: reason for n, reason in images.faults.items() if n not in listed})
    chunks = [
        range(first, min(first + IMAGES_PER_CHUNK, len(images))) for first in range(0, len(images), IMAGES_PER_CHUNK)
    ]
    faults: dict[int, str] = {}
    for chunk, faults_in_chunk in zip(chunks, _map(_decode, chunks, in_process=len(chunks) == 1, images=unlisted)):
        faults |= faults_in_chunk
        progress(f"decoding {images.source}", chunk.stop, len(images))
    with suppress(UserError):
        BadList(images.bad_list).rewrite(images, {n: why for n, why in faults.items() if n not in unlisted.faults})
    return _with_faults(replace(index, images=unlisted), faults)


def _files_changed(index: SplitIndex) -> bool:
    images = index.images
    if images.in_shards:  # Shards are watched.
        return False
    stamps = zip(index.changed_ns.tolist(), images.size_bytes.tolist())
    return any(n not in images.faults and stamp(images.path(n)) != before for n, before in enumerate(stamps))


def _with_faults(index: SplitIndex, more: Mapping[int, str]) -> SplitIndex:
    """The index with more faults. Raises UserError if no usable image is left."""
    images = index.images
    faults = dict(sorted({**images.faults, **more}.items()))
    if len(faults) < len(images):
        return replace(index, images=replace(images, faults=faults))
    detail = f" (skipped: {format_counts(index.skipped)})" if index.skipped else ""
    if len(images):
        detail = f"; the first is {images.name(0)} ({faults[0]})"
    raise UserError(f"{images.source} holds no image that can be read{detail}; fetch the data set again.")


def _scan(
    root: Path, listing: Listing, partial_index: PartialIndex, progress: Progress, shards: ShardCache | None
) -> list[ScanResult]:
    """The results of the listing's chunks, in order: a shard each, or FILES_PER_CHUNK files."""
    total = len(listing.files)
    per_chunk = 1 if listing.in_shards else FILES_PER_CHUNK
    chunks = range(0, total, per_chunk)
    missing = [k for k in range(len(chunks)) if k not in partial_index.done]
    scan: Callable[[Any], ScanResult]
    if listing.in_shards:
        noun, scan = "shards", partial(_scan_shard, root, shards)
        in_process = sum(size for _, size in listing.watched.values()) < FEW_BYTES
        numbers: Sequence[int | None] = [None] * total
        if listing.layout == "Parquet":
            noun, numbers = "row groups", row_group_numbers(listing.files)
        tasks: list[Any] = [(os.fsdecode(listing.files[k]), numbers[k]) for k in missing]
    else:
        noun, scan = "images", partial(read_files, root)
        in_process = total < FEW_FILES
        tasks = [[listing.files[n] for n in range(chunks[k], min(chunks[k] + per_chunk, total))] for k in missing]
    done = total - sum(min(per_chunk, total - chunks[k]) for k in missing)
    for k, result in zip(missing, _map(scan, tasks, in_process=in_process)):
        partial_index.add(k, result)
        done += min(per_chunk, total - chunks[k])
        progress(f"indexing {noun} of {root if shards is None else shards.remote}", done, total)
    return [partial_index.done[k] for k in range(len(chunks))]


def _scan_shard(root: Path, shards: ShardCache | None, task: tuple[str, int | None]) -> ScanResult:
    """Scan a tar shard, or a row group of a Parquet file, given its name and its number; a remote one is fetched."""
    name, group = task
    shown = str(root / name) if shards is None else shards.url(name)
    with nullcontext((None, root / name)) if shards is None else shards.opened(name) as (_, path):
        return read_shard(path, shown) if group is None else read_row_group(path, group, shown)


def _assemble(root: Path, listing: Listing, chunks: Sequence[ScanResult], shards: ShardCache | None) -> SplitIndex:
    rows = np.concatenate([np.empty(0, ROW_DTYPE), *(chunk.rows for chunk in chunks)])
    lengths = [len(chunk.rows) for chunk in chunks]
    firsts = (np.cumsum(lengths) - lengths).tolist()
    faults = {first + n: fault for first, chunk in zip(firsts, chunks) for n, fault in chunk.faults.items()}
    if listing.in_shards:
        labels = np.ascontiguousarray(rows["label"])
        file_of = np.repeat(np.arange(len(chunks), dtype=np.int32), lengths)
        classes = tuple(str(k) for k in range(int(labels.max(initial=UNLABELED)) + 1))
        if classes:
            for first, chunk in zip(firsts, chunks):
                if chunk.note and len(chunk.rows) and chunk.rows["label"][-1] == UNLABELED:
                    faults.setdefault(first + len(chunk.rows) - 1, "its shard was cut off before its label")
    else:
        labels, classes = listing.labels, listing.classes
        file_of = np.arange(len(rows), dtype=np.int32)
    images = ImageFiles(
        root=root,
        files=listing.files,
        file_of=file_of,
        offset=np.ascontiguousarray(rows["offset"]),
        size_bytes=np.ascontiguousarray(rows["size_bytes"]),
        sizes=np.stack([rows["height"], rows["width"]], axis=1),
        labels=labels,
        needs_pillow=np.ascontiguousarray(rows["needs_pillow"]),
        orientation=np.ascontiguousarray(rows["orientation"]),
        faults=dict(sorted(faults.items())),
        shards=shards,
    )
    skipped = Counter(listing.skipped)
    for chunk in chunks:
        skipped.update(chunk.skipped)
    return SplitIndex(
        images=images,
        classes=classes,
        layout=listing.layout,
        notes=tuple(chunk.note for chunk in chunks if chunk.note),
        skipped=skipped,
        watched=listing.watched | _stamps_of_faulty(images),
        changed_ns=np.ascontiguousarray(rows["changed_ns"]),
    )


def _stamps_of_faulty(images: ImageFiles) -> dict[str, Stamp]:
    """Stamps of the files with a fault, as repairing a file in place changes no directory."""
    return {images.file_name(image_id): stamp_of_image(images, image_id) for image_id in images.faults}


_images_of_worker: ImageFiles


def _decode(image_ids: Sequence[int]) -> dict[int, str]:
    """Why images cannot be decoded, by image id."""
    faults = {}
    for image_id in image_ids:
        try:
            _images_of_worker.open(image_id)
        except UserError as error:
            faults[image_id] = error.reason if isinstance(error, BadImage) else str(error)
    return faults


def _map(
    function: Callable[[T], R], tasks: Sequence[T], *, in_process: bool, images: ImageFiles | None = None
) -> Iterator[R]:
    """The results of ``function`` in order, computed in this process or by one process per CPU."""
    if in_process:
        _set_images(images)
        yield from map(function, tasks)
        return
    # Fork would copy locks that threads of loaded libraries hold.
    context = multiprocessing.get_context("forkserver")
    try:
        with ProcessPoolExecutor(
            available_cpus(), mp_context=context, initializer=_begin_worker, initargs=(images,)
        ) as pool:
            yield from pool.map(function, tasks)
    except BrokenProcessPool as error:
        raise UserError(
            "A process that read images was killed, perhaps for lack of memory; start again to continue the scan."
        ) from error


def _set_images(images: ImageFiles | None) -> None:
    global _images_of_worker
    if images is not None:
        _images_of_worker = images


def _begin_worker(images: ImageFiles | None) -> None:
    _set_images(images)
    warnings.simplefilter("ignore")
    begin_work()
