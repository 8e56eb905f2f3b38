"""The claim: due, by priority, then oldest; what this host can serve; one winner; a cap without a race."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.errors import RowsHidden
from daemon.queue.rows import Claim
from daemon.queue.sql_job_store import SqlJobStore
from tests.postgres import AppDatabase
from tests.queue.claiming import claim, claimed


async def claimed_ids(store: SqlJobStore, **limits: Any) -> list[UUID]:
    """Claim until nothing is left."""
    ids: list[UUID] = []
    while (job := (await claim(store, **limits)).job) is not None:
        ids.append(job.id)
    return ids


async def test_an_empty_queue_is_not_contested(store: SqlJobStore) -> None:
    assert await claim(store) == Claim(None)


async def test_the_highest_priority_goes_first_then_the_oldest(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    jobs = [database.insert_job(user, priority=priority) for priority in (0, 5, 0, 5, -1)]
    assert await claimed_ids(store) == [jobs[1], jobs[3], jobs[0], jobs[2], jobs[4]]


async def test_a_claim_carries_the_job_and_its_dataset(store: SqlJobStore, database: AppDatabase, user: UUID) -> None:
    dataset = database.insert_dataset(user)
    job_id = database.insert_job(user, dataset, max_cost=12.5)
    job = (await claim(store)).job
    assert job is not None
    assert (job.id, job.user_id, job.dataset_id, job.dataset_user_id) == (job_id, user, dataset, user)
    assert (job.lease_epoch, job.attempt, job.max_attempts, job.need_gpus) == (1, 1, 3, 1)
    assert job.storage_bucket == "lora-datasets" and job.storage_path == f"{user}/{dataset}/data.jsonl"
    assert job.hyperparameters["lora_rank"] == 16 and job.gpu_config["gpu_type"] == "H100"
    assert job.base_model == "mistralai/Mistral-7B-v0.1" and job.max_cost == 12.5 and job.spent == 0
    assert job.waited_seconds >= 0
    row = database.job(job_id)
    assert (row["status"], row["attempt"], row["retry_count"], row["due"]) == ("initializing", 1, 0, False)


async def test_a_held_job_is_invisible_to_other_daemons(store: SqlJobStore, database: AppDatabase, user: UUID) -> None:
    database.insert_job(user)
    assert (await claim(store)).job is not None
    assert await claim(store) == Claim(None)


@pytest.mark.parametrize(
    ("wanted", "limits", "served"),
    [
        ({"num_gpus": 2}, {"free_gpus": 1}, False),
        ({"num_gpus": 2}, {"free_gpus": 2}, True),
        ({"count": 2}, {"free_gpus": 1}, False),
        ({"num_gpus": 8}, {"free_gpus": None}, True),
        ({}, {"free_gpus": 0}, False),
        ({"gpu_memory_gb": 80}, {"gpu_memory_gb": 79.6}, True),
        ({"gpu_memory_gb": 80}, {"gpu_memory_gb": 48.0}, False),
        ({"gpu_memory_gb": 80}, {"gpu_memory_gb": None}, True),
        ({}, {"gpu_memory_gb": 8.0}, True),
        ({"gpu_type": "H100"}, {"gpu_type": "NVIDIA H100 80GB HBM3"}, True),
        ({"type": "h100"}, {"gpu_type": "NVIDIA H100 80GB HBM3"}, True),
        ({"gpu_type": "A100"}, {"gpu_type": "NVIDIA H100 80GB HBM3"}, False),
        ({"gpu_type": "A100"}, {"gpu_type": None}, True),
    ],
)
async def test_only_a_job_that_this_host_can_serve_is_taken(
    store: SqlJobStore, database: AppDatabase, user: UUID, wanted: dict[str, Any], limits: dict[str, Any], served: bool
) -> None:
    database.insert_job(user, gpu_config=wanted)
    assert ((await claim(store, **limits)).job is not None) is served


async def test_only_models_that_this_host_may_load_are_taken(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    database.insert_job(user, hyperparameters={"base_model": "Qwen/Qwen3-8B"})
    unnamed = database.insert_job(user, hyperparameters={})
    assert await claimed_ids(store, models=["mistralai/Mistral-7B-v0.1"]) == [unnamed]
    assert len(await claimed_ids(store, models=["Qwen/Qwen3-8B"])) == 1


async def test_a_large_job_at_the_head_does_not_hide_a_small_one(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    for _ in range(20):
        database.insert_job(user, gpu_config={"num_gpus": 8}, priority=9)
    small = database.insert_job(user)
    assert await claimed_ids(store, free_gpus=1) == [small]


async def test_a_capped_users_jobs_wait_and_another_users_go_on(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    mine = [database.insert_job(user) for _ in range(4)]
    other = database.insert_job(database.insert_user())
    assert await claimed_ids(store, user_cap=2) == [*mine[:2], other]


async def test_eight_claimers_never_exceed_a_users_cap(database: AppDatabase, user: UUID) -> None:
    for _ in range(40):
        database.insert_job(user)

    async def take(barrier: asyncio.Barrier) -> int:
        async with Database(database.dsn, application_name="test") as connection:
            store = SqlJobStore(connection)
            await store.next_due_in()
            taken = 0
            for _ in range(5):
                await barrier.wait()
                taken += (await claim(store, user_cap=3)).job is not None
            return taken

    barrier = asyncio.Barrier(8)
    taken = await asyncio.gather(*(take(barrier) for _ in range(8)))
    assert sum(taken) == 3
    slots = [row["user_slot"] for row in database.run("SELECT user_slot FROM training_leases ORDER BY user_slot")]
    assert slots == [1, 2, 3]


async def test_two_daemons_never_take_the_same_job(database: AppDatabase, user: UUID) -> None:
    jobs = {database.insert_job(user) for _ in range(30)}

    async def take() -> list[UUID]:
        async with Database(database.dsn, application_name="test") as connection:
            return await claimed_ids(SqlJobStore(connection))

    taken = [job for ids in await asyncio.gather(*(take() for _ in range(4))) for job in ids]
    assert len(taken) == len(jobs) and set(taken) == jobs


async def test_a_child_rows_insert_in_flight_does_not_hide_the_job(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user)
    with database.connect() as app, app.transaction():
        # The foreign key holds KEY SHARE on the job's row; FOR UPDATE SKIP LOCKED would pass it over.
        app.execute("INSERT INTO notifications (user_id, type, title, message) VALUES (%s, 'x', 'x', 'x')", (user,))
        app.execute(
            "INSERT INTO metrics_points (job_id, epoch, step, training_loss, learning_rate) VALUES (%s, 0, 0, 1, 1)",
            (job_id,),
        )
        job = (await claim(store)).job
    assert job is not None and job.id == job_id


async def test_candidates_that_others_hold_are_contested(store: SqlJobStore, database: AppDatabase, user: UUID) -> None:
    for _ in range(3):
        database.insert_job(user)
    with database.connect() as rival, rival.transaction():
        rival.execute("SELECT FROM training_jobs FOR UPDATE")
        assert await claim(store) == Claim(None, contested=True)
    assert (await claim(store)).job is not None


async def test_the_window_grows_past_candidates_that_others_hold(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    jobs = [database.insert_job(user) for _ in range(12)]
    with database.connect() as rival, rival.transaction():
        rival.execute("SELECT FROM training_jobs WHERE id = ANY (%s) FOR UPDATE", (jobs[:10],))
        job = (await claim(store)).job
    assert job is not None and job.id == jobs[10]


async def test_a_scheduled_job_waits_for_its_time_and_tells_when_it_is(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    later = database.one("SELECT clock_timestamp() + interval '1 hour' AS at")["at"]
    job_id = database.insert_job(user, run_after=later)
    assert (await claim(store)).job is None
    wait = await store.next_due_in()
    assert wait is not None and 3590 < wait <= 3600
    assert await store.promote_due_jobs() == 0
    with database.acting("service_role") as service:
        service.execute("UPDATE training_jobs SET run_after = clock_timestamp() - interval '1 s'")
    job = (await claim(store)).job
    assert job is not None and job.id == job_id and await store.next_due_in() is None


async def test_a_job_whose_time_has_come_is_promoted(store: SqlJobStore, database: AppDatabase, user: UUID) -> None:
    soon = database.one("SELECT clock_timestamp() + interval '1 second' AS at")["at"]
    database.insert_job(user, run_after=soon)
    assert (await claim(store)).job is None
    database.run("SELECT pg_sleep(extract(epoch FROM %s - clock_timestamp()) + 0.01)", (soon,))
    assert await store.next_due_in() == 0.0
    assert await store.promote_due_jobs() == 1
    assert (await claim(store)).job is not None


async def test_a_cancelled_job_submitted_again_waits_until_its_old_child_is_gone(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user)
    first = (await claim(store)).job
    assert first is not None
    with database.acting("authenticated", user) as owner:
        owner.execute("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job_id,))
        owner.execute("SELECT retry_training_job(%s)", (job_id,))
    assert (await claim(store)).job is None
    with database.connect() as listener:
        listener.execute("LISTEN training_jobs")
        ending = await store.end_cancelled_job(first.lease, cost=1.0, data={})
        assert (ending.moved, ending.state) == (False, "queued")
        heard = next(listener.notifies(timeout=5, stop_after=1))
    assert heard.payload == f"queued {job_id}"
    again = (await claim(store)).job
    assert again is not None and again.id == job_id and again.lease_epoch == first.lease_epoch + 1


def test_a_fresh_claim_cannot_take_a_slot_twice(database: AppDatabase, user: UUID) -> None:
    jobs = [database.insert_job(user) for _ in range(2)]
    text = (
        "INSERT INTO training_leases (job_id, epoch, worker_id, user_id, user_slot, expires_at) "
        "VALUES (%s, 1, gen_random_uuid(), %s, 1, now())"
    )
    database.run(text, (jobs[0], user))
    with pytest.raises(psycopg.errors.UniqueViolation):
        database.run(text, (jobs[1], user))


async def test_a_policy_that_admits_no_lease_is_no_missing_right(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    """Before the first claim as well, where a missing right would end the daemon: waiting heals it."""
    job_id = database.insert_job(user)
    database.run("CREATE POLICY tenants ON training_leases AS RESTRICTIVE FOR INSERT WITH CHECK (false)")
    with pytest.raises(RowsHidden, match="row-level security"):
        await claim(store)
    assert database.job(job_id)["held"] is False
    database.run("DROP POLICY tenants ON training_leases")
    assert (await claimed(store)).id == job_id
