"""As much of the Hugging Face Hub as pushing a model and fetching it again asks for, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "a" * 40


class _Handler(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    """By ``owner/name/path``."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = self.path.partition("?")[0]
        here = f"http://{self.headers['Host']}"
        if address == "/api/repos/create":
            asked = json.loads(body)
            self._json({"url": f"{here}/{asked['organization']}/{asked['name']}"})
        elif address == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in address:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif "/commit/" in address:
            repo_id = address.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[f"{repo_id}/{line['value']['path']}"] = content
            self._json({"commitUrl": f"{here}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._absent("RepoNotFound")

    def do_GET(self) -> None:
        repo_id, _, rest = self.path.partition("?")[0].lstrip("/").partition("/resolve/")
        content = self.files.get(f"{repo_id}/{rest.partition('/')[2]}")
        if content is None:
            known = any(name.startswith(f"{repo_id}/") for name in self.files)
            self._absent("EntryNotFound" if known else "RepoNotFound")
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _absent(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[str]:
    """A Hub that holds ``files``, and takes what is pushed into them; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"files": files}))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
