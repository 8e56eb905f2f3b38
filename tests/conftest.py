"""Fixtures of every test: one Postgres a run, one freshly migrated database a test."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from tests.postgres import AppDatabase, Server, migrated, open_server

_POSTGRES = pytest.StashKey[str]()


def pytest_configure() -> None:
    # A shell ignores SIGINT for what it starts in the background, and programs inherit that: Control-C in a test would
    # be heard by nobody.
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
    """A database that has been migrated once and is copied for each test."""
    with postgres.database() as name:
        migrated(postgres, name)
        yield name


@pytest.fixture
def database(postgres: Server, migrated_template: str) -> Iterator[AppDatabase]:
    """A freshly migrated, empty database of the test's own; `database.dsn` logs in as the superuser."""
    with postgres.database(template=migrated_template) as name:
        app = AppDatabase(postgres.dsn(name))
        yield app
        app.close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a parallel run the controller prints the summary, and only its workers know the server."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["postgres"] = session.config.stash.get(_POSTGRES, None)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if used := getattr(node, "workeroutput", {}).get("postgres"):
        node.config.stash[_POSTGRES] = used


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which Postgres it was: given, container, installed or wheel."""
    used = config.stash.get(_POSTGRES, None)
    if used is not None:
        terminalreporter.write_line(f"postgres: {used}")
