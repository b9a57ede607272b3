"""Features of a whole split as a file: written batch by batch into a partial file that outlives an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from pipelines.batch import PlainLoader
from pipelines.errors import BadImage, UserError
from pipelines.files import atomic_write, lock, read_object, sign, unwritable, write_json
from stec.distributed.processes import on_main_process
from stec.evaluation.evaluate import encode_batches
from stec.models.encoder import ImageEncoder
from stec.runs.background import Background

SPAN_BATCHES = 16
"""Batches whose features are flushed to disk together: the most that a killed process loses."""
MISSING, DONE, BAD = 0, 1, 2
"""What the status file holds for each image."""


def fingerprint_of_weights(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names, dtypes, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_complete(out: Path, about: Mapping[str, Any]) -> bool:
    """Whether ``out`` already holds these features.

    Raises UserError if ``out``, or the .json file next to it, holds something else.
    """
    metadata_file = out.with_suffix(".json") if out.suffix == ".npy" else out
    if not out.exists() and not metadata_file.exists():
        return False
    try:
        if out.suffix == ".npy":
            existing = json.loads(metadata_file.read_text())
        else:
            with safe_open(out, "np") as file:
                existing = json.loads((file.metadata() or {}).get("stec", "null"))
    except (OSError, ValueError, SafetensorError):
        existing = None
    if not out.exists() and isinstance(existing, dict) and existing.keys() == about.keys():
        return False  # the metadata of features that were deleted
    if out.exists() and existing == about:
        return True
    raise UserError(
        f"{out if out.exists() else metadata_file} exists and holds something else; delete it, or choose another file."
    )


def embed(
    encoder: ImageEncoder,
    loader: PlainLoader,
    out: Path,
    about: Mapping[str, Any],
    *,
    accelerator: Accelerator,
    known_bad: Mapping[int, str],
    name_of: Callable[[int], str] | None,
    progress: Callable[[str, int, int], None],
    report: Callable[[str], None],
) -> int:
    """Write the features of the loader's images to ``out``, in order, and return the number of rows.

    Bad images are omitted and passed to ``report`` in a sentence; ``known_bad`` are those known before, with reasons.
    ``about`` is what the features depend on: a partial file with the same is continued. ``name_of`` gives the names
    that are written next to the features, by image id. All processes share the work, and ``out`` must be on a disk that
    all of them see. Raises UserError if the partial file has other settings or the disk cannot be written.
    """
    partial_file = PartialFeatures(out, images=len(loader), feature_dim=encoder.feature_dim)
    status = on_main_process(accelerator, lambda: partial_file.open(about, list(known_bad)))
    # The batches do not depend on interruptions, so neither do the bits of the features.
    span = SPAN_BATCHES * loader.batch_size
    spans = [np.arange(first, min(first + span, len(loader))) for first in range(0, len(loader), span)]
    missing = [image_ids for image_ids in spans if (status[image_ids] == MISSING).any()]
    if accelerator.is_main_process and len(missing) < len(spans):
        report(f"Continuing: {len(spans) - len(missing)} of {len(spans)} spans are complete.")
    own = [
        missing[n] for n in np.array_split(range(len(missing)), accelerator.num_processes)[accelerator.process_index]
    ]
    done = 0
    # An error of a write is raised by the ``finish`` before the next one.
    with Background(lambda: None) as writer:
        while done < len(own):
            good = [image_ids[status[image_ids] != BAD] for image_ids in own[done:]]
            features = encode_batches(encoder, (batch.images for batch in loader.batches(*good)), accelerator)
            try:
                for image_ids in good:
                    rows = _next_rows(features, len(image_ids), encoder.feature_dim)
                    writer.finish()
                    writer.start(partial(partial_file.write, image_ids, rows.numpy()))
                    done += 1
                    progress("spans", done, len(own))
            except BadImage as bad:
                # The batches of this span are encoded again without it.
                status[bad.image_id] = BAD
                partial_file.mark(np.array([bad.image_id]), BAD)
                report(f"Bad image, omitted: {bad.name} ({bad.reason})")
        writer.finish()
    accelerator.wait_for_everyone()
    return on_main_process(accelerator, lambda: partial_file.finish(about, loader.labels, name_of))


def _next_rows(batches: Iterator[Tensor], count: int, feature_dim: int) -> Tensor:
    """The next batches' features, ``count`` rows in total: [count, feature_dim] on the host."""
    parts, rows = [], 0
    while rows < count:
        parts.append(next(batches))
        rows += len(parts[-1])
    return torch.cat(parts).cpu() if parts else torch.empty(0, feature_dim)


