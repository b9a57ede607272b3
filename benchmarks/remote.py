"""What shards at a URL cost: images per second of an epoch, from a local folder and from an http server.

    python -m benchmarks.remote

The images are JPEG files of 500 x 375 px in tar shards that are made for this. The server is Python's, in a process of
its own on the same cores, which it competes for. An epoch begins with an index, and with building the pipeline.
"""

from __future__ import annotations

import http.server
import io
import itertools
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import tyro

from benchmarks import report
from benchmarks.bad_images import KINDS, photographs
from benchmarks.report import Figures, Output
from pipelines import read_ahead
from pipelines.commands import Policy
from pipelines.cpus import available_cpus
from pipelines.datasets.registry import open_data_set
from pipelines.datasets.urls import RemoteFolder
from pipelines.errors import UserError
from pipelines.loader import Loader
from pipelines.sampler import Sampler
from stec.console import Console


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """Measure what shards at a URL cost."""

    images: int = 4096
    """Images in all shards."""
    shards: int = 16
    """Number of shards."""
    batch_size: int = 64
    """Images in a batch."""
    view_size: int = 224
    """Height and width of a view in px."""
    shuffle_window: int = 4
    """Shards that are shuffled together; the small cache holds twice as many."""
    repeats: int = 3
    """Times that each is measured, after one for warming up."""

    def check(self) -> None:
        """Raise UserError for what cannot be measured."""
        report.check(self)
        report.check_positive(self, "images", "shards", "batch_size", "view_size", "shuffle_window", "repeats")
        if self.batch_size > self.images:
            raise UserError(f"--batch_size {self.batch_size} is more than --images {self.images}; give fewer.")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


def serve(folder: Path, port: Connection) -> None:
    """Serve a folder until the process is ended; its port goes through ``port``."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    port.send(server.server_port)
    server.serve_forever()


def write_shards(folder: Path, options: Options) -> int:
    """Returns the bytes of the largest shard."""
    folder.mkdir()
    encoded = photographs()
    for shard in range(options.shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as archive:
            for n in range(shard, options.images, options.shards):
                member = tarfile.TarInfo(f"{n:06d}.jpg")
                member.size = len(encoded[n % KINDS])
                archive.addfile(member, io.BytesIO(encoded[n % KINDS]))
    return max(path.stat().st_size for path in folder.iterdir())


def epoch(location: Path | RemoteFolder, options: Options, *, empty: bool = False) -> float:
    """Images per second of the first epoch; with ``empty``, from an empty cache."""
    images = open_data_set("folder", location).train
    if empty:
        assert isinstance(location, RemoteFolder) and location.cache_dir is not None
        shutil.rmtree(location.cache_dir)
    policy = Policy(size=options.view_size, jitter_strength=1.0)
    sampler = Sampler(images, policy, seed=0, batch_size=options.batch_size, shuffle_window=options.shuffle_window)
    loader = Loader(sampler, backend="dali", device=torch.device("cpu"), workers=available_cpus())
    started = time.perf_counter()
    for _ in itertools.islice(loader.batches(0), sampler.steps_per_epoch):
        pass
    images_per_s = sampler.steps_per_epoch * options.batch_size / (time.perf_counter() - started)
    for thread in threading.enumerate():
        if thread.name == read_ahead.THREAD:  # Those of the next epoch must not compete with what is measured next.
            thread.join()
    return images_per_s


def benchmark(options: Options) -> None:
    options.check()
    console = Console(enabled=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["XDG_CACHE_HOME"] = folder
        largest = write_shards(root / "shards", options)
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(root / "shards", theirs), daemon=True)
        server.start()
        url = f"http://127.0.0.1:{ours.recv()}"
        whole = RemoteFolder(url, root / "whole")
        small = RemoteFolder(url, root / "small", 2 * options.shuffle_window * largest / 1e9)
        contenders = {
            "local folder": partial(epoch, root / "shards", options),
            "URL, all shards in the cache": partial(epoch, whole, options),
            "URL, empty cache": partial(epoch, RemoteFolder(url, root / "cold"), options, empty=True),
            "URL, empty cache for two windows": partial(epoch, small, options, empty=True),
        }
        turns = report.take_turns(contenders, repeats=options.repeats, console=console)
        server.terminate()
    title = f"{options.images:,} images in {options.shards} shards of {largest / 1e6:.1f} MB, {options.view_size} px"
    report.publish([Figures(title=title, unit="images/s", turns=turns)], options, console)


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.remote", args=arguments, use_underscores=True)
    return report.run(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
