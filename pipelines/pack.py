"""Tar shards in WebDataset's layout, written from images of any kind.

The images of a folder or of an array are shuffled once, as those of a shard are read together; those in shards keep
their order. Which images a shard holds and its bytes depend on the images and ``Packing`` only, so shards can be
written in any order and by any number of threads.
"""

from __future__ import annotations

import io
import os
import pkgutil
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.commands import IMAGE_STREAM, generator
from pipelines.datasets.bad_list import remember
from pipelines.datasets.fingerprint import fingerprint
from pipelines.datasets.headers import ORIENTATION, open_lazily, reason
from pipelines.datasets.image_folders import check_labels, splits_below
from pipelines.datasets.images import UNLABELED, ImageFiles, Images
from pipelines.datasets.listing import is_hidden
from pipelines.datasets.notes import notes_on_files
from pipelines.datasets.registry import DATA_SETS, Progress, Source, no_progress
from pipelines.datasets.shards import IMAGE_SUFFIXES, PACKED
from pipelines.errors import BadImage, UserError
from pipelines.files import atomic_write, lock, read_object, remove_leftovers, unwritable, write_json
from pipelines.splits import Kind, read_split

FORMAT_VERSION = 1
POLL_SECONDS = 0.2
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "PPM": "ppm"}
"""Suffixes that differ from the name of Pillow's format."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How images are written."""

    max_side: int = 0
    """Images whose shorter side is longer, in px, are scaled down to it; 0: none."""
    quality: int = 95
    """JPEG quality of scaled images."""
    images_per_shard: int = 1000


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images that are packed into one folder."""

    name: str
    """The folder below the destination; empty: the destination itself."""
    images: Images
    kind: Kind
    """How the folder will be read."""
    notes: tuple[str, ...] = ()
    """A sentence each on what was not as expected, such as skipped files."""

    def shards(self, packing: Packing) -> list[tuple[str, NDArray[np.int64]]]:
        """The name and the images of each shard."""
        order = np.arange(len(self.images))
        if not (isinstance(self.images, ImageFiles) and self.images.in_shards):
            order = generator(IMAGE_STREAM, 0, 0).permutation(order)
        size = packing.images_per_shard
        return [(f"shard-{k:06d}.tar", order[size * k : size * (k + 1)]) for k in range(-(-len(order) // size))]


def open_source(source: Path, progress: Progress = no_progress) -> list[Part]:
    """The images of a folder: CIFAR or STL-10 as unpacked from their archives, splits, or images of one kind.

    Folders below a folder without images of its own are classes. Raises UserError if there are no images.
    """
    if source.name in _ARRAYS:
        return list(_read_arrays(source.parent, _ARRAYS[source.name], progress))
    found = sorted({data_set for name, data_set in _ARRAYS.items() if (source / name).is_dir()})
    if len(found) > 1:
        raise UserError(f"{source} holds {' and '.join(found)}; name the folder in it that is to be packed.")
    if found:
        return list(_read_arrays(source, found[0], progress))
    parts = []
    for name, (root, kind) in splits_below(source).items():
        assert isinstance(root, Path), "a local folder has local splits"
        if kind == "loose images" and _holds_only_folders(root):
            kind = "class folders"
        index = read_split(root, kind, progress, check_files=True)
        check_labels(index)
        named = name in ("train", "val")
        parts.append(
            Part(
                name=name if named else "",
                images=index.images,
                kind="class folders" if named else "loose images",
                notes=tuple(notes_on_files(index)),
            )
        )
    return parts


_ARRAYS = {
    "cifar-10-batches-bin": "cifar10",
    "cifar-10-batches-py": "cifar10",
    "cifar-100-binary": "cifar100",
    "cifar-100-python": "cifar100",
    "stl10_binary": "stl10",
}
"""Folders of archives, and the data sets that they hold."""


def _read_arrays(source: Path, data_set: str, progress: Progress) -> Iterator[Part]:
    traits = DATA_SETS[data_set]
    names = list(dict.fromkeys(traits.splits.values()))
    splits = pkgutil.resolve_name(traits.reader)(Source(data_dir=source, progress=progress), names)
    for name, split in zip(names, splits):
        labeled = bool((split.images.labels != UNLABELED).all())
        folder = "val" if name == "test" else name
        yield Part(name=folder, images=split.images, kind="class folders" if labeled else "loose images")


def _holds_only_folders(root: Path) -> bool:
    try:
        visible = [path for path in root.iterdir() if not is_hidden(path.name)]
    except OSError:  # Reported when it is read.
        return False
    return any(path.is_dir() for path in visible) and not any(
        path.suffix.lower()[1:] in IMAGE_SUFFIXES | {"tar", "parquet"} for path in visible if not path.is_dir()
    )


class Packer:
    """Writes the shards of ``parts`` below ``destination``; those that are there already are kept.

    Raises UserError if the folder holds anything else, or shards of other images or another packing.
    """

    def __init__(self, parts: Sequence[Part], destination: Path, packing: Packing) -> None:
        self.parts, self.destination, self.packing = parts, destination, packing
        self.bad = {
            part.images.name(image_id): why
            for part in parts
            if isinstance(part.images, ImageFiles)
            for image_id, why in part.images.faults.items()
        }
        """Why images are left out, by their names."""
        self._stopped = threading.Event()
        self._done: dict[str, int] = {}
        manifest = {
            "version": FORMAT_VERSION,
            **asdict(packing),
            "images": {part.name: [len(part.images), fingerprint(part.images)] for part in parts},
        }
        file = destination / PACKED
        if file.exists():
            if read_object(file, "delete the folder to pack again") != manifest:
                raise UserError(
                    f"{destination} holds shards of other images or settings; name another folder, or delete it."
                )
        else:
            try:
                destination.mkdir(exist_ok=True)
                remove_leftovers(destination)
                if any(destination.iterdir()):
                    raise UserError(f"{destination} is not empty; name a new folder for the shards.")
            except OSError as error:
                raise unwritable(destination, error) from error
            write_json(file, manifest)

    @property
    def missing(self) -> list[tuple[Part, Path, NDArray[np.int64]]]:
        """The shards that are not written yet, with their images."""
        shards = [
            (part, self.destination / part.name / name, image_ids)
            for part in self.parts
            for name, image_ids in part.shards(self.packing)
        ]
        return [shard for shard in shards if not shard[1].exists()]

    def write(self, workers: int, progress: Progress = no_progress) -> None:
        """Write the missing shards by so many threads. Raises UserError if the disk is full or fails.

        A shard has its name once it is complete, also if this is interrupted.
        """
        missing = self.missing
        folders = {path.parent for _, path, _ in missing}
        try:
            held = lock(
                self.destination / PACKED, lambda _: f"Another process writes to {self.destination}; wait for it."
            )
            for folder in folders:
                folder.mkdir(exist_ok=True)
                remove_leftovers(folder)
        except OSError as error:
            raise unwritable(self.destination, error) from error
        total = sum(len(part.images) for part in self.parts)
        before = total - sum(len(image_ids) for _, _, image_ids in missing)
        # Threads, as reading, decoding and encoding release Python's lock, and share decoded row groups.
        with ThreadPoolExecutor(workers) as pool:
            try:
                pending = {pool.submit(self._write_shard, *shard) for shard in missing}
                while pending:
                    finished, pending = wait(pending, POLL_SECONDS, FIRST_EXCEPTION)
                    for future in finished:
                        future.result()
                    progress(f"packing images into {self.destination}", before + sum(self._done.values()), total)
            finally:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
                for folder in folders:
                    remove_leftovers(folder)
                if held is not None:
                    os.close(held)

    def _write_shard(self, part: Part, path: Path, image_ids: NDArray[np.int64]) -> None:
        bad_images: list[BadImage] = []
        atomic_write(path, partial(self._fill, part, str(path), image_ids, bad_images))

    def _fill(
        self, part: Part, shard: str, image_ids: NDArray[np.int64], bad_images: list[BadImage], file: IO[bytes]
    ) -> None:
        images = part.images
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for done, image_id in enumerate(image_ids.tolist(), start=1):
                if self._stopped.is_set():
                    raise UserError("Packing was stopped.")
                try:
                    suffix, content = encode(images, image_id, self.packing)
                except BadImage as bad:
                    self.bad[bad.name] = bad.reason
                    bad_images.append(bad)
                    continue
                finally:
                    self._done[shard] = done
                _add(archive, f"{image_id:09d}.{suffix}", content)
                if (label := int(images.labels[image_id])) != UNLABELED:
                    _add(archive, f"{image_id:09d}.cls", b"%d" % label)
        if isinstance(images, ImageFiles):
            # Before the shard is complete: a later call does not read its images again.
            remember(images, bad_images)


def encode(images: Images, image_id: int, packing: Packing) -> tuple[str, Any]:
    """An image's suffix and its encoded bytes: those that it has, unless it is in memory (PNG) or large (JPEG).

    A scaled image keeps its EXIF orientation, and no other metadata. Raises BadImage if it cannot be used.
    """
    if not isinstance(images, ImageFiles):
        return "png", _save(images.open(image_id), "PNG")
    if image_id in images.faults:
        raise images.bad(image_id, images.faults[image_id])
    height, width = images.sizes[image_id].tolist()
    if not 0 < packing.max_side < min(height, width):
        content = images.encoded(image_id).data
        try:
            return _suffix(content), content
        except Exception as error:  # Its file was replaced since it was indexed.
            raise images.bad(image_id, reason(error)) from error
    image = images.open(image_id)
    scale = packing.max_side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    exif = Image.Exif()
    exif[ORIENTATION] = int(images.orientation[image_id])
    scaled = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
    return "jpg", _save(scaled, "JPEG", quality=packing.quality, exif=exif)


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _suffix(content: Any) -> str:
    """The suffix of an image in a shard, by its format."""
    with open_lazily(io.BytesIO(content)) as image:
        kind = image.format or ""
    suffix = SUFFIXES.get(kind, kind.lower())
    return suffix if suffix in IMAGE_SUFFIXES else "jpg"


def _add(archive: tarfile.TarFile, name: str, content: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
