"""A queue of one's own for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lifecycle.queue import Queue
from tests.postgres import AppDatabase


@pytest.fixture
def queue(database: AppDatabase, tmp_path: Path) -> Queue:
    return Queue(database.dsn, tmp_path)
