"""Shards at a URL: the same batches as from a folder, what is fetched when, and what goes wrong."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import s3fs
import torch
from moto.server import ThreadedMotoServer
from pyarrow import parquet

import launch
from pipelines.batch import Batch
from pipelines.commands import Policy
from pipelines.datasets import shard_cache, urls
from pipelines.datasets.bad_list import BadList, remember
from pipelines.datasets.images import ImageFiles
from pipelines.datasets.registry import open_data_set
from pipelines.datasets.shard_cache import ShardCache
from pipelines.datasets.urls import RemoteFolder
from pipelines.errors import UserError
from pipelines.loader import EvaluationLoader, Loader
from pipelines.sampler import Sampler
from pipelines.splits import read_split, verify_split
from tests.servers import PROCESSES, HttpServer, read_all, read_on_full_disk, serving
from tests.test_index import encode, make_image, write_shards

SHARDS, PER_SHARD = 6, 8


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "indexes"))
    monkeypatch.setattr(urls, "PAUSES_S", (0.01, 0.01, 0.01, 0.01))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_shards(root / "train", shards=SHARDS, per_shard=PER_SHARD)
    write_shards(root / "val", shards=2, per_shard=PER_SHARD)
    return root


@pytest.fixture
def server(data: Path) -> Iterator[HttpServer]:
    with serving(data) as server:
        yield server


def gb_of(folder: Path, count: int) -> float:
    """GB of the largest shards in a folder."""
    return sum(sorted((path.stat().st_size for path in folder.glob("*.tar")), reverse=True)[:count]) / 1e9


def bytes_in(images: ImageFiles) -> int:
    """In the cache; nothing is deleted from it meanwhile, but transfers go on."""
    assert images.shards is not None
    total = 0
    with images.shards.locked():
        for path in images.shards.folder.iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def train_images(location: Path | RemoteFolder) -> ImageFiles:
    images = open_data_set("imagenet", location).train
    assert isinstance(images, ImageFiles)
    return images


def loader_of(images: ImageFiles, backend: Any = "dali", *, window: int = 2, **options: Any) -> Loader:
    policy = Policy(size=32, jitter_strength=0.5)
    sampler = Sampler(images, policy, seed=1, batch_size=6, shuffle_window=window, **options)
    return Loader(sampler, backend=backend, device=torch.device("cpu"), workers=1)


def assert_equal(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected):
        assert np.array_equal(batch.image_ids, other.image_ids) and torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.views, other.views)


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_batches_are_those_of_a_local_folder(data: Path, server: HttpServer, tmp_path: Path, backend: str) -> None:
    """With an empty cache, a full one, and one that never holds more than three shards; resumed as well."""
    expected = list(islice(loader_of(train_images(data), backend).batches(0), 20))
    assert {batch.epoch for batch in expected} == {0, 1, 2}
    whole = RemoteFolder(server.url, tmp_path / "whole")
    for _ in range(2):
        assert_equal(list(islice(loader_of(train_images(whole), backend).batches(0), 20)), expected)
        assert server.fetched.total() == SHARDS + 2 and set(server.fetched.values()) == {1, 2}  # train and val
    small = RemoteFolder(server.url, tmp_path / "small", gb_of(data / "train", 3))
    loader, sizes = loader_of(train_images(small), backend), []
    server.fetched.clear()
    for batch, other in zip(loader.batches(0), expected):
        assert_equal([batch], [other])
        sizes.append(bytes_in(loader.sampler.images))
    assert max(sizes) <= small.cache_bytes
    assert server.fetched.total() < 1.5 * 3 * SHARDS  # About once per epoch.
    assert_equal(list(islice(loader_of(train_images(small), backend).batches(9), 5)), expected[9:14])


def test_evaluation_and_names(data: Path, server: HttpServer, tmp_path: Path) -> None:
    local, remote = (
        train_images(location) for location in (data, RemoteFolder(server.url, tmp_path, gb_of(data / "train", 2)))
    )
    ids = np.arange(len(local))[::-1].copy()
    options: dict[str, Any] = {"size": 24, "resize_px": 28, "batch_size": 5, "workers": 1}
    for backend in ("dali", "torchvision"):
        ours, theirs = (
            EvaluationLoader(images, backend=backend, device=torch.device("cpu"), **options).batches(ids)
            for images in (remote, local)
        )
        for batch, other in zip(ours, theirs, strict=True):
            assert torch.equal(batch.images, other.images) and torch.equal(batch.labels, other.labels)
    for n in (0, len(local) - 1):
        assert remote.name(n) == local.name(n).replace(str(data), server.url)


def test_shards_are_fetched_before_they_are_needed(data: Path, server: HttpServer, tmp_path: Path) -> None:
    """As many as fit, in the order of need, while nobody asks for a batch; those that are done make room."""
    images = train_images(RemoteFolder(server.url, tmp_path / "cache"))
    for path in (tmp_path / "cache").glob("*-train-*"):
        path.unlink()
    assert images.shards is not None
    small = replace(images.shards, remote=replace(images.shards.remote, cache_gb=gb_of(data / "train", 4)))
    loader = loader_of(replace(images, shards=small))
    order = [f"train-{n:03d}.tar" for n in loader.sampler.shards_from(0)[:SHARDS]]
    server.fetched.clear()
    batches = loader.batches(0)

    def wait_for(names: list[str]) -> None:
        deadline = time.monotonic() + 10
        while not all(small.holds(name) for name in names):
            assert time.monotonic() < deadline, (names, server.fetched)
            time.sleep(0.01)

    next(batches)
    wait_for(order[:4])
    time.sleep(0.1)
    assert set(server.fetched) == set(order[:4])
    for _ in range(4):  # Two windows have 32 images, of which 3 batches are prepared in advance.
        next(batches)
    wait_for(order[2:6])
    assert server.fetched == Counter(order)


def test_processes_share_a_cache(data: Path, server: HttpServer, tmp_path: Path) -> None:
    """Each shard is fetched by one of them; with little room they stay below the bound together."""
    images = train_images(RemoteFolder(server.url, tmp_path / "first"))
    assert images.shards is not None
    server.seconds[""] = 0.05
    for folder, cache_gb in (("whole", 50.0), ("small", gb_of(data / "train", 2))):
        server.fetched.clear()
        cache = tmp_path / folder
        remote = RemoteFolder(server.url + "/train", cache, cache_gb)
        shared = replace(images, shards=replace(images.shards, remote=remote, folder=cache))
        steps = (1, 1, -1, PER_SHARD)
        start = PROCESSES.Barrier(len(steps))
        readers = [PROCESSES.Process(target=read_all, args=(shared, step, start)) for step in steps]
        for reader in readers:
            reader.start()
        sizes = [0]
        while any(reader.is_alive() for reader in readers):
            sizes.append(bytes_in(shared))
            time.sleep(0.002)
        assert [reader.exitcode for reader in readers] == [0, 0, 0, 0]
        assert 0 < max(sizes) <= remote.cache_bytes
        if folder == "whole":
            assert set(server.fetched.values()) == {1} and len(server.fetched) == SHARDS
        assert not [path.name for path in cache.iterdir() if path.name.endswith((".part", ".tar.lock"))]


def test_the_bound_holds_while_a_transfer_ends(
    data: Path, server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that becomes complete between the listing of the cache and a look at its files counts."""
    images = train_images(RemoteFolder(server.url, tmp_path / "cache"))
    shards = images.shards
    assert shards is not None
    sizes = {name: shard.stamp[1] for name, shard in shards.shards.items()}
    first, second = sorted(sizes)[:2]
    small = replace(
        shards,
        remote=replace(shards.remote, cache_gb=(max(sizes[first], sizes[second]) + 1) / 1e9),
        folder=tmp_path / "small",
    )
    small.folder.mkdir()
    listing, release = threading.Event(), threading.Event()
    scandir = os.scandir

    def slow_scandir(path: Any) -> Any:
        if threading.current_thread().name != "second":
            return scandir(path)
        entries = list(scandir(path))
        listing.set()
        time.sleep(0.3)  # Time for the first transfer to end, if nothing keeps it from it.
        return entries

    transfer = ShardCache._transfer

    def watched_transfer(cache: ShardCache, name: str, *arguments: Any) -> None:
        if name == first:
            assert release.wait(10) and listing.wait(10)
        transfer(cache, name, *arguments)

    monkeypatch.setattr(shard_cache.os, "scandir", slow_scandir)
    monkeypatch.setattr(ShardCache, "_transfer", watched_transfer)
    one = threading.Thread(target=small.fetch, args=(first,), name="first")
    one.start()
    while not list(small.folder.glob(".*.tar.*.lock")):
        time.sleep(0.01)
    other = threading.Thread(target=lambda: small.fetch(second, wait=False), name="second")
    other.start()
    release.set()
    one.join()
    other.join()
    assert small.holds(first) and not small.holds(second)


