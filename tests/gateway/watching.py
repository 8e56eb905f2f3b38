"""A browser's side of the dashboard's stream, without a browser: signed in, reading, keeping what it was told."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.daemon_process import eventually
from tests.gateway.conftest import KEY

HEADERS = {"X-Dashboard": "1"}


def sign_in(url: str, key: str = KEY) -> httpx.Client:
    """A client with the cookie that this key opens."""
    answer = httpx.post(f"{url}/dashboard/login", json={"key": key}, headers=HEADERS)
    assert answer.status_code == 204, answer.text
    return httpx.Client(base_url=url, timeout=30, headers=HEADERS, cookies=answer.cookies)


@dataclass(frozen=True)
class Told:
    """One event of the stream, and when it arrived by this process's monotonic clock."""

    event: str
    data: dict[str, Any]
    number: str
    at: float


@dataclass
class Watcher:
    """Use as a context manager; reads in a thread until left."""

    url: str
    last_event_id: str = ""
    cookies: httpx.Cookies | None = None
    told: list[Told] = field(default_factory=list)

    def __enter__(self) -> Watcher:
        cookies = self.cookies
        if cookies is None:
            with sign_in(self.url) as client:
                cookies = client.cookies
        cookie = "; ".join(f"{name}={value}" for name, value in cookies.items())
        address = urlsplit(self.url)
        self._connection = HTTPConnection(str(address.hostname), address.port, timeout=60)
        headers = {"Cookie": cookie} | ({"Last-Event-ID": self.last_event_id} if self.last_event_id else {})
        self._connection.request("GET", "/dashboard/stream", headers=headers)
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200, self._answer.read()
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        # As a browser that is closed: the reader's wait ends with the connection.
        with contextlib.suppress(OSError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        self._connection.close()

    def _read(self) -> None:
        event = data = number = ""
        with contextlib.suppress(OSError, HTTPException):
            while line := self._answer.readline():
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name == "event":
                    event = value
                elif name == "id":
                    number = value
                elif name == "data":
                    data = value
                elif not name:
                    self.told.append(Told(event, json.loads(data), number, time.monotonic()))
        self.ended.set()

    def wait(self, question: Callable[[Told], bool], *, after: int = 0, seconds: float = 30.0) -> Told:
        """The first message that answers the question."""
        return eventually(
            lambda: next((told for told in self.told[after:] if question(told)), None),
            seconds=seconds,
            why=lambda: f"not told: {[(told.event, str(told.data)[:300]) for told in self.told[-8:]]}",
        )

    def wait_for_job(self, job_id: object, *, after: int = 0, seconds: float = 30.0, **fields: object) -> Told:
        """The first message in which the job's line has these values."""

        def says(told: Told) -> bool:
            return any(
                line["job_id"] == str(job_id) and all(line[name] == value for name, value in fields.items())
                for line in told.data.get("jobs", ())
            )

        return self.wait(says, after=after, seconds=seconds)

    def snapshot(self) -> dict[str, Any]:
        return self.wait(lambda told: told.event == "snapshot").data
