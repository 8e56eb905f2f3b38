"""An early dataset is a guess: taken when it is proven, gone when it was wrong, and never in anybody's way."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from daemon.dataset.prefetch import EarlyDataset, Prefetch
from daemon.dataset.prefetch_folder import early_dataset_name, open_early_folder, remove_early_datasets
from daemon.host.inspect import Host
from daemon.queue.job import JobDataset
from daemon.settings import Settings
from daemon.storage.supabase import SupabaseStorage
from daemon.trainer.pool import TrainerPool
from tests.doubles.storage import SERVICE_KEY, StorageDouble

OWNER = uuid4()
LINE = b'{"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]}\n'


@dataclass
class Site:
    """One host with its volume and a project's storage."""

    double: StorageDouble
    storage: SupabaseStorage
    folder: Path
    host: Host

    def prefetch(self, **changes: Any) -> Prefetch:
        given = {
            "database_url": "postgresql://unused", "supabase_url": self.double.url,
            "supabase_service_role_key": SERVICE_KEY, "work_dir": self.folder / "jobs",
        }  # fmt: skip
        return Prefetch(Settings(_env_file=None, **(given | changes)), self.host, self.storage)

    def dataset(self, content: bytes = LINE, **changes: Any) -> JobDataset:
        """A new job's, uploaded."""
        name = f"{OWNER}/{uuid4()}.jsonl"
        self.double.put("lora-datasets", name, content)
        dataset = JobDataset(
            job_id=uuid4(), user_id=OWNER, dataset_id=uuid4(), dataset_url=None,
            storage_bucket="lora-datasets", storage_path=name, dataset_user_id=OWNER,
        )  # fmt: skip
        return replace(dataset, **changes)

    def files(self) -> list[str]:
        return [file.name for file in (self.folder / "jobs").rglob("*") if file.is_file()]

    async def until(self, question: Any) -> None:
        async with asyncio.timeout(30):
            while not question():
                await asyncio.sleep(0.005)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with StorageDouble(tmp_path / "double") as double:
        storage = SupabaseStorage(double.url, SERVICE_KEY, first_wait_seconds=0.005)
        yield Site(double, storage, tmp_path, Host(device="cpu", hostname="pod-1"))
        await storage.close()


async def handed_over(prefetch: Prefetch, dataset: JobDataset) -> EarlyDataset:
    early = prefetch.hand_over(dataset)
    assert early is not None
    return early


async def test_what_is_still_on_its_way_at_the_claim_is_waited_for(site: Site) -> None:
    prefetch, dataset, go = site.prefetch(), site.dataset(), asyncio.Event()
    site.double.fail("GET", "/object/sign/", held_until=go)
    prefetch.guess(dataset)
    taking = asyncio.create_task((await handed_over(prefetch, dataset)).take(site.folder / "dataset"))
    await site.until(lambda: site.double.count("GET", "/object/sign/"))
    go.set()
    taken = await taking
    assert taken is not None and taken.path.read_bytes() == LINE and taken.validator
    assert site.double.count("GET", "/object/sign/") == 1
    await prefetch.ended()


async def test_a_wrong_guess_is_discarded_at_the_next_claim_and_another_one_is_made_after_it(site: Site) -> None:
    prefetch, expected, other = site.prefetch(), site.dataset(), site.dataset()
    prefetch.guess(expected)
    await site.until(lambda: len(site.files()) == 1)
    prefetch.guess(other)
    assert not prefetch.wants_a_job and len(site.files()) == 1
    assert prefetch.hand_over(other) is None
    await prefetch.ended()
    assert site.files() == [] and prefetch.wants_a_job


@pytest.mark.parametrize(
    "edit", [{"storage_path": f"{OWNER}/other.jsonl"}, {"dataset_user_id": uuid4()}, {"dataset_url": "https://x.org/d"}]
)
async def test_a_row_that_was_edited_since_gets_nothing(site: Site, edit: dict[str, Any]) -> None:
    prefetch, dataset = site.prefetch(), site.dataset()
    prefetch.guess(dataset)
    assert prefetch.hand_over(replace(dataset, **edit)) is None
    await prefetch.ended()
    assert site.files() == []


async def test_a_file_that_is_damaged_or_gone_is_not_taken(site: Site) -> None:
    for harm in (lambda file: file.write_bytes(b"x" * len(LINE)), lambda file: file.unlink()):
        prefetch, dataset = site.prefetch(), site.dataset()
        prefetch.guess(dataset)
        early = open_early_folder(site.folder / "jobs") / early_dataset_name(site.host, dataset.job_id)
        await site.until(early.exists)
        harm(early)
        assert await (await handed_over(prefetch, dataset)).take(site.folder / "dataset") is None
        await prefetch.ended()
        assert site.files() == []


