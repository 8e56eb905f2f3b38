"""The demo's job in plain SQL, as an app sees it: the rows that it inserts, and the finished row."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from daemon.job_view.reads import Connection

INSERT_USER = "INSERT INTO auth.users (email) VALUES ('you@example.com') RETURNING id"

INSERT_DATASET = """\
INSERT INTO datasets (user_id, name, storage_bucket, storage_path, file_name, file_size, training_ready, status)
VALUES (%(user_id)s, %(name)s, 'lora-datasets', %(storage_path)s, %(file_name)s, %(file_size)s, true, 'ready')
RETURNING id"""

INSERT_JOB = """\
INSERT INTO training_jobs (user_id, dataset_id, hyperparameters)
VALUES (%(user_id)s, %(dataset_id)s, %(hyperparameters)s)
RETURNING id"""

# The columns of the finished row, in the order shown; the lines fit a terminal of 80 columns.
SELECT_ROW = """\
SELECT id, status, current_stage, progress, current_epoch, current_step,
    total_steps, attempt, queued_at, started_at, completed_at,
    current_metrics, error_code, error_message,
    adapter_path, adapter_bytes, adapter_sha256
FROM training_jobs WHERE id = '{job_id}'"""


def insert_user(connection: Connection) -> UUID:
    return _returned_id(connection.execute(INSERT_USER))


def insert_dataset(connection: Connection, user_id: UUID, storage_path: str, file_name: str, size: int) -> UUID:
    values = {"user_id": user_id, "name": file_name[:200], "storage_path": storage_path}
    return _returned_id(connection.execute(INSERT_DATASET, values | {"file_name": file_name, "file_size": size}))


def insert_job(connection: Connection, user_id: UUID, dataset_id: UUID, hyperparameters: dict[str, Any]) -> UUID:
    values = {"user_id": user_id, "dataset_id": dataset_id, "hyperparameters": Jsonb(hyperparameters)}
    return _returned_id(connection.execute(INSERT_JOB, values))


def read_row(connection: Connection, job_id: UUID) -> dict[str, Any]:
    """Reads the row with `SELECT_ROW`, to show at the end."""
    row = connection.execute(SELECT_ROW.format(job_id=job_id).encode()).fetchone()
    assert row is not None, "the demo's own row is gone"
    return row


def _returned_id(cursor: psycopg.Cursor[dict[str, Any]]) -> UUID:
    row = cursor.fetchone()
    assert row is not None, "INSERT … RETURNING gives a row"
    value: UUID = row["id"]
    return value
