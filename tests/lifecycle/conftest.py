"""A queue of one's own for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.lifecycle.project import Project
from tests.lifecycle.queue import Queue
from tests.postgres import AppDatabase
from tests.receiver import Receiver
from tests.storage_double import StorageDouble


@pytest.fixture
def queue(database: AppDatabase, tmp_path: Path) -> Queue:
    return Queue(database.dsn, tmp_path)


@pytest.fixture
async def project(queue: Queue, tmp_path: Path) -> AsyncIterator[Project]:
    async with StorageDouble(tmp_path / "double") as storage, Receiver() as receiver:
        yield Project(queue, storage, receiver, tmp_path)
