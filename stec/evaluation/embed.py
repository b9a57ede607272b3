"""Features of a whole split as a file: made in parts, which outlive an interruption, and then joined."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipelines.batch import PlainLoader
from pipelines.errors import BadImage, UserError
from pipelines.files import atomic_write, lock, read_object, remove_leftovers, sign, unwritable, write_json
from stec.distributed.processes import on_main_process
from stec.evaluation.evaluate import encode_batches
from stec.models.encoder import Encoder
from stec.runs.background import Background
from stec.weights.export import write_safetensors

PART_BATCHES = 16
"""Batches whose features are written to the disk together: what a killed process loses at most."""


def fingerprint_of_weights(state: Mapping[str, Tensor]) -> str:
    """A digest of weights: of their names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_complete(out: Path, about: Mapping[str, Any]) -> bool:
    """Whether ``out`` holds these features already. Raises UserError where it, or the .json beside it, holds something
    else.
    """
    beside = out.with_suffix(".json") if out.suffix == ".npy" else out
    if not out.exists() and not beside.exists():
        return False
    try:
        if out.suffix == ".npy":
            found = json.loads(beside.read_text())
        else:
            with safe_open(out, "np") as file:
                found = json.loads((file.metadata() or {}).get("stec", "null"))
    except (OSError, ValueError, SafetensorError):
        found = None
    if not out.exists() and isinstance(found, dict) and found.keys() == about.keys():
        return False  # of features that were deleted
    if out.exists() and found == about:
        return True
    existing = out if out.exists() else beside
    raise UserError(f"{existing} exists and holds something else; delete it, or name another file.")


def embed(
    encoder: Encoder,
    loader: PlainLoader,
    out: Path,
    about: Mapping[str, Any],
    *,
    accelerator: Accelerator,
    known_bad: Mapping[int, str],
    name_of: Callable[[int], str] | None,
    progress: Callable[[str, int, int], None],
    say: Callable[[str], None],
) -> int:
    """Write the features of the loader's images to ``out``, in order, and return how many images that are.

    Bad images are left out and told to ``say``; ``known_bad`` are those known before, with reasons. ``about`` is what
    the features depend on: parts made with the same are kept. ``name_of`` gives the names that stand beside them, by
    image id. All processes share the work, and ``out`` must be on a disk that all of them see. Raises UserError where
    parts were made otherwise or the disk refuses.
    """
    parts = Parts(out, size=PART_BATCHES * loader.batch_size, images=len(loader))
    missing = on_main_process(accelerator, lambda: parts.open(about))
    own = np.array_split(np.array(missing, np.int64), accelerator.num_processes)[accelerator.process_index]
    left, bad = deque(own.tolist()), dict(known_bad)
    if accelerator.is_main_process and len(missing) < parts.count:
        say(f"Going on: {parts.count - len(missing)} of {parts.count} parts are there.")
    # A failed write is raised by the ``finish`` before the next one.
    with Background(lambda: None) as saving:
        while left:
            stretches = [parts.image_ids(part, without=bad) for part in left]
            features = encode_batches(encoder, loader, accelerator, *stretches)
            try:
                for image_ids in stretches:
                    rows = _next_rows(features, len(image_ids), encoder.feature_dim)
                    saving.finish()
                    saving.start(partial(parts.write, left.popleft(), rows, image_ids))
                    progress("parts", len(own) - len(left), len(own))
            except BadImage as error:
                # What was made of this part is made again without it.
                bad[error.image_id] = error.reason
                say(f"Bad image, left out: {error.name} ({error.reason})")
        saving.finish()
    accelerator.wait_for_everyone()
    return on_main_process(accelerator, lambda: parts.join(about, loader.labels, name_of))


def _next_rows(batches: Iterator[Tensor], count: int, feature_dim: int) -> Tensor:
    """The next batches' features, ``count`` rows in all: [count, feature_dim] on the host."""
    taken, rows = [], 0
    while rows < count:
        taken.append(next(batches))
        rows += len(taken[-1])
    return torch.cat(taken).cpu() if taken else torch.empty(0, feature_dim)


