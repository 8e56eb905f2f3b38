"""A double of Supabase Storage as a real HTTP server on loopback, with the behaviour that surprises clients.

- Errors are HTTP 400 with the real code as a string in the body's `statusCode`; only 500 is HTTP 500.
- Signed URLs expire; a download in flight survives it, a later Range request does not.
- A duplicate is answered before the body is read, and the connection is closed.
- Buckets have size limits and lists of MIME types; keys are checked.
- An object is not sent again to a client that names its ETag (If-None-Match).
- TUS: creation, HEAD, PATCH with offsets; 409 on a wrong offset, 423 while locked, 404/410 when gone; real
  HTTP statuses with plain text.

A status of Cloudflare's (520 to 527, 530) is sent as its HTML page, with that HTTP status.

Faults can be injected: cut a request or an answer at any byte, answer 5xx for a while, lose an answer or delay it.
As a separate process, `python -m tests.doubles.storage FOLDER [CUTS]` prints its URL and serves until stdin closes; it
cuts every second PATCH somewhere inside its chunk, CUTS times in all, and prints the number of cuts at the end.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from tests.doubles.loopback import Cut, Exchange, LoopbackDouble

SERVICE_KEY = "eyJ-service-role-key-of-the-double"
BASE = "/storage/v1"
_KEY = re.compile(r"^(\w|/|!|-|\.|\*|'|\(|\)| |&|\$|@|=|;|:|\+|,|\?)*$", re.ASCII)


@dataclass
class Bucket:
    file_size_limit: int | None = None
    allowed_mime_types: list[str] | None = None
    public: bool = False


@dataclass
class Upload:
    """A TUS upload that has begun."""

    bucket: str
    name: str
    size: int
    file: Path
    gone_with: int | None = None

    @property
    def offset(self) -> int:
        return self.file.stat().st_size


@dataclass
class Fault:
    """A fault for the next `times` requests that match."""

    matches: Callable[[Exchange], bool]
    times: int = 1
    status: int | None = None
    page: str | None = None  # sent unchanged with this status: the answer of a proxy in front, not of Storage
    headers: dict[str, str] = field(default_factory=dict)
    cut_request_after: int | None = None
    cut_answer_after: int | None = None
    lose_answer: bool = False
    held_until: asyncio.Event | None = None


class StorageRefuses(Exception):
    def __init__(self, status: int, error: str, message: str) -> None:
        self.status, self.error, self.message = status, error, message


class StorageDouble(LoopbackDouble):
    """Enter it to serve. Objects are files under `folder/objects/<bucket>/<path>`."""

    def __init__(self, folder: Path, key: str = SERVICE_KEY) -> None:
        self.key = key
        self.buckets: dict[str, Bucket] = {}
        self.uploads: dict[str, Upload] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.sent: list[str] = []
        self.forget_finished_uploads = False
        self.keep_partial_chunks = True
        self.damage_next_object = False
        self.clock = time.time
        self._folder = folder
        self._secret = uuid4().bytes
        super().__init__()

    async def __aenter__(self) -> Self:
        self.path_of("", "").mkdir(parents=True, exist_ok=True)
        return await super().__aenter__()

    def path_of(self, bucket: str, name: str) -> Path:
        return self._folder / "objects" / bucket / name

    def put(self, bucket: str, name: str, content: bytes) -> None:
        """Adds an object that exists from the start."""
        self.buckets.setdefault(bucket, Bucket())
        path = self.path_of(bucket, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def count(self, method: str, containing: str = "") -> int:
        return sum(1 for seen, path in self.requests if seen == method and containing in path)

    def fail(self, method: str, containing: str = "", **fault: Any) -> Fault:
        """Makes the next matching requests fail; see Fault."""
        made = Fault(lambda exchange: exchange.method == method and containing in exchange.path, **fault)
        self.faults.append(made)
        return made

    def forget_uploads(self, status: int = 404) -> None:
        """Loses every upload that has begun."""
        for upload in self.uploads.values():
            upload.gone_with = status

    # -- one request ----------------------------------------------------------------------------------------------

    async def handle(self, exchange: Exchange) -> None:
        self.requests.append((exchange.method, exchange.path))
        fault = self._fault_for(exchange)
        if fault is not None and fault.held_until is not None:
            await fault.held_until.wait()
        if fault is not None and fault.status is not None and fault.page is not None:
            kind = "text/html" if fault.page.startswith("<") else "application/json"
            await exchange.answer(fault.status, fault.page.encode(), {"Content-Type": kind})
            return
        if fault is not None and fault.status is not None:
            await _refuse(exchange, fault.status, "Injected", "as the test wants it", fault.headers)
            return
        if fault is not None and fault.lose_answer:
            exchange.writer = _Lost(exchange.writer)  # type: ignore[assignment]
        try:
            await self._route(exchange, fault)
        except StorageRefuses as refused:
            await _refuse(exchange, refused.status, refused.error, refused.message)
        if fault is not None and fault.lose_answer:
            raise Cut("the answer is lost")

    def _fault_for(self, exchange: Exchange) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.matches(exchange):
                fault.times -= 1
                return fault
        return None

    async def _route(self, exchange: Exchange, fault: Fault | None) -> None:
        path, method = exchange.path.removeprefix(BASE), exchange.method
        if path.startswith("/upload/resumable"):
            await self._tus(exchange, path, fault)
        elif method == "GET" and path.startswith("/object/sign/"):
            bucket, name = self._signed_object(exchange, path)
            await self._send_object(exchange, bucket, name, fault)
        else:
            self._require_key(exchange)
            match method, path.split("/")[1:]:
                case "GET", ["bucket", bucket]:
                    await _json(exchange, self._bucket_json(bucket))
                case "POST", ["bucket"]:
                    await self._create_bucket(exchange)
                case "POST", ["object", "sign", bucket, *name]:
                    await self._sign(exchange, bucket, "/".join(name))
                case "GET", ["object", "info", bucket, *name]:
                    await self._info(exchange, bucket, "/".join(name))
                case "GET", ["object", "authenticated", bucket, *name]:
                    await self._send_object(exchange, bucket, "/".join(name), fault)
                case "POST", ["object", bucket, *name]:
                    await self._upload(exchange, bucket, "/".join(name), fault)
                case "DELETE", ["object", bucket]:
                    await self._delete(exchange, bucket)
                case _:
                    raise StorageRefuses(404, "not_found", f"Route {method}:{path} not found")

    # -- buckets and small requests -------------------------------------------------------------------------------

    def _require_key(self, exchange: Exchange) -> None:
        if exchange.headers.get("apikey") != self.key:
            raise StorageRefuses(403, "Unauthorized", "signature verification failed")

    def _bucket(self, name: str) -> Bucket:
        if name not in self.buckets:
            raise StorageRefuses(404, "Bucket not found", "Bucket not found")
        return self.buckets[name]

    def _bucket_json(self, name: str) -> dict[str, Any]:
        bucket = self._bucket(name)
        at = "2026-11-01T00:00:00.000Z"
        return {
            "id": name, "name": name, "owner": "", "public": bucket.public, "created_at": at, "updated_at": at,
            "file_size_limit": bucket.file_size_limit, "allowed_mime_types": bucket.allowed_mime_types,
        }  # fmt: skip

    async def _create_bucket(self, exchange: Exchange) -> None:
        asked = json.loads(await exchange.body())
        if asked["id"] in self.buckets:
            raise StorageRefuses(409, "Duplicate", "The resource already exists")
        self.buckets[asked["id"]] = Bucket(asked.get("file_size_limit"), asked.get("allowed_mime_types"))
        await _json(exchange, {"name": asked["id"]})

    async def _sign(self, exchange: Exchange, bucket: str, name: str) -> None:
        asked = json.loads(await exchange.body())
        self._existing(bucket, name)
        until = int(self.clock()) + int(asked["expiresIn"])
        token = f"{until}.{self._signature(bucket, name, until)}"
        await _json(exchange, {"signedURL": f"/object/sign/{bucket}/{name}?token={token}"})

    def _signature(self, bucket: str, name: str, until: int) -> str:
        return hmac.new(self._secret, f"{bucket}/{name}/{until}".encode(), hashlib.sha256).hexdigest()

    def _signed_object(self, exchange: Exchange, path: str) -> tuple[str, str]:
        bucket, _, name = path.removeprefix("/object/sign/").partition("/")
        until, _, signature = exchange.query.get("token", "0.").partition(".")
        if signature != self._signature(bucket, name, int(until)):
            raise StorageRefuses(400, "InvalidJWT", "invalid signature")
        if self.clock() > int(until):
            raise StorageRefuses(400, "InvalidJWT", '"exp" claim timestamp check failed')
        return bucket, name

    async def _info(self, exchange: Exchange, bucket: str, name: str) -> None:
        file = self._existing(bucket, name)
        await _json(exchange, {"name": name, "bucket_id": bucket, "size": file.stat().st_size})

    async def _delete(self, exchange: Exchange, bucket: str) -> None:
        asked = json.loads(await exchange.body())
        self._bucket(bucket)
        gone = [name for name in asked["prefixes"] if self.path_of(bucket, name).is_file()]
        for name in gone:
            self.path_of(bucket, name).unlink()
        await _json(exchange, [{"name": name} for name in gone])

    def _existing(self, bucket: str, name: str) -> Path:
        self._bucket(bucket)
        file = self.path_of(bucket, name)
        if not file.is_file():
            raise StorageRefuses(404, "not_found", "Object not found")
        return file

    # -- whole objects --------------------------------------------------------------------------------------------

    def _admit(self, bucket_name: str, name: str, size: int, mime: str) -> None:
        bucket = self._bucket(bucket_name)
        if not name or not _KEY.match(name):
            raise StorageRefuses(400, "InvalidKey", f"Invalid key: {name}")
        if bucket.file_size_limit is not None and size > bucket.file_size_limit:
            raise StorageRefuses(413, "Payload too large", "The object exceeded the maximum allowed size")
        if bucket.allowed_mime_types is not None and mime not in bucket.allowed_mime_types:
            raise StorageRefuses(415, "invalid_mime_type", f"mime type {mime} is not supported")

    async def _upload(self, exchange: Exchange, bucket: str, name: str, fault: Fault | None) -> None:
        self._bucket(bucket)
        if self.path_of(bucket, name).is_file() and exchange.headers.get("x-upsert") != "true":
            # Answered before the body is read.
            raise StorageRefuses(409, "Duplicate", "The resource already exists")
        received = b""
        async for piece in exchange.pieces():
            received += piece
            if fault is not None and fault.cut_request_after is not None and len(received) > fault.cut_request_after:
                raise Cut("as the test wants it")
        mime, content = _file_of_form(exchange.headers["content-type"], received)
        self._admit(bucket, name, len(content), mime)
        self._store(bucket, name, content)
        await _json(exchange, {"Id": str(uuid4()), "Key": f"{bucket}/{name}"})

    def _store(self, bucket: str, name: str, content: bytes) -> None:
        if self.damage_next_object:
            self.damage_next_object = False
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.put(bucket, name, content)

    async def _send_object(self, exchange: Exchange, bucket: str, name: str, fault: Fault | None) -> None:
        file = self._existing(bucket, name)
        size = file.stat().st_size
        tag = f'"{hashlib.md5(f"{file.stat().st_mtime_ns}-{size}".encode(), usedforsecurity=False).hexdigest()}"'
        if exchange.headers.get("if-none-match") == tag:
            await exchange.answer(304, b"", {"ETag": tag})
            return
        wanted = re.match(r"bytes=(\d+)-$", exchange.headers.get("range", ""))
        start = int(wanted.group(1)) if wanted and exchange.headers.get("if-range", tag) == tag else 0
        if start >= size > 0:
            await exchange.answer(416, b"", {"Content-Range": f"bytes */{size}"})
            return
        headers = {"Content-Length": str(size - start), "ETag": tag, "Content-Type": "application/octet-stream"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        exchange.start_answer(206 if start else 200, headers)
        self.sent.append(f"{bucket}/{name}")
        sent = 0
        with file.open("rb") as stream:
            stream.seek(start)
            while piece := stream.read(64 * 1024):
                if fault is not None and fault.cut_answer_after is not None:
                    piece = piece[: fault.cut_answer_after - sent]
                exchange.writer.write(piece)
                await exchange.writer.drain()
                sent += len(piece)
                if fault is not None and fault.cut_answer_after is not None and sent >= fault.cut_answer_after:
                    # Close the stream cleanly, so that what was sent arrives; then send nothing more.
                    exchange.writer.close()
                    raise Cut("as the test wants it")

    # -- resumable uploads ----------------------------------------------------------------------------------------

    async def _tus(self, exchange: Exchange, path: str, fault: Fault | None) -> None:
        if exchange.headers.get("apikey") != self.key:
            await exchange.answer(403, b"new row violates row-level security policy")
        elif exchange.headers.get("tus-resumable") != "1.0.0":
            await exchange.answer(412, b"Tus-Resumable Required")
        elif exchange.method == "POST":
            await self._tus_create(exchange)
        else:
            upload = self.uploads.get(path.removeprefix("/upload/resumable/"))
            if upload is None or upload.gone_with is not None:
                status = upload.gone_with if upload is not None and upload.gone_with is not None else 404
                await exchange.answer(status, b"The file for this url was not found")
            elif exchange.method == "HEAD":
                offset = str(upload.offset)
                headers = {"Upload-Offset": offset, "Upload-Length": str(upload.size), "Tus-Resumable": "1.0.0"}
                await exchange.answer(200, b"", headers)
            else:
                await self._tus_patch(exchange, upload, fault)

    async def _tus_create(self, exchange: Exchange) -> None:
        pairs = (pair.split(" ") for pair in exchange.headers["upload-metadata"].split(","))
        facts = {name: base64.b64decode(value).decode() for name, value in pairs}
        size = int(exchange.headers["upload-length"])
        bucket, name = facts["bucketName"], facts["objectName"]
        try:
            self._admit(bucket, name, size, facts.get("contentType", ""))
        except StorageRefuses as refused:
            await exchange.answer(refused.status, refused.message.encode())
            return
        if self.path_of(bucket, name).is_file() and exchange.headers.get("x-upsert") != "true":
            await exchange.answer(409, b"The resource already exists")
            return
        identity = base64.urlsafe_b64encode(f"{bucket}/{name}/{uuid4()}".encode()).decode()
        file = self._folder / f"upload-{len(self.uploads)}"
        file.touch()
        self.uploads[identity] = Upload(bucket, name, size, file)
        await exchange.answer(201, b"", {"Location": f"{self.url}{BASE}/upload/resumable/{identity}"})

    async def _tus_patch(self, exchange: Exchange, upload: Upload, fault: Fault | None) -> None:
        if int(exchange.headers["upload-offset"]) != upload.offset:
            await exchange.answer(409, b"Upload-Offset conflict")
            return
        begun_at, received = upload.offset, 0
        with upload.file.open("ab") as file:
            try:
                async for piece in exchange.pieces():
                    limit = fault.cut_request_after if fault is not None else None
                    if limit is not None and received + len(piece) >= limit:
                        file.write(piece[: limit - received])
                        raise Cut("as the test wants it")
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

    def _finish(self, upload: Upload) -> None:
        target = self.path_of(upload.bucket, upload.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.hardlink_to(upload.file)
        if self.damage_next_object:
            self.damage_next_object = False
            content = target.read_bytes()
            target.unlink()
            self.put(upload.bucket, upload.name, content[:-1] + bytes([content[-1] ^ 1]))
        if self.forget_finished_uploads:
            upload.gone_with = 404


class _Lost:
    """A writer that discards everything."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.transport = writer.transport

    def write(self, _data: bytes) -> None: ...

    async def drain(self) -> None: ...


