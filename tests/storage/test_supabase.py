"""Supabase Storage through its double: what is stored is whole, whatever goes wrong on the way.

With TEST_SUPABASE_URL and TEST_SUPABASE_KEY the tests that need no injected fault run against a real one too: see
tests/storage/real_server.py.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from daemon.errors import HostFault, JobDelayed, JobFailed
from daemon.storage.interface import SignedUrl, Storage
from daemon.storage.supabase import SupabaseStorage
from daemon.storage.tus import CHUNK_BYTES
from tests.doubles.loopback import Exchange
from tests.doubles.storage import SERVICE_KEY, Bucket, Fault, StorageDouble
from tests.doubles.storage_keys import ANON_KEY, PUBLISHABLE_KEY, SECRET_KEY, make_key
from tests.storage.real_server import SERVERS, serve
from training.events import ErrorCode

SMALL = 100_000
LARGE = 2 * CHUNK_BYTES + 123_457


def file_of(folder: Path, size: int, seed: int = 0) -> tuple[Path, str]:
    content = random.Random(seed).randbytes(size)
    file = folder / f"{size}-{seed}.tar.gz"
    file.write_bytes(content)
    return file, hashlib.sha256(content).hexdigest()


@pytest.fixture(params=SERVERS)
async def any_storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    async with serve(request.param, tmp_path) as server:
        storage = SupabaseStorage(server.url, server.key, server.bucket)
        yield storage
        await storage.close()


@pytest.mark.parametrize("size", [1, SMALL, LARGE])
async def test_an_object_comes_back_as_it_was_sent(any_storage: Storage, tmp_path: Path, size: int) -> None:
    await any_storage.check(size)
    file, sha256 = file_of(tmp_path, size)
    name = f"adapters/{uuid4()}.tar.gz"
    assert not await any_storage.exists(name)
    stored = await any_storage.upload(file, name, sha256=sha256, resume_dir=tmp_path)
    assert (stored.path, stored.bytes, stored.sha256) == (name, size, sha256)
    assert await any_storage.exists(name)
    assert await any_storage.verify(name, size, sha256)
    assert not await any_storage.verify(name, size, "0" * 64)
    fetched = await any_storage.download(name, tmp_path / "back")
    assert fetched.sha256 == sha256
    opened = await any_storage.open_dataset(any_storage.bucket, name)
    assert isinstance(opened, SignedUrl)
    async with httpx.AsyncClient() as client:
        assert hashlib.sha256((await client.get(opened.url)).content).hexdigest() == sha256
    await any_storage.delete(name)
    await any_storage.delete(name)
    assert not await any_storage.exists(name)


async def test_an_upload_found_whole_is_not_sent_again(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path
) -> None:
    file, sha256 = file_of(tmp_path, LARGE)
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    sent = double.count("PATCH")
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert double.count("PATCH") == sent
    assert double.count("POST", "/upload/resumable") == 1


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_a_leftover_of_other_content_is_replaced(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path, size: int
) -> None:
    double.put("lora-models", "adapters/a.tar.gz", b"half of something older")
    file, sha256 = file_of(tmp_path, size)
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert double.read("lora-models", "adapters/a.tar.gz") == file.read_bytes()


@pytest.mark.parametrize("keep_partial", [True, False])
@pytest.mark.parametrize("cut_after", [1, 65_537, 3_000_000, CHUNK_BYTES - 1])
async def test_an_upload_survives_a_cut_inside_any_chunk(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path, cut_after: int, keep_partial: bool
) -> None:
    double.tus.keep_partial_chunks = keep_partial
    double.fail("PATCH", cut_request_after=cut_after, times=3)
    file, sha256 = file_of(tmp_path, LARGE)
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert double.read("lora-models", "adapters/a.tar.gz") == file.read_bytes()
    assert double.count("POST", "/upload/resumable") == 1, "it must go on, not begin again"
    # The last request may carry less than the cut is at.
    assert double.count("HEAD") in (2, 3), "after each failure the server is asked for its offset"


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize("forgets", [True, False])
async def test_a_lost_answer_does_not_lose_or_double_the_object(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path, method: str, forgets: bool
) -> None:
    double.tus.forget_finished = forgets
    file, sha256 = file_of(tmp_path, CHUNK_BYTES + 5)
    lost = double.fail(method, "/upload/resumable", lose_answer=True, times=2)
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert lost.times == 0
    assert double.read("lora-models", "adapters/a.tar.gz") == file.read_bytes()


async def test_a_small_upload_whose_answer_was_lost_is_found_stored(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path
) -> None:
    file, sha256 = file_of(tmp_path, SMALL)
    double.fail("POST", "/object/lora-models", lose_answer=True)
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert double.read("lora-models", "adapters/a.tar.gz") == file.read_bytes()


async def test_storage_that_is_away_is_asked_for_as_long_as_the_pauses_add_up(
    double: StorageDouble, tmp_path: Path
) -> None:
    file, sha256 = file_of(tmp_path, SMALL)
    double.fail("POST", status=503, times=100)
    storage = SupabaseStorage(double.url, double.key, first_wait_seconds=0.02)
    for number in range(5):
        begun = time.monotonic()
        with pytest.raises(JobDelayed):
            await storage.upload(file, f"adapters/{number}", sha256=sha256, resume_dir=tmp_path)
        assert time.monotonic() - begun >= 0.02 * (1 + 2 + 4 + 8 + 16)
    await storage.close()


@pytest.mark.parametrize("status", [423, 429, 500, 502, 503, 504, *range(520, 528), 530, 544])
async def test_passing_trouble_is_waited_out(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path, status: int
) -> None:
    for method, where in [
        ("POST", "/upload/"),
        ("PATCH", "/upload/"),
        ("GET", "/object/info"),
        ("GET", "/object/auth"),
    ]:
        double.fail(method, where, status=status, times=2)
    file, sha256 = file_of(tmp_path, LARGE)
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert all(fault.times == 0 for fault in double.faults)


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_a_page_of_cloudflares_that_stays_delays_the_job_without_its_text(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path, size: int
) -> None:
    file, sha256 = file_of(tmp_path, size)
    for method, where in [("GET", "/object/info"), ("POST", "/upload/"), ("POST", "/object/lora"), ("GET", "/bucket/")]:
        fault = double.fail(method, where, status=522, times=100)
        with pytest.raises(JobDelayed) as raised:
            await storage.check(1)
            await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
            # Only one of the two kinds of upload is made for this size; the probe of the other is no more than a doubt.
            raise JobDelayed(ErrorCode.UPLOAD_FAILED, "522", "not asked") if fault.times >= 99 else AssertionError
        told = f"{raised.value.message} {raised.value.hint}"
        assert "522" in told and len(told) < 400
        assert not any(words in told.lower() for words in ("<", "html>", "ray", "doctype")), told
        double.faults.clear()
        await storage.delete("adapters/a.tar.gz")


async def test_an_answer_that_is_not_storages_is_told_by_its_status(
    storage: SupabaseStorage, double: StorageDouble
) -> None:
    """A firewall's 403, a gateway's JSON of another shape: neither text reaches a row, neither is tried for ever."""
    double.fail("GET", "/object/info", status=403, page="<html><body>blocked: ray 8f2a</body></html>")
    with pytest.raises(HostFault) as refused:
        await storage.exists("a.tar.gz")
    told = f"{refused.value.message} {refused.value.for_the_operator}"
    assert "HTTP 403, an HTML error page" in told and "8f2a" not in told
    double.fail("GET", "/object/info", status=400, page='{"msg": "no route"}')
    with pytest.raises(JobDelayed) as raised:
        await storage.exists("a.tar.gz")
    assert "HTTP 400" in raised.value.message and "no route" not in raised.value.message


async def test_an_offset_conflict_is_resolved_by_asking(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path
) -> None:
    double.fail("PATCH", status=409)
    file, sha256 = file_of(tmp_path, LARGE)
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert double.count("HEAD") == 1


@pytest.mark.parametrize("status", [404, 410])
async def test_an_upload_that_the_server_forgot_is_begun_again(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path, status: int
) -> None:
    file, sha256 = file_of(tmp_path, LARGE)
    double.fail("PATCH", status=503, times=100)
    with pytest.raises(JobDelayed):
        await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    double.faults.clear()
    double.forget_uploads(status)
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert double.count("POST", "/upload/resumable") == 2
    assert double.read("lora-models", "adapters/a.tar.gz") == file.read_bytes()


async def test_another_process_goes_on_where_the_first_stopped(double: StorageDouble, tmp_path: Path) -> None:
    file, sha256 = file_of(tmp_path, 4 * CHUNK_BYTES)
    first = SupabaseStorage(double.url, double.key, first_wait_seconds=0.001)
    seen = 0

    def third_chunk(exchange: object) -> bool:
        nonlocal seen
        seen += getattr(exchange, "method", "") == "PATCH"
        return seen > 2 and getattr(exchange, "method", "") == "PATCH"

    double.fail("PATCH", status=503, times=100).matches = third_chunk
    with pytest.raises(JobDelayed) as raised:
        await first.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    await first.close()
    assert raised.value.code is ErrorCode.UPLOAD_FAILED
    double.faults.clear()
    patches = double.count("PATCH")
    second = SupabaseStorage(double.url, double.key, first_wait_seconds=0.001)
    await second.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    await second.close()
    assert double.count("PATCH") - patches == 2, "two of four chunks were there already"
    assert list(tmp_path.glob("*.upload.json")) == [], "the finished upload is forgotten"


async def test_the_same_bytes_under_another_name_are_another_upload(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path
) -> None:
    file, sha256 = file_of(tmp_path, LARGE)
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    await storage.upload(file, "adapters/a-e2.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert "adapters/a-e2.tar.gz" in double.names("lora-models")


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_an_object_that_the_storage_damaged_is_noticed_and_sent_again(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path, size: int
) -> None:
    double.damage_next_object = True
    file, sha256 = file_of(tmp_path, size)
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert double.read("lora-models", "adapters/a.tar.gz") == file.read_bytes()


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_a_file_over_the_limit_fails_for_good_and_says_so(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path, size: int
) -> None:
    double.set_bucket("lora-models", file_size_limit=size - 1)
    file, sha256 = file_of(tmp_path, size)
    with pytest.raises(JobFailed, match=f"{size:,} bytes") as raised:
        await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert raised.value.code is ErrorCode.UPLOAD_FAILED
    assert "limit" in str(raised.value.hint)
    assert double.count("POST") == 1, "what cannot succeed is not tried again"
    with pytest.raises(JobFailed, match=f"may have {size - 1:,}"):
        await storage.check(size)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (make_key("service_role", secret=b"of another project"), "signature verification failed"),
        ("sb_secret_of-another-project", "headers must have required property 'authorization'"),
        ("eyJ-half-a-key", "Invalid Compact JWS"),
        # Not one that we know to be powerless: Storage finds no bucket for it, and lets it make none.
        (make_key("somebody"), "new row violates row-level security policy"),
        (ANON_KEY, "is the anon key"),
        (PUBLISHABLE_KEY, "is the publishable key"),
        (make_key("service_role", exp=1), "has expired"),
    ],
)
@pytest.mark.double
async def test_a_key_that_may_not_work_is_the_hosts_fault_whatever_is_asked(
    double: StorageDouble, tmp_path: Path, key: str, said: str
) -> None:
    double.put("lora-datasets", "u/d.jsonl", b"{}")
    storage = SupabaseStorage(double.url, key, first_wait_seconds=0.001)
    file, sha256 = file_of(tmp_path, SMALL)
    for ask in (
        storage.prove(),
        storage.check(1),
        storage.open_dataset("lora-datasets", "u/d.jsonl"),
        storage.open_dataset("lora-datasets", "u/none.jsonl"),
        storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path),
    ):
        with pytest.raises(HostFault) as raised:
            await ask
        assert raised.value.part == "storage"
        assert key not in f"{raised.value} {raised.value.hint} {raised.value.for_the_operator}"
    with pytest.raises(HostFault) as raised:
        await storage.prove()
    assert said in raised.value.for_the_operator
    await storage.close()


async def test_the_gateways_refusal_is_told_in_its_words(tmp_path: Path) -> None:
    async with StorageDouble(tmp_path / "double", gateway=True) as double:
        storage = SupabaseStorage(double.url, "sb_secret_of-another-project", first_wait_seconds=0.001)
        with pytest.raises(HostFault) as raised:
            await storage.prove()
        assert "Unregistered API key" in raised.value.message and "parse" not in raised.value.for_the_operator
        await storage.close()


async def test_a_newer_key_that_the_direct_host_refuses_goes_by_the_projects_url(tmp_path: Path) -> None:
    """Past the gateway an sb_secret_ key is no JWT; it is asked once, and every later upload goes the other way."""
    async with (
        StorageDouble(tmp_path / "double", gateway=True) as double,
        double.behind_the_gateway() as direct,
    ):
        storage = SupabaseStorage(double.url, SECRET_KEY, large_files_url=direct, first_wait_seconds=0.001)
        await storage.check(LARGE)
        for name in ("a", "b"):
            file, sha256 = file_of(tmp_path, LARGE)
            await storage.upload(file, f"adapters/{name}.tar.gz", sha256=sha256, resume_dir=tmp_path)
            assert double.read("lora-models", f"adapters/{name}.tar.gz") == file.read_bytes()
        await storage.close()
        # The probe goes both ways, the uploads only by the second.
        assert double.count("POST", "/upload/resumable") == 4


@pytest.mark.double
async def test_an_upload_is_resumed_after_its_key_was_refused_for_a_while(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path
) -> None:
    """A HEAD is refused without a word: what had arrived must not be forgotten for it."""
    file, sha256 = file_of(tmp_path, LARGE)
    secret, seen = double.gate.secret, 0

    def after_the_first_chunk(exchange: Exchange) -> bool:
        nonlocal seen
        seen += exchange.method == "PATCH"
        if seen > 1:
            double.gate.secret = b"rotated"
        return False

    double.faults.append(Fault(after_the_first_chunk))
    for _ in range(2):
        with pytest.raises(HostFault):
            await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    double.faults.clear()
    double.gate.secret = secret
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert double.count("POST", "/upload/resumable") == 1
    assert double.read("lora-models", "adapters/a.tar.gz") == file.read_bytes()


@pytest.mark.parametrize(
    ("limits", "size", "said"),
    [
        ({"allowed_mime_types": ["image/png"]}, LARGE, "mime type application/gzip is not supported"),
        ({"allowed_mime_types": []}, LARGE, "mime type application/gzip is not supported"),
        ({"allowed_mime_types": ["image/png"]}, SMALL, "mime type application/gzip is not supported"),
        ({"file_size_limit": 5}, LARGE, "Maximum size exceeded"),
        ({"file_size_limit": 5}, SMALL, "EntityTooLarge: The object exceeded the maximum allowed size"),
    ],
)
async def test_the_reason_of_a_refusal_is_in_the_message(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path, limits: dict[str, Any], size: int, said: str
) -> None:
    double.set_bucket("lora-models", **limits)
    file, sha256 = file_of(tmp_path, size)
    with pytest.raises(JobFailed) as raised:
        await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert said in raised.value.message and "parse" not in raised.value.message


async def test_a_bucket_that_vanished_is_named_by_either_kind_of_upload(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path
) -> None:
    double.drop_bucket("lora-models")
    for size in (SMALL, LARGE):
        file, sha256 = file_of(tmp_path, size)
        with pytest.raises(JobDelayed, match="Bucket not found"):
            await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)


async def test_a_name_taken_while_an_upload_goes_on_is_looked_at(
    storage: SupabaseStorage, double: StorageDouble, tmp_path: Path
) -> None:
    """Storage cuts the connection without a word. The object is read back, and replaced as it is not ours."""
    file, sha256 = file_of(tmp_path, LARGE)

    def store_another(exchange: Exchange) -> bool:
        if exchange.method == "PATCH" and double.count("PATCH") == 2:
            double.put("lora-models", "adapters/a.tar.gz", b"of somebody else")
        return False

    double.faults.append(Fault(store_another))
    await storage.upload(file, "adapters/a.tar.gz", sha256=sha256, resume_dir=tmp_path)
    assert double.read("lora-models", "adapters/a.tar.gz") == file.read_bytes()


@pytest.mark.double
async def test_a_missing_bucket_is_created_private(storage: SupabaseStorage, double: StorageDouble) -> None:
    double.buckets.clear()
    await storage.check(10**9)
    assert double.buckets == {"lora-models": Bucket(public=False)}


async def test_a_bucket_that_refuses_archives_is_found_before_training(
    storage: SupabaseStorage, double: StorageDouble
) -> None:
    double.set_bucket("lora-models", allowed_mime_types=["image/png"])
    with pytest.raises(JobFailed, match="image/png"):
        await storage.check(1)
    # The archive would pass; the configuration and the manifest beside it would not, hours later.
    double.set_bucket("lora-models", allowed_mime_types=["application/gzip", "application/octet-stream"])
    with pytest.raises(JobFailed, match="not application/json, image/png"):
        await storage.check(1)
    double.set_bucket("lora-models", allowed_mime_types=["application/*", "image/*"])
    await storage.check(1)


async def test_a_missing_dataset_is_named(storage: SupabaseStorage, double: StorageDouble) -> None:
    double.set_bucket("lora-datasets")
    with pytest.raises(JobFailed, match="no dataset lora-datasets/u/none") as raised:
        await storage.open_dataset("lora-datasets", "u/none.jsonl")
    assert raised.value.code is ErrorCode.DATASET_UNREACHABLE


async def test_a_missing_bucket_for_datasets_fails_no_job_for_good(
    storage: SupabaseStorage, double: StorageDouble
) -> None:
    """Signing looks at no bucket: the answer is the same as for a missing object."""
    double.drop_bucket("lora-datasets")
    with pytest.raises(JobDelayed, match="has no bucket lora-datasets") as raised:
        await storage.open_dataset("lora-datasets", "u/none.jsonl")
    assert not isinstance(raised.value, HostFault) and raised.value.code is ErrorCode.DATASET_UNREACHABLE


async def test_something_that_is_no_storage_is_named_by_its_setting(tmp_path: Path) -> None:
    storage = SupabaseStorage("http://127.0.0.1:9", SERVICE_KEY, first_wait_seconds=0.001)
    with pytest.raises(JobDelayed, match="ConnectError"):
        await storage.check(1)
    await storage.close()