def test_a_name_that_is_as_long_as_names_may_be(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "data", shards=1, per_shard=3)
    (root / "train-000.tar").rename(root / f"{'漢' * 80}.tar")
    with serving(root) as server:
        assert len(read_split(RemoteFolder(server.url, tmp_path / "shards"), "loose images").images) == 3


def test_failures_are_retried_and_then_named(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = train_images(RemoteFolder(server.url, tmp_path / "cache"))
    before = np.asarray(images.open(0))

    def fetch_again() -> Any:
        for path in (tmp_path / "cache").glob("*-train-000.tar"):
            path.unlink()
        server.fetched.clear()
        return images.open(0)

    server.password = "Basic dXNlcjp3b3Jk"
    with pytest.raises(UserError, match=r"train-000.tar cannot be read without the right credentials .*netrc"):
        fetch_again()
    assert server.fetched["train-000.tar"] == 1
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password word")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert np.array_equal(np.asarray(fetch_again()), before)
    for injected in (server.failing, server.cut):
        injected["train-000.tar"] = 4
        assert np.array_equal(np.asarray(fetch_again()), before)
        assert server.fetched["train-000.tar"] == 5
        injected["train-000.tar"] = 100
        with pytest.raises(UserError, match=r"train/train-000.tar cannot be read .*(503|bytes instead of)") as caught:
            fetch_again()
        assert caught.value.local and "\n" not in str(caught.value)
        injected.clear()
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")] == [".lock"]
    assert np.array_equal(np.asarray(fetch_again()), before)


def test_a_server_that_falls_silent(server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "SILENCE_S", 0.2)
    monkeypatch.setattr(urls, "PAUSES_S", (0.01,))
    server.seconds["train-002.tar"] = 2
    with pytest.raises(UserError, match=r"train-002.tar cannot be read .*imeout"):
        train_images(RemoteFolder(server.url, tmp_path))


def test_a_shard_that_was_damaged_in_the_cache_is_fetched_again(server: HttpServer, tmp_path: Path) -> None:
    images = train_images(RemoteFolder(server.url, tmp_path / "cache"))
    before = np.asarray(images.open(0))
    os.truncate(images.path(0), 100)
    assert np.array_equal(np.asarray(images.open(0)), before)
    assert images.path(0).stat().st_size == images.shards.shards["train-000.tar"].stamp[1]


def test_a_full_disk(server: HttpServer, tmp_path: Path) -> None:
    images = train_images(RemoteFolder(server.url, tmp_path / "cache"))
    images.path(0).unlink()
    server.fetched.clear()
    reader = PROCESSES.Process(target=read_on_full_disk, args=(images, f"There is no disk space in {tmp_path}"))
    reader.start()
    reader.join()
    assert reader.exitcode == 0
    assert server.fetched == {"train-000.tar": 1} and not list((tmp_path / "cache").glob(".*.part"))


def test_what_a_killed_process_left_is_deleted(data: Path, server: HttpServer, tmp_path: Path) -> None:
    """And nothing that the cache did not make, even if there is no more room."""
    cache = tmp_path / "cache"
    images = train_images(RemoteFolder(server.url, cache, gb_of(data / "train", 2)))
    for path in cache.glob("*.tar"):
        path.unlink()
    (cache / "notes.txt").write_text("of somebody else")
    server.seconds["train-000.tar"] = 60
    reader = PROCESSES.Process(target=read_all, args=(images, 1))
    reader.start()
    while not list(cache.glob(".*.tar.*.lock")):
        time.sleep(0.01)
    os.kill(reader.pid, signal.SIGKILL)
    reader.join()
    del server.seconds["train-000.tar"]
    images.open(len(images) - 1)
    assert {path.name for path in cache.iterdir()} == {".lock", "notes.txt", images.path(len(images) - 1).name}
    read_all(images, PER_SHARD)
    last = {images.path(n).name for n in (len(images) - 1, len(images) - 1 - PER_SHARD)}
    assert {path.name for path in cache.iterdir()} == {".lock", "notes.txt", *last}


def test_a_shard_that_was_rewritten_is_indexed_and_fetched_again(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "data", shards=2, per_shard=3)
    with serving(root) as server:
        remote = RemoteFolder(server.url, tmp_path / "shards")
        before = read_split(remote, "loose images").images
        assert before.labels.tolist() == [0, 1, 2, 3, 0, 1]
        shard, end = root / "train-001.tar", int(before.offset[4])
        # The label of the image before, so that only the time tells.
        head, label, tail = shard.read_bytes()[:end].rpartition(b"3" + bytes(511))
        assert label
        shard.write_bytes(head + b"2" + label[1:] + tail + shard.read_bytes()[end:])
        os.utime(shard, (1, 1))
        server.fetched.clear()
        assert read_split(remote, "loose images").images.labels.tolist() == [0, 1, 2, 2, 0, 1]
        assert server.fetched == {"train-001.tar": 1}


def test_bad_images_are_known_when_their_shards_are_gone(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "data", shards=2, per_shard=3)
    with serving(root) as server:
        remote = RemoteFolder(server.url, tmp_path / "shards")
        images = read_split(remote, "loose images").images
        remember(images, [images.bad(4, "broken")])
        for path in (tmp_path / "shards").glob("*.tar"):
            path.unlink()
        again = read_split(remote, "loose images")
        assert again.images.faults == {4: "broken"} == BadList(again.images.bad_list).faults(again.images)
        assert verify_split(again).images.faults == {}


def test_parquet(tmp_path: Path) -> None:
    """Files of a split in one folder; all must fit, as their row groups are in random order."""
    (tmp_path / "data").mkdir()
    for split, count in (("train", 2), ("validation", 1)):
        for k in range(count):
            rows = [{"image": {"bytes": encode(make_image(5 * k + n)), "path": ""}, "label": n % 2} for n in range(8)]
            table = pyarrow.Table.from_pylist(rows)
            parquet.write_table(table, tmp_path / f"data/{split}-{k:05d}.parquet", row_group_size=3)
    expected = list(islice(loader_of(train_images(tmp_path / "data")).batches(0), 5))
    with serving(tmp_path / "data") as server:
        images = train_images(RemoteFolder(server.url, tmp_path / "cache"))
        assert_equal(list(islice(loader_of(images).batches(0), 5)), expected)
        assert set(server.fetched.values()) == {1}
        size = (tmp_path / "data/train-00000.parquet").stat().st_size
        with pytest.raises(UserError, match=r"--cache_gb .* pack"):
            loader_of(train_images(RemoteFolder(server.url, tmp_path / "small", 1.5 * size / 1e9)))


def command(location: str, *flags: str, dataset: str = "imagenet") -> list[str]:
    small = "--view_size 32 --width 4 --batch_size 8 --max_epochs 1 --warmup_epochs 0 --num_workers 1 --log_every 1"
    return ["--dataset", dataset, "--data_dir", location, *small.split(), *flags]


def test_mistakes_are_one_sentence(
    data: Path, server: HttpServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = f"{gb_of(data / 'train', 1) / 2:.9f}"
    window = f"{gb_of(data / 'train', 3):.9f}"

    fsspec_registry = importlib.import_module("fsspec.registry")  # Shadowed by a dictionary of the same name.

    def assert_refused(*arguments: str, names: tuple[str, ...]) -> None:
        assert launch.main(list(arguments)) == 2, arguments
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line]
        assert len(lines) == 1, printed.err
        assert all(name in lines[0] for name in names), lines[0]
        assert not (tmp_path / "runs").exists() and not list((tmp_path / "cache").rglob("*.part"))

    url = server.url
    assert_refused(*command(url, "--cache_gb", small), names=("--cache_gb", "train-00"))
    assert_refused(*command(url, "--cache_gb", window, "--shuffle_window", "4"), names=("--shuffle_window", "4 shards"))
    assert_refused(*command(f"{url}/nowhere"), names=(f"{url}/nowhere", "404"))
    assert_refused(*command(url, dataset="cifar10"), names=("cifar10", "folder"))
    assert_refused(*command("nosuch://host/folder"), names=("nosuch",))
    assert_refused("index", "nosuch://host/folder", names=("nosuch",))
    (tmp_path / "file").touch()
    assert_refused(*command(url, "--cache_dir", f"{tmp_path}/file/cache"), names=(f"{tmp_path}/file/cache",))
    assert_refused(*command(f"{url}/train"), names=(f"{url}/train/train",))
    for protocol, package, install in (
        ("https", "aiohttp", "stec[remote]"),
        ("s3", "s3fs", "pip install s3fs"),
        ("gs", "gcsfs", "pip install gcsfs"),
        ("hf", "huggingface_hub", "pip install huggingface_hub"),
        ("s3", "fsspec", "fsspec"),
    ):
        with monkeypatch.context() as patched:
            for module in [name for name in sys.modules if name.split(".")[0] == package]:
                patched.delitem(sys.modules, module)
            patched.setitem(sys.modules, package, None)
            patched.setattr(fsspec_registry, "_registry", {})
            assert_refused(*command(f"{protocol}://bucket/data"), names=(f"{protocol}://bucket/data", install))
    server.index = False
    assert_refused(*command(url), names=(url, "403", "index page"))


def test_s3(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        with pytest.raises(UserError, match=r"s3://bucket/data cannot be read without the right credentials.*s3fs"):
            train_images(RemoteFolder("s3://bucket/data", tmp_path / "shards"))
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        bucket = s3fs.S3FileSystem()
        bucket.mkdir("bucket")
        bucket.put(str(data), "bucket/data", recursive=True)
        images = train_images(RemoteFolder("s3://bucket/data", tmp_path / "shards"))
        expected = list(islice(loader_of(train_images(data)).batches(0), 4))
        assert_equal(list(islice(loader_of(images).batches(0), 4)), expected)
        for missing in ("s3://bucket/none", "s3://nobucket/data"):
            with pytest.raises(UserError, match=f"{missing} does not exist"):
                train_images(RemoteFolder(missing, tmp_path / "shards"))
        bucket.rm("bucket/data/val/train-000.tar")
        assert len(open_data_set("imagenet", RemoteFolder("s3://bucket/data", tmp_path / "shards")).test) == PER_SHARD
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
