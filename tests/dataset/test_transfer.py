"""A dataset arrives whole or not at all, from storage or from a URL, and only if the job's owner may read it."""

from __future__ import annotations

import gzip
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from daemon.dataset.fetch import fetch_dataset
from daemon.dataset.transfer import MAX_REDIRECTS, FetchedDataset, download
from daemon.errors import JobDelayed, JobFailed, StorageAway
from daemon.network.address_rules import AddressRules
from daemon.queue.job import ClaimedJob
from daemon.settings import Settings
from daemon.storage.folder import FolderStorage
from daemon.storage.supabase import SIGNED_SECONDS, SupabaseStorage
from tests.doubles.loopback import Cut, Exchange, LoopbackDouble
from tests.doubles.storage import SERVICE_KEY, Bucket, Fault, StorageDouble
from training.events import ErrorCode

OWNER, OTHER = uuid4(), uuid4()
LINES = b"".join(b'{"messages": [{"role": "user", "content": "%d"}]}\n' % number for number in range(20_000))


def settings_of(**changes: Any) -> Settings:
    return Settings(_env_file=None, database_url="postgresql://unused", **changes)


def job_of(**changes: Any) -> ClaimedJob:
    now = datetime.now(UTC)
    facts: dict[str, Any] = {
        "id": uuid4(), "lease_epoch": 1, "lease_token": uuid4(), "attempt": 1, "max_attempts": 3,
        "user_id": OWNER, "dataset_id": uuid4(),
        "need_gpus": 1, "hyperparameters": {}, "gpu_config": {}, "dataset_url": None,
        "storage_bucket": "lora-datasets", "storage_path": f"{OWNER}/d.jsonl", "dataset_user_id": OWNER,
        "callback_url": None, "queued_at": now, "claimed_at": now, "started_at": None,
    }  # fmt: skip
    return ClaimedJob(**{**facts, **changes})


