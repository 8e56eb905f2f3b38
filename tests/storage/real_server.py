"""Which Storage the tests run against: the double, and a real server as well when its URL and key are given.

TEST_SUPABASE_URL     for example http://127.0.0.1:8000 or https://<ref>.supabase.co
TEST_SUPABASE_KEY     its service_role key
TEST_SUPABASE_ANON    its anon key; without it, what an anon key sees is tested against the double alone

Every test that asks for the fixture `project`, or for `double` in tests/storage, is run against both. Those that look
inside the double (a changed secret, a file on its disk) are marked `double` and passed over there. They use the
daemon's buckets and want a project of their own, empty; run them with `-n 0`:

    TEST_SUPABASE_URL=… TEST_SUPABASE_KEY=… pytest -n 0 -k real tests/storage tests/lifecycle

The others make buckets whose names begin with `trainer-test-`, and delete them at the end.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest

from tests.doubles.real_storage import RealStorage
from tests.doubles.storage import Bucket, StorageDouble
from tests.doubles.storage_keys import ANON_KEY

REAL_URL = os.environ.get("TEST_SUPABASE_URL", "").rstrip("/")
REAL_KEY = os.environ.get("TEST_SUPABASE_KEY", "")
REAL_ANON = os.environ.get("TEST_SUPABASE_ANON", "")
SERVERS = ["double", "real"] if REAL_URL and REAL_KEY else ["double"]


@dataclass
class Server:
    """A Storage server under test, and a way to ask it without any client of ours."""

    url: str
    key: str
    anon: str
    http: httpx.AsyncClient
    bucket: str
    double: StorageDouble | None = None
    made: list[str] = field(default_factory=list)

    async def ask(self, method: str, path: str, *, key: str | None = None, **rest: Any) -> httpx.Response:
        token = self.key if key is None else key
        headers = {"Authorization": f"Bearer {token}", "apikey": token, **rest.pop("headers", {})}
        return await self.http.request(method, f"{self.url}/storage/v1{path}", headers=headers, **rest)

    async def make_bucket(self, **options: Any) -> str:
        """Adds a private bucket; returns its name."""
        name = f"trainer-test-{uuid4().hex[:12]}"
        if self.double is not None:
            self.double.buckets[name] = Bucket(**options)
        else:
            body = {"id": name, "name": name, "public": False, **options}
            (await self.ask("POST", "/bucket", json=body)).raise_for_status()
            self.made.append(name)
        return name

    async def put(self, name: str, content: bytes, bucket: str | None = None) -> None:
        answer = await self.ask(
            "POST", f"/object/{bucket or self.bucket}/{name}", files={"file": content}, headers={"x-upsert": "true"}
        )
        answer.raise_for_status()


@asynccontextmanager
async def open_storage_server(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[StorageDouble]:
    """The double, or a real server behind a proxy that does what tests ask of the double: the fixture's parameter."""
    if request.param == "double":
        async with StorageDouble(folder / "double") as double:
            yield double
        return
    if request.node.get_closest_marker("double") is not None:
        pytest.skip("it looks inside the double")
    async with RealStorage(REAL_URL, REAL_KEY) as real:
        yield cast(StorageDouble, real)


@asynccontextmanager
async def serve(kind: str, folder: Path) -> AsyncIterator[Server]:
    async with httpx.AsyncClient(timeout=30) as http:
        if kind == "double":
            async with StorageDouble(folder / "double") as double:
                server = Server(double.url, double.key, ANON_KEY, http, "", double)
                server.bucket = await server.make_bucket()
                yield server
            return
        server = Server(REAL_URL, REAL_KEY, REAL_ANON, http, "")
        server.bucket = await server.make_bucket()
        try:
            yield server
        finally:
            for bucket in server.made:
                await server.ask("POST", f"/bucket/{bucket}/empty", json={})
                await server.ask("DELETE", f"/bucket/{bucket}")
