"""Storage that goes away counts no attempt of a job, wherever in an attempt it is missed, and costs no training."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest

from tests.daemon_process import eventually
from tests.doubles.loopback import Exchange
from tests.doubles.storage import Fault
from tests.lifecycle.project import Project
from tests.lifecycle.test_finished_adapter import elsewhere, insert, killed_while_storing, trainings
from tests.lifecycle.test_out_of_service import out_of_service, returned

# Not one of those that are tried again for a quarter of a minute: a gateway that has lost its project, say.
ODD = {"status": 400, "times": 1_000_000}
AWAY = {"status": 503, "times": 1_000_000}


async def is_returned(project: Project, job: UUID) -> dict[str, Any]:
    (event, *_more) = await asyncio.to_thread(eventually, lambda: returned(project.queue, job), seconds=60)
    assert event["data"]["counted"] is False
    return event


async def comes_back(project: Project, job: UUID, attempts: int = 1) -> None:
    """Clears all faults: then the job completes, and its own attempts are all that were counted."""
    project.storage.faults.clear()
    row = await project.wait_for(job, "completed", seconds=60)
    assert row["attempt"] == attempts and row["error_code"] is None
    assert trainings(project) == 1


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("POST", "/object/sign/lora-datasets"),
        ("GET", "/object/sign/lora-datasets"),
        ("GET", "/bucket/lora-models"),
        ("POST", "/object/lora-models/adapters"),
        ("GET", "/object/info/lora-models/adapters"),
        ("GET", "/object/authenticated/lora-models/adapters"),
    ],
    ids=["signing", "download", "check", "upload", "is it there", "reading back"],
)
async def test_an_answer_that_is_none_counts_no_attempt(project: Project, method: str, where: str) -> None:
    def missed(exchange: Exchange) -> bool:
        """Once a job is under way: a host that starts without its storage claims nothing."""
        under_way = project.storage.count("POST", "/object/sign/lora-datasets") > 0
        return under_way and exchange.method == method and where in exchange.path

    project.storage.faults.append(Fault(missed, **ODD))
    with project.daemon(upload_hours=0):
        job = insert(project)
        told = await is_returned(project, job)
        assert told["data"]["part"] == "storage"
        assert "failed" in told["message"] or "could not be downloaded" in told["message"]
        await comes_back(project, job)


@pytest.mark.parametrize("missed", ["/object/info", "/object/authenticated"])
async def test_nor_where_a_finished_adapter_is_fetched_from_storage(project: Project, missed: str) -> None:
    async with killed_while_storing(project, "adapter_model.safetensors") as job:
        project.storage.fail("GET", f"{missed}/lora-models/adapters", **ODD)
        with elsewhere(project, project.daemon("second"), "another volume"):
            await is_returned(project, job)
            await comes_back(project, job, attempts=2)  # the host that was killed counts


async def test_a_host_claims_nothing_while_objects_can_not_be_stored_although_their_bucket_answers(
    project: Project,
) -> None:
    """What keeps the objects is away, and the server in front of it is not: one job comes back, and the others wait."""
    project.storage.fail("POST", "/object/lora-models", **ODD)
    with project.daemon(upload_hours=0) as daemon:
        jobs = [insert(project) for _ in range(3)]
        trouble = await asyncio.to_thread(eventually, out_of_service(project.queue, "storage"), seconds=60)
        assert "If the storage is away, wait" in trouble["message"]
        # Longer than the pauses between two returns of a job, if the host claimed on.
        await asyncio.sleep(2)
        assert len(daemon.logged("job_claimed")) == 1
        project.storage.faults.clear()
        rows = [await project.wait_for(job, "completed", seconds=60) for job in jobs]
    assert [row["attempt"] for row in rows] == [1, 1, 1]
    assert trainings(project) == 3
    assert not [name for name in project.objects() if name.startswith("probes/")]


@pytest.mark.system
async def test_a_storage_that_is_gone_in_mid_training_costs_nothing(project: Project) -> None:
    """With the daemon's own patience: a quarter of a minute for each request."""
    with project.daemon(upload_hours=0):
        job = project.insert(script=[["mark", str(project.folder / "trainings")], ["steps", 40, 0.05]])
        await project.wait_for(job, "running")
        project.storage.faults.append(Fault(lambda _exchange: True, **AWAY))
        await is_returned(project, job)
        await comes_back(project, job)
