"""A command line that knows the test's queue."""

from __future__ import annotations

import pytest

from tests.cli.command import CommandLine
from tests.lifecycle.queue import Queue


@pytest.fixture
def cli(queue: Queue) -> CommandLine:
    """Shares the daemon's storage and work folder, as on one host; its models are elsewhere."""
    folder = queue.folder
    return CommandLine(
        folder,
        DATABASE_URL=queue.dsn,
        TRAINER_STORAGE="folder",
        TRAINER_STORAGE_DIR=str(folder / "storage"),
        TRAINER_WORK_DIR=str(folder / "jobs"),
        TRAINER_MODELS_DIR=str(folder / "no-models"),
        TRAINER_SERVICE_USER_ID=str(queue.user_id),
    )
