"""A real Storage server with the interface of its double: a proxy on loopback in front of it counts requests, holds
them back and answers in its place; objects are put and read past the proxy.

It needs a project of its own: the buckets are the daemon's, and what they hold at the end is deleted. One that holds
anything at the start is refused.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, Self

import httpx

from tests.doubles.loopback import Cut, Exchange
from tests.doubles.storage import Faulty

BUCKETS = ("lora-models", "lora-datasets")
_OBJECT = re.compile(r"/storage/v1/object/(?:sign|authenticated)/(.+)")
# Of one connection, not of the request.
_HOP = frozenset({"host", "connection", "keep-alive", "transfer-encoding", "content-length", "date"})


class RealStorage(Faulty):
    """Enter it to serve. `url` is the proxy's."""

    def __init__(self, url: str, key: str) -> None:
        self.key = key
        self._real = url
        self._http = httpx.AsyncClient(timeout=120)
        self._past = httpx.Client(timeout=60, headers={"Authorization": f"Bearer {key}", "apikey": key})
        self._uploads: list[str] = []
        # The objects that were sent whole.
        self.sent: list[str] = []
        # How the double behaves where servers differ: this one does as it does.
        self.tus = SimpleNamespace()
        self.damage_next_object = False
        super().__init__()

    async def __aenter__(self) -> Self:
        for bucket in BUCKETS:
            self.set_bucket(bucket)
            if self.names(bucket):
                raise RuntimeError(f"{bucket} of {self._real} holds objects: give the tests an empty project")
        return await super().__aenter__()

    async def __aexit__(self, *exc: object) -> None:
        await super().__aexit__(*exc)
        self.forget_uploads()
        for bucket in BUCKETS:
            self.set_bucket(bucket)
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

    def set_bucket(self, name: str, **options: Any) -> None:
        """Makes the bucket, or gives it these limits: none where none is given."""
        body = {"public": False, "file_size_limit": None, "allowed_mime_types": None, **options}
        made = self._ask("POST", "/bucket", json={"id": name, "name": name, **body}, allow=(200, 400))
        if made.status_code != 200:
            self._ask("PUT", f"/bucket/{name}", json=body)

    def drop_bucket(self, name: str) -> None:
        self._ask("POST", f"/bucket/{name}/empty", json={}, allow=(200, 400))
        self._ask("DELETE", f"/bucket/{name}", allow=(200, 400))

    def forget_uploads(self, status: int = 404) -> None:
        """Deletes every upload that has begun through the proxy."""
        for path in self._uploads:
            self._past.delete(f"{self._real}{path}", headers={"Tus-Resumable": "1.0.0"})

    async def handle(self, exchange: Exchange) -> None:
        self.requests.append((exchange.method, exchange.path))
        fault = self.fault_for(exchange)
        if await self.spoils(exchange, fault):
            return
        headers = {name: value for name, value in exchange.headers.items() if name not in _HOP}
        headers |= {"X-Forwarded-Host": self.host, "Content-Length": str(exchange.body_left)}
        try:
            async with self._http.stream(
                exchange.method,
                httpx.URL(self._real).copy_with(path=exchange.path, params=exchange.query),
                headers=headers,
                content=_cut(exchange.pieces(), fault.cut_request_after if fault is not None else None),
            ) as answer:
                if exchange.path.endswith("/upload/resumable") and "location" in answer.headers:
                    self._uploads.append(httpx.URL(answer.headers["location"]).raw_path.decode())
                if fault is not None and fault.lose_answer:
                    raise Cut("the answer is lost")
                await self._pass_on(exchange, answer, fault.cut_answer_after if fault is not None else None)
        except httpx.TransportError as error:
            raise Cut(str(error)) from error

    async def _pass_on(self, exchange: Exchange, answer: httpx.Response, cut_after: int | None) -> None:
        told = {name: value for name, value in answer.headers.items() if name not in _HOP}
        length = answer.headers.get("content-length")
        if length is None and answer.status_code not in (204, 304) and exchange.method != "HEAD":
            body = await answer.aread()
            await exchange.answer(answer.status_code, body, told)
            return
        exchange.start_answer(answer.status_code, told | ({"Content-Length": length} if length is not None else {}))
        async for piece in _cut(answer.aiter_raw(), cut_after):
            exchange.writer.write(piece)
            await exchange.writer.drain()
        if exchange.method == "GET" and answer.status_code == 200 and (found := _OBJECT.match(exchange.path)):
            self.sent.append(found[1])


async def _cut(pieces: AsyncIterator[bytes], after: int | None) -> AsyncIterator[bytes]:
    """The pieces, up to a byte at which the connection ends."""
    passed = 0
    async for piece in pieces:
        if after is not None and passed + len(piece) >= after:
            yield piece[: after - passed]
            raise Cut("as the test wants it")
        passed += len(piece)
        yield piece
