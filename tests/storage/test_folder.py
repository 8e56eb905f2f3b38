"""The folder that stands in for object storage keeps the same promises."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from daemon.errors import HostFault, JobDelayed, JobFailed
from daemon.settings import Settings
from daemon.storage.folder import FolderStorage
from daemon.storage.interface import LocalFile, Location
from daemon.storage.open import open_storage
from daemon.storage.supabase import SupabaseStorage
from training.events import ErrorCode

CONTENT = b"an adapter" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "adapter.tar.gz"
    file.write_bytes(CONTENT)
    return file


async def test_an_object_comes_back_as_it_was_sent(tmp_path: Path, file: Path) -> None:
    storage = FolderStorage(tmp_path / "root")
    await storage.check(len(CONTENT))
    stored = await storage.upload(file, "adapters/a.tar.gz", sha256=SHA256, resume_dir=tmp_path)
    assert (stored.bytes, stored.sha256) == (len(CONTENT), SHA256)
    assert (tmp_path / "root" / "lora-models" / "adapters" / "a.tar.gz").read_bytes() == CONTENT
    assert await storage.exists("adapters/a.tar.gz")
    assert await storage.verify("adapters/a.tar.gz", len(CONTENT), SHA256)
    assert not await storage.verify("adapters/a.tar.gz", len(CONTENT), "0" * 64)
    assert not await storage.verify("adapters/b.tar.gz", len(CONTENT), SHA256)
    assert (await storage.download("adapters/a.tar.gz", tmp_path / "back")).sha256 == SHA256
    await storage.delete("adapters/a.tar.gz")
    await storage.delete("adapters/a.tar.gz")
    assert not await storage.exists("adapters/a.tar.gz")
    with pytest.raises(JobFailed, match="not in storage"):
        await storage.download("adapters/a.tar.gz", tmp_path / "back")


async def test_a_hash_that_is_not_the_files_is_noticed(tmp_path: Path, file: Path) -> None:
    with pytest.raises(JobDelayed, match="reading it back"):
        await FolderStorage(tmp_path / "root").upload(file, "a.tar.gz", sha256="0" * 64, resume_dir=tmp_path)


async def test_a_leftover_is_replaced_whole_and_no_part_remains(tmp_path: Path, file: Path) -> None:
    storage = FolderStorage(tmp_path / "root")
    target = tmp_path / "root" / "lora-models" / "a.tar.gz"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"half")
    await storage.upload(file, "a.tar.gz", sha256=SHA256, resume_dir=tmp_path)
    assert [path.name for path in target.parent.iterdir()] == ["a.tar.gz"]
    assert target.read_bytes() == CONTENT


async def test_an_upload_that_is_cancelled_leaves_nothing_now_or_later(tmp_path: Path, file: Path) -> None:
    """Whoever sweeps after a cancelled job must not be followed by a thread that still copies."""
    os.truncate(file, 1 << 30)
    folder = tmp_path / "root" / "lora-models"
    upload = asyncio.create_task(
        FolderStorage(tmp_path / "root").upload(file, "a.tar.gz", sha256="0" * 64, resume_dir=tmp_path)
    )
    async with asyncio.timeout(30):
        while not any(folder.glob(".*.part")):
            await asyncio.sleep(0.001)
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert list(folder.iterdir()) == []


def test_a_folder_is_known_by_what_it_keeps_and_not_by_its_path(tmp_path: Path) -> None:
    here = FolderStorage(tmp_path / "a").location
    assert FolderStorage(tmp_path / "a").location == here
    (tmp_path / "mounted elsewhere").symlink_to(tmp_path / "a")
    assert FolderStorage(tmp_path / "mounted elsewhere").location == here
    assert FolderStorage(tmp_path / "b").location.storage != here.storage
    (tmp_path / "file").touch()
    with pytest.raises(JobDelayed, match="cannot be written"):
        FolderStorage(tmp_path / "file").location  # noqa: B018 - asking is the test


def test_a_project_is_known_by_its_url() -> None:
    storage = SupabaseStorage("https://abc.supabase.co/", "key", "b")
    assert storage.location == Location("https://abc.supabase.co", "b")


async def test_a_folder_that_cannot_be_used_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file in the way")
    with pytest.raises(JobDelayed, match="cannot be written") as raised:
        await FolderStorage(tmp_path / "root").check(1)
    fault = raised.value
    assert isinstance(fault, HostFault) and fault.part == "storage folder"
    # The path is the operator's; the job's owner reads none.
    assert str(tmp_path) in fault.detail and str(tmp_path) not in f"{fault.message} {fault.hint}"


async def test_a_disk_too_small_for_the_adapter_is_named_before_training(tmp_path: Path) -> None:
    with pytest.raises(JobDelayed) as raised:
        await FolderStorage(tmp_path).check(10**18)
    assert raised.value.code is ErrorCode.DISK_FULL


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a//b", "a/./b", "", "a/", "a\nb", "a\n", "ü", "a#b", "a%2f", "a\\b"]
)
async def test_a_path_that_leaves_the_bucket_is_refused(tmp_path: Path, file: Path, path: str) -> None:
    storage = FolderStorage(tmp_path / "root")
    with pytest.raises(JobFailed, match="not a path inside a bucket"):
        await storage.upload(file, path, sha256=SHA256, resume_dir=tmp_path)
    with pytest.raises(JobFailed, match="not a path inside a bucket"):
        await storage.open_dataset("lora-datasets", path)


async def test_a_dataset_is_where_bucket_and_path_say(tmp_path: Path) -> None:
    file = tmp_path / "lora-datasets" / "u" / "d.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    assert await FolderStorage(tmp_path).open_dataset("lora-datasets", "u/d.jsonl") == LocalFile(file)


async def test_settings_choose_the_storage(tmp_path: Path) -> None:
    folder = open_storage(Settings(_env_file=None, database_url="postgresql://x", storage_dir=tmp_path))
    assert isinstance(folder, FolderStorage)
    hosted = open_storage(
        Settings(
            _env_file=None,
            database_url="postgresql://x",
            supabase_url="https://abcdef.supabase.co",
            supabase_service_role_key="sb_secret_x",
            models_bucket="other",
        )
    )
    assert isinstance(hosted, SupabaseStorage)
    assert hosted.bucket == "other"
    await hosted.close()