# The real page in short: the ray id, the message, and too much text for a row.
CLOUDFLARE_PAGE = (
    """<!DOCTYPE html>
<html class="no-js" lang="en-US"><head><title>x.supabase.co | {status}: Web server is returning an unknown error</title>
</head><body><div id="cf-error-details"><span class="code-label">Error code {status}</span>
<p>Cloudflare Ray ID: <strong>8f2a1b3c4d5e6f70</strong></p></div></body></html>
"""
    + " " * 2000
)


async def _json(exchange: Exchange, value: Any) -> None:
    await exchange.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


async def _refuse(
    exchange: Exchange, status: int, error: str, message: str, headers: dict[str, str] | None = None
) -> None:
    body = json.dumps({"statusCode": str(status), "error": error, "message": message}).encode()
    if 520 <= status <= 530:
        await exchange.body()  # Cloudflare reads the whole request before it answers
        page = {"Content-Type": "text/html; charset=UTF-8", "Server": "cloudflare", "CF-RAY": "8f2a1b3c4d5e6f70-FRA"}
        await exchange.answer(status, CLOUDFLARE_PAGE.format(status=status).encode(), {**page, **(headers or {})})
        return
    shown = 500 if status == 500 else status if exchange.path.startswith(f"{BASE}/upload/") else 400
    if exchange.method != "HEAD" and not exchange.path.startswith(f"{BASE}/upload/"):
        await exchange.answer(shown, body, {"Content-Type": "application/json", **(headers or {})})
    else:
        await exchange.answer(shown, b"", headers)


