"""What Supabase Storage does where a client would not expect it: the same table for our double and a real server.

Sources are files of github.com/supabase/storage (1.11) and of the libraries it uses (tus-node-server 2.4, jose).
See tests/storage/real_server.py for how to run it against a real one.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.doubles.storage import StorageDouble
from tests.doubles.storage_keys import PUBLISHABLE_KEY, SECRET_KEY, SERVICE_KEY, make_key
from tests.storage.real_server import SERVERS, Server, serve

WRONG_KEY = make_key("service_role", secret=b"the secret of another project, as long as it must be")
EXPIRED_KEY = make_key("service_role", exp=1)
TUS = {"Tus-Resumable": "1.0.0"}


@pytest.fixture(params=SERVERS)
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(request.param, tmp_path) as server:
        yield server


async def begin(
    at: Server, size: int, *, bucket: str | None = None, name: str = "", kind: str = "application/gzip", **rest: Any
) -> httpx.Response:
    """Creates a resumable upload."""
    facts = {"bucketName": bucket or at.bucket, "objectName": name or f"{uuid4()}.tar.gz", "contentType": kind}
    encoded = ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in facts.items())
    headers = {**TUS, "Upload-Length": str(size), "Upload-Metadata": encoded, **rest.pop("headers", {})}
    return await at.ask("POST", "/upload/resumable", headers=headers, **rest)


def path_of(upload: httpx.Response) -> str:
    return "/upload/resumable/" + upload.headers["location"].rpartition("/")[2]


async def send(at: Server, upload: httpx.Response, offset: int, content: Any, **rest: Any) -> httpx.Response:
    headers = {**TUS, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}
    return await at.ask("PATCH", path_of(upload), headers=headers, content=content, **rest)


async def offset_of(at: Server, upload: httpx.Response) -> tuple[int, str | None]:
    answer = await at.ask("HEAD", path_of(upload), headers=TUS)
    return answer.status_code, answer.headers.get("upload-offset")


def refusal(answer: httpx.Response) -> tuple[int, str, str, str]:
    """HTTP status, and of the JSON: the real status, code, older name."""
    body = answer.json()
    return answer.status_code, body["statusCode"], body["code"], body["error"]


def plain(answer: httpx.Response) -> tuple[int, str]:
    assert not answer.text.startswith("{")
    return answer.status_code, answer.text.strip()


# -- what is asked -----------------------------------------------------------------------------------------------------


async def stale_if_range(at: Server) -> Any:
    await at.put("d.jsonl", b"old " * 100)
    first = await at.ask("GET", f"/object/authenticated/{at.bucket}/d.jsonl")
    await at.put("d.jsonl", b"new " * 100)
    headers = {"Range": "bytes=200-", "If-Range": first.headers["etag"]}
    rest = await at.ask("GET", f"/object/authenticated/{at.bucket}/d.jsonl", headers=headers)
    return rest.status_code, rest.content == b"new " * 50, rest.headers["content-range"]


async def range_beyond_the_end(at: Server) -> Any:
    await at.put("d.jsonl", b"0123456789")
    answer = await at.ask("GET", f"/object/authenticated/{at.bucket}/d.jsonl", headers={"Range": "bytes=10-"})
    return refusal(answer)[1], "content-range" in answer.headers


async def unchanged_object(at: Server) -> Any:
    await at.put("d.jsonl", b"0123456789")
    first = await at.ask("GET", f"/object/authenticated/{at.bucket}/d.jsonl")
    headers = {"If-None-Match": first.headers["etag"]}
    return (await at.ask("GET", f"/object/authenticated/{at.bucket}/d.jsonl", headers=headers)).status_code


async def too_large_for_the_project(at: Server) -> Any:
    if at.double is not None:
        at.double.file_size_limit = 10**9
    return plain(await begin(at, 10**15))


async def too_large_for_the_bucket(at: Server) -> Any:
    bucket = await at.make_bucket(file_size_limit=10)
    whole = await at.ask("POST", f"/object/{bucket}/a.bin", files={"file": b"x" * 11})
    return plain(await begin(at, 11, bucket=bucket)), refusal(whole)


async def bad_key_at_creation(at: Server) -> Any:
    return [refusal(await begin(at, 5, key=key)) for key in (WRONG_KEY, "no-jwt")]


async def bad_key_on_patch(at: Server) -> Any:
    upload = await begin(at, 5)
    answer = await send(at, upload, 0, b"12345", key=WRONG_KEY)
    return refusal(answer), await offset_of(at, upload)


async def bad_key_on_head(at: Server) -> Any:
    upload = await begin(at, 5)
    answer = await at.ask("HEAD", path_of(upload), headers=TUS, key=WRONG_KEY)
    return answer.status_code, answer.content


async def no_key(at: Server) -> Any:
    """`apikey` alone, which only a gateway reads."""
    encoded = f"bucketName {base64.b64encode(at.bucket.encode()).decode()},objectName YQ=="
    headers = {"apikey": at.key}
    bucket = await at.http.get(f"{at.url}/storage/v1/bucket/{at.bucket}", headers=headers)
    headers |= {**TUS, "Upload-Length": "5", "Upload-Metadata": encoded}
    upload = await at.http.post(f"{at.url}/storage/v1/upload/resumable", headers=headers)
    return refusal(bucket)[:3], refusal(upload)


async def expired_key(at: Server) -> Any:
    answer = await at.ask("GET", f"/bucket/{at.bucket}", key=EXPIRED_KEY)
    return refusal(answer)


async def patch_beyond_the_length(at: Server) -> Any:
    return plain(await send(at, await begin(at, 5), 0, b"123456"))


async def patch_after_the_end(at: Server) -> Any:
    upload = await begin(at, 5)
    first = await send(at, upload, 0, b"12345")
    return first.status_code, plain(await send(at, upload, 5, b""))


async def patch_at_a_wrong_offset(at: Server) -> Any:
    return plain(await send(at, await begin(at, 5), 3, b"45"))


async def malformed_identity(at: Server) -> Any:
    path = "/upload/resumable/" + base64.urlsafe_b64encode(b"nothing").decode().rstrip("=")
    head = await at.ask("HEAD", path, headers=TUS)
    headers = {**TUS, "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
    return head.status_code, (await at.ask("PATCH", path, headers=headers, content=b"1")).status_code


async def unknown_upload(at: Server) -> Any:
    identity = base64.urlsafe_b64encode(f"{at.bucket}/a.bin/{uuid4()}".encode()).decode().rstrip("=")
    return (await at.ask("HEAD", f"/upload/resumable/{identity}", headers=TUS)).status_code


async def head_during_a_patch(at: Server) -> Any:
    upload, hold = await begin(at, 10), asyncio.Event()
    sent = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b"12345"
        sent.set()
        await hold.wait()
        yield b"67890"

    async def patch() -> str:
        try:
            headers = {"Content-Length": "10", **TUS, "Upload-Offset": "0"}
            headers["Content-Type"] = "application/offset+octet-stream"
            answer = await at.ask("PATCH", path_of(upload), headers=headers, content=half())
            return f"{answer.status_code} at {answer.headers.get('upload-offset')}"
        except httpx.TransportError:
            return "cut"

    patching = asyncio.create_task(patch())
    await sent.wait()
    await asyncio.sleep(0.3)
    status, offset = await offset_of(at, upload)
    hold.set()
    return status, offset, await patching


async def deleted_upload(at: Server) -> Any:
    upload = await begin(at, 10)
    await send(at, upload, 0, b"12345")
    gone = await at.ask("DELETE", path_of(upload), headers=TUS)
    return gone.status_code, (await offset_of(at, upload))[0]


async def deleting_what_is_not_there(at: Server) -> Any:
    objects = await at.ask("DELETE", f"/object/{at.bucket}", json={"prefixes": ["none"]})
    absent = await at.ask("DELETE", "/object/trainer-test-absent", json={"prefixes": ["none"]})
    return objects.status_code, objects.json(), absent.status_code, absent.json()


async def types(at: Server) -> Any:
    """For each list of allowed types: are a whole upload and a resumable one taken?"""
    seen = {}
    for allowed in (["application/*"], ["application/gzip"], ["*/*"], []):
        bucket = await at.make_bucket(allowed_mime_types=allowed)
        whole = await at.ask("POST", f"/object/{bucket}/a.gz", files={"file": ("a.gz", b"x", "application/gzip")})
        seen[",".join(allowed)] = (whole.status_code, (await begin(at, 5, bucket=bucket)).status_code)
    return seen


async def refused_type(at: Server) -> Any:
    bucket = await at.make_bucket(allowed_mime_types=["image/png"])
    whole = await at.ask("POST", f"/object/{bucket}/a.gz", files={"file": ("a.gz", b"x", "application/gzip")})
    return refusal(whole), plain(await begin(at, 5, bucket=bucket))


async def anon_reads(at: Server) -> Any:
    await at.put("d.jsonl", b"0123456789")
    object_path = f"{at.bucket}/d.jsonl"
    return [
        refusal(await at.ask(method, path, key=at.anon, **body))[1:3]
        for method, path, body in [
            ("GET", f"/bucket/{at.bucket}", {}),
            ("GET", f"/object/info/{object_path}", {}),
            ("GET", f"/object/authenticated/{object_path}", {}),
            ("POST", f"/object/sign/{object_path}", {"json": {"expiresIn": 60}}),
        ]
    ]


async def anon_writes(at: Server) -> Any:
    whole = await at.ask("POST", f"/object/{at.bucket}/a.bin", files={"file": b"x"}, key=at.anon)
    name = f"trainer-test-{uuid4().hex[:12]}"
    bucket = await at.ask("POST", "/bucket", json={"id": name, "name": name}, key=at.anon)
    return refusal(whole), refusal(bucket), plain(await begin(at, 5, key=at.anon))


async def anon_deletes(at: Server) -> Any:
    await at.put("d.jsonl", b"0123456789")
    answer = await at.ask("DELETE", f"/object/{at.bucket}", json={"prefixes": ["d.jsonl"]}, key=at.anon)
    return answer.status_code, answer.json()


async def absent(at: Server) -> Any:
    return [
        refusal(await at.ask("GET", f"/object/info/{at.bucket}/none")),
        refusal(await at.ask("GET", "/object/info/trainer-test-absent/none")),
        refusal(await at.ask("GET", "/bucket/trainer-test-absent")),
    ]


async def signing_in_an_absent_bucket(at: Server) -> Any:
    return refusal(await at.ask("POST", "/object/sign/trainer-test-absent/none", json={"expiresIn": 60}))


async def creation_in_an_absent_bucket(at: Server) -> Any:
    return plain(await begin(at, 5, bucket="trainer-test-absent"))


async def creation_of_a_duplicate(at: Server) -> Any:
    await at.put("a.bin", b"x")
    whole = await at.ask("POST", f"/object/{at.bucket}/a.bin", files={"file": b"y"})
    return plain(await begin(at, 5, name="a.bin")), refusal(whole)[1:]


async def location(at: Server) -> Any:
    """Whatever the client came by: a proxy in front says it, and one that says nothing makes it http."""
    told = await begin(at, 5, headers={"X-Forwarded-Proto": "https"})
    return told.headers["location"].split("://")[0]


@dataclass(frozen=True)
class Row:
    case: Callable[[Server], Awaitable[Any]]
    seen: Any
    source: str
    anon: bool = False


BAD_KEY = (400, "403", "AccessDenied", "Unauthorized")
TABLE = [
    Row(
        stale_if_range, (206, True, "bytes 200-399/400"), "storage/renderer/asset.ts: If-Range is not among the headers"
    ),
    Row(range_beyond_the_end, ("416", False), "storage/range.ts; S3 behind it says the same in an HTTP 400"),
    Row(unchanged_object, 304, "storage/renderer/asset.ts: ifNoneMatch"),
    Row(too_large_for_the_project, (413, "Maximum size exceeded"), "http/routes/tus/index.ts: maxSize"),
    Row(
        too_large_for_the_bucket,
        ((413, "Maximum size exceeded"), (400, "413", "EntityTooLarge", "Payload too large")),
        "http/routes/tus/index.ts: maxSize; storage/uploader.ts: isTruncated",
    ),
    Row(bad_key_at_creation, [BAD_KEY, BAD_KEY], "http/plugins/jwt.ts, before the TUS server; http/error-handler.ts"),
    Row(bad_key_on_patch, (BAD_KEY, (200, "0")), "http/plugins/jwt.ts"),
    Row(bad_key_on_head, (400, b""), "http/plugins/jwt.ts"),
    Row(no_key, ((400, "400", "InvalidRequest"), BAD_KEY), "http/schemas/auth.ts, http/plugins/jwt.ts"),
    Row(expired_key, BAD_KEY, "http/plugins/jwt.ts, jose: exp"),
    Row(patch_beyond_the_length, (413, "upload's size exceeded"), "tus-node-server, BaseHandler: calculateMaxBodySize"),
    Row(
        patch_after_the_end,
        (204, (409, "The resource already exists")),
        "http/routes/tus/lifecycle.ts: canUpload inserts the object's row before the offset is looked at",
    ),
    Row(patch_at_a_wrong_offset, (409, "Upload-Offset conflict"), "tus-node-server, PatchHandler"),
    Row(malformed_identity, (400, 400), "storage/protocols/tus/upload-id.ts"),
    Row(unknown_upload, 404, "storage/protocols/tus/*-store.ts: getUpload"),
    Row(
        head_during_a_patch,
        (200, "5", "204 at 5"),
        "tus-node-server, HeadHandler: acquireLock; postgres-locker.ts asks the holder to stop",
    ),
    Row(deleted_upload, (204, 404), "tus-node-server, DeleteHandler"),
    Row(deleting_what_is_not_there, (200, [], 200, []), "http/routes/object/deleteObjects.ts: the bucket is not read"),
    Row(
        types,
        {"application/*": (200, 201), "application/gzip": (200, 201), "*/*": (400, 415), "": (200, 415)},
        "storage/uploader.ts: validateMimeType, asked for a list of length 0 by tus/lifecycle.ts alone",
    ),
    Row(
        refused_type,
        ((400, "415", "InvalidMimeType", "invalid_mime_type"), (415, "mime type application/gzip is not supported")),
        "storage/uploader.ts; tus/lifecycle.ts: onResponseError sends the message alone",
    ),
    Row(
        anon_reads,
        [("404", "NoSuchBucket"), ("404", "NoSuchKey"), ("404", "NoSuchKey"), ("404", "NoSuchKey")],
        "row security of storage.buckets and storage.objects",
        anon=True,
    ),
    Row(
        anon_writes,
        (BAD_KEY, BAD_KEY, (403, "new row violates row-level security policy")),
        "storage/database/errors.ts: 42501",
        anon=True,
    ),
    Row(anon_deletes, (200, []), "storage/object.ts: deleteObjects deletes the rows that it sees", anon=True),
    Row(
        absent,
        [
            (400, "404", "NoSuchKey", "not_found"),
            (400, "404", "NoSuchBucket", "Bucket not found"),
            (400, "404", "NoSuchBucket", "Bucket not found"),
        ],
        "internal/errors/codes.ts, storage-error.ts",
    ),
    Row(
        signing_in_an_absent_bucket,
        (400, "404", "NoSuchKey", "not_found"),
        "storage/object.ts: signObjectUrl looks for the object alone",
    ),
    Row(creation_in_an_absent_bucket, (404, "Bucket not found"), "http/routes/tus/index.ts: maxSize; lifecycle.ts"),
    Row(
        creation_of_a_duplicate,
        ((409, "The resource already exists"), ("409", "KeyAlreadyExists", "Duplicate")),
        "storage/uploader.ts: canUpload",
    ),
    Row(location, "https", "tus-node-server, BaseHandler.extractHostAndProto; tus/lifecycle.ts: generateUrl"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.case.__name__)
async def test_the_double_and_the_real_server_answer_alike(server: Server, row: Row) -> None:
    if row.anon and not server.anon:
        pytest.skip("TEST_SUPABASE_ANON is not set")
    assert await row.case(server) == row.seen, row.source


async def test_the_location_of_an_upload_is_http_when_no_proxy_says_more(tmp_path: Path) -> None:
    async with serve("double", tmp_path) as server:
        assert server.double is not None
        assert (await begin(server, 5)).headers["location"].startswith(f"{server.url}/storage/v1/upload/resumable/")


@pytest.mark.parametrize(
    ("keys", "status"),
    [
        ({"apikey": SERVICE_KEY}, 200),
        ({"apikey": SECRET_KEY}, 200),
        ({"Authorization": f"Bearer {SERVICE_KEY}"}, 401),
        ({"apikey": "sb_secret_of-another-project"}, 401),
        ({"apikey": PUBLISHABLE_KEY}, 400),
    ],
)
async def test_the_gateway_reads_apikey_and_storage_reads_authorization(
    tmp_path: Path, keys: dict[str, str], status: int
) -> None:
    """Supabase's documentation of API keys: the gateway exchanges a newer key for a JWT, and passes an older one on."""
    async with (
        StorageDouble(tmp_path / "double", gateway=True) as double,
        double.behind_the_gateway() as direct,
        httpx.AsyncClient() as http,
    ):
        double.put("b", "x", b"")
        assert (await http.get(f"{double.url}/storage/v1/bucket/b", headers=keys)).status_code == status
        past = (await http.get(f"{direct}/storage/v1/bucket/b", headers=keys)).status_code
        assert past == (200 if "Authorization" in keys else 400)
