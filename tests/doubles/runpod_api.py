"""RunPod's API v2 on loopback: the pods of one account, with the documented states, errors and misbehaviour.

A real HTTP server in its own thread, so that tests, daemons and fleet processes can all call it. Nothing in it depends
on time: a pod boots, stops and dies when the test says so. The older GraphQL API, which the runpod package uses, is
served at /graphql.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

NO_CAPACITY = "There are no longer any instances available with the requested specifications."
PAGE = 3
# A pod that is starting may be stopped; one that has ended may only be terminated.
MAY_STOP = {"PROVISIONING", "STARTING", "RUNNING"}


@dataclass
class PodRow:
    """One pod; the test reads and changes it."""

    id: str
    name: str
    status: str
    body: dict[str, Any]
    cost: float
    created_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat())

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "status": self.status,
            "createdAt": self.created_at,
            "image": self.body.get("image"),
            "gpu": self.body.get("gpu"),
            "env": self.body.get("env", {}),
            "cost": self.cost,
        }


@dataclass
class Failure:
    """After `skip` matching calls, the next `times` get this answer; `after`: only once their work is done."""

    status: int
    detail: str = "injected"
    times: int = 1
    skip: int = 0
    only: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False
    cut: bool = False


class RunPodDouble:
    """Enter it to serve. `keys` are the bearer keys and what each may do: read, create, end."""

    def __init__(self, prices: dict[str, float] | None = None) -> None:
        self.prices = {"NVIDIA H100 80GB HBM3": 3.0, "NVIDIA A40": 0.5} if prices is None else prices
        self.keys: dict[str, set[str]] = {"good-key": {"read", "create", "end"}}
        self.pods: dict[str, PodRow] = {}
        self.calls: list[tuple[str, str, dict[str, Any] | None]] = []
        self.failures: list[Failure] = []
        self.sold_out: set[str] = set()
        # While set, a create does its work but holds back its answer.
        self.hold_create = False
        self.created = threading.Event()
        self._release = threading.Event()
        self._count = 0
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> RunPodDouble:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._release.set()
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{self.root}/v2"

    def release(self) -> None:
        self.hold_create = False
        self._release.set()

    def fail(self, status: int, **how: Any) -> None:
        self.failures.append(Failure(status, **how))

    def add(self, pod_id: str, *, status: str = "RUNNING", cost: float = 3.0, **body: Any) -> PodRow:
        """Adds a pod that was made by hand."""
        self.pods[pod_id] = PodRow(pod_id, str(body.pop("name", pod_id)), status, body, cost)
        return self.pods[pod_id]

    @property
    def billing(self) -> list[PodRow]:
        return [pod for pod in self.pods.values() if pod.status not in ("EXITED", "TERMINATED")]

    def called(self, method: str, ending: str = "") -> list[tuple[str, str, dict[str, Any] | None]]:
        return [call for call in self.calls if call[0] == method and call[1].endswith(ending)]

    # -- what the handler asks -----------------------------------------------------------------------------------

    def answer(self, method: str, target: str, key: str, body: dict[str, Any] | None) -> Answer:
        parts = urlsplit(target)
        path, query = parts.path, parse_qs(parts.query)
        with self._lock:
            self.calls.append((method, path, body))
            injected = self._injected(method, path)
            if injected is not None and not injected.after:
                return _injected_answer(injected)
            answer = (
                self._graphql(key, body or {}) if path == "/graphql" else self._rest(method, path, query, key, body)
            )
        if self.hold_create and (method, path) == ("POST", "/v2/pods"):
            self.created.set()
            self._release.wait(30)
        return answer if injected is None else _injected_answer(injected)

    def _injected(self, method: str, path: str) -> Failure | None:
        for failure in self.failures:
            if failure.times > 0 and failure.only in f"{method} {path}":
                if failure.skip > 0:
                    failure.skip -= 1
                    continue
                failure.times -= 1
                return failure
        return None

    def _rest(
        self, method: str, path: str, query: dict[str, list[str]], key: str, body: dict[str, Any] | None
    ) -> Answer:
        rights = self.keys.get(key)
        if rights is None:
            return problem(401, "The API key is not valid.")
        action = re.fullmatch(r"/v2/pods/([^/]+)/action", path)
        one = re.fullmatch(r"/v2/pods/([^/]+)", path)
        needed = "read" if method == "GET" else "end" if action else "create"
        if needed not in rights:
            return problem(403, f"This key may not {needed}.")
        if (method, path) == ("GET", "/v2/pods"):
            return self._list(query)
        if (method, path) == ("POST", "/v2/pods"):
            return self._create(body or {})
        if action and method == "POST":
            return self._act(action[1], body or {})
        if one and method == "GET":
            pod = self.pods.get(one[1])
            return Answer(200, pod.as_json()) if pod else problem(404, "No such pod.")
        return problem(404, "No such route.")

    def _list(self, query: dict[str, list[str]]) -> Answer:
        # Terminated pods are no longer listed. Pages are short, so that every test needs several.
        listed = [pod.as_json() for pod in self.pods.values() if pod.status != "TERMINATED"]
        start = int(query.get("cursor", ["0"])[0])
        more = start + PAGE < len(listed)
        pagination = {"hasNextPage": more, "nextCursor": str(start + PAGE) if more else None}
        return Answer(200, {"pods": listed[start : start + PAGE], "pagination": pagination})

    def _create(self, body: dict[str, Any]) -> Answer:
        if not body.get("name") or not (body.get("image") or body.get("templateId")):
            return problem(422, "name and image are required.")
        if ("gpu" in body) == ("cpu" in body):
            return problem(400, "Exactly one of gpu or cpu must be set.")
        if (body.get("gpu") or {}).get("id") in self.sold_out:
            return problem(400, NO_CAPACITY)
        self._count += 1
        pod_id = f"pod{self._count}"
        gpu = body.get("gpu") or {}
        cost = self.prices.get(str(gpu.get("id")), 1.0) * int(gpu.get("count", 1))
        self.pods[pod_id] = PodRow(pod_id, str(body["name"]), "PROVISIONING", body, cost)
        return Answer(201, self.pods[pod_id].as_json())

    def _act(self, pod_id: str, body: dict[str, Any]) -> Answer:
        pod = self.pods.get(pod_id)
        if pod is None:
            return problem(404, "No such pod.")
        if body.get("action") == "stop" and pod.status in MAY_STOP:
            pod.status = "EXITED"
        elif body.get("action") == "terminate" and pod.status != "TERMINATED":
            pod.status = "TERMINATED"
        elif body.get("action") in ("stop", "terminate"):
            return problem(409, f"The pod is {pod.status}.")
        else:
            return problem(422, "No such action.")
        return Answer(200, pod.as_json())

    def _graphql(self, key: str, body: dict[str, Any]) -> Answer:
        if "end" not in self.keys.get(key, set()):
            return Answer(401, {"errors": [{"message": "Unauthorized"}]})
        wanted = re.search(r'(podStop|podTerminate)\(input:\s*\{\s*podId:\s*"([^"]+)"', str(body.get("query")))
        pod = self.pods.get(wanted[2]) if wanted else None
        if wanted is None or pod is None:
            return Answer(200, {"errors": [{"message": "no such pod"}]})
        pod.status = "EXITED" if wanted[1] == "podStop" else "TERMINATED"
        return Answer(200, {"data": {wanted[1]: {"id": pod.id, "desiredStatus": pod.status}}})


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Answer:
    """Returns an RFC 9457 problem document."""
    return Answer(status, {"title": "Problem", "status": status, "detail": detail}, headers or {})


def _injected_answer(failure: Failure) -> Answer:
    if failure.cut:
        return Answer(0, None, cut=True)
    return problem(failure.status, failure.detail, failure.headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, double: RunPodDouble) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.double = double


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        answer = self.server.double.answer(self.command, self.path, key, body)
        if answer.cut:
            self.close_connection = True
            return
        content = json.dumps(answer.body).encode()
        kind = "application/json" if answer.status < 400 else "application/problem+json"
        try:
            self.send_response(answer.status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            # The caller was killed while we held back its answer.
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Does nothing."""
