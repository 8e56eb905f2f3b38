"""The demo's job in plain SQL: the rows that an app inserts to start it, and the reads while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from daemon.queue.states import FINAL

INSERT_USER = "INSERT INTO auth.users (email) VALUES ('you@example.com') RETURNING id"

INSERT_DATASET = """\
INSERT INTO datasets (user_id, name, storage_bucket, storage_path, file_name, file_size, training_ready, status)
VALUES (%(user_id)s, %(name)s, 'lora-datasets', %(storage_path)s, %(file_name)s, %(file_size)s, true, 'ready')
RETURNING id"""

INSERT_JOB = """\
INSERT INTO training_jobs (user_id, dataset_id, hyperparameters)
VALUES (%(user_id)s, %(dataset_id)s, %(hyperparameters)s)
RETURNING id"""

SELECT_STANDING = """\
SELECT status, current_stage, progress::float8 AS progress, current_step, total_steps, current_metrics,
    estimated_completion_at, error_code, error_message, error_hint, adapter_path
FROM training_jobs WHERE id = %(job_id)s"""

SELECT_LOSSES = """\
SELECT step, training_loss::float8 AS loss FROM metrics_points WHERE job_id = %(job_id)s ORDER BY step"""

SELECT_STORY = """\
SELECT id, at, kind, message, data FROM training_events WHERE job_id = %(job_id)s ORDER BY id"""

# The columns of the finished row, in the order shown; the lines fit a terminal of 80 columns.
SELECT_ROW = """\
SELECT id, status, current_stage, progress, current_epoch, current_step,
    total_steps, attempt, queued_at, started_at, completed_at,
    current_metrics, error_code, error_message,
    adapter_path, adapter_bytes, adapter_sha256
FROM training_jobs WHERE id = '{job_id}'"""


@dataclass(frozen=True)
class Standing:
    """The row's values at one moment."""

    status: str
    current_stage: str
    progress: float
    current_step: int
    total_steps: int | None
    current_metrics: dict[str, Any] | None
    estimated_completion_at: datetime | None
    error_code: str | None
    error_message: str | None
    error_hint: str | None
    adapter_path: str | None

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def tokens_per_second(self) -> float | None:
        return (self.current_metrics or {}).get("throughput")


@dataclass(frozen=True)
class StoryLine:
    id: int
    at: datetime
    kind: str
    message: str
    data: dict[str, Any]


@dataclass(frozen=True)
class LossPoint:
    step: int
    loss: float


@dataclass(frozen=True)
class JobView:
    """Everything that the demo shows about a job: the row, its curve, its events."""

    standing: Standing
    losses: tuple[LossPoint, ...]
    story: tuple[StoryLine, ...]

    @property
    def held_out_losses(self) -> tuple[LossPoint, ...]:
        """Validation losses on held-out conversations, starting before training."""
        return tuple(
            LossPoint(int(line.data["step"]), float(line.data["validation_loss"]))
            for line in self.story
            if line.kind == "evaluated"
        )

    def sample(self, when: str) -> tuple[str, str] | None:
        """The first question and its answer `before` or `after` training."""
        for line in self.story:
            if line.kind == "sample" and line.data.get("when") == when:
                return str(line.data["prompt"]), str(line.data["answer"])
        return None


Connection = psycopg.Connection[Any]


def insert_user(connection: Connection) -> UUID:
    return _returned_id(connection.execute(INSERT_USER))


def insert_dataset(connection: Connection, user_id: UUID, storage_path: str, file_name: str, size: int) -> UUID:
    values = {"user_id": user_id, "name": file_name[:200], "storage_path": storage_path}
    return _returned_id(connection.execute(INSERT_DATASET, values | {"file_name": file_name, "file_size": size}))


def insert_job(connection: Connection, user_id: UUID, dataset_id: UUID, hyperparameters: dict[str, Any]) -> UUID:
    values = {"user_id": user_id, "dataset_id": dataset_id, "hyperparameters": Jsonb(hyperparameters)}
    return _returned_id(connection.execute(INSERT_JOB, values))


def read_job(connection: Connection, job_id: UUID) -> JobView:
    """Reads the job in three small queries; a demo job has at most a few hundred points."""
    values = {"job_id": job_id}
    with connection.cursor(row_factory=class_row(Standing)) as cursor:
        standing = cursor.execute(SELECT_STANDING, values).fetchone()
    assert standing is not None, "the demo's own row is gone"
    with connection.cursor(row_factory=class_row(LossPoint)) as cursor:
        losses = tuple(cursor.execute(SELECT_LOSSES, values).fetchall())
    with connection.cursor(row_factory=class_row(StoryLine)) as cursor:
        story = tuple(cursor.execute(SELECT_STORY, values).fetchall())
    return JobView(standing, losses, story)


def read_row(connection: Connection, job_id: UUID) -> dict[str, Any]:
    """Reads the row with `SELECT_ROW`, to show at the end."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(SELECT_ROW.format(job_id=job_id)).fetchone()
    assert row is not None, "the demo's own row is gone"
    return row


def _returned_id(cursor: psycopg.Cursor[Any]) -> UUID:
    row = cursor.fetchone()
    assert row is not None, "INSERT … RETURNING gives a row"
    value: UUID = row[0]
    return value
