"""The index of a split: its layout is found out, its images are looked at by several processes, the outcome is kept."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from pipelines.datasets.bad_list import BadList
from pipelines.datasets.cache import Partial, Split, cache_file, read_cache, write_cache
from pipelines.datasets.folders import Listing, Stamp, counted, list_class_folders, list_loose_images, read_files, stamp
from pipelines.datasets.headers import Found
from pipelines.datasets.images import UNLABELED, ImageFiles
from pipelines.datasets.shards import list_shards, read_shard
from pipelines.errors import BadImage, UserError
from pipelines.worker_process import begin_work

T = TypeVar("T")
R = TypeVar("R")

Kind = Literal["class folders", "loose images"]
"""What a split is where it holds no shards."""
Progress = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and of how much."""

FILES_PER_CHUNK = 1024
IMAGES_PER_CHUNK = 256
"""For decoding, which takes longer."""
FEW_FILES, FEW_BYTES = 2000, 10**8
"""Less than that is done in this process: starting others takes a second."""


def silent(_what: str, _done: int, _total: int) -> None:
    pass


def read_split(root: Path, kind: Kind, progress: Progress = silent, *, check_files: bool = False) -> Split:
    """The index of the images below ``root``: from the cache, unless something has changed since it was written.

    A file that was replaced by one of the same name goes unnoticed, unless ``check_files`` looks at each. A pass that
    is interrupted goes on where it was. Images that cannot be read have a fault, also those that runs found to be bad
    since. Raises UserError where there are no images, none of them can be read, or two layouts are mixed.
    """
    file = cache_file(root, kind)
    split = read_cache(file, root)
    if split is None or (check_files and _files_changed(split)):
        try:
            listing = list_shards(root)
            if listing is None:
                listing = list_class_folders(root) if kind == "class folders" else list_loose_images(root)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); make it readable.") from error
        so_far = Partial(file.with_suffix(".partial"), root, listing)
        try:
            split = _assembled(root, listing, _look(root, listing, so_far, progress))
        finally:
            so_far.close()
        if write_cache(file, split):
            so_far.delete()
    bad_list = file.with_suffix(".bad.tsv")
    images = replace(split.images, index_file=file, bad_list=bad_list)
    return _with_faults(replace(split, images=images), BadList(bad_list).faults(images))


def verified(split: Split, progress: Progress = silent) -> Split:
    """The index after every image was decoded: those that could not be have faults, also from now on."""
    images = split.images
    firsts = range(0, len(images), IMAGES_PER_CHUNK)
    few = len(images) < IMAGES_PER_CHUNK
    # What the index says of an image is a fault of its header; what is only in the list may have been a mistake.
    assert images.bad_list is not None, "read_split gives every index a list"
    listed = BadList(images.bad_list).faults(images)
    unlisted = replace(images, faults={n: why for n, why in images.faults.items() if n not in listed})
    found: dict[int, str] = {}
    chunks = [range(first, min(first + IMAGES_PER_CHUNK, len(images))) for first in firsts]
    for chunk, of_chunk in zip(chunks, _in_processes(_undecodable, chunks, few=few, images=unlisted)):
        found |= of_chunk
        progress(f"decoding {images.root}", chunk.stop, len(images))
    with suppress(UserError):
        BadList(images.bad_list).rewrite(images, {n: why for n, why in found.items() if n not in unlisted.faults})
    return _with_faults(replace(split, images=unlisted), found)


def _files_changed(split: Split) -> bool:
    images = split.images
    if images.in_shards:  # they are watched
        return False
    known = zip(split.changed_ns.tolist(), images.size_bytes.tolist())
    return any(n not in images.faults and stamp(images.path(n)) != before for n, before in enumerate(known))


def _with_faults(split: Split, more: Mapping[int, str]) -> Split:
    """The split with more faults. Raises UserError where no image is left that can be used."""
    images, left_out = split.images, ""
    faults = dict(sorted({**images.faults, **more}.items()))
    if len(faults) < len(images):
        return replace(split, images=replace(images, faults=faults))
    if split.left_out:
        left_out = f" (left out: {counted(split.left_out)})"
    first = f"; the first is {images.name(0)} ({faults[0]})" if len(images) else left_out
    raise UserError(f"{images.root} holds no image that can be read{first}; fetch the data set again.")


