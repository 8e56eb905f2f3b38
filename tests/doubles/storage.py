"""A double of Supabase Storage as a real HTTP server on loopback, with the behaviour that surprises clients.

- Errors are HTTP 400 with the real code as a string in the body's `statusCode`; only 500 is HTTP 500.
- The key is what `Authorization` says. Who is not the service role reads "not found" and writes to 403.
- Signed URLs expire; a download in flight survives it, a later Range request does not.
- `If-Range` is ignored: a Range request gets bytes of whatever lies there now.
- A duplicate is answered before the body is read, and the connection is closed.
- The project and each bucket have size limits; buckets have lists of MIME types; keys are checked.
- An object is not sent again to a client that names its ETag (If-None-Match).
- Resumable uploads: tests.doubles.storage_uploads.

tests/storage/test_double.py holds each of these against the double, and against a real server where there is one.

A status of Cloudflare's (520 to 527, 530) is sent as its HTML page, with that HTTP status.

Faults can be injected: cut a request or an answer at any byte, answer 5xx for a while, lose an answer or delay it.
As a separate process, `python -m tests.doubles.storage FOLDER [CUTS]` prints its URL and serves until stdin closes; it
cuts every second PATCH somewhere inside its chunk, CUTS times in all, and prints the number of cuts at the end.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import random
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from tests.doubles.loopback import Cut, Exchange, LoopbackDouble, LoopbackServer
from tests.doubles.storage_keys import SERVICE_KEY, Gate, GatewayRefuses, KeyRefused
from tests.doubles.storage_uploads import PATH as UPLOADS
from tests.doubles.storage_uploads import ResumableUploads, Upload

BASE = "/storage/v1"
# Of a body that is refused, this much is read.
EARLY_BYTES = 64 * 1024
_KEY = re.compile(r"^(\w|/|!|-|\.|\*|'|\(|\)| |&|\$|@|=|;|:|\+|,|\?)*$", re.ASCII)


@dataclass
class Bucket:
    file_size_limit: int | None = None
    allowed_mime_types: list[str] | None = None
    public: bool = False

    def takes(self, kind: str) -> bool:
        """As the server reads its list: a type, or `type/*`; `*/*` is the type named `*`, which no file has."""
        wanted, _, exact = kind.partition("/")
        return any(
            entry.partition("/")[0] == wanted and entry.partition("/")[2] in ("*", exact)
            for entry in self.allowed_mime_types or ()
        )


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


# The codes that errors carry beside their older names, where the two differ.
CODES = {
    "not_found": "NoSuchKey", "Bucket not found": "NoSuchBucket", "Unauthorized": "AccessDenied",
    "Duplicate": "KeyAlreadyExists", "Payload too large": "EntityTooLarge", "invalid_mime_type": "InvalidMimeType",
    "invalid_range": "InvalidRange",
}  # fmt: skip


class StorageRefuses(Exception):
    def __init__(self, status: int, error: str, message: str, *, shown: int | None = None) -> None:
        self.status, self.error, self.message = status, error, message
        self.shown = shown


class Faulty(LoopbackDouble):
    """Counts the requests that reach it, and spoils those that a test names."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        super().__init__()

    def count(self, method: str, containing: str = "") -> int:
        return sum(1 for seen, path in self.requests if seen == method and containing in path)

    def fail(self, method: str, containing: str = "", **fault: Any) -> Fault:
        """Makes the next matching requests fail; see Fault."""
        made = Fault(lambda exchange: exchange.method == method and containing in exchange.path, **fault)
        self.faults.append(made)
        return made

    def fault_for(self, exchange: Exchange) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.matches(exchange):
                fault.times -= 1
                return fault
        return None

    async def spoils(self, exchange: Exchange, fault: Fault | None) -> bool:
        """Holds a request back, or answers it in the place of the storage: then True."""
        if fault is None:
            return False
        if fault.held_until is not None:
            await fault.held_until.wait()
        if fault.status is None:
            return False
        if fault.page is not None:
            kind = "text/html" if fault.page.startswith("<") else "application/json"
            await exchange.answer(fault.status, fault.page.encode(), {"Content-Type": kind})
        elif exchange.path.startswith(BASE + UPLOADS) and not 520 <= fault.status <= 530:
            await exchange.answer(fault.status, b"as the test wants it", fault.headers)
        else:
            await _refuse(exchange, fault.status, "Injected", "as the test wants it", fault.headers)
        return True


