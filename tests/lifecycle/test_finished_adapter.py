"""An adapter whose training has ended is stored, however its host dies: it is not trained a second time."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import pytest

from tests.daemon_process import DaemonProcess, eventually
from tests.lifecycle.project import Project


def elsewhere(project: Project, daemon: DaemonProcess, volume: str) -> DaemonProcess:
    """The daemon with a work folder of its own: a host that shares no volume with the others."""
    daemon.environment["TRAINER_WORK_DIR"] = str(project.folder / volume)
    return daemon


@asynccontextmanager
async def killed_while_storing(project: Project, name: str) -> AsyncIterator[UUID]:
    """A job whose host is killed when it is about to store this file; then the storage takes everything."""
    held = project.storage.fail("POST", name, held_until=asyncio.Event())
    with project.daemon("first") as first:
        job = insert(project)
        await asyncio.to_thread(eventually, lambda: held.times == 0, why=first.tail)
        os.kill(first.pid, signal.SIGKILL)
    project.storage.faults.clear()
    yield job


def insert(project: Project) -> UUID:
    """A job whose trainer leaves a mark: the story may not have been written yet when its host is killed."""
    return project.insert(script=[["mark", str(project.folder / "trainings")], ["steps", 5, 0.0]])


def trainings(project: Project) -> int:
    return len((project.folder / "trainings").read_text().splitlines())


def weights(project: Project, job: UUID) -> str:
    path = project.queue.row(job)["adapter_path"].removeprefix("lora-models/")
    with tarfile.open(fileobj=io.BytesIO(project.storage.read("lora-models", path))) as archive:
        content = archive.extractfile("adapter_model.safetensors")
        assert content is not None
        return content.read().decode()


async def test_a_host_on_the_same_volume_stores_what_the_dead_one_had_trained(project: Project) -> None:
    async with killed_while_storing(project, ".tar.gz") as job:
        with project.daemon("second"):
            row = await project.wait_for(job, "completed")
            await project.tidied()
    assert trainings(project) == 1 and "adapter_adopted" in project.queue.story(job)
    assert weights(project, job).startswith("epoch 1") and row["lease_epoch"] == 2
    # What the row and the artifact say comes from the attempt that trained.
    assert row["base_model"] == "tiny" and row["result"]["summary"]["final_training_loss"] == pytest.approx(0.1)
    assert not (project.folder / "jobs" / str(job)).exists()


@pytest.mark.parametrize(("name", "trained"), [("adapter_model.safetensors", 1), (".tar.gz", 2)])
async def test_a_host_without_the_volume_adopts_what_is_whole_in_storage_and_else_trains(
    project: Project, name: str, trained: int
) -> None:
    async with killed_while_storing(project, name) as job:
        with elsewhere(project, project.daemon("second"), "another volume"):
            await project.wait_for(job, "completed")
            await project.tidied()
    assert trainings(project) == trained
    assert weights(project, job).startswith(f"epoch {1 if trained == 1 else 2}")
    # The dead host's objects are gone, the winner's are there.
    assert all(name.startswith(f"adapters/{job}-e2") for name in project.objects())


async def test_a_job_that_failed_for_the_bucket_is_retried_without_training(project: Project) -> None:
    refused = project.storage.fail("POST", "object/lora-models/adapters", status=413, times=1_000)
    with project.daemon():
        job = insert(project)
        await project.wait_for(job, "failed")
        refused.times = 0
        project.queue.select("SELECT retry_training_job(%s)", job)
        await project.wait_for(job, "completed")
    assert trainings(project) == 1


async def test_a_deadline_that_passes_while_the_adapter_is_stored_says_so_and_costs_no_training(
    project: Project,
) -> None:
    held = project.storage.fail("POST", ".tar.gz", held_until=asyncio.Event())
    with project.daemon():
        job = insert(project)
        await asyncio.to_thread(eventually, lambda: held.times == 0)
        project.queue.select("UPDATE training_jobs SET deadline_at = clock_timestamp() WHERE id = %s", job)
        row = await project.wait_for(job, "failed")
        assert row["error_code"] == "deadline_exceeded"
        assert row["error_hint"].endswith("Its adapter is finished: it is only stored then, not trained again.")
        project.queue.select("UPDATE training_jobs SET deadline_at = NULL WHERE id = %s", job)
        project.queue.select("SELECT retry_training_job(%s)", job)
        await project.wait_for(job, "completed")
    assert trainings(project) == 1


async def test_another_spec_is_trained_anew(project: Project) -> None:
    refused = project.storage.fail("POST", "object/lora-models/adapters", status=413, times=1_000)
    with project.daemon() as daemon:
        job = insert(project)
        await project.wait_for(job, "failed")
        refused.times = 0
        daemon.signal(signal.SIGTERM)
        await asyncio.to_thread(daemon.wait, 30)
    project.queue.select("SELECT retry_training_job(%s)", job)
    changed = json.dumps({"base_model": "tiny", "learning_rate": 0.001})
    project.queue.select("UPDATE training_jobs SET hyperparameters = %s WHERE id = %s", changed, job)
    with project.daemon("second"):
        await project.wait_for(job, "completed")
    assert trainings(project) == 2
