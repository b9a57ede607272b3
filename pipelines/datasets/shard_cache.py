"""A bounded cache of remote shards on this machine, which its processes share.

A shard is fetched under a temporary name, compared with its listed size, and renamed. Nobody keeps a shard open between
reads, so any number of processes can work with a cache that holds only what is read next; the least recently read
shards make room for others.

Who fetches a shard holds a lock on a file whose name has the shard's size, which counts as used from then on. It is
made under the lock of the cache, so the bound holds for all processes together, and a shard is fetched once. Locks are
flock's: those of a process that is killed are gone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pipelines.datasets.listing import Stamp
from pipelines.datasets.urls import RemoteFolder, attempt, disk_is_full, open_folder, sentence
from pipelines.errors import UserError
from pipelines.files import unwritable

POLL_S = 0.05
"""How often it is tried again to make room, if all shards in the cache are in use."""
READ_NS = 10**9
"""A shard's time in ns is that of its last read, to a second."""
CACHED = re.compile(r"[0-9a-f]{24}-")
FETCHING = re.compile(r"\.([0-9a-f]{24}-.*)\.(\d+)\.lock$")
"""Files of the cache; others in its folder are neither counted nor deleted."""


@dataclass(frozen=True, kw_only=True)
class RemoteShard:
    """A shard as it was listed."""

    path: str
    """As fsspec names it."""
    stamp: Stamp
    """A number that changes with the content, as far as the server tells, and the size in bytes."""


@dataclass(frozen=True, kw_only=True)
class ShardCache:
    """The shards of a remote folder by name, as local files. For several threads, and valid in other processes."""

    remote: RemoteFolder
    folder: Path
    shards: Mapping[str, RemoteShard]

    @cached_property
    def paths(self) -> Mapping[str, Path]:
        """The local files of the shards by name; they exist if they are in the cache."""
        paths = {}
        for name, shard in self.shards.items():
            digest = hashlib.sha256(f"{self.remote.protocol} {shard.path} {shard.stamp}".encode()).hexdigest()
            # File names have at most 255 bytes.
            end = os.fsencode(name)[-100:].decode(errors="ignore")
            paths[name] = self.folder / f"{digest[:24]}-{end}"
        return paths

    def url(self, name: str) -> str:
        return str(self.remote / name)

    def holds(self, name: str) -> bool:
        return self.paths[name].exists()

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[int, Path]]:
        """A descriptor and the local file of a shard, which is fetched if it is missing, and kept while this is open.

        Raises UserError if it cannot be fetched.
        """
        path, size = self.paths[name], self.shards[name].stamp[1]
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch(name)
                continue
            try:
                _lock(descriptor, fcntl.LOCK_SH)
                status = os.fstat(descriptor)
                if status.st_nlink and status.st_size == size:
                    if time.time_ns() - status.st_mtime_ns > READ_NS:
                        os.utime(descriptor)
                    yield descriptor, path
                    return
            finally:
                _close(descriptor)
            if status.st_nlink:  # Not the file that was fetched.
                path.unlink(missing_ok=True)

    def touch(self, names: Sequence[str]) -> None:
        """Count these shards as read now, the first of them last."""
        now = time.time_ns()
        for n, name in enumerate(names):
            with suppress(OSError):
                os.utime(self.paths[name], ns=(now, now - n * 1000))

    def fetch(self, name: str, *, wait: bool = True) -> bool:
        """Fetch a shard that is not in the cache. Returns whether it is there.

        If it is being fetched already or there is no room, ``wait`` for that, or return. Raises UserError if it cannot
        be fetched.
        """
        shard, path = self.shards[name], self.paths[name]
        size = shard.stamp[1]
        reservation = self.folder / f".{path.name}.{size}.lock"
        while not path.exists():
            reserved = self._reserve(reservation, size)
            if isinstance(reserved, int):
                try:
                    # Another process may have fetched it since it was looked for.
                    if not path.exists():
                        self._transfer(name, shard, path)
                finally:
                    try:
                        # While others make room, what they have listed must not change: the shard or its reservation
                        # would count as nothing.
                        with self.locked():
                            reservation.unlink(missing_ok=True)
                    finally:
                        _close(reserved)
            elif not wait:
                return False
            elif reserved == "no room":
                time.sleep(POLL_S)
            else:
                with suppress(FileNotFoundError), reservation.open("rb") as file:
                    _lock(file.fileno(), fcntl.LOCK_SH)
        return True

    def _transfer(self, name: str, shard: RemoteShard, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.part")
        files, _ = open_folder(self.remote)

        def get() -> None:
            files.get_file(shard.path, str(temporary))
            fetched = temporary.stat().st_size
            if fetched != shard.stamp[1]:
                raise OSError(f"{fetched} bytes instead of {shard.stamp[1]}")

        try:
            attempt(get)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except Exception as error:
            if disk_is_full(error):
                raise UserError(
                    f"There is no disk space in {self.folder} for {self.url(name)}; free some, or give a smaller "
                    f"--cache_gb or another --cache_dir.",
                    local=True,
                ) from error
            raise sentence(self.url(name), error) from error
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from changing the cache. Raises UserError if it cannot be written or locked."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        try:
            _lock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            _close(descriptor)

    def _reserve(self, reservation: Path, size: int) -> int | Literal["no room"] | None:
        """Reserve space for a shard, after deleting others if need be.

        Returns the descriptor of the locked ``reservation``, or None if another process has it.
        """
        with self.locked():
            if reservation.exists() and not _delete_unlocked(reservation):
                return None
            if not self._make_room(size):
                return "no room"
            descriptor = os.open(reservation, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _lock(descriptor, fcntl.LOCK_EX)
            return descriptor

    def _make_room(self, size: int) -> bool:
        """Delete the least recently read shards that nobody reads until there is room. Returns whether there is."""
        reserved, shards = {}, []
        for entry in os.scandir(self.folder):
            if match := FETCHING.fullmatch(entry.name):
                if not _delete_unlocked(Path(entry)):
                    reserved[match[1]] = int(match[2])
            elif CACHED.match(entry.name):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    shards.append((status.st_mtime_ns, status.st_size, Path(entry)))
        # A shard that was just fetched may still have its reservation.
        shards = [shard for shard in shards if shard[2].name not in reserved]
        used = sum(reserved.values()) + sum(size for _, size, _ in shards)
        for _, freed, path in sorted(shards):
            if used + size <= self.remote.cache_bytes:
                break
            if _delete_unlocked(path):
                used -= freed
        return used + size <= self.remote.cache_bytes


def _lock(descriptor: int, kind: int) -> None:
    """Raises UserError if the file system has no locks, and BlockingIOError with LOCK_NB."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(
            f"The file system of --cache_dir has no locks ({error.strerror}); give a folder on a local disk."
        ) from error


def _delete_unlocked(path: Path) -> bool:
    """Delete a file, and the transfer to it, unless a process has locked it. Returns whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        if match := FETCHING.fullmatch(path.name):
            path.with_name(f".{match[1]}.part").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return True
    finally:
        _close(descriptor)


def _close(descriptor: int) -> None:
    """Unlock and close a file. Closing alone would not unlock it while a process forked in between lives."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