class FileServer(LoopbackDouble):
    """Serves one content, with the faults that a test lists: each request uses up one."""

    def __init__(self, content: bytes, *faults: Callable[[Exchange], Awaitable[bool]]) -> None:
        self.content = content
        self.faults = list(faults)
        self.ranges: list[str | None] = []
        # What names this version; None is not sent.
        self.tag: str | None = '"first"'
        self.modified: str | None = None
        self.sent = "Wed, 04 Nov 2026 10:00:00 GMT"
        # Supabase Storage ignores If-Range.
        self.heeds_if_range = True
        super().__init__()

    @property
    def url(self) -> str:
        return f"{self.server.url}/data.jsonl?token=secret-token"

    async def fetch(self, to: Path, **changes: Any) -> FetchedDataset:
        async def sign() -> str:
            return self.url

        facts: dict[str, Any] = {
            "rules": AddressRules([self.host]), "max_bytes": 10**8, "source": "a dataset", "first_wait_seconds": 0.005,
        }  # fmt: skip
        return await download(sign, to, **{**facts, **changes})

    async def handle(self, exchange: Exchange) -> None:
        self.ranges.append(exchange.headers.get("range"))
        if self.faults and await self.faults.pop(0)(exchange):
            return
        await self.send(exchange)

    async def send(self, exchange: Exchange, stop_after: int | None = None) -> None:
        asked = exchange.headers.get("range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if self.heeds_if_range and exchange.headers.get("if-range", self.tag) != self.tag:
            start = 0
        if start and start >= len(self.content):
            # As Supabase Storage does it: no Content-Range says how long the object is.
            body = b'{"statusCode":"416","code":"InvalidRange","error":"InvalidRange","message":"not satisfiable"}'
            await exchange.answer(416, body, {"Content-Type": "application/json"})
            return
        body = self.content[start:]
        headers = {"Content-Length": str(len(body))}
        headers |= {"ETag": self.tag} if self.tag is not None else {}
        headers |= {"Last-Modified": self.modified, "Date": self.sent} if self.modified is not None else {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
        exchange.start_answer(206 if start else 200, headers)
        exchange.writer.write(body if stop_after is None else body[:stop_after])
        await exchange.writer.drain()
        if stop_after is not None:
            exchange.writer.close()
            raise Cut("as the test wants it")


def says(status: int, body: bytes = b"", **headers: str) -> Callable[[Exchange], Awaitable[bool]]:
    async def fault(exchange: Exchange) -> bool:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        await exchange.answer(status, body, named)
        return True

    return fault


def cut_after(server: list[FileServer], size: int) -> Callable[[Exchange], Awaitable[bool]]:
    async def fault(exchange: Exchange) -> bool:
        await server[0].send(exchange, stop_after=size)
        return True

    return fault


async def test_a_dataset_is_streamed_and_hashed(tmp_path: Path) -> None:
    async with FileServer(LINES) as server:
        fetched = await server.fetch(tmp_path / "in" / "d.jsonl")
    assert fetched.path.read_bytes() == LINES
    assert (fetched.bytes, fetched.sha256) == (len(LINES), hashlib.sha256(LINES).hexdigest())
    assert [path.name for path in fetched.path.parent.iterdir()] == ["d.jsonl"], "no .part is left"


@pytest.mark.parametrize("size", [1, 1000, 65_536, len(LINES) - 1])
async def test_a_cut_download_goes_on_from_where_it_stopped(tmp_path: Path, size: int) -> None:
    held: list[FileServer] = []
    async with FileServer(LINES, cut_after(held, size)) as server:
        held.append(server)
        fetched = await server.fetch(tmp_path / "d.jsonl")
        assert server.ranges == [None, f"bytes={size}-"]
    assert fetched.sha256 == hashlib.sha256(LINES).hexdigest()


async def test_many_cuts_are_survived_as_long_as_something_arrives(tmp_path: Path) -> None:
    held: list[FileServer] = []
    cuts = [cut_after(held, 100_000) for _ in range(8)]
    async with FileServer(LINES, *cuts) as server:
        held.append(server)
        fetched = await server.fetch(tmp_path / "d.jsonl")
    assert fetched.sha256 == hashlib.sha256(LINES).hexdigest()


async def test_a_file_that_changed_in_between_is_read_from_its_start(tmp_path: Path) -> None:
    held: list[FileServer] = []

    async def change(exchange: Exchange) -> bool:
        held[0].content, held[0].tag = LINES[::-1], '"second"'
        return False

    async with FileServer(LINES, cut_after(held, 5000), change) as server:
        held.append(server)
        fetched = await server.fetch(tmp_path / "d.jsonl")
    assert fetched.path.read_bytes() == LINES[::-1]


MONDAY, TUESDAY = "Mon, 02 Nov 2026 10:00:00 GMT", "Tue, 03 Nov 2026 10:00:00 GMT"
TURNED = LINES[::-1]


@pytest.mark.parametrize("stopped_at", [5000, len(LINES) // 2, len(LINES) - 1])
@pytest.mark.parametrize(
    "second", [TURNED[: len(LINES) // 2], TURNED, TURNED + LINES], ids=["shorter", "as long", "longer"]
)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (('"first"', None), ('"second"', None)),
        (('W/"first"', None), ('W/"second"', None)),
        (('"first"', MONDAY), ('"second"', MONDAY)),
        ((None, MONDAY), (None, TUESDAY)),
        (('"first"', None), (None, None)),
        (('"first"', None), (None, TUESDAY)),
        ((None, None), ('"second"', None)),
        ((None, None), (None, None)),
    ],
)
async def test_a_file_that_was_replaced_during_an_interruption_is_never_joined_with_its_successor(
    tmp_path: Path,
    stopped_at: int,
    second: bytes,
    before: tuple[str | None, str | None],
    after: tuple[str | None, str | None],
) -> None:
    """As Supabase Storage does it: If-Range is ignored, and 206 brings bytes of the new object."""
    held: list[FileServer] = []

    async def replace(exchange: Exchange) -> bool:
        held[0].content = second
        held[0].tag, held[0].modified = after
        return False

    async with FileServer(LINES, cut_after(held, stopped_at), replace) as server:
        held.append(server)
        server.heeds_if_range = False
        server.tag, server.modified = before
        fetched = await server.fetch(tmp_path / "d.jsonl")
    assert fetched.path.read_bytes() == second
    assert (fetched.bytes, fetched.sha256) == (len(second), hashlib.sha256(second).hexdigest())


async def test_a_file_of_another_length_is_another_file_whatever_its_tag(tmp_path: Path) -> None:
    held: list[FileServer] = []

    async def grow(exchange: Exchange) -> bool:
        held[0].content = LINES[::-1] + b"{}"
        return False

    async with FileServer(LINES, cut_after(held, 5000), grow) as server:
        held.append(server)
        fetched = await server.fetch(tmp_path / "d.jsonl")
    assert fetched.path.read_bytes() == LINES[::-1] + b"{}"


@pytest.mark.parametrize(("tag", "modified"), [('W/"first"', None), (None, MONDAY), ('"first"', MONDAY)])
async def test_a_download_goes_on_where_any_validator_proves_that_the_file_is_the_same(
    tmp_path: Path, tag: str | None, modified: str | None
) -> None:
    held: list[FileServer] = []
    async with FileServer(LINES, cut_after(held, 5000)) as server:
        held.append(server)
        server.heeds_if_range = False
        server.tag, server.modified = tag, modified
        fetched = await server.fetch(tmp_path / "d.jsonl")
        assert server.ranges == [None, "bytes=5000-"]
    assert fetched.path.read_bytes() == LINES


async def test_a_date_of_the_same_second_proves_nothing(tmp_path: Path) -> None:
    held: list[FileServer] = []

    async def replace(exchange: Exchange) -> bool:
        held[0].content = TURNED
        return False

    async with FileServer(LINES, cut_after(held, 5000), replace) as server:
        held.append(server)
        server.tag, server.modified, server.sent = None, MONDAY, MONDAY
        fetched = await server.fetch(tmp_path / "d.jsonl")
    assert fetched.path.read_bytes() == TURNED


async def test_a_strong_tag_that_a_proxy_weakened_is_the_same_tag(tmp_path: Path) -> None:
    held: list[FileServer] = []

    async def weaken(exchange: Exchange) -> bool:
        held[0].tag = 'W/"first"'
        return False

    async with FileServer(LINES, cut_after(held, 5000), weaken) as server:
        held.append(server)
        server.heeds_if_range = False
        fetched = await server.fetch(tmp_path / "d.jsonl")
        assert server.ranges == [None, "bytes=5000-"]
    assert fetched.path.read_bytes() == LINES


@pytest.mark.parametrize("status", [416, 400])
async def test_a_refused_range_without_content_range_starts_the_download_again(tmp_path: Path, status: int) -> None:
    held: list[FileServer] = []
    body = b'{"statusCode":"416","code":"InvalidRange","error":"InvalidRange","message":"not satisfiable"}'
    async with FileServer(LINES, cut_after(held, 5000), says(status, body)) as server:
        held.append(server)
        fetched = await server.fetch(tmp_path / "d.jsonl")
        assert server.ranges == [None, "bytes=5000-", None]
    assert fetched.path.read_bytes() == LINES


async def test_a_successor_as_long_as_what_had_arrived_is_not_taken_for_the_end(tmp_path: Path) -> None:
    held: list[FileServer] = []
    ends = says(416, b"", Content_Range="bytes */5000")
    async with FileServer(LINES, cut_after(held, 5000), ends) as server:
        held.append(server)
        fetched = await server.fetch(tmp_path / "d.jsonl")
    assert fetched.path.read_bytes() == LINES


async def test_unchanged_is_not_believed_under_another_tag(tmp_path: Path) -> None:
    async with FileServer(LINES) as server:
        known = await server.fetch(tmp_path / "early")
        server.content, server.tag = LINES[::-1], '"second"'
        server.faults = [says(304, ETag='"second"')]
        fetched = await server.fetch(tmp_path / "d.jsonl", known=known)
    assert fetched.path.read_bytes() == LINES[::-1]


async def test_a_server_without_range_is_read_again(tmp_path: Path) -> None:
    held: list[FileServer] = []

    async def ignore_range(exchange: Exchange) -> bool:
        exchange.headers.pop("range")
        return False

    async with FileServer(LINES, cut_after(held, 5000), ignore_range) as server:
        held.append(server)
        fetched = await server.fetch(tmp_path / "d.jsonl")
    assert fetched.path.read_bytes() == LINES


async def test_a_range_that_was_not_asked_for_is_not_believed(tmp_path: Path) -> None:
    held: list[FileServer] = []
    wrong = says(206, b"xyz", Content_Range=f"bytes 7-9/{len(LINES)}")
    async with FileServer(LINES, cut_after(held, 5000), wrong) as server:
        held.append(server)
        fetched = await server.fetch(tmp_path / "d.jsonl")
    assert fetched.path.read_bytes() == LINES


async def test_a_compressed_answer_is_unpacked(tmp_path: Path) -> None:
    async with FileServer(LINES, says(200, gzip.compress(LINES), Content_Encoding="gzip")) as server:
        fetched = await server.fetch(tmp_path / "d.jsonl")
    assert fetched.path.read_bytes() == LINES


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, *range(520, 528), 530])
async def test_passing_trouble_is_waited_out(tmp_path: Path, status: int) -> None:
    async with FileServer(LINES, says(status), says(status)) as server:
        fetched = await server.fetch(tmp_path / "d.jsonl")
    assert fetched.bytes == len(LINES)


async def test_trouble_that_stays_delays_the_job_and_says_what_to_do(tmp_path: Path) -> None:
    async with FileServer(LINES, *[says(503) for _ in range(50)]) as server:
        with pytest.raises(JobDelayed, match="HTTP 503") as raised:
            await server.fetch(tmp_path / "d.jsonl")
    assert raised.value.code is ErrorCode.DATASET_UNREACHABLE
    assert raised.value.hint == "check the dataset URL and submit again"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
async def test_a_refusal_of_a_users_url_fails_at_once_without_its_token(tmp_path: Path, status: int) -> None:
    async with FileServer(LINES, *[says(status) for _ in range(9)]) as server:
        with pytest.raises(JobFailed, match=f"HTTP {status}") as raised:
            await server.fetch(tmp_path / "d.jsonl")
        assert len(server.ranges) == 1
    assert raised.value.code is ErrorCode.DATASET_UNREACHABLE
    assert "secret-token" not in f"{raised.value} {raised.value.hint}"


@pytest.mark.parametrize(("announced", "sent"), [(True, 2_000_000), (False, 2_000_000)])
async def test_a_file_over_the_limit_is_refused(tmp_path: Path, announced: bool, sent: int) -> None:
    async def flood(exchange: Exchange) -> bool:
        if announced:
            return False
        exchange.start_answer(200, {"Transfer-Encoding": "chunked"})
        piece = random.randbytes(65_536)
        for _ in range(sent // len(piece)):
            exchange.writer.write(b"10000\r\n" + piece + b"\r\n")
            await exchange.writer.drain()
        exchange.writer.write(b"0\r\n\r\n")
        return True

    async with FileServer(random.randbytes(sent), flood) as server:
        with pytest.raises(JobFailed, match="1,000,000 are allowed") as raised:
            await server.fetch(tmp_path / "d.jsonl", max_bytes=1_000_000)
    assert raised.value.code is ErrorCode.DATASET_INVALID
    assert list(tmp_path.iterdir()) == []


async def test_a_gzip_bomb_meets_the_same_limit(tmp_path: Path) -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    async with FileServer(b"", says(200, bomb, Content_Encoding="gzip")) as server:
        with pytest.raises(JobFailed, match="1,000,000 are allowed"):
            await server.fetch(tmp_path / "d.jsonl", max_bytes=1_000_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><title>Sign in</title>", "web page"),
        (b"\xef\xbb\xbf  <HTML>", "web page"),
        (gzip.compress(b"{}", mtime=0), "compressed"),
        (b"PK\x03\x04rest of a zip", "compressed"),
    ],
)
async def test_what_plainly_is_no_dataset_is_said_at_once(tmp_path: Path, content: bytes, message: str) -> None:
    async with FileServer(content) as server:
        with pytest.raises(JobFailed, match=message) as raised:
            await server.fetch(tmp_path / "d.jsonl")
    assert raised.value.code is ErrorCode.DATASET_INVALID
    assert list(tmp_path.iterdir()) == []


async def test_a_redirect_to_an_allowed_place_is_followed(tmp_path: Path) -> None:
    async with FileServer(LINES) as second, FileServer(b"", says(302, Location=second.url)) as first:
        fetched = await first.fetch(tmp_path / "d.jsonl", rules=AddressRules([first.host, second.host]))
    assert fetched.bytes == len(LINES)


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/",
        "https://127.0.0.1/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::ffff:169.254.169.254]/",
        "https://2130706433/",
        "https://metadata.google.internal/",
        "file:///etc/passwd",
        "//10.0.0.1/x",
    ],
)
async def test_a_redirect_to_a_private_place_is_not_followed(tmp_path: Path, location: str) -> None:
    async with FileServer(b"the inside") as inside:
        where = location.format(port=inside.host.partition(":")[2])
        async with FileServer(b"", says(302, Location=where)) as first:
            with pytest.raises(JobFailed) as raised:
                await first.fetch(tmp_path / "d.jsonl", rules=AddressRules([first.host]))
        assert inside.ranges == []
    assert raised.value.code is ErrorCode.DATASET_FORBIDDEN


