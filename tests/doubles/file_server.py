"""A caller's own server on loopback: serves the datasets that it names by URL and receives its callbacks."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class FileServer:
    """`files` maps a path to its bytes; `fetched` lists each requested path, `posted` each callback's headers and body.

    Enter it to serve."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.posted: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.fetched: list[str] = []
        files, posted, fetched = self.files, self.posted, self.fetched

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fetched.append(self.path)
                content = files.get(self.path.partition("?")[0])
                self.send_response(200 if content is not None else 404)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                posted.append((dict(self.headers), body))
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                """Does nothing: keeps the test's output clean."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def put(self, name: str, content: bytes) -> str:
        """Serves a file; returns its URL, with a signature like storage's."""
        self.files[f"/{name}"] = content
        return f"http://{self.host}/{name}?token=signed-for-an-hour"


def script_file(*actions: list[object]) -> bytes:
    """Returns a dataset that tells the scripted trainer what to do."""
    return (json.dumps({"script": actions}) + "\n").encode()
