"""No credential leaves over a scheme, host or port that was not configured, whatever a server says.

The servers here lure: by redirects of every status and by addresses of every kind. On the port of each there is also
somebody who listens in plain text, and on another port somebody with a trusted certificate.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from daemon.errors import JobError
from daemon.network.endpoint_client import CredentialWithheld, at_endpoint, beneath_endpoint, endpoint_client
from daemon.pod.runpod_api import Key, RunPod, RunPodError
from daemon.report.courier import CallbackCourier
from daemon.settings import Settings
from daemon.storage.supabase import SupabaseStorage
from daemon.storage.tus import RESUME_SUFFIX, ResumePoint, begin_upload
from tests.doubles.certificate import certificate
from tests.doubles.loopback import Exchange, Handler, LoopbackServer
from tests.doubles.storage import SERVICE_KEY, Bucket, StorageDouble

ROOT = Path(__file__).parents[2]
STATUSES = (301, 302, 303, 307, 308)
ADDRESS = "127.0.0.1"
TOKEN = "hf_token-that-stays-at-home"

# {home}: host and port that are configured, with https. {other}: another port. {path}: where the work would go on.
ABROAD = (
    "http://{home}{path}",
    "HTTP://{home}{path}",
    "http://{other}{path}",
    "https://{other}{path}",
    "HTTPS://{other}{path}",
    "//{other}{path}",
    "http://localhost:{other_port}{path}",
    "https://{home}@{other}{path}",
    "http://user:password@{home}{path}",
    "\\\\{other}{path}",
    "/\\{other}{path}",
    "https:\\\\{other}{path}",
    "https://{other}{path}?redirect=https://{home}/",
)
AT_HOME = ("{path}", "https://{home}{path}", "{path}?a=b", "https://user:password@{home}{path}")


@dataclass
class Port:
    """One port on which both TLS and plain text are answered. `heard` is what came in plain text."""

    handler: Handler
    tls: ssl.SSLContext
    heard: list[bytes] = field(default_factory=list)
    port: int = 0

    @property
    def host(self) -> str:
        return f"{ADDRESS}:{self.port}"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Port]:
        async with LoopbackServer(self.handler, tls=self.tls) as inner:
            connections: set[asyncio.Task[None]] = set()

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = asyncio.current_task()
                assert task is not None
                connections.add(task)
                with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                    await self._serve(reader, writer, inner.port)
                writer.close()
                connections.discard(task)

            server = await asyncio.start_server(serve, ADDRESS, 0)
            self.port = server.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                server.close()
                for task in list(connections):
                    task.cancel()
                await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, inner: int) -> None:
        first = await reader.read(65536)
        if first[:1] == b"\x16":
            behind, before = await asyncio.open_connection(ADDRESS, inner)
            before.write(first)
            await asyncio.gather(_pass_on(reader, before), _pass_on(behind, writer))
            return
        if first:
            self.heard.append(first)
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            await writer.drain()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()
    writer.close()


@dataclass
class Lures:
    """The configured server, the stranger, and what the stranger and the listeners in plain text have heard."""

    home: Port
    other: Port
    met: list[dict[str, str]]

    @property
    def url(self) -> str:
        return f"https://{self.home.host}"

    def location(self, form: str, path: str = "/lured") -> str:
        return form.format(home=self.home.host, other=self.other.host, other_port=self.other.port, path=path)

    @property
    def all_heard(self) -> str:
        return repr((self.home.heard, self.other.heard, self.met))


@asynccontextmanager
async def lured(folder: Path, handler: Handler, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lures]:
    met: list[dict[str, str]] = []

    async def meet(exchange: Exchange) -> None:
        met.append({":path": exchange.path, ":query": json.dumps(exchange.query), **exchange.headers})
        await exchange.answer(200, b"{}")

    tls, _ = certificate(folder, ADDRESS)
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / f"{ADDRESS}.pem"))
    home, other = Port(handler, tls), Port(meet, tls)
    async with home.open(), other.open():
        yield Lures(home, other, met)


class Redirecting:
    """Answers every request with the redirect that the test has set."""

    def __init__(self) -> None:
        self.status, self.location = 302, ""
        self.asked = 0

    async def __call__(self, exchange: Exchange) -> None:
        self.asked += 1
        await exchange.body()
        await exchange.answer(self.status, b"{}", {"Location": self.location, "Content-Type": "application/json"})


def every_lure(lures: Lures, server: Redirecting) -> list[Callable[[], None]]:
    def setting(status: int, form: str) -> Callable[[], None]:
        def set_it() -> None:
            server.status, server.location = status, lures.location(form)

        return set_it

    return [setting(status, form) for status in STATUSES for form in (*ABROAD, *AT_HOME)]


async def test_storage_follows_no_redirect_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Redirecting()
    local = tmp_path / "file"
    local.write_bytes(b"12345")
    async with lured(tmp_path, server, monkeypatch) as lures:
        storage = SupabaseStorage(lures.url, SERVICE_KEY, first_wait_seconds=0.001)
        calls: list[Callable[[], Any]] = [
            lambda: storage.open_dataset("lora-datasets", "user/d.jsonl"),
            lambda: storage.exists("a"),
            lambda: storage.verify("a", 5, "0"),
            lambda: storage.download("a", tmp_path / "to"),
            lambda: storage.delete("a"),
            lambda: storage.check(5),
            lambda: storage._upload_whole(local, "a"),
            lambda: storage._upload_resumable(local, "a", 5, "0", tmp_path / "resume"),
        ]
        for number, lure in enumerate(every_lure(lures, server)):
            lure()
            # Each call meets each status and, over the rounds, each address.
            for call in calls if number % len(ABROAD) == 0 else [calls[number % len(calls)], calls[3], calls[7]]:
                with suppress(JobError):
                    await call()
        await storage.close()
    assert server.asked > 200
    assert (lures.home.heard, lures.other.heard, lures.met) == ([], [], [])


def resumable_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[StorageDouble, Path]:
    """A storage with the adapters' bucket, and a file that goes there by a resumable upload, small as it is."""
    monkeypatch.setattr("daemon.storage.supabase.STANDARD_UPLOAD_BYTES", 10)
    (tmp_path / "double").mkdir()
    double = StorageDouble(tmp_path / "double")
    double.buckets["lora-models"] = Bucket()
    local = tmp_path / "adapter.tar.gz"
    local.write_bytes(os.urandom(5000))
    return double, local