class StorageDouble(Faulty):
    """Enter it to serve. Objects are files under `folder/objects/<bucket>/<path>`."""

    def __init__(self, folder: Path, key: str = SERVICE_KEY, *, gateway: bool = False) -> None:
        """`key` is the one that tests use. `gateway`: requests pass the one in front, as at <ref>.supabase.co."""
        self.key = key
        self.gate = Gate()
        self.gateway = gateway
        self.base = BASE
        self.buckets: dict[str, Bucket] = {}
        # The project's own limit, above those of its buckets.
        self.file_size_limit: int | None = None
        # What the proxy in front says that the client came by.
        self.forwarded_proto = "http"
        self.tus = ResumableUploads(self, folder)
        self.sent: list[str] = []
        self.damage_next_object = False
        self.clock = time.time
        self._folder = folder
        self._secret = uuid4().bytes
        super().__init__()

    async def __aenter__(self) -> Self:
        self.path_of("", "").mkdir(parents=True, exist_ok=True)
        return await super().__aenter__()

    @asynccontextmanager
    async def behind_the_gateway(self) -> AsyncIterator[str]:
        """Serves the same objects past the gateway as well, as <ref>.storage.supabase.co may."""
        async with LoopbackServer(lambda exchange: self._serve(exchange, gateway=False)) as server:
            yield server.url

    @property
    def uploads(self) -> dict[str, Upload]:
        return self.tus.begun

    def is_key(self, name: str) -> bool:
        return bool(name and _KEY.match(name))

    def size_limit(self, bucket: Bucket) -> int | None:
        limits = (bucket.file_size_limit, self.file_size_limit)
        return min((limit for limit in limits if limit is not None), default=None)

    def path_of(self, bucket: str, name: str) -> Path:
        return self._folder / "objects" / bucket / name

    def put(self, bucket: str, name: str, content: bytes) -> None:
        """Adds an object that exists from the start."""
        self.buckets.setdefault(bucket, Bucket())
        path = self.path_of(bucket, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def read(self, bucket: str, name: str) -> bytes:
        return self.path_of(bucket, name).read_bytes()

    def names(self, bucket: str) -> set[str]:
        folder = self.path_of(bucket, "")
        return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}

    def set_bucket(self, name: str, **options: Any) -> None:
        """Makes the bucket, or gives it these limits."""
        self.buckets[name] = Bucket(**options)

    def drop_bucket(self, name: str) -> None:
        self.buckets.pop(name, None)

    def forget_uploads(self, status: int = 404) -> None:
        """Loses every upload that has begun."""
        for upload in self.uploads.values():
            upload.gone_with = status

    # -- one request ----------------------------------------------------------------------------------------------

    async def handle(self, exchange: Exchange) -> None:
        await self._serve(exchange, gateway=self.gateway)

    async def _serve(self, exchange: Exchange, *, gateway: bool) -> None:
        self.requests.append((exchange.method, exchange.path))
        fault = self.fault_for(exchange)
        if await self.spoils(exchange, fault):
            return
        if fault is not None and fault.lose_answer:
            exchange.writer = _Lost(exchange.writer)  # type: ignore[assignment]
        try:
            if gateway:
                exchange.headers = self.gate.through_gateway(exchange.headers)
            await self._route(exchange, fault)
        except GatewayRefuses as refused:
            await exchange.answer(401, json.dumps({"message": str(refused)}).encode(), _JSON)
        except KeyRefused as refused:
            await exchange.body()  # read to its end, unlike where a body has been looked into
            await _refuse(exchange, 403, "Unauthorized", str(refused), shown=400)
        except StorageRefuses as refused:
            await _refuse(exchange, refused.status, refused.error, refused.message, shown=refused.shown)
        if fault is not None and fault.lose_answer:
            raise Cut("the answer is lost")

    async def _route(self, exchange: Exchange, fault: Fault | None) -> None:
        path, method = exchange.path.removeprefix(BASE), exchange.method
        if method == "GET" and path.startswith("/object/sign/"):
            bucket, name = self._signed_object(exchange, path)
            await self._send_object(exchange, bucket, name, fault)
            return
        if not path.startswith(UPLOADS) and "authorization" not in exchange.headers:
            raise StorageRefuses(400, "InvalidRequest", "headers must have required property 'authorization'")
        role = self.gate.role(exchange.headers)
        if path.startswith(UPLOADS):
            await self.tus.answer(exchange, path, role, fault)
            return
        match method, path.split("/")[1:]:
            case "GET", ["bucket", bucket]:
                await _json(exchange, self._bucket_json(bucket, role))
            case "POST", ["bucket"]:
                await self._create_bucket(exchange, role)
            case "PUT", ["bucket", bucket]:
                await self._limit_bucket(exchange, bucket, role)
            case "DELETE", ["bucket", bucket]:
                await self._delete_bucket(exchange, bucket, role)
            case "POST", ["bucket", bucket, "empty"]:
                await self._empty_bucket(exchange, bucket, role)
            case "POST", ["object", "list", bucket]:
                await self._list(exchange, bucket, role)
            case "POST", ["object", "sign", bucket, *name]:
                await self._sign(exchange, bucket, "/".join(name), role)
            case "GET", ["object", "info", bucket, *name]:
                await self._info(exchange, bucket, "/".join(name), role)
            case "GET", ["object", "authenticated", bucket, *name]:
                self._bucket(bucket)
                self._existing(bucket, "/".join(name), role)
                await self._send_object(exchange, bucket, "/".join(name), fault)
            case "POST", ["object", bucket, *name]:
                await self._upload(exchange, bucket, "/".join(name), role, fault)
            case "DELETE", ["object", bucket]:
                await self._delete(exchange, bucket, role)
            case _:
                raise StorageRefuses(404, "not_found", f"Route {method}:{path} not found", shown=404)

    # -- buckets and small requests -------------------------------------------------------------------------------

    async def _bucket_for(self, exchange: Exchange, name: str) -> Bucket:
        """The bucket that an object is sent to; its body is read all the same."""
        if name not in self.buckets:
            await exchange.body()
        return self._bucket(name)

    def _bucket(self, name: str) -> Bucket:
        if name not in self.buckets:
            raise StorageRefuses(404, "Bucket not found", "Bucket not found")
        return self.buckets[name]

    def _bucket_json(self, name: str, role: str) -> dict[str, Any]:
        # Row security: a bucket that the key may not see is one that is not there.
        bucket = self._bucket(name if role == "service_role" else "")
        at = "2026-11-01T00:00:00.000Z"
        return {
            "id": name, "name": name, "owner": "", "public": bucket.public, "created_at": at, "updated_at": at,
            "file_size_limit": bucket.file_size_limit, "allowed_mime_types": bucket.allowed_mime_types,
        }  # fmt: skip

    async def _create_bucket(self, exchange: Exchange, role: str) -> None:
        asked = json.loads(await exchange.body())
        _require_right_to_write(role)
        if asked["id"] in self.buckets:
            raise StorageRefuses(409, "Duplicate", "The resource already exists")
        self.buckets[asked["id"]] = Bucket(asked.get("file_size_limit"), asked.get("allowed_mime_types"))
        await _json(exchange, {"name": asked["id"]})

    async def _limit_bucket(self, exchange: Exchange, name: str, role: str) -> None:
        asked, bucket = json.loads(await exchange.body()), self._bucket(name)
        _require_right_to_write(role)
        for limit in ("file_size_limit", "allowed_mime_types", "public"):
            if limit in asked:
                setattr(bucket, limit, asked[limit])
        await _json(exchange, {"message": "Successfully updated"})

    async def _empty_bucket(self, exchange: Exchange, name: str, role: str) -> None:
        await exchange.body()
        self._bucket(name)
        _require_right_to_write(role)
        for object_name in self.names(name):
            self.path_of(name, object_name).unlink()
        await _json(exchange, {"message": "Successfully emptied"})

    async def _delete_bucket(self, exchange: Exchange, name: str, role: str) -> None:
        self._bucket(name)
        _require_right_to_write(role)
        if self.names(name):
            raise StorageRefuses(409, "InvalidRequest", "The bucket you tried to delete is not empty")
        del self.buckets[name]
        await _json(exchange, {"message": "Successfully deleted"})

    async def _list(self, exchange: Exchange, name: str, role: str) -> None:
        """One level below a prefix: objects with an id, folders without one."""
        folder = json.loads(await exchange.body())["prefix"].strip("/")
        names = self.names(name) if role == "service_role" else set()
        below = {each.removeprefix(f"{folder}/" if folder else "") for each in names if each.startswith(folder)}
        firsts = {each.partition("/")[0]: "/" not in each for each in below}
        await _json(
            exchange, [{"name": first, "id": first if is_object else None} for first, is_object in firsts.items()]
        )

    async def _sign(self, exchange: Exchange, bucket: str, name: str, role: str) -> None:
        asked = json.loads(await exchange.body())
        # The bucket is not looked at: in one that is not there, the object is not there.
        self._existing(bucket, name, role)
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

    async def _info(self, exchange: Exchange, bucket: str, name: str, role: str) -> None:
        self._bucket(bucket)
        file = self._existing(bucket, name, role)
        await _json(exchange, {"name": name, "bucket_id": bucket, "size": file.stat().st_size})

    async def _delete(self, exchange: Exchange, bucket: str, role: str) -> None:
        """What the key may not see, and what is not there, is not deleted; neither is an error."""
        asked = json.loads(await exchange.body())
        seen = asked["prefixes"] if role == "service_role" else []
        gone = [name for name in seen if self.path_of(bucket, name).is_file()]
        for name in gone:
            self.path_of(bucket, name).unlink()
        await _json(exchange, [{"name": name} for name in gone])

    def _existing(self, bucket: str, name: str, role: str = "service_role") -> Path:
        file = self.path_of(bucket, name)
        if role != "service_role" or not file.is_file():
            raise StorageRefuses(404, "not_found", "Object not found")
        return file

    # -- whole objects --------------------------------------------------------------------------------------------

    async def _upload(self, exchange: Exchange, bucket_name: str, name: str, role: str, fault: Fault | None) -> None:
        bucket = await self._bucket_for(exchange, bucket_name)
        if not self.is_key(name):
            raise StorageRefuses(400, "InvalidKey", f"Invalid key: {name}")
        pieces = exchange.pieces()
        received = b""
        while len(received) < EARLY_BYTES and (piece := await anext(pieces, b"")):
            received += piece
        # Answered before the rest of the body is read.
        _require_right_to_write(role)
        if self.path_of(bucket_name, name).is_file() and exchange.headers.get("x-upsert") != "true":
            raise StorageRefuses(409, "Duplicate", "The resource already exists")
        limit = fault.cut_request_after if fault is not None else None
        while not (limit is not None and len(received) > limit):
            if not (piece := await anext(pieces, b"")):
                break
            received += piece
        else:
            raise Cut("as the test wants it")
        mime, content = _file_of_form(exchange.headers["content-type"], received)
        # An empty list allows every type here, and none in a resumable upload.
        if bucket.allowed_mime_types and not bucket.takes(mime):
            raise StorageRefuses(415, "invalid_mime_type", f"mime type {mime} is not supported")
        most = self.size_limit(bucket)
        if most is not None and len(content) > most:
            raise StorageRefuses(413, "Payload too large", "The object exceeded the maximum allowed size")
        self._store(bucket_name, name, content)
        await _json(exchange, {"Id": str(uuid4()), "Key": f"{bucket_name}/{name}"})

    def _store(self, bucket: str, name: str, content: bytes) -> None:
        if self.damage_next_object:
            self.damage_next_object = False
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.put(bucket, name, content)

    def store_file(self, bucket: str, name: str, file: Path) -> None:
        """Makes a finished upload an object."""
        target = self.path_of(bucket, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.hardlink_to(file)
        if self.damage_next_object:
            content = target.read_bytes()
            target.unlink()
            self._store(bucket, name, content)

    async def _send_object(self, exchange: Exchange, bucket: str, name: str, fault: Fault | None) -> None:
        file = self._existing(bucket, name)
        size = file.stat().st_size
        tag = f'"{hashlib.md5(f"{file.stat().st_mtime_ns}-{size}".encode(), usedforsecurity=False).hexdigest()}"'
        if exchange.headers.get("if-none-match") == tag:
            await exchange.answer(304, b"", {"ETag": tag})
            return
        wanted = re.match(r"bytes=(\d+)-$", exchange.headers.get("range", ""))
        start = int(wanted.group(1)) if wanted else 0  # whatever If-Range says
        if start >= size > 0:
            raise StorageRefuses(416, "invalid_range", "invalid range provided", shown=416)
        changed = datetime.fromtimestamp(file.stat().st_mtime, UTC)
        headers = {
            "Content-Length": str(size - start), "ETag": tag, "Content-Type": "application/octet-stream",
            "Last-Modified": format_datetime(changed, usegmt=True), "Accept-Ranges": "bytes",
        }  # fmt: skip
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


_JSON = {"Content-Type": "application/json; charset=utf-8"}


async def _json(exchange: Exchange, value: Any) -> None:
    await exchange.answer(200, json.dumps(value).encode(), _JSON)


def _require_right_to_write(role: str) -> None:
    if role != "service_role":
        raise StorageRefuses(403, "Unauthorized", "new row violates row-level security policy")


async def _refuse(
    exchange: Exchange,
    status: int,
    error: str,
    message: str,
    headers: dict[str, str] | None = None,
    *,
    shown: int | None = None,
) -> None:
    """Refuses in Storage's JSON. `shown` is the HTTP status where it is not the usual 400."""
    if 520 <= status <= 530:
        await exchange.body()  # Cloudflare reads the whole request before it answers
        page = {"Content-Type": "text/html; charset=UTF-8", "Server": "cloudflare", "CF-RAY": "8f2a1b3c4d5e6f70-FRA"}
        await exchange.answer(status, CLOUDFLARE_PAGE.format(status=status).encode(), {**page, **(headers or {})})
        return
    body = {"statusCode": str(status), "code": CODES.get(error, error), "error": error, "message": message}
    await exchange.answer(
        shown or (500 if status == 500 else 400), json.dumps(body).encode(), {**_JSON, **(headers or {})}
    )


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
