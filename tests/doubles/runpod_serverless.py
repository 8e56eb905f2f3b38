"""RunPod's job API as its worker sees it: hands out jobs, takes updates and results, requests stops.

Small but real: HTTP on loopback, with the routes and shapes of runpod 1.12 (serverless/modules/rp_job, rp_http).
"""

from __future__ import annotations

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from tests.daemon_process import eventually

POLL_SECONDS = 0.5


class RunPodDouble:
    """`told` keeps every update and result in order of arrival. Enter it to serve."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self._jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stops: queue.Queue[str] = queue.Queue()
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                try:
                    if "/job-take/" in path:
                        self._answer(double._jobs.get(timeout=POLL_SECONDS))
                    elif "/job-stop/" in path:
                        self._answer({"jobsToStop": [double._stops.get(timeout=POLL_SECONDS)]})
                    else:
                        self._answer({})
                except queue.Empty:
                    self.send_response(204)
                    self.end_headers()

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                double.told.append({"id": urlsplit(self.path).path.rpartition("/")[2], **body})
                self._answer({})

            def _answer(self, content: object) -> None:
                body = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Does nothing: keeps the test's output clean."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> RunPodDouble:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that RunPod sets in a worker's container."""
        base = f"http://127.0.0.1:{self._server.server_port}/v2/endpoint"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=H100",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=H100",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_POD_ID": "pod-of-the-test",
        }

    def run(self, request_id: str, **given: Any) -> str:
        """POST /run, as a client calls it: the worker gets the job at its next poll."""
        self._jobs.put({"id": request_id, "input": given})
        return request_id

    def cancel(self, job_id: str) -> None:
        self._stops.put(job_id)

    def updates(self, job_id: str) -> list[dict[str, Any]]:
        return [told["output"] for told in self.told if told["id"] == job_id and told.get("status") == "IN_PROGRESS"]

    def result(self, job_id: str) -> dict[str, Any] | None:
        results = [told for told in self.told if told["id"] == job_id and told.get("status") != "IN_PROGRESS"]
        return results[-1] if results else None

    def wait_for_result(self, job_id: str, seconds: float = 40.0) -> dict[str, Any]:
        return eventually(lambda: self.result(job_id), seconds=seconds, why=lambda: f"no result, only {self.told[-3:]}")