async def test_an_upload_goes_on_at_the_configured_address_whatever_the_server_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Supabase Storage builds Location from what its proxy says: behind TLS it may be http://."""
    double, local = resumable_only(tmp_path, monkeypatch)
    content = local.read_bytes()
    forms = [*ABROAD, *AT_HOME]

    async def handle(exchange: Exchange) -> None:
        start = exchange.start_answer

        def start_luring(status: int, headers: Any) -> None:
            if "Location" in headers:
                path = re.sub(r"^\w+://[^/]*", "", headers["Location"])
                headers = {**headers, "Location": lures.location(forms[0], path)}
            start(status, headers)

        exchange.start_answer = start_luring  # type: ignore[method-assign]
        await double.handle(exchange)

    async with lured(tmp_path, handle, monkeypatch) as lures:
        storage = SupabaseStorage(lures.url, SERVICE_KEY, first_wait_seconds=0.001)
        digest = hashlib.sha256(content).hexdigest()
        while forms:
            name = f"adapters/{len(forms)}.tar.gz"
            await storage.upload(local, name, sha256=digest, resume_dir=tmp_path / "resume")
            assert double.path_of("lora-models", name).read_bytes() == content
            forms.pop(0)
        await storage.close()
    assert (lures.home.heard, lures.other.heard, lures.met) == ([], [], [])


