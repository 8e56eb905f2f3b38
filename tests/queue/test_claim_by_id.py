"""The claim of a serverless host: the one job that it was called for, if it waits and this host can serve it."""

from __future__ import annotations

import re
from typing import Any, Literal
from uuid import UUID, uuid4

import pytest

from daemon.database.statements import statement
from daemon.gateway.job_rows import Refused
from daemon.gateway.schemas import Submission
from daemon.host.gpus import Gpu
from daemon.host.inspect import Host
from daemon.queue.job import ClaimedJob
from daemon.queue.outcome import Failed
from daemon.queue.sql_job_store import SqlJobStore
from daemon.read_settings import load_settings
from daemon.serverless.memory_job_store import MemoryJobStore
from daemon.serverless.memory_outbox import MemoryOutbox
from daemon.serverless.row_store import ServerlessRows
from tests.postgres import AppDatabase
from tests.queue.claiming import claim
from training.events import ErrorCode

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", 79.6)
BROKEN = Failed(ErrorCode.INTERNAL, "broke", transient=True)


async def taken(
    database: AppDatabase,
    job_id: UUID,
    *,
    device: Literal["cuda", "cpu"] = "cuda",
    gpus: tuple[Gpu, ...] = (H100,),
    **settings: Any,
) -> ClaimedJob | None:
    """What a serverless host with these cards is given when it is called for this job."""
    given = load_settings(database_url=database.dsn, **settings)
    host = Host(device=device, gpus=gpus if device == "cuda" else ())
    async with ServerlessRows(given, host).open() as rows:
        assert isinstance(rows, ServerlessRows)
        return await rows.claim(job_id)


async def test_a_job_that_this_host_can_serve_is_taken_like_any_other(database: AppDatabase, user: UUID) -> None:
    job_id = database.insert_job(user)
    job = await taken(database, job_id)
    assert job is not None and (job.id, job.lease_epoch, job.attempt, job.base_model) == (
        job_id, 1, 1, "mistralai/Mistral-7B-v0.1",
    )  # fmt: skip
    assert database.job(job_id)["status"] == "initializing" and await taken(database, job_id) is None


LACKING = pytest.mark.parametrize(
    ("wanted", "gpus", "allowed", "said"),
    [
        ({"num_gpus": 4}, (H100,), "", "it asks for 4 GPUs, and this host has 1."),
        ({"gpu_memory_gb": 80}, (Gpu(0, "NVIDIA L4", 24.0),), "", "a GPU of 80 GB, and this host's has 24 GB."),
        ({"gpu_type": "A100"}, (H100,), "", "a GPU of the type A100, and this host has NVIDIA H100 80GB HBM3."),
        ({}, (H100,), "a/b, c/d", "the model mistralai/Mistral-7B-v0.1, and this host may load a/b, c/d only."),
        ({"count": 2, "type": "B200"}, (H100,), "", "2 GPUs, and this host has 1; for a GPU of the type B200"),
    ],
)


@LACKING
async def test_a_job_that_this_host_cannot_serve_is_refused_with_what_it_lacks_and_waits_on(
    store: SqlJobStore, database: AppDatabase, user: UUID, wanted: Any, gpus: tuple[Gpu, ...], allowed: str, said: str
) -> None:
    job_id = database.insert_job(user, gpu_config=wanted)
    with pytest.raises(Refused) as refused:
        await taken(database, job_id, gpus=gpus, allowed_models=allowed)
    assert said in refused.value.message and "stays queued" in str(refused.value.hint)
    row = database.job(job_id)
    assert (row["status"], row["attempt"], row["lease_epoch"], row["due"]) == ("queued", 0, 0, True)
    assert (await claim(store)).job is not None, "a host without these limits takes it"


@LACKING
async def test_a_host_without_a_database_refuses_the_same_jobs_in_the_same_words(
    wanted: Any, gpus: tuple[Gpu, ...], allowed: str, said: str
) -> None:
    models = load_settings(database_url="postgresql://nowhere", allowed_models=allowed).allowed_models
    store = MemoryJobStore(Host(device="cuda", gpus=gpus), models, MemoryOutbox())
    with pytest.raises(Refused) as refused:
        await store.submit(submission(wanted))
    assert said in refused.value.message and "stays queued" not in str(refused.value.hint)


@pytest.mark.parametrize(
    "wanted",
    [{}, {"count": 1, "type": "h100"}, {"gpu_memory_gb": 80}, {"gpu_type": "  "}, {"gpu_type": "H100", "num_gpus": 1}],
)
async def test_what_a_host_has_it_serves_with_a_database_and_without(
    database: AppDatabase, user: UUID, wanted: dict[str, Any]
) -> None:
    assert await taken(database, database.insert_job(user, gpu_config=wanted)) is not None
    store = MemoryJobStore(Host(device="cuda", gpus=(H100,)), (), MemoryOutbox())
    assert await store.claim(await store.submit(submission(wanted))) is not None


async def test_a_cpu_host_without_a_database_takes_what_it_is_called_for() -> None:
    store = MemoryJobStore(Host(device="cpu"), (), MemoryOutbox())
    much = submission({"num_gpus": 8, "gpu_memory_gb": 640, "gpu_type": "B200"})
    assert await store.claim(await store.submit(much)) is not None


def submission(gpu_config: dict[str, Any]) -> Submission:
    """What a caller without a row sends."""
    base_model = {"base_model": "mistralai/Mistral-7B-v0.1"}
    return Submission(
        dataset_url="https://files.example.com/d.jsonl", hyperparameters=base_model, gpu_config=gpu_config
    )


async def test_a_cpu_host_takes_what_it_is_called_for(database: AppDatabase, user: UUID) -> None:
    job_id = database.insert_job(user, gpu_config={"num_gpus": 8, "gpu_memory_gb": 640, "gpu_type": "B200"})
    assert await taken(database, job_id, device="cpu") is not None


async def test_what_does_not_wait_is_not_said_to_lack_anything(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    """Held by somebody, final, or not due: its own row tells how it does."""
    wanted = {"num_gpus": 4}
    held = database.insert_job(user, gpu_config=wanted)
    lease = (await claim(store)).job
    assert lease is not None and await taken(database, held) is None
    await store.retry_job(lease.lease, BROKEN, delay_seconds=3600, cost=None)
    assert await taken(database, held) is None
    database.run("UPDATE training_jobs SET status = 'cancelled'")
    assert await taken(database, held) is None and await taken(database, uuid4()) is None


async def test_a_new_job_is_taken_before_its_time(database: AppDatabase, user: UUID) -> None:
    later = database.one("SELECT now() + interval '1 hour' AS at")["at"]
    assert await taken(database, database.insert_job(user, run_after=later)) is not None


def test_both_claims_move_the_job_and_answer_alike() -> None:
    """Two ways to choose a job, one way to take it: what follows the lease is the same text."""

    def taking(name: str) -> str:
        found = re.search(r"UPDATE training_jobs AS job.* AS dataset_user_id", statement(name), re.DOTALL)
        assert found is not None
        return found[0]

    assert taking("claim_job") == taking("claim_job_by_id")
