"""Fixtures of the SQL tests: a store over the test's database, and a user."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from daemon.database.connection import Database
from daemon.queue.store import Store
from tests.postgres import AppDatabase


@pytest.fixture
async def store(database: AppDatabase) -> AsyncIterator[Store]:
    async with Database(database.dsn, application_name="test") as connection:
        yield Store(connection)


@pytest.fixture
def user(database: AppDatabase) -> UUID:
    return database.insert_user()
