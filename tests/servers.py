"""A real http server on this machine that fails, cuts off or delays what a test wants, and processes that read."""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

    from pipelines.datasets.images import ImageFiles


class HttpServer(ThreadingHTTPServer):
    """Serves a folder; ``index`` is whether folders have a page with links."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.fetched: Counter[str] = Counter()
        """How often files were asked for, by name; not questions for their size."""
        self.failing: Counter[str] = Counter()
        """How often files are still to be refused, by name."""
        self.cut: Counter[str] = Counter()
        """How often files are still to end after half of their bytes, by name."""
        self.seconds: dict[str, float] = {}
        """How long a file takes, by name; "" for all others."""
        self.index = True
        self.password: str | None = None
        """The Authorization that files need, if any."""

    def handle_error(self, _request: Any, _address: Any) -> None:
        """Clients may go away."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    server: HttpServer

    def log_message(self, *_arguments: Any) -> None:
        pass

    def list_directory(self, path: Any) -> Any:
        if self.server.index:
            return super().list_directory(path)
        self.send_error(403)
        return None

    def do_GET(self) -> None:
        name = Path(self.path).name
        if not name.endswith((".tar", ".parquet")):
            return super().do_GET()
        self.server.fetched[name] += 1
        if self.headers["Authorization"] != self.server.password is not None:
            return self.send_error(401)
        if self.server.failing[name] > 0:
            self.server.failing[name] -= 1
            return self.send_error(503)
        time.sleep(self.server.seconds.get(name, self.server.seconds.get("", 0)))
        if self.server.cut[name] > 0:
            self.server.cut[name] -= 1
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            # Without a length: the client takes the end of the connection for that of the file.
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            return None
        return super().do_GET()


PROCESSES = multiprocessing.get_context("spawn")
"""Of processes that load no more than they need."""


def read_all(images: ImageFiles, step: int, start: Barrier | None = None) -> None:
    """Decode every image (1), or from the last one on (-1), or some of them, after other processes are there."""
    if start is not None:
        start.wait()
    for n in range(len(images))[::step]:
        images.open(n)


def read_on_full_disk(images: ImageFiles, first_words: str) -> None:
    """Decode an image while no file may grow to 100 bytes; exits with 0 if the error begins with these words."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        images.open(0)
    except UserError as error:
        os._exit(0 if str(error).startswith(first_words) else 2)


@contextmanager
def serving(folder: Path) -> Iterator[HttpServer]:
    server = HttpServer(folder)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