class Parts:
    """A folder of files, each with the features of ``size`` images that follow each other, or fewer at the end.

    A part is there whole or not at all, so which ones are there is all that is to be known of how far the work is.
    """

    def __init__(self, out: Path, *, size: int, images: int) -> None:
        self.out, self.size, self.images = out, size, images
        self.folder = out.with_name(f"{out.name}.parts")
        self.count = len(range(0, images, size))
        self._lock: int | None = None

    def open(self, about: Mapping[str, Any]) -> list[int]:
        """The numbers of the parts that are not there yet; from here on they are this process's to write.

        Raises UserError where another process writes them, or those there were made otherwise.
        """
        file = self.folder / "about.json"
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = lock(
                self.folder / ".lock",
                lambda holder: f"{self.out} is being made by {holder}; wait for it or stop it, or name another file.",
            )
            if self._lock is not None:
                sign(self._lock)
            remove_leftovers(self.folder)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        if not file.exists():
            write_json(file, about)
        elif (found := read_object(file, f"delete {self.folder} to start anew")) != about:
            differing = [name for name in about if found.get(name) != about[name]]
            raise UserError(
                f"{self.folder} holds parts that were made otherwise ({', '.join(differing)} changed); delete it to "
                f"start anew, or name another file."
            )
        return [part for part in range(self.count) if not self._file(part).exists()]

    def image_ids(self, part: int, without: Mapping[int, str]) -> NDArray[np.int64]:
        """The images of a part, bad ones left out."""
        ids = np.arange(part * self.size, min((part + 1) * self.size, self.images))
        return ids[~np.isin(ids, list(without))]

    def write(self, part: int, features: Tensor, image_ids: NDArray[np.int64]) -> None:
        write_safetensors({"features": features, "ids": torch.from_numpy(image_ids)}, self._file(part), {})

    def join(self, about: Mapping[str, Any], labels: NDArray[np.int64], name_of: Callable[[int], str] | None) -> int:
        """Make the file of the parts, part by part, and what stands beside it; then drop them. The number of images."""
        ids = np.concatenate([self._read(part, "ids") for part in range(self.count)])
        small = {"ids": ids, "labels": labels[ids]}
        feature_dim = self._read(0, "features").shape[1]
        if name_of is not None:
            names = (" ".join(name_of(image_id).splitlines()) for image_id in ids.tolist())
            atomic_write(self.out.with_suffix(".names.txt"), "".join(f"{name}\n" for name in names).encode())
        if self.out.suffix == ".npy":
            for name, values in small.items():
                atomic_write(self.out.with_suffix(f".{name}.npy"), partial(np.save, arr=values))
            write_json(self.out.with_suffix(".json"), about)
            start = partial(_start_npy, shape=(len(ids), feature_dim))
        else:
            start = partial(_start_safetensors, shape=(len(ids), feature_dim), small=small, about=about)

        def content(file: IO[bytes]) -> None:
            start(file)
            for part in range(self.count):
                file.write(self._read(part, "features").data)

        atomic_write(self.out, content)
        try:
            if self._lock is not None:
                os.close(self._lock)  # NFS keeps the names of open files
            shutil.rmtree(self.folder)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return len(ids)

    def _file(self, part: int) -> Path:
        return self.folder / f"{part:06d}.safetensors"

    def _read(self, part: int, name: str) -> NDArray[Any]:
        try:
            with safe_open(self._file(part), "np") as file:
                values: NDArray[Any] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._file(part)} is damaged ({error}); delete it to have it made again.") from error
        return values


def _start_npy(file: IO[bytes], shape: tuple[int, int]) -> None:
    """Everything of a ``.npy`` file but the features, which follow."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def _start_safetensors(
    file: IO[bytes], shape: tuple[int, int], small: Mapping[str, NDArray[np.int64]], about: Mapping[str, Any]
) -> None:
    """Everything of a safetensors file but the features, which follow: the library would want them all in memory.

    Its format: the header's length, the header, then tensor after tensor. The wider numbers come first, so that all
    are aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"stec": json.dumps(about, sort_keys=True)}}
    end = 0
    for name, values in small.items():
        header[name] = {"dtype": "I64", "shape": values.shape, "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    header["features"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * shape[0] * shape[1]]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for values in small.values():
        file.write(values.data)