async def test_nothing_is_fetched_from_a_strangers_server_nor_into_a_volume_without_room(site: Site) -> None:
    for changes, edit in (({}, {"dataset_url": "https://example.com/d"}), ({"max_dataset_bytes": 2**60}, {})):
        prefetch, dataset = site.prefetch(**changes), site.dataset(**edit)
        prefetch.guess(dataset)
        early = prefetch.hand_over(dataset)
        assert early is None or await early.take(site.folder / "dataset") is None
        await prefetch.ended()
    assert site.double.requests == [] and site.files() == []


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        ({"dataset_user_id": uuid4()}, "dataset_forbidden"),
        ({"storage_path": "another-user/data.jsonl"}, "dataset_forbidden"),
        ({"storage_path": f"{OWNER}/../another-user/data.jsonl"}, "invalid_spec"),
        ({"storage_bucket": "lora-models"}, "dataset_forbidden"),
    ],
    ids=["owner", "prefix", "dots", "bucket"],
)
async def test_what_a_job_may_not_read_is_not_read_before_it_either(
    site: Site, edit: dict[str, Any], code: str
) -> None:
    prefetch, dataset = site.prefetch(), site.dataset(**edit)
    site.double.put("lora-datasets", "another-user/data.jsonl", LINE)
    with capture_logs() as logged:
        prefetch.guess(dataset)
        await prefetch.ended()
    assert [line["code"] for line in logged if line["event"] == "next_dataset_refused"] == [code]
    assert site.double.requests == [] and site.files() == []
    assert await (await handed_over(prefetch, dataset)).take(site.folder / "dataset") is None


async def test_a_full_disk_leaves_nothing_behind_and_the_job_to_its_own_download(site: Site) -> None:
    prefetch, dataset = site.prefetch(), site.dataset()
    folder = open_early_folder(site.folder / "jobs")
    (folder / f"{early_dataset_name(site.host, dataset.job_id)}.part").symlink_to("/dev/full")
    with capture_logs() as logged:
        prefetch.guess(dataset)
        await prefetch.ended()
    (line,) = [line for line in logged if line["event"] == "next_dataset_not_fetched"]
    assert "No space left" in line["error"] and list(folder.iterdir()) == []
    assert await (await handed_over(prefetch, dataset)).take(site.folder / "dataset") is None


@pytest.mark.parametrize("leave", ["stop", "drop", "forget", "discard"])
async def test_a_download_that_hangs_ends_when_nobody_wants_it(site: Site, leave: str) -> None:
    prefetch, dataset = site.prefetch(), site.dataset()
    hung = site.double.fail("GET", "/object/sign/", held_until=asyncio.Event())
    prefetch.guess(dataset)
    await site.until(lambda: hung.times == 0)
    if leave == "discard":
        (await handed_over(prefetch, dataset)).discard()
    elif leave == "forget":
        prefetch.forget(uuid4())
        assert len(site.files()) == 1, "another job's cancellation"
        prefetch.forget(dataset.job_id)
    else:
        getattr(prefetch, leave)()
    async with asyncio.timeout(10):
        await prefetch.ended()
    assert site.files() == [] and prefetch.wants_a_job is (leave != "stop")


async def test_the_log_is_warned_of_a_dataset_whose_job_will_fail_and_of_no_other(site: Site) -> None:
    prefetch = site.prefetch()
    with capture_logs() as logged:
        for content in (LINE, LINE + b'{"messages": []}\n'):
            prefetch.guess(site.dataset(content))
            await prefetch.ended()
            prefetch.drop()
    (warning,) = [line for line in logged if line["log_level"] == "warning"]
    assert warning["event"] == "next_dataset_faulty" and "line 2" in warning["error"]


@pytest.mark.parametrize(("warm", "held"), [("model", ["", "org/base", "org/default"]), ("libraries", []), ("off", [])])
def test_the_guess_counts_on_what_the_ending_jobs_leave_in_memory(warm: Any, held: list[str]) -> None:
    settings = Settings(_env_file=None, database_url="postgresql://unused", warm=warm, default_model="org/default")
    trainers = TrainerPool(settings, Host(device="cpu"), ("never-started",))
    assert trainers.bases() == [] and trainers.bases_after(["org/base", None]) == held


def test_what_a_dead_daemon_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    host, earlier, elsewhere = (Host(device="cpu", hostname=name) for name in ("pod-1", "pod-1", "pod-10"))
    folder = open_early_folder(tmp_path)
    for owner in (host, earlier, elsewhere):
        (folder / early_dataset_name(owner, uuid4())).write_bytes(LINE)
    (folder / f"{early_dataset_name(earlier, uuid4())}.part").write_bytes(LINE)
    long_ago = time.time() - 7200
    old = folder / early_dataset_name(elsewhere, uuid4())
    old.write_bytes(LINE)
    os.utime(old, (long_ago, long_ago))
    remove_early_datasets(tmp_path, host)
    kept = sorted(file.name.split(".")[0] for file in folder.iterdir())
    assert kept == ["pod-1", "pod-10"] and not old.exists()
