"""While one job trains the next one's dataset comes; whatever becomes of that, its attempt tells the truth."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from tests.daemon_process import DaemonProcess, eventually
from tests.lifecycle.project import Project

# Half a minute of training that is cancelled once the test has seen what it waits for.
ENDING_SOON = [["steps", 1000, 0.03]]
# The trainer reads the script in it, the reader a conversation.
CONVERSATION = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]}


def lines_of(*script: list[Any]) -> list[str]:
    return [json.dumps(CONVERSATION | {"script": list(script)})]


def dataset_name(project: Project, job: UUID) -> str:
    (row,) = project.queue.select("SELECT * FROM datasets WHERE id = %s", project.queue.row(job)["dataset_id"])
    return str(row["storage_path"])


def early_files(project: Project) -> list[Path]:
    folder = project.folder / "jobs" / ".early"
    return list(folder.iterdir()) if folder.is_dir() else []


async def seen(daemon: DaemonProcess, event: str, **fields: Any) -> dict[str, Any]:
    return await asyncio.to_thread(daemon.wait_for_log, event, seconds=40, **fields)


async def test_the_next_jobs_dataset_is_read_from_storage_once_and_before_its_claim(project: Project) -> None:
    with project.daemon() as daemon:
        first = project.insert(ENDING_SOON)
        cancelled = project.insert(lines=lines_of(["steps", 5, 0.0]))
        await seen(daemon, "next_dataset_fetched", job_id=str(cancelled))
        project.queue.cancel_as_owner(cancelled)
        await asyncio.to_thread(eventually, lambda: not early_files(project))
        second = project.insert(lines=lines_of(["steps", 5, 0.0]))
        await seen(daemon, "next_dataset_fetched", job_id=str(second))
        (early,) = early_files(project)
        assert early.stat().st_mode & 0o777 == 0o600 and early.parent.stat().st_mode & 0o777 == 0o700
        assert project.queue.row(second)["status"] == "queued"
        project.queue.cancel_as_owner(first)
        await project.wait_for(second, "completed")
    assert project.storage.sent.count(f"lora-datasets/{dataset_name(project, second)}") == 1
    assert early_files(project) == [] and not daemon.logged("next_dataset_faulty")


async def test_an_object_that_changed_before_the_claim_is_fetched_anew(project: Project) -> None:
    with project.daemon() as daemon:
        first = project.insert(ENDING_SOON)
        second = project.insert(lines=lines_of(["steps", 5, 0.0]))
        await seen(daemon, "next_dataset_fetched", job_id=str(second))
        name = dataset_name(project, second)
        project.storage.put("lora-datasets", name, "\n".join(lines_of(["steps", 7, 0.0])).encode())
        project.queue.cancel_as_owner(first)
        row = await project.wait_for(second, "completed")
    assert row["current_step"] == 7
    assert project.storage.sent.count(f"lora-datasets/{name}") == 2


async def test_a_dataset_that_is_bad_or_anothers_fails_its_job_when_it_is_claimed_and_not_before(
    project: Project,
) -> None:
    stranger = uuid4()
    project.queue.select("INSERT INTO auth.users (id, email) VALUES (%s, 'stranger@example.test')", stranger)
    secret = project.insert(user_id=stranger, run_after_seconds=3600)
    with project.daemon() as daemon:
        first = project.insert(ENDING_SOON)
        faulty = project.insert(lines=[json.dumps({"messages": [], "script": [["exit", 3]]})], max_attempts=1)
        await seen(daemon, "next_dataset_faulty", job_id=str(faulty))
        assert project.queue.row(faulty)["status"] == "queued" and project.queue.row(faulty)["error_code"] is None
        project.queue.cancel_as_owner(faulty)
        stolen = project.insert(dataset_id=project.queue.row(secret)["dataset_id"])
        await seen(daemon, "next_dataset_refused", job_id=str(stolen), code="dataset_forbidden")
        assert project.queue.row(stolen)["status"] == "queued" and early_files(project) == []
        project.queue.cancel_as_owner(first)
        row = await project.wait_for(stolen, "failed")
    assert row["error_code"] == "dataset_forbidden"
    assert f"lora-datasets/{dataset_name(project, secret)}" not in project.storage.sent


async def test_what_another_host_claims_is_not_kept_and_what_a_killed_daemon_had_fetched_is_removed_by_the_next(
    project: Project,
) -> None:
    with project.daemon() as daemon:
        first = project.insert(ENDING_SOON)
        second = project.insert(lines=lines_of(["steps", 5, 0.0]))
        await seen(daemon, "next_dataset_fetched", job_id=str(second))
        # A volume of its own: a daemon that starts on the same one removes what it finds there.
        with project.daemon("elsewhere", work_dir=project.folder / "elsewhere"):
            await project.wait_for(second, "completed")
        assert len(early_files(project)) == 1
        project.queue.cancel_as_owner(first)
        await asyncio.to_thread(eventually, lambda: not early_files(project))
        third = project.insert(ENDING_SOON)
        fourth = project.insert(lines=lines_of(["steps", 5, 0.0]))
        await seen(daemon, "next_dataset_fetched", job_id=str(fourth))
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    assert len(early_files(project)) == 1
    project.queue.cancel_as_owner(third)
    with project.daemon("next"):
        await asyncio.to_thread(eventually, lambda: not early_files(project))
        assert (await project.wait_for(fourth, "completed"))["attempt"] == 1


async def test_a_download_that_hangs_holds_up_neither_training_nor_the_way_out(project: Project) -> None:
    never = asyncio.Event()
    with project.daemon() as daemon:
        first = project.insert(ENDING_SOON)
        second = project.insert(lines=lines_of(["steps", 5, 0.0]))
        hung = project.storage.fail("GET", dataset_name(project, second), held_until=never)
        await asyncio.to_thread(eventually, lambda: hung.times == 0)
        daemon.signal(signal.SIGTERM)
        # The downloads' own patience is half a minute for each try.
        assert await asyncio.to_thread(daemon.wait, 20) == 0
    assert early_files(project) == []
    assert [project.queue.row(job)["status"] for job in (first, second)] == ["queued", "queued"]
