"""The resumable uploads (TUS) of the double of Supabase Storage.

Its refusals are plain text with their real status, unlike those of every other route. Only a key that Storage does not
accept is refused in JSON, as HTTP 400, before the upload is looked at.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from tests.doubles.loopback import Cut, Exchange

if TYPE_CHECKING:
    from tests.doubles.storage import Fault, StorageDouble

PATH = "/upload/resumable"
# How long a request waits for the lock of another before it is refused.
LOCK_SECONDS = 5.0


@dataclass
class Upload:
    """An upload that has begun. `lock` is held by one request at a time; `wanted` asks its holder to let go."""

    bucket: str
    name: str
    size: int
    file: Path
    gone_with: int | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def offset(self) -> int:
        return self.file.stat().st_size


class TusRefuses(Exception):
    """Plain text with a status."""

    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text


class ResumableUploads:
    def __init__(self, storage: StorageDouble, folder: Path) -> None:
        self._storage = storage
        self._folder = folder
        self.begun: dict[str, Upload] = {}
        self.forget_finished = False
        self.keep_partial_chunks = True
        # How long a request goes on after another one has asked for its lock (the server's own drain is 3 s).
        self.drain_seconds = 0.0

    async def answer(self, exchange: Exchange, path: str, role: str, fault: Fault | None) -> None:
        try:
            if exchange.headers.get("tus-resumable") != "1.0.0":
                raise TusRefuses(412, "Tus-Resumable Required\n")
            if exchange.method == "POST":
                await self._create(exchange, role)
                return
            upload = self._find(path.removeprefix(PATH).removeprefix("/"))
            if exchange.method != "HEAD":
                self._require_right(exchange, role, upload.bucket, upload.name)
            async with self._locked(upload):
                match exchange.method:
                    case "HEAD":
                        await self._tell(exchange, upload)
                    case "PATCH":
                        await self._take(exchange, upload, fault)
                    case "DELETE":
                        await self._remove(exchange, upload)
                    case _:
                        raise TusRefuses(404, "Not found\n")
        except TusRefuses as refused:
            await exchange.answer(refused.status, refused.text.encode(), {"Tus-Resumable": "1.0.0"})

    async def _create(self, exchange: Exchange, role: str) -> None:
        """In the server's order: names, size, right and duplicate, type."""
        pairs = (pair.split(" ") for pair in exchange.headers["upload-metadata"].split(","))
        facts = {name: base64.b64decode(value).decode() for name, value in pairs}
        size, storage = int(exchange.headers["upload-length"]), self._storage
        bucket_name, name = facts["bucketName"], facts["objectName"]
        if not storage.is_key(name):
            raise TusRefuses(400, f"Invalid key: {name}")
        bucket = storage.buckets.get(bucket_name)
        if bucket is None:
            raise TusRefuses(404, "Bucket not found")
        limit = storage.size_limit(bucket)
        if limit is not None and size > limit:
            raise TusRefuses(413, "Maximum size exceeded\n")
        self._require_right(exchange, role, bucket_name, name)
        kind = facts.get("contentType", "")
        # An empty list refuses every type here, and none in a whole upload.
        if kind and bucket.allowed_mime_types is not None and not bucket.takes(kind):
            raise TusRefuses(415, f"mime type {kind} is not supported")
        identity = base64.urlsafe_b64encode(f"{bucket_name}/{name}/{uuid4()}".encode()).rstrip(b"=").decode()
        file = self._folder / f"upload-{len(self.begun)}"
        file.touch()
        self.begun[identity] = Upload(bucket_name, name, size, file)
        await exchange.answer(201, b"", {"Location": self._location(exchange, identity), "Tus-Resumable": "1.0.0"})

    def _location(self, exchange: Exchange, identity: str) -> str:
        """Built from what a proxy in front says about the request; without it, http."""
        scheme = exchange.headers.get("x-forwarded-proto", self._storage.forwarded_proto)
        host = exchange.headers.get("x-forwarded-host", exchange.headers["host"])
        return f"{scheme}://{host}{self._storage.base}{PATH}/{identity}"

    def _find(self, identity: str) -> Upload:
        try:
            parts = base64.b64decode(identity + "=" * (-len(identity) % 4), altchars=b"-_", validate=False).split(b"/")
        except ValueError:
            parts = []
        # The server puts the project before it and wants bucket, name and version.
        if len(parts) < 2:
            raise TusRefuses(400, "Invalid upload id")
        upload = self.begun.get(identity)
        if upload is None or upload.gone_with is not None:
            status = upload.gone_with if upload is not None and upload.gone_with is not None else 404
            raise TusRefuses(status, "The file for this url was not found\n")
        return upload

    def _require_right(self, exchange: Exchange, role: str, bucket: str, name: str) -> None:
        """The server tries to insert the object's row with the rights of the key."""
        if role != "service_role":
            raise TusRefuses(403, "new row violates row-level security policy")
        if self._storage.path_of(bucket, name).is_file() and exchange.headers.get("x-upsert") != "true":
            raise TusRefuses(409, "The resource already exists")

    @contextlib.asynccontextmanager
    async def _locked(self, upload: Upload) -> AsyncIterator[None]:
        """One request at a time. The one that waits asks the holder to stop, which keeps what it has received."""
        upload.wanted.set()
        try:
            await asyncio.wait_for(upload.lock.acquire(), LOCK_SECONDS)
        except TimeoutError:
            raise TusRefuses(423, "Lock timeout\n") from None
        upload.wanted.clear()
        try:
            yield
        finally:
            upload.lock.release()

    async def _tell(self, exchange: Exchange, upload: Upload) -> None:
        headers = {"Upload-Offset": str(upload.offset), "Upload-Length": str(upload.size), "Tus-Resumable": "1.0.0"}
        await exchange.answer(200, b"", {**headers, "Cache-Control": "no-store"})

    async def _remove(self, exchange: Exchange, upload: Upload) -> None:
        if upload.offset == upload.size:
            raise TusRefuses(400, "Cannot terminate an already completed upload")
        upload.gone_with = 404
        upload.file.unlink()
        await exchange.answer(204, b"", {"Tus-Resumable": "1.0.0"})

    async def _take(self, exchange: Exchange, upload: Upload, fault: Fault | None) -> None:
        if int(exchange.headers["upload-offset"]) != upload.offset:
            raise TusRefuses(409, "Upload-Offset conflict\n")
        begun_at, received = upload.offset, 0
        limit = fault.cut_request_after if fault is not None else None
        with upload.file.open("ab") as file:
            try:
                async for piece in self._pieces(exchange, upload):
                    if limit is not None and received + len(piece) >= limit:
                        file.write(piece[: limit - received])
                        raise Cut("as the test wants it")
                    if begun_at + received + len(piece) > upload.size:
                        raise TusRefuses(413, "upload's size exceeded\n")
                    file.write(piece)
                    received += len(piece)
            except Cut:
                file.flush()
                if not self.keep_partial_chunks:
                    file.truncate(begun_at)
                raise
        offset = upload.offset
        if offset == upload.size:
            self._finish(upload)
        await exchange.answer(204, b"", {"Upload-Offset": str(offset), "Tus-Resumable": "1.0.0"})

    async def _pieces(self, exchange: Exchange, upload: Upload) -> AsyncIterator[bytes]:
        """The body, until another request wants the lock: what had come by then is kept, and told as a success."""
        wanted = asyncio.ensure_future(upload.wanted.wait())
        pieces = exchange.pieces()
        try:
            while True:
                piece: asyncio.Future[bytes | None] = asyncio.ensure_future(anext(pieces, None))  # type: ignore[arg-type]
                await asyncio.wait({piece, wanted}, return_when=asyncio.FIRST_COMPLETED)
                if not piece.done():
                    await asyncio.wait({piece}, timeout=self.drain_seconds)
                if not piece.done():
                    piece.cancel()
                    return
                if (came := piece.result()) is None:
                    return
                yield came
        finally:
            wanted.cancel()

    def _finish(self, upload: Upload) -> None:
        self._storage.store_file(upload.bucket, upload.name, upload.file)
        if self.forget_finished:
            upload.gone_with = 404
