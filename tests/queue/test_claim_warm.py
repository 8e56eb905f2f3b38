"""A host takes what its memory already holds first, within a bound of fairness."""

from __future__ import annotations

from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

from daemon.database.connection import Database
from daemon.queue.sql_job_store import SqlJobStore
from tests.postgres import AppDatabase
from tests.queue.claiming import claimed

WARM = {"warm_models": ["org/warm"], "warm_first_seconds": 120.0}


def insert(database: AppDatabase, user: UUID, base_model: str | None, **columns: object) -> UUID:
    chosen = {} if base_model is None else {"base_model": base_model}
    return database.insert_job(user, hyperparameters=Jsonb(chosen), **columns)


async def test_a_job_whose_base_model_is_in_memory_goes_before_an_older_one(database: AppDatabase, user: UUID) -> None:
    older, newer = insert(database, user, "org/other"), insert(database, user, "org/warm")
    async with Database(database.dsn, application_name="warm") as connection:
        store = SqlJobStore(connection)
        assert [(await claimed(store, **WARM)).id for _ in range(2)] == [newer, older]


async def test_a_job_that_has_waited_long_is_overtaken_by_none(database: AppDatabase, user: UUID) -> None:
    older, newer = insert(database, user, "org/other"), insert(database, user, "org/warm")
    async with Database(database.dsn, application_name="warm") as connection:
        bounded = WARM | {"warm_first_seconds": 0.0}
        assert [(await claimed(SqlJobStore(connection), **bounded)).id for _ in range(2)] == [older, newer]


async def test_a_higher_priority_counts_more_than_memory(database: AppDatabase, user: UUID) -> None:
    warm, urgent = insert(database, user, "org/warm"), insert(database, user, "org/other", priority=5)
    async with Database(database.dsn, application_name="warm") as connection:
        assert [(await claimed(SqlJobStore(connection), **WARM)).id for _ in range(2)] == [urgent, warm]


@pytest.mark.parametrize("held", [True, False])
async def test_a_job_that_names_no_model_counts_as_the_default_one(
    database: AppDatabase, user: UUID, held: bool
) -> None:
    older, unnamed = insert(database, user, "org/other"), insert(database, user, None)
    async with Database(database.dsn, application_name="warm") as connection:
        limits = WARM | {"warm_models": ["org/default", ""] if held else ["org/default"]}
        assert (await claimed(SqlJobStore(connection), **limits)).id == (unnamed if held else older)
