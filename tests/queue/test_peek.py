"""The look ahead: the very job that the next claim takes, without taking it."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

from daemon.database.statements import statement
from daemon.queue.job import JobDataset
from daemon.queue.rows import Limits
from daemon.queue.sql_job_store import SqlJobStore
from tests.postgres import AppDatabase
from tests.queue.claiming import claim, claimed


async def peek(store: SqlJobStore, **limits: Any) -> JobDataset | None:
    return await store.peek_next_job(Limits(**limits))


async def test_an_empty_queue_has_no_next_job(store: SqlJobStore) -> None:
    assert await peek(store) is None


async def test_a_look_names_the_dataset_as_the_claim_does_and_takes_nothing(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job = database.insert_job(user)
    before = database.job(job)
    seen = await peek(store)
    assert seen is not None and seen.job_id == job and seen.dataset_user_id == user
    assert database.job(job) == before and await peek(store) == seen
    assert (await claimed(store)).dataset == seen


async def test_a_look_waits_for_nobodys_lock(store: SqlJobStore, database: AppDatabase, user: UUID) -> None:
    job = database.insert_job(user)
    with database.connect() as other, other.transaction():
        other.execute("SELECT FROM training_jobs WHERE id = %s FOR UPDATE", (job,))
        seen = await peek(store)
    assert seen is not None and seen.job_id == job


async def test_what_is_held_scheduled_or_final_is_not_next(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    database.insert_job(user)
    await claimed(store)
    cancelled = database.insert_job(user)
    database.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (cancelled,))
    database.insert_job(user, run_after=datetime.now(UTC) + timedelta(hours=1))
    assert await peek(store) is None


@pytest.mark.parametrize("seed", range(3))
async def test_a_look_names_what_the_claim_takes_whatever_the_queue(
    store: SqlJobStore, database: AppDatabase, user: UUID, seed: int
) -> None:
    chosen = random.Random(seed)
    users = [user, database.insert_user()]
    for _ in range(16):
        database.insert_job(
            chosen.choice(users),
            priority=chosen.choice([0, 0, 3]),
            hyperparameters=Jsonb({"base_model": chosen.choice(["org/warm", "org/other"])}),
            gpu_config={"num_gpus": chosen.choice([1, 1, 2, 4]), "gpu_memory_gb": chosen.choice([24, 80])},
        )
    limits = {
        "free_gpus": 2,
        "gpu_memory_gb": chosen.choice([24.0, 79.6]),
        "user_cap": 3,
        "models": chosen.choice([None, ["org/warm"]]),
        "warm_models": ["org/warm"],
        "warm_first_seconds": chosen.choice([0.0, 120.0]),
    }
    claims = 0
    while (seen := await peek(store, **limits)) is not None:
        assert (await claimed(store, **limits)).dataset == seen
        claims += 1
    assert claims and (await claim(store, **limits)).job is None


def test_a_look_chooses_by_the_very_words_of_the_claim() -> None:
    words, found, _rest = statement("claim_job").partition("),\npicked AS")
    assert found and statement("peek_next_job").startswith(words)