class PartialFeatures:
    """A folder next to ``out`` with the features [images, D] as .npy, a status byte per image, and what they depend on.

    Rows are written to their places before their status, so the status tells which rows are valid after a crash. They
    are written with ``pwrite``: of a memory map, processes on several machines would overwrite each other's pages.
    """

    def __init__(self, out: Path, *, images: int, feature_dim: int) -> None:
        self.out, self.images, self.feature_dim = out, images, feature_dim
        self.folder = out.with_name(f"{out.name}.partial")
        self.features, self.status = self.folder / "features.npy", self.folder / "status"
        self._lock: int | None = None

    def open(self, about: Mapping[str, Any], bad: list[int]) -> NDArray[np.uint8]:
        """Create the folder, or lock the existing one; returns the status of each image.

        Raises UserError if another process is writing it, or its features depend on something else.
        """
        about_file = self.folder / "about.json"
        remedy = f"delete {self.folder} to start from the beginning"
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = lock(
                self.folder / ".lock",
                lambda holder: f"{self.out} is being made by {holder}; wait for it or stop it, or choose another file.",
            )
            if self._lock is not None:
                sign(self._lock)
            if not about_file.exists():
                # The status last but for ``about``: what is killed in between begins again.
                open_memmap(self.features, "w+", "<f4", (self.images, self.feature_dim))
                self.status.write_bytes(bytes(self.images))
                write_json(about_file, about)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        existing = read_object(about_file, remedy)
        if existing != about:
            differing = [name for name in about if existing.get(name) != about[name]]
            raise UserError(
                f"{self.folder} holds features with other settings ({', '.join(differing)} changed); {remedy}, or "
                f"choose another file."
            )
        if bad:
            self.mark(np.array(bad), BAD)
        try:
            status = np.fromfile(self.status, np.uint8)
            shape = np.load(self.features, mmap_mode="r").shape
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} is damaged ({error}); {remedy}.") from error
        if len(status) != self.images or shape != (self.images, self.feature_dim):
            raise UserError(f"{self.folder} is damaged (files of another length); {remedy}.")
        return status

    def write(self, image_ids: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """Write the rows of these images, then mark them. Raises UserError if the disk cannot be written."""
        row_bytes = 4 * self.feature_dim
        try:
            with self.features.open("r+b", buffering=0) as file:
                header_bytes = os.fstat(file.fileno()).st_size - self.images * row_bytes
                for image_id, row in zip(image_ids.tolist(), rows.astype("<f4", copy=False)):
                    os.pwrite(file.fileno(), row.data, header_bytes + image_id * row_bytes)
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.features, error) from error
        self.mark(image_ids, DONE)

    def mark(self, image_ids: NDArray[np.int64], value: int) -> None:
        """Set the status of these images. Raises UserError if the disk cannot be written."""
        try:
            with self.status.open("r+b", buffering=0) as file:
                for image_id in image_ids.tolist():
                    os.pwrite(file.fileno(), bytes([value]), image_id)
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.status, error) from error

    def finish(self, about: Mapping[str, Any], labels: NDArray[np.int64], name_of: Callable[[int], str] | None) -> int:
        """Write the file and what belongs next to it, delete the folder, and return the number of rows.

        A .npy file without bad images is the partial file, renamed. safetensors copies all features into memory.
        """
        ids = np.flatnonzero(np.fromfile(self.status, np.uint8) == DONE)
        arrays = {"ids": ids, "labels": labels[ids]}
        features = np.load(self.features, mmap_mode="r")
        if name_of is not None:
            names = (" ".join(name_of(image_id).splitlines()) for image_id in ids.tolist())
            atomic_write(self.out.with_suffix(".names.txt"), "".join(f"{name}\n" for name in names).encode())
        try:
            if self.out.suffix == ".npy":
                for name, values in arrays.items():
                    atomic_write(self.out.with_suffix(f".{name}.npy"), partial(np.save, arr=values))
                write_json(self.out.with_suffix(".json"), about)
                self._without_bad_images(features, ids).replace(self.out)
            else:
                rows = np.load(self._without_bad_images(features, ids), mmap_mode="r")
                metadata = {"stec": json.dumps(about, sort_keys=True)}
                save_file({"features": rows, **arrays}, self.folder / "out.safetensors", metadata)
                (self.folder / "out.safetensors").replace(self.out)
            if self._lock is not None:
                os.close(self._lock)  # NFS keeps the names of open files
            shutil.rmtree(self.folder)
        except OSError as error:
            raise unwritable(self.out, error) from error
        return len(ids)

    def _without_bad_images(self, features: NDArray[np.float32], ids: NDArray[np.int64]) -> Path:
        """A file with the rows ``ids`` alone: the partial file itself if these are all."""
        if len(ids) == self.images:
            return self.features
        compact = self.folder / "compact.npy"
        rows = open_memmap(compact, "w+", "<f4", (len(ids), self.feature_dim))
        for chunk in np.array_split(np.arange(len(ids)), max(1, len(ids) // 10_000)):
            rows[chunk] = features[ids[chunk]]
        rows.flush()
        return compact