def _file_of_form(content_type: str, form: bytes) -> tuple[str, bytes]:
    """Returns the MIME type and content of the part named "file" in a multipart form."""
    found = re.search(r"boundary=([^;]+)", content_type)
    assert found is not None, content_type
    for part in form.split(b"--" + found.group(1).encode()):
        head, _, content = part.partition(b"\r\n\r\n")
        if b'name="file"' in head:
            mime = re.search(rb"[Cc]ontent-[Tt]ype: (\S+)", head)
            return (mime.group(1).decode() if mime else ""), content.removesuffix(b"\r\n")
    raise StorageRefuses(400, "InvalidRequest", "no file in the form")


async def _serve_until_stdin_closes(folder: Path, cuts: int) -> None:
    async with StorageDouble(folder) as double:
        source = random.Random(0)

        def every_second_patch(exchange: Exchange) -> bool:
            return exchange.method == "PATCH" and double.count("PATCH") % 2 == 0

        for _ in range(cuts):
            double.faults.append(Fault(every_second_patch, cut_request_after=source.randrange(1, 1_000_000)))
        sys.stdout.write(double.url + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
        sys.stdout.write(f"{cuts - sum(fault.times for fault in double.faults)}\n")


if __name__ == "__main__":
    asyncio.run(_serve_until_stdin_closes(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