def _look(root: Path, listing: Listing, so_far: Partial, progress: Progress) -> list[Found]:
    """What is found out about each chunk of the listing, in order: a shard, or so many files."""
    total = len(listing.files)
    per_chunk = 1 if listing.layout == "shards" else FILES_PER_CHUNK
    chunks = range(0, total, per_chunk)
    missing = [k for k in range(len(chunks)) if k not in so_far.done]
    work: Callable[[Any], Found]
    if listing.layout == "shards":
        what, work = "shards", read_shard
        few = sum(size for _, size in listing.watched.values()) < FEW_BYTES
        tasks: list[Any] = [root / os.fsdecode(listing.files[chunks[k]]) for k in missing]
    else:
        what, work = "images", partial(read_files, root)
        few = total < FEW_FILES
        tasks = [[listing.files[n] for n in range(chunks[k], min(chunks[k] + per_chunk, total))] for k in missing]
    done = total - sum(min(per_chunk, total - chunks[k]) for k in missing)
    for k, found in zip(missing, _in_processes(work, tasks, few=few)):
        so_far.add(k, found)
        done += min(per_chunk, total - chunks[k])
        progress(f"indexing {what} of {root}", done, total)
    return [so_far.done[k] for k in range(len(chunks))]


def _assembled(root: Path, listing: Listing, chunks: Sequence[Found]) -> Split:
    rows = np.concatenate([found.rows for found in chunks])
    lengths = [len(found.rows) for found in chunks]
    ends = np.cumsum(lengths)
    faults = {
        int(end) - len(found.rows) + n: fault for end, found in zip(ends, chunks) for n, fault in found.faults.items()
    }
    if listing.layout == "shards":
        labels = np.ascontiguousarray(rows["label"])
        file_of = np.repeat(np.arange(len(chunks), dtype=np.int32), lengths)
        classes = tuple(str(k) for k in range(int(labels.max(initial=UNLABELED)) + 1))
        if classes:
            for end, found in zip(ends, chunks):
                if found.remark and len(found.rows) and found.rows["label"][-1] == UNLABELED:
                    faults.setdefault(int(end) - 1, "its shard was cut off before its label")
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
    )
    left_out = Counter(listing.left_out)
    for found in chunks:
        left_out.update(found.left_out)
    return Split(
        images=images,
        classes=classes,
        layout=listing.layout,
        remarks=tuple(found.remark for found in chunks if found.remark),
        left_out=left_out,
        watched=listing.watched | _stamps_of_faulty(images),
        changed_ns=np.ascontiguousarray(rows["changed_ns"]),
    )


def _stamps_of_faulty(images: ImageFiles) -> dict[str, Stamp]:
    """A file that is mended in place changes no directory."""
    paths = {images.path(image_id) for image_id in images.faults}
    return {str(path.relative_to(images.root)): stamp(path) for path in paths}


_images_of_worker: ImageFiles


def _undecodable(image_ids: Sequence[int]) -> dict[int, str]:
    """Which of these images cannot be decoded, and why."""
    faults = {}
    for image_id in image_ids:
        try:
            _images_of_worker.open(image_id)
        except UserError as error:
            faults[image_id] = error.reason if isinstance(error, BadImage) else str(error)
    return faults


def _in_processes(
    work: Callable[[T], R], tasks: Sequence[T], *, few: bool, images: ImageFiles | None = None
) -> Iterator[R]:
    """The results of ``work`` in order, by as many processes as there are CPUs, or in this one."""
    if few:
        _give(images)
        yield from map(work, tasks)
        return
    # Fork would copy the threads' locks of libraries that are loaded by now.
    context = multiprocessing.get_context("forkserver")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with ProcessPoolExecutor(cpus, mp_context=context, initializer=_begin_worker, initargs=(images,)) as pool:
            yield from pool.map(work, tasks)
    except BrokenProcessPool as error:
        raise UserError(
            "A process that looked at images was killed, perhaps for want of memory; start again to go on where it was."
        ) from error


def _give(images: ImageFiles | None) -> None:
    global _images_of_worker
    if images is not None:
        _images_of_worker = images


def _begin_worker(images: ImageFiles | None) -> None:
    _give(images)
    warnings.simplefilter("ignore")
    begin_work()