async def test_a_name_that_turns_private_between_two_tries_is_not_followed(tmp_path: Path) -> None:
    """DNS rebinding: public at the first look, loopback at the second."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]

    async def rebinding(host: str, port: int) -> list[str]:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async with FileServer(LINES) as inside:
        rules = AddressRules(resolve=rebinding)
        await rules.check(f"https://rebind.example.com:{inside.host.partition(':')[2]}/")

        async def sign() -> str:
            return f"https://rebind.example.com:{inside.host.partition(':')[2]}/"

        with pytest.raises(JobFailed) as raised:
            await download(sign, tmp_path / "d", rules=rules, max_bytes=10**6, source="x")
        assert inside.ranges == []
    assert raised.value.code is ErrorCode.DATASET_FORBIDDEN


async def test_redirects_in_a_circle_end(tmp_path: Path) -> None:
    async with FileServer(b"", *[says(302, Location="/again") for _ in range(20)]) as server:
        with pytest.raises(JobFailed, match="redirects more than"):
            await server.fetch(tmp_path / "d.jsonl")


async def test_a_full_or_forbidden_disk_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file-not-folder"
    blocked.write_text("in the way")
    async with FileServer(LINES) as server:
        with pytest.raises(JobDelayed, match="cannot be written"):
            await server.fetch(blocked / "d.jsonl")


# -- which dataset a job may read ------------------------------------------------------------------------------------


@pytest.fixture
async def double(tmp_path: Path) -> AsyncIterator[StorageDouble]:
    async with StorageDouble(tmp_path / "double") as double:
        double.buckets["lora-datasets"] = Bucket()
        yield double


@pytest.fixture
async def storage(double: StorageDouble) -> AsyncIterator[SupabaseStorage]:
    storage = SupabaseStorage(double.url, SERVICE_KEY, first_wait_seconds=0.005)
    yield storage
    await storage.close()


async def test_a_stored_dataset_is_signed_and_fetched(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path
) -> None:
    double.put("lora-datasets", f"{OWNER}/d.jsonl", LINES)
    settings = settings_of(supabase_url=double.url, supabase_service_role_key=SERVICE_KEY)
    fetched = await fetch_dataset(job_of().dataset, settings, storage, tmp_path / "d.jsonl")
    assert fetched.path.read_bytes() == LINES
    assert fetched.source == f"lora-datasets/{OWNER}/d.jsonl"


async def test_a_url_that_expired_between_two_tries_is_signed_again(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path
) -> None:
    double.put("lora-datasets", f"{OWNER}/d.jsonl", LINES)
    double.fail("GET", "/object/sign/", cut_answer_after=5000)
    real_clock, signed_before = double.clock, double.count("POST", "/object/sign/")

    def clock() -> float:
        # The second signing and all that follows happen in an hour's time.
        late = double.count("GET", "/object/sign/") > 1
        return real_clock() + (SIGNED_SECONDS + 60 if late else 0)

    double.clock = clock
    settings = settings_of(supabase_url=double.url, supabase_service_role_key=SERVICE_KEY)
    fetched = await fetch_dataset(job_of().dataset, settings, storage, tmp_path / "d.jsonl")
    assert fetched.path.read_bytes() == LINES
    # Once to see where it is, once to start, once because that one expired.
    assert double.count("POST", "/object/sign/") - signed_before == 3


async def test_a_stored_dataset_that_is_replaced_between_two_tries_is_read_from_its_start(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path
) -> None:
    name = f"{OWNER}/d.jsonl"
    double.put("lora-datasets", name, LINES)
    double.fail("GET", "/object/sign/", cut_answer_after=5000)

    def replaced(exchange: Exchange) -> bool:
        if exchange.headers.get("range"):
            double.put("lora-datasets", name, TURNED)
        return False

    double.faults.append(Fault(replaced))
    settings = settings_of(supabase_url=double.url, supabase_service_role_key=SERVICE_KEY)
    fetched = await fetch_dataset(job_of().dataset, settings, storage, tmp_path / "d.jsonl")
    assert fetched.path.read_bytes() == TURNED
    assert fetched.sha256 == hashlib.sha256(TURNED).hexdigest()


@pytest.mark.parametrize("changed", [False, True])
async def test_a_copy_from_before_is_taken_only_where_storage_says_that_nothing_has_changed(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path, changed: bool
) -> None:
    name = f"{OWNER}/d.jsonl"
    double.put("lora-datasets", name, LINES)
    settings = settings_of(supabase_url=double.url, supabase_service_role_key=SERVICE_KEY)
    dataset = job_of().dataset
    known = await fetch_dataset(dataset, settings, storage, tmp_path / "early")
    if changed:
        double.put("lora-datasets", name, LINES[: len(LINES) // 2])
    fetched = await fetch_dataset(dataset, settings, storage, tmp_path / "d.jsonl", known=known)
    assert fetched.path.read_bytes() == (LINES[: len(LINES) // 2] if changed else LINES)
    assert fetched.sha256 == hashlib.sha256(fetched.path.read_bytes()).hexdigest()
    assert double.sent == [f"lora-datasets/{name}"] * (2 if changed else 1)
    assert known.path.exists() is changed


async def test_a_weak_validator_is_none(tmp_path: Path) -> None:
    async with FileServer(LINES) as server:
        server.tag = 'W/"first"'
        assert (await server.fetch(tmp_path / "d.jsonl")).validator is None


async def test_a_server_that_says_unchanged_without_being_asked_has_sent_nothing(tmp_path: Path) -> None:
    async with FileServer(LINES, says(304)) as server:
        with pytest.raises(JobFailed, match="HTTP 304"):
            await server.fetch(tmp_path / "d.jsonl")
    assert list(tmp_path.iterdir()) == []


async def test_a_dataset_on_its_way_is_nobody_elses_to_read(tmp_path: Path) -> None:
    async with FileServer(LINES) as server:
        fetched = await server.fetch(tmp_path / "d.jsonl")
    assert fetched.path.stat().st_mode & 0o777 == 0o600


TENANT = b'{"statusCode":"400","code":"TenantNotFound","error":"Missing tenant config","message":"for ref"}'


@pytest.mark.parametrize(
    "refused",
    [
        says(400, b'{"statusCode":"400","error":"InvalidJWT","message":"invalid signature"}'),
        says(400, TENANT),
        says(403),
        says(404, b"<html>no such host here</html>"),
        says(410),
        says(418),
        says(304),
        says(302, Location="https://10.0.0.1/x"),
        says(302, Location="/again"),
    ],
    ids=["signature", "tenant", "403", "a page", "410", "418", "304", "private", "circle"],
)
async def test_an_odd_refusal_of_a_stored_dataset_is_no_fault_of_the_job_and_is_not_signed_for_ever(
    tmp_path: Path, refused: Callable[[Exchange], Awaitable[bool]]
) -> None:
    async with FileServer(LINES, *[refused] * 40) as server:
        with pytest.raises(StorageAway, match="could not be downloaded") as raised:
            await server.fetch(tmp_path / "d.jsonl", is_stored=True)
        assert len(server.ranges) <= 2 * (MAX_REDIRECTS + 1)
    assert raised.value.code is ErrorCode.DATASET_UNREACHABLE
    assert "nothing is wrong with the job" in str(raised.value.hint)


async def test_a_storage_that_does_not_answer_is_no_fault_of_the_job(tmp_path: Path) -> None:
    async with FileServer(LINES, *[says(503)] * 40) as server:
        with pytest.raises(StorageAway, match="HTTP 503"):
            await server.fetch(tmp_path / "d.jsonl", is_stored=True)


async def test_a_dataset_that_is_deleted_after_its_url_was_signed_is_absent(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path
) -> None:
    name = f"{OWNER}/d.jsonl"
    double.put("lora-datasets", name, LINES)

    def deleted(exchange: Exchange) -> bool:
        if exchange.method == "GET":
            double.path_of("lora-datasets", name).unlink(missing_ok=True)
        return False

    double.faults.append(Fault(deleted))
    settings = settings_of(supabase_url=double.url, supabase_service_role_key=SERVICE_KEY)
    with pytest.raises(JobFailed, match="there is no dataset lora-datasets/"):
        await fetch_dataset(job_of().dataset, settings, storage, tmp_path / "d.jsonl")


async def test_a_dataset_in_a_folder_is_copied(tmp_path: Path) -> None:
    file = tmp_path / "root" / "lora-datasets" / str(OWNER) / "d.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(LINES)
    fetched = await fetch_dataset(
        job_of().dataset, settings_of(), FolderStorage(tmp_path / "root"), tmp_path / "d.jsonl"
    )
    assert (fetched.bytes, fetched.sha256) == (len(LINES), hashlib.sha256(LINES).hexdigest())


async def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not yours")
    folder = tmp_path / "root" / "lora-datasets" / str(OWNER)
    folder.mkdir(parents=True)
    (folder / "d.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(JobFailed) as raised:
        await fetch_dataset(job_of().dataset, settings_of(), FolderStorage(tmp_path / "root"), tmp_path / "d.jsonl")
    assert raised.value.code is ErrorCode.DATASET_UNREACHABLE


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"dataset_user_id": OTHER}, ErrorCode.DATASET_FORBIDDEN),
        ({"dataset_user_id": None}, ErrorCode.DATASET_FORBIDDEN),
        ({"dataset_user_id": OTHER, "dataset_url": "https://example.com/d"}, ErrorCode.DATASET_FORBIDDEN),
        ({"storage_path": f"{OTHER}/d.jsonl"}, ErrorCode.DATASET_FORBIDDEN),
        ({"storage_path": f"{OWNER}-not/d.jsonl"}, ErrorCode.DATASET_FORBIDDEN),
        ({"storage_path": f"{OWNER}/../{OTHER}/d.jsonl"}, ErrorCode.INVALID_SPEC),
        ({"storage_path": f"/{OWNER}/d.jsonl"}, ErrorCode.INVALID_SPEC),
        ({"storage_path": f"{OWNER}//d.jsonl"}, ErrorCode.INVALID_SPEC),
        ({"storage_path": f"{OWNER}/./d.jsonl"}, ErrorCode.INVALID_SPEC),
        ({"storage_path": f"{OWNER}/d#.jsonl"}, ErrorCode.INVALID_SPEC),
        ({"storage_path": f"{OWNER}/%2e%2e/d.jsonl"}, ErrorCode.INVALID_SPEC),
        ({"storage_path": ".."}, ErrorCode.INVALID_SPEC),
        ({"storage_bucket": "lora-models"}, ErrorCode.DATASET_FORBIDDEN),
        ({"storage_bucket": "../secrets"}, ErrorCode.DATASET_FORBIDDEN),
        ({"storage_path": None}, ErrorCode.DATASET_UNREACHABLE),
        ({"dataset_url": "http://169.254.169.254/latest"}, ErrorCode.DATASET_FORBIDDEN),
        ({"dataset_url": "https://localhost/d.jsonl"}, ErrorCode.DATASET_FORBIDDEN),
    ],
)
async def test_what_a_job_may_not_read_is_refused_before_anything_is_opened(
    tmp_path: Path, changes: dict[str, Any], code: ErrorCode
) -> None:
    root = tmp_path / "root"
    for user in (OWNER, OTHER):
        (root / "lora-datasets" / str(user)).mkdir(parents=True)
        (root / "lora-datasets" / str(user) / "d.jsonl").write_bytes(LINES)
    with pytest.raises(JobFailed) as raised:
        await fetch_dataset(job_of(**changes).dataset, settings_of(), FolderStorage(root), tmp_path / "d.jsonl")
    assert raised.value.code is code
    assert raised.value.hint
    assert not (tmp_path / "d.jsonl").exists()


async def test_a_training_file_is_read_where_the_database_says_that_it_is_the_owners(tmp_path: Path) -> None:
    """Which paths are whose: tests/dataset/test_paths.py."""
    path = f"{uuid4()}/training.jsonl"
    file = tmp_path / "training-files" / path
    file.parent.mkdir(parents=True)
    file.write_bytes(LINES)
    job = job_of(storage_bucket="training-files", storage_path=path)

    async def owns_file(user_id: UUID, asked: str) -> bool:
        return (user_id, asked) == (OWNER, path)

    to = tmp_path / "d.jsonl"
    with pytest.raises(JobFailed, match="no training file of the owner"):
        await fetch_dataset(job.dataset, settings_of(), FolderStorage(tmp_path), to)
    fetched = await fetch_dataset(job.dataset, settings_of(), FolderStorage(tmp_path), to, owns_file=owns_file)
    assert fetched.bytes == len(LINES)


async def test_a_given_url_wins_over_the_dataset_row_and_is_shown_without_its_query(tmp_path: Path) -> None:
    async with FileServer(LINES) as server:
        settings = settings_of(allowed_hosts=server.host)
        job = job_of(dataset_url=server.url, storage_path=f"urls/{UUID(int=0)}")
        fetched = await fetch_dataset(job.dataset, settings, FolderStorage(tmp_path), tmp_path / "d.jsonl")
    assert fetched.bytes == len(LINES)
    assert fetched.source == f"http://{server.host}/data.jsonl"
