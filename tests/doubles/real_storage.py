"""A real Storage server with the interface of its double: a proxy on loopback in front of it counts requests, holds
them back and answers in its place; objects are put and read past the proxy.

It needs a project of its own: the buckets are the daemon's, and what they hold at the end is deleted. One that holds
anything at the start is refused.
"""

from __future__ import annotations

import json
from typing import Any, Self

import httpx

from tests.doubles.loopback import Cut, Exchange
from tests.doubles.storage import Faulty

BUCKETS = ("lora-models", "lora-datasets")
# Of one connection, not of the request.
_HOP = frozenset({"host", "connection", "keep-alive", "transfer-encoding", "content-length", "date"})


class RealStorage(Faulty):
    """Enter it to serve. `url` is the proxy's."""

    def __init__(self, url: str, key: str) -> None:
        self.key = key
        self._real = url
        self._http = httpx.AsyncClient(timeout=120)
        self._past = httpx.Client(timeout=60, headers={"Authorization": f"Bearer {key}", "apikey": key})
        super().__init__()

    async def __aenter__(self) -> Self:
        for bucket in BUCKETS:
            self._ask("POST", "/bucket", json={"id": bucket, "name": bucket, "public": False}, allow=(200, 400))
            if self.names(bucket):
                raise RuntimeError(f"{bucket} of {self._real} holds objects: give the tests an empty project")
        return await super().__aenter__()

    async def __aexit__(self, *exc: object) -> None:
        await super().__aexit__(*exc)
        for bucket in BUCKETS:
            if names := sorted(self.names(bucket)):
                self._ask("DELETE", f"/object/{bucket}", json={"prefixes": names})
        await self._http.aclose()
        self._past.close()

    def _ask(self, method: str, path: str, *, allow: tuple[int, ...] = (200,), **rest: Any) -> httpx.Response:
        answer = self._past.request(method, f"{self._real}/storage/v1{path}", **rest)
        assert answer.status_code in allow, f"{method} {path}: {answer.status_code} {answer.text[:200]}"
        return answer

    def put(self, bucket: str, name: str, content: bytes) -> None:
        self._ask("POST", f"/object/{bucket}/{name}", files={"file": content}, headers={"x-upsert": "true"})

    def read(self, bucket: str, name: str) -> bytes:
        return self._ask("GET", f"/object/authenticated/{bucket}/{name}").content

    def names(self, bucket: str) -> set[str]:
        found, folders = set(), [""]
        while folders:
            folder = folders.pop()
            body = {"prefix": folder, "limit": 1000, "offset": 0}
            for entry in self._ask("POST", f"/object/list/{bucket}", json=body).json():
                path = f"{folder}/{entry['name']}".lstrip("/")
                # A folder is no object and has no id.
                found.add(path) if entry["id"] else folders.append(path)
        return found

    async def handle(self, exchange: Exchange) -> None:
        self.requests.append((exchange.method, exchange.path))
        fault = self.fault_for(exchange)
        if fault is not None and fault.held_until is not None:
            await fault.held_until.wait()
        if fault is not None and fault.status is not None:
            body = {"statusCode": str(fault.status), "error": "Injected", "message": "as the test wants it"}
            await exchange.answer(fault.status, json.dumps(body).encode(), {"Content-Type": "application/json"})
            return
        headers = {name: value for name, value in exchange.headers.items() if name not in _HOP}
        headers |= {"X-Forwarded-Host": self.host, "Content-Length": str(exchange.body_left)}
        try:
            async with self._http.stream(
                exchange.method,
                httpx.URL(self._real).copy_with(path=exchange.path, params=exchange.query),
                headers=headers,
                content=exchange.pieces(),
            ) as answer:
                await self._pass_on(exchange, answer)
        except httpx.TransportError as error:
            raise Cut(str(error)) from error

    async def _pass_on(self, exchange: Exchange, answer: httpx.Response) -> None:
        told = {name: value for name, value in answer.headers.items() if name not in _HOP}
        length = answer.headers.get("content-length")
        if length is None and answer.status_code not in (204, 304) and exchange.method != "HEAD":
            body = await answer.aread()
            await exchange.answer(answer.status_code, body, told)
            return
        exchange.start_answer(answer.status_code, told | ({"Content-Length": length} if length is not None else {}))
        async for piece in answer.aiter_raw():
            exchange.writer.write(piece)
            await exchange.writer.drain()
