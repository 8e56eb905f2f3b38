"""What only an upload is told is found before a training, and what an attempt left unfinished is deleted and listed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from daemon.doctor.check_result import Status
from daemon.doctor.service_checks import check_unfinished_uploads
from daemon.errors import JobError, JobFailed
from daemon.settings import Settings
from daemon.storage.object_types import STORED_TYPES, takes
from daemon.storage.supabase import SupabaseStorage
from daemon.storage.tus import CHUNK_BYTES, unfinished_uploads
from tests.doubles.storage import Bucket, StorageDouble
from tests.storage.real_server import SERVERS, serve

MB = 1_000_000


@pytest.mark.double
async def test_a_limit_of_the_whole_project_is_found_before_training(
    double: StorageDouble, storage: SupabaseStorage
) -> None:
    double.file_size_limit = 50 * MB
    assert await storage.check(50 * MB) is None
    with pytest.raises(JobFailed, match=r"about 60,000,000 bytes.*would take any") as raised:
        await storage.check(60 * MB)
    assert "file size limit" in str(raised.value.hint)
    # Whatever was begun to find that out is gone.
    assert all(upload.gone_with for upload in double.tus.begun.values())
    assert double.path_of("lora-models", "").exists() is False


@pytest.mark.parametrize(
    ("types", "size", "refused"), [(["*/*"], 1, True), ([], 7 * MB, True), ([], 1, False), (None, 7 * MB, False)]
)
async def test_a_list_of_types_is_read_as_the_server_reads_it(
    double: StorageDouble, storage: SupabaseStorage, types: list[str] | None, size: int, refused: bool
) -> None:
    double.set_bucket("lora-models", allowed_mime_types=types)
    if not refused:
        await storage.check(size)
        return
    with pytest.raises(JobFailed, match="application/gzip"):
        await storage.check(size)


LISTS = [["*/*"], ["application/*"], ["application/gzip"], ["image/*", "application/gzip"], ["*"], ["image/png"]]


@pytest.mark.parametrize("allowed", LISTS, ids=str)
@pytest.mark.parametrize("kind", STORED_TYPES)
def test_a_type_is_looked_for_in_a_list_as_the_server_does(allowed: list[str], kind: str) -> None:
    """tests/storage/test_double.py holds the double to the real server in this."""
    assert takes(allowed, kind) is Bucket(allowed_mime_types=allowed).takes(kind)


@pytest.mark.parametrize("server", SERVERS)
async def test_a_bucket_of_its_own_settings_takes_the_probe_and_keeps_nothing(server: str, tmp_path: Path) -> None:
    async with serve(server, tmp_path) as served:
        bucket = await served.make_bucket(allowed_mime_types=["application/*", "image/*"], file_size_limit=20 * MB)
        storage = SupabaseStorage(served.url, served.key, bucket)
        assert await storage.check(19 * MB) is None
        await storage.close()


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 404}, {"lose_answer": True}], ids=str)
async def test_a_doubt_fails_no_job(double: StorageDouble, storage: SupabaseStorage, fault: dict[str, Any]) -> None:
    double.fail("POST", "upload/resumable", **fault)
    assert "could not be tried" in str(await storage.check(10 * MB))


async def test_a_probe_that_cannot_be_deleted_is_no_fault(double: StorageDouble, storage: SupabaseStorage) -> None:
    double.fail("DELETE", "upload/resumable", status=500)
    assert await storage.check(10 * MB) is None


@pytest.mark.double
async def test_an_upload_that_was_cut_off_is_listed_and_deleted_on_the_server(
    double: StorageDouble, storage: SupabaseStorage, tmp_path: Path
) -> None:
    work_dir = tmp_path / "jobs"
    settings = Settings(_env_file=None, database_url="postgresql://x", work_dir=work_dir)
    assert check_unfinished_uploads(settings).detail == "none"
    file = tmp_path / "a.tar.gz"
    file.write_bytes(bytes(2 * CHUNK_BYTES))
    cut = double.fail("PATCH", status=503, times=1_000)
    with pytest.raises(JobError):
        await storage.upload(
            file, "adapters/a.tar.gz", sha256="0" * 64, resume_dir=work_dir / "job" / "attempts" / "e1" / "publish"
        )
    assert cut.times < 1_000
    ((mark, upload),) = unfinished_uploads(work_dir)
    assert upload.object_name == "adapters/a.tar.gz"
    listed = check_unfinished_uploads(settings)
    assert listed.light is Status.GREEN and "adapters/a.tar.gz, 12,582,912 bytes" in listed.detail
    os.utime(mark, (time.time() - 90_000,) * 2)
    assert check_unfinished_uploads(settings).light is Status.YELLOW

    # The storage is away: nothing is lost, the next clean-up comes by.
    double.fail("DELETE", status=503)
    await storage.end_unfinished_uploads(work_dir)
    assert len(unfinished_uploads(work_dir)) == 1
    await storage.end_unfinished_uploads(work_dir)
    assert unfinished_uploads(work_dir) == []
    assert all(upload.gone_with == 404 for upload in double.tus.begun.values())
    await storage.end_unfinished_uploads(work_dir)
