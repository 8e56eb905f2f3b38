"""Fixtures for all tests: one Postgres per run, one freshly migrated database per test, the doubles. And the order.

`--shuffle` runs the files, and the tests in each file, in a random order and prints the seed; `--shuffle SEED` repeats
that order.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import structlog

from daemon.database.connection import Database
from daemon.queue.sql_job_store import SqlJobStore
from tests.database_pool import DatabasePool
from tests.doubles.file_server import FileServer
from tests.doubles.receiver import Receiver
from tests.doubles.runpod_api import RunPodDouble
from tests.lifecycle.project import Project
from tests.lifecycle.queue import Queue
from tests.postgres import AppDatabase, Server, migrated, open_server
from tests.storage.real_server import SERVERS, open_storage_server

# Before any test file imports torch, which reads them once: for models this small one thread is fastest, and none may
# spin while others work: beside three spinning workers a training of two seconds took seventy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_POSTGRES = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", nargs="?", const="any", metavar="SEED", help="run the tests in a random order")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.option.shuffle = config.workerinput["shuffle"]
    elif config.option.shuffle == "any":
        config.option.shuffle = str(random.SystemRandom().randrange(1_000_000))
    # A shell ignores SIGINT for what it starts in the background, and programs inherit that: a test's Control-C would
    # have no effect.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def logs_of_this_test_only() -> Iterator[None]:
    """A log configured by one test writes to a stderr that is closed in the next."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Iterator[Server]:
    """The server of this run, started when the first test needs it."""
    with open_server() as server:
        pytestconfig.stash[_POSTGRES] = f"{server.kind} ({server.description})"
        yield server


@pytest.fixture(scope="session")
def migrated_template(postgres: Server) -> Iterator[str]:
    """A database that is migrated once and copied for each test."""
    with postgres.database() as name:
        migrated(postgres, name)
        yield name


@pytest.fixture(scope="session")
def database_pool(postgres: Server, migrated_template: str) -> Iterator[DatabasePool]:
    with DatabasePool(postgres, migrated_template) as pool:
        yield pool


@pytest.fixture
def database(postgres: Server, database_pool: DatabasePool) -> Iterator[AppDatabase]:
    """A freshly migrated, empty database for one test; `database.dsn` logs in as the superuser."""
    with database_pool.database() as name:
        app = AppDatabase(postgres.dsn(name))
        yield app
        app.close()


@pytest.fixture
def empty(postgres: Server) -> Iterator[AppDatabase]:
    """A database without a table, before anybody came."""
    with postgres.database() as name:
        app = AppDatabase(postgres.dsn(name))
        yield app
        app.close()


@pytest.fixture
def queue(database: AppDatabase, tmp_path: Path) -> Queue:
    return Queue(database.dsn, tmp_path)


@pytest.fixture(params=SERVERS)
async def project(request: pytest.FixtureRequest, queue: Queue, tmp_path: Path) -> AsyncIterator[Project]:
    async with open_storage_server(request, tmp_path) as storage, Receiver() as receiver:
        yield Project(queue, storage, receiver, tmp_path)


@pytest.fixture
async def store(database: AppDatabase) -> AsyncIterator[SqlJobStore]:
    async with Database(database.dsn, application_name="test") as connection:
        yield SqlJobStore(connection)


@pytest.fixture
def user(database: AppDatabase) -> UUID:
    return database.insert_user()


@pytest.fixture
def runpod() -> Iterator[RunPodDouble]:
    with RunPodDouble() as double:
        yield double


@pytest.fixture
def files() -> Iterator[FileServer]:
    """A server for the datasets of callers that have no database row."""
    with FileServer() as server:
        yield server


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Makes all workers of a parallel run collect in the same order."""
    node.workerinput["shuffle"] = node.config.option.shuffle


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"order: --shuffle {config.option.shuffle}" if config.option.shuffle is not None else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.shuffle is None:
        # Workers help each other out from the ends of their queues: what is first in the first one's stays together.
        items.sort(key=lambda item: item.get_closest_marker("together") is None)
        return
    order = random.Random(config.option.shuffle)
    rank: dict[Path, float] = {}
    for item in items:
        rank.setdefault(item.path, order.random())
    order.shuffle(items)
    items.sort(key=lambda item: rank[item.path])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a parallel run the controller prints the summary, but only its workers know the server."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["postgres"] = session.config.stash.get(_POSTGRES, None)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if used := getattr(node, "workeroutput", {}).get("postgres"):
        node.config.stash[_POSTGRES] = used


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints which Postgres was used: given, container, installed or wheel."""
    used = config.stash.get(_POSTGRES, None)
    if used is not None:
        terminalreporter.write_line(f"postgres: {used}")
    if config.option.shuffle is not None:
        terminalreporter.write_line(f"order: --shuffle {config.option.shuffle}")
