"""Folders at URLs: opened, listed and read by fsspec, whose errors become sentences."""

from __future__ import annotations

import asyncio
import errno
import posixpath
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from pipelines.errors import UserError

T = TypeVar("T")

PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Before each of the further attempts at what has failed."""
SILENCE_S = 60
"""How long an http server may send nothing; a whole shard may take any time."""
PACKAGES = {
    "abfs": "adlfs", "az": "adlfs", "gcs": "gcsfs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp",
    "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "sftp": "paramiko",
}  # fmt: skip
"""The packages by which fsspec reads from a protocol."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of shards at an fsspec URL, and the cache on this machine into which they are fetched."""

    url: str
    cache_dir: Path | None = None
    """None: ``shards`` in the folder of the indexes."""
    cache_gb: float = 50.0
    """The most bytes in the cache, in units of 10^9, for all data sets and processes that share it."""

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemoteFolder:
        return replace(self, url=f"{self.url.rstrip('/')}/{name}")

    @property
    def protocol(self) -> str:
        return self.url.partition("://")[0]

    @property
    def cache_bytes(self) -> int:
        return int(self.cache_gb * 1e9)


class MissingFolder(UserError):
    """There is nothing at a URL."""


def is_url(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def open_folder(folder: RemoteFolder) -> tuple[Any, str]:
    """fsspec's file system, of which a forked process gets its own, and its path of the folder.

    Raises UserError if a package is missing.
    """
    options: dict[str, Any] = {}
    try:
        from fsspec.core import url_to_fs

        if folder.protocol in ("http", "https"):
            import aiohttp

            # aiohttp's default limits the time of a whole transfer.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
            headers = {"Accept-Encoding": "identity"}  # Else sizes are those of compressed content.
            options["client_kwargs"] = {"timeout": timeout, "headers": headers, "trust_env": True}
        files, path = url_to_fs(folder.url, **options)
        return files, str(path)
    except ImportError as error:
        package = PACKAGES.get(folder.protocol, "fsspec")
        install = '"stec[remote]"' if package == "aiohttp" else package
        raise UserError(f"Reading {folder} needs fsspec and {package}; run pip install {install}.") from error
    except Exception as error:
        if isinstance(error, ValueError) and "rotocol" in str(error):
            raise UserError(f"fsspec knows no protocol {folder.protocol}:// ({folder}); check the URL.") from error
        raise sentence(folder, error) from error


def list_files(folder: RemoteFolder) -> dict[str, dict[str, Any]]:
    """fsspec's entries of the files directly in a folder, by their names.

    Over http these are the links of its index page, without sizes. Raises MissingFolder if there is none, and UserError
    if it cannot be listed.
    """
    over_http = folder.protocol in ("http", "https")
    files, path = open_folder(folder)
    path = path.rstrip("/") + "/" if over_http else path
    files.invalidate_cache()
    try:
        entries = attempt(lambda: files.ls(path, detail=True))
    except UserError:
        raise
    except Exception as error:
        if over_http and (status := next(statuses(error), 404 if _is_final(error) else 0)) in (401, 403, 404, 410):
            raise MissingFolder(
                f"{path} does not exist, is private, or has no index page with links to its shards ({status}); check "
                f"the URL, and user and password in ~/.netrc."
            ) from error
        if _is_final(error) and not _lacks_credentials(error):
            raise MissingFolder(f"{folder} does not exist; check the URL.") from error
        raise sentence(folder, error) from error
    names = ((posixpath.basename(entry["name"]), entry) for entry in entries if entry["type"] != "directory")
    return {unquote(name) if over_http else name: entry for name, entry in names if name}


def attempt(action: Callable[[], T]) -> T:
    """The result of ``action``, after some more attempts if it fails for a reason that may pass.

    A server that sends nothing gets one more, as each takes long.
    """
    timeouts = 0
    for pause_s in PAUSES_S:
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            timeouts += any(isinstance(one, TimeoutError | asyncio.TimeoutError) for one in _chain(error))
            if _is_final(error) or timeouts > 1:
                raise
            time.sleep(pause_s)
    return action()


def sentence(where: object, error: Exception) -> UserError:
    """The error for the user if something at a URL cannot be read."""
    protocol = str(where).partition("://")[0]
    if _lacks_credentials(error):
        package = PACKAGES.get(protocol, "fsspec")
        place = "~/.netrc" if package == "aiohttp" else f"the environment or the files that {package} reads"
        return UserError(
            f"{where} cannot be read without the right credentials ({_cause(error)}); give them in {place}.",
            local=True,
        )
    if _is_final(error):
        return UserError(f"{where} does not exist; check the URL.", local=True)
    return UserError(
        f"{where} cannot be read ({_cause(error)}), also when it was tried again; check the connection and the server, "
        f"and start again.",
        local=True,
    )


def disk_is_full(error: Exception) -> bool:
    return any(getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) for one in _chain(error))


def statuses(error: Exception) -> Iterator[int]:
    """The status codes of http in an error and its causes, as the packages of fsspec hold them."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        found = getattr(one, "status", None) or getattr(response, "status_code", None) or getattr(one, "code", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(found, int | str) and str(found).isdigit():
            yield int(found)


def _is_final(error: Exception) -> bool:
    """Whether another attempt is useless."""
    if _lacks_credentials(error) or disk_is_full(error):
        return True
    status = next(statuses(error), None)
    if status is not None:
        return status in (404, 410)
    # fsspec reports any failure of a request for an http file's size as a missing file.
    return isinstance(_chain(error)[-1], FileNotFoundError)


def _lacks_credentials(error: Exception) -> bool:
    text = " ".join(f"{type(one).__name__} {one}" for one in _chain(error)).lower()
    status = next(statuses(error), None)
    return status in (401, 403) or isinstance(error, PermissionError) or "credential" in text


def _cause(error: Exception) -> str:
    first = _chain(error)[-1]
    return " ".join(str(first).split()) or type(first).__name__


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its causes."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain
