"""Folders of image files, one folder a class: which files there are, and how large each image is.

The sizes come from the files' headers, once; they are kept in a cache that notices when files were added or removed. A
file that was overwritten in place by an image of another size is noticed when it is decoded.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.images import ImageFiles, cache_folder
from stec.errors import UserError

CACHE_VERSION = 1
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What torchvision's ImageFolder takes for an image."""


SPLITS = ("train", "val")


def read_folder(data_dir: Path, split: str) -> tuple[ImageFiles, tuple[str, ...]]:
    """The split ``train`` or ``val`` below ``data_dir`` and its classes, in the order of torchvision's ImageFolder.

    Raises UserError where the split is missing or lies elsewhere, a class is empty, or a file is not the image that its
    name promises. Files with other names are left alone.
    """
    root = data_dir / split
    if not root.is_dir():
        raise UserError(_where_instead(data_dir))
    classes = _class_names(root)
    return _index(root, classes), classes


def _where_instead(data_dir: Path) -> str:
    needed = " and ".join(SPLITS)
    candidates = [data_dir.resolve().parent]
    if data_dir.is_dir():
        candidates += sorted(path for path in data_dir.iterdir() if path.is_dir())
    for candidate in candidates:
        if all((candidate / split).is_dir() for split in SPLITS):
            return f"--data_dir {data_dir} does not hold {needed}, but {candidate} does; use --data_dir {candidate}."
    return f"--data_dir {data_dir} must hold the folders {needed}, each with a folder of images per class."


def _class_names(root: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
    if not names:
        raise UserError(f"{root} holds no class folders; put each class's images into a folder of its own.")
    return names


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """What lies below a root: directories with their times of change, image files with their class."""

    directories: tuple[str, ...]
    changed_ns: NDArray[np.int64]
    paths: tuple[str, ...]
    labels: NDArray[np.int64]


def _index(root: Path, classes: tuple[str, ...]) -> ImageFiles:
    """The images below ``root``, from the cache where nothing has changed since."""
    cache = _cache_file(root)
    images = _read_cache(cache, root)
    if images is None:
        listing = _list_images(root, classes)
        images = ImageFiles(
            root=root, paths=listing.paths, sizes=_read_sizes(root, listing.paths), labels=listing.labels
        )
        _write_cache(cache, images, listing)
    return images


def _list_images(root: Path, classes: tuple[str, ...]) -> _Listing:
    directories, changed_ns = ["."], [root.stat().st_mtime_ns]
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        before = len(paths)
        for directory, _, files in sorted(os.walk(root / name, followlinks=True)):
            relative = os.path.relpath(directory, root)
            directories.append(relative)
            changed_ns.append(Path(directory).stat().st_mtime_ns)
            paths += [f"{relative}/{file}" for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
        if len(paths) == before:
            raise UserError(f"{root / name} holds no image ({', '.join(EXTENSIONS)}); fill it or delete the folder.")
        labels += [label] * (len(paths) - before)
    return _Listing(
        directories=tuple(directories),
        changed_ns=np.array(changed_ns, np.int64),
        paths=tuple(paths),
        labels=np.array(labels, np.int64),
    )


def _read_sizes(root: Path, paths: tuple[str, ...]) -> NDArray[np.int64]:
    """[N, 2]: heights and widths in px, read from the files' headers by as many processes as there are CPUs."""
    files = [str(root / path) for path in paths]
    if len(files) < 2000:
        sizes = [_read_size(file) for file in files]
    else:
        # Fork would copy the threads' locks of libraries that are loaded by now.
        with ProcessPoolExecutor(mp_context=get_context("forkserver")) as pool:
            sizes = list(pool.map(_read_size, files, chunksize=256))
    for file, size in zip(files, sizes):
        if isinstance(size, str):
            raise UserError(f"{file} is not a readable image ({size}); delete it or fetch it again.")
    return np.array(sizes, np.int64).reshape(-1, 2)


def _read_size(file: str) -> tuple[int, int] | str:
    """Height and width of an image, or why it has none."""
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except (OSError, Image.DecompressionBombError) as error:
        return str(error).replace(f"'{file}'", "the file")


def _cache_file(root: Path) -> Path:
    return cache_folder() / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:24]}.npz"


def _read_cache(cache: Path, root: Path) -> ImageFiles | None:
    """The cached index of ``root``, or None where there is none, or a directory has changed since it was written."""
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            if int(arrays["version"]) != CACHE_VERSION or str(arrays["root"]) != str(root.resolve()):
                return None
            directories = list(_split(arrays["directories"]))
            changed_ns = [(root / directory).stat().st_mtime_ns for directory in directories]
            if not np.array_equal(arrays["changed_ns"], changed_ns):
                return None
            return ImageFiles(
                root=root, paths=tuple(_split(arrays["paths"])), sizes=arrays["sizes"], labels=arrays["labels"]
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_cache(cache: Path, images: ImageFiles, listing: _Listing) -> None:
    """Write the index to a temporary name and rename it. A cache that cannot be written is done without."""
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}.npz")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            temporary,
            version=CACHE_VERSION,
            root=str(images.root.resolve()),
            directories=_join(listing.directories),
            changed_ns=listing.changed_ns,
            paths=_join(images.paths),
            sizes=images.sizes,
            labels=images.labels,
        )
        temporary.replace(cache)
    except OSError:
        temporary.unlink(missing_ok=True)


def _join(names: tuple[str, ...]) -> NDArray[np.uint8]:
    """Names as one array of bytes: no file name holds a zero byte."""
    return np.frombuffer(os.fsencode("\0".join(names)), np.uint8)


def _split(joined: NDArray[np.uint8]) -> Iterator[str]:
    return iter(os.fsdecode(joined.tobytes()).split("\0"))