async def test_the_addresses_of_uploads_that_lie_on_the_volume_lead_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt before a change of SUPABASE_URL has left them, or somebody else who writes to the volume."""
    double, local = resumable_only(tmp_path, monkeypatch)
    content = local.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    resume = tmp_path / "resume"
    resume.mkdir()
    forms = [*ABROAD, "file:///etc/passwd", "https://[broken/x", "not a URL", ""]
    async with lured(tmp_path, double.handle, monkeypatch) as lures:
        endpoint = f"{lures.url}/storage/v1/upload/resumable"

        def leave(number: int, url: str) -> str:
            name = f"adapters/{number:02}.tar.gz"
            file = resume / f"{name.replace('/', '__')}{RESUME_SUFFIX}"
            ResumePoint(endpoint, name, len(content), digest, url).save(file)
            return name

        storage = SupabaseStorage(lures.url, SERVICE_KEY, first_wait_seconds=0.001)
        # An upload goes on at the configured address, or begins anew there.
        for number, form in enumerate(forms):
            name = leave(number, lures.location(form, "/storage/v1/upload/resumable/aWQ"))
            await storage.upload(local, name, sha256=digest, resume_dir=resume)
            assert double.read("lora-models", name) == content
        # The clean-up leaves alone what lies elsewhere, and deletes its own behind them.
        for number, form in enumerate(forms):
            leave(number, lures.location(form, "/storage/v1/upload/resumable/aWQ"))
        metadata = {"bucketName": "lora-models", "objectName": "adapters/own.tar.gz", "contentType": "application/gzip"}
        own = await begin_upload(storage._client, endpoint, storage._headers, metadata, len(content))
        leave(len(forms), own)
        await storage.end_unfinished_uploads(resume)
        await storage.close()
    assert [upload.name for upload in double.uploads.values() if upload.gone_with] == ["adapters/own.tar.gz"]
    assert len(list(resume.iterdir())) == len(forms)
    assert (lures.home.heard, lures.other.heard, lures.met) == ([], [], [])


async def test_runpods_key_follows_no_redirect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Redirecting()
    async with lured(tmp_path, server, monkeypatch) as lures, RunPod([Key("key", TOKEN)], api=lures.url) as runpod:
        for lure in every_lure(lures, server):
            lure()
            with pytest.raises(RunPodError):
                await runpod.list_pods()
            with pytest.raises(RunPodError):
                await runpod.create_pod({})
    assert server.asked == 2 * len(STATUSES) * len((*ABROAD, *AT_HOME))
    assert (lures.home.heard, lures.other.heard, lures.met) == ([], [], [])


async def test_the_authorization_of_callbacks_follows_no_redirect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Redirecting()
    async with lured(tmp_path, server, monkeypatch) as lures:
        settings = Settings(
            _env_file=None, database_url="postgresql://unused", supabase_url=lures.url,
            supabase_service_role_key=SERVICE_KEY, callback_authorization=f"Bearer {TOKEN}",
            allowed_hosts=f"{lures.other.host},localhost:{lures.other.port}",
        )  # fmt: skip
        courier = CallbackCourier(settings)
        for lure in every_lure(lures, server):
            lure()
            await courier._post("id", f"{lures.url}/functions/v1/done", b"{}")
        followed = server.asked
        # A caller may name an address of every kind himself; the header is for the project's functions alone.
        for form in ABROAD:
            await courier._post("id", lures.location(form, "/functions/v1/done"), b"{}")
        await courier._end_all()
    assert followed == len(STATUSES) * len((*ABROAD, *AT_HOME))
    assert TOKEN not in lures.all_heard and SERVICE_KEY not in lures.all_heard
    assert lures.met, "they were posted to, without it"


HUB_CLIENT = """
import contextlib, sys
from daemon.base_model.hub_download import Order, download
for number, line in enumerate(sys.stdin):
    with contextlib.suppress(Exception):
        download(Order(line.strip(), f"{sys.argv[1]}/{number}", sys.argv[2]))
"""


async def test_the_hubs_token_stays_at_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files come from other hosts, by redirects; pages and download tokens are asked for where an answer says."""
    lured_by: dict[str, tuple[str, str]] = {}
    for number, form in enumerate(ABROAD):
        for what in ("info", "file"):
            lured_by[f"acme/{what}-{len(lured_by)}"] = (f"{what} {STATUSES[number % len(STATUSES)]}", form)
        for what in ("next", "xet-auth", "x-xet-refresh-route") if number in (0, 2, 3, 5) else ():
            lured_by[f"acme/{what}-{len(lured_by)}"] = (what, form)
    commit = "0123456789abcdef0123456789abcdef01234567"
    seen_with_token: set[str] = set()

    async def hub(exchange: Exchange) -> None:
        found = re.search(r"acme/[a-z-]+\d+", exchange.path)
        if exchange.headers.get("authorization") == f"Bearer {TOKEN}" and found:
            seen_with_token.add(found.group())
        if found is None:
            await exchange.answer(404, b"{}")
            return
        how, form = lured_by[found.group()]
        location = lures.location(form)
        what, _, status = how.partition(" ")
        is_file = "/resolve/" in exchange.path
        if (what, is_file) in (("info", False), ("file", True)):
            await exchange.answer(int(status), b"", {"Location": location, "X-Repo-Commit": commit, "ETag": '"e"'})
            return
        headers = {"Content-Type": "application/json", "X-Repo-Commit": commit, "ETag": f'"{"a" * 64}"'}
        if what in ("next", "xet-auth"):
            headers["Link"] = f'<{location}>; rel="{what}"'
        if what == "x-xet-refresh-route":
            headers["X-Xet-Refresh-Route"] = location
        if what in ("xet-auth", "x-xet-refresh-route"):
            headers["X-Xet-Hash"] = "b" * 64
        files = [{"type": "file", "path": "w.safetensors", "rfilename": "w.safetensors", "size": 2, "oid": "c" * 40}]
        answer: Any = {"id": found.group(), "sha": commit, "siblings": files}
        if "/tree/" in exchange.path:
            answer = files
        await exchange.answer(200, b"{}" if is_file else json.dumps(answer).encode(), headers)

    async with lured(tmp_path, hub, monkeypatch) as lures:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HUB_CLIENT, str(tmp_path / "models"), TOKEN,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, cwd=ROOT,
            env={**os.environ, "HF_ENDPOINT": lures.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path),
                 "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2"},
        )  # fmt: skip
        await process.communicate("".join(f"{name}\n" for name in lured_by).encode())
        assert process.returncode == 0
    assert seen_with_token == set(lured_by), "each was asked for with the token, at home"
    assert TOKEN not in lures.all_heard
    assert lures.met, "redirects to file servers are followed, without it"


