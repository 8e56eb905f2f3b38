"""A database of the app with the pipeline's table as a front of the queue, installed once and copied for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from daemon.schema.fronts import fronts
from daemon.schema.migrations import bring_up_to_date
from tests.database_pool import DatabasePool
from tests.fronts.pipeline import Pipeline, app_tables
from tests.postgres import AppDatabase, Server


@pytest.fixture(scope="session")
def front_pool(postgres: Server) -> Iterator[DatabasePool]:
    with postgres.database() as name:
        app = AppDatabase(postgres.dsn(name))
        app_tables(app)
        app.close()
        bring_up_to_date(postgres.dsn(name), local=False, fronts=[fronts()["pipeline"]], base_model="tiny")
        with DatabasePool(postgres, name) as pool:
            yield pool


@pytest.fixture
def database(postgres: Server, front_pool: DatabasePool) -> Iterator[AppDatabase]:
    """Instead of the one without the app's newer tables."""
    with front_pool.database() as name:
        app = AppDatabase(postgres.dsn(name))
        yield app
        app.close()


@pytest.fixture
def pipeline(database: AppDatabase) -> Pipeline:
    return Pipeline(database, database.insert_user())