TRACKING = """
import wandb
try:
    wandb.init(project="p", settings=wandb.Settings(init_timeout=15, silent=True, console="off", disable_git=True))
except wandb.Error:
    print("refused")
"""


@pytest.mark.system
@pytest.mark.parametrize(
    ("status", "form"), [(302, "http://{other}{path}"), (307, "http://{home}{path}"), (308, ABROAD[5])]
)
async def test_the_key_of_weights_and_biases_follows_no_redirect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, form: str
) -> None:
    """Its client is not ours: this says of the version that is installed that it needs no guard of ours."""
    server, asked = Redirecting(), []

    async def home(exchange: Exchange) -> None:
        asked.append(exchange.headers.get("authorization"))
        await server(exchange)

    key = "0123456789" * 4
    async with lured(tmp_path, home, monkeypatch) as lures:
        server.status, server.location = status, lures.location(form, "/graphql")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", TRACKING, cwd=tmp_path, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "WANDB_API_KEY": key, "WANDB_BASE_URL": lures.url, "HOME": str(tmp_path)},
        )  # fmt: skip
        # Whether it gives up or breaks is its own affair; training goes on without it.
        await asyncio.wait_for(process.communicate(), 120)
    sent = base64.b64encode(f"api:{key}".encode()).decode()
    assert f"Basic {sent}" in asked
    assert key not in lures.all_heard and sent not in lures.all_heard


async def test_a_client_with_a_credential_refuses_any_other_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind all of the above: also a library that makes its own addresses cannot take the key elsewhere."""

    async def handle(exchange: Exchange) -> None:
        await exchange.answer(200, b"here")

    whole = [form for form in ABROAD if form.lower().startswith("http") and "\\" not in form]
    async with lured(tmp_path, handle, monkeypatch) as lures:
        client = endpoint_client(f"{lures.url}/storage/v1", timeout=5.0)
        for form in whole:
            with pytest.raises(CredentialWithheld):
                await client.get(lures.location(form), headers={"apikey": TOKEN}, follow_redirects=True)
        assert (await client.get(f"{lures.url}/x")).text == "here"
        await client.aclose()
    assert (lures.home.heard, lures.other.heard, lures.met) == ([], [], [])


ENDPOINT = "https://ref.storage.supabase.co/storage/v1/upload/resumable"


@pytest.mark.parametrize(
    ("location", "moved"),
    [
        (f"{ENDPOINT}/aWQ=", f"{ENDPOINT}/aWQ="),
        (f"{ENDPOINT}/aWQ=?sign=1", f"{ENDPOINT}/aWQ=?sign=1"),
        ("http://ref.supabase.co:8000/storage/v1/upload/resumable/aWQ", f"{ENDPOINT}/aWQ"),
        ("//evil.example/storage/v1/upload/resumable/aWQ", f"{ENDPOINT}/aWQ"),
        ("https://user:password@evil.example/storage/v1/upload/resumable/aWQ", f"{ENDPOINT}/aWQ"),
        ("/storage/v1/upload/resumable/aWQ", f"{ENDPOINT}/aWQ"),
        ("resumable/aWQ", f"{ENDPOINT}/aWQ"),
        # The prefix that a proxy takes off, and paths that are not the upload's.
        ("http://storage:5000/upload/resumable/aWQ", f"{ENDPOINT}/aWQ"),
        ("/rest/v1/training_jobs", f"{ENDPOINT}/training_jobs"),
        ("/storage/v1/upload/resumable/../../object/x", f"{ENDPOINT}/x"),
    ],
)
def test_what_was_created_at_an_endpoint_lies_beneath_it(location: str, moved: str) -> None:
    assert beneath_endpoint(ENDPOINT, location) == moved


@pytest.mark.parametrize(
    "location", ["https://evil.example", "//evil.example/", "http://[broken/x", "https://h:99999/"]
)
def test_an_address_without_a_path_or_that_cannot_be_read_is_refused(location: str) -> None:
    with pytest.raises(ValueError):
        at_endpoint("https://ref.supabase.co", location)


def test_no_client_is_made_elsewhere() -> None:
    """One rule in one place: who speaks HTTP gets a client from daemon/network."""
    made = re.compile(
        r"httpx\.(Async)?Client\(|httpx\.(get|post|put|patch|head|delete|request|stream)\(|urlopen\(|\brequests\.(get|post|Session)"
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "daemon").rglob("*.py")
        if path.parent.name != "network"
        for line in path.read_text().splitlines()
        if made.search(line)
    ]
    assert found == []
    assert httpx.AsyncClient().follow_redirects is False
