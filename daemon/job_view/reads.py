"""Typed reads of jobs, their events and their curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg

from daemon.database.statements import read_statement
from daemon.queue.states import FINAL

# Rows are dicts.
Connection = psycopg.Connection[dict[str, Any]]

EVENTS_A_READ = 1000


@dataclass(frozen=True)
class JobRow:
    """One job from `training_job_status`; seconds by the database's clock, cost in US dollars."""

    job_id: UUID
    user_id: UUID
    state: str
    stage: str
    progress: float
    epoch: int
    total_epochs: int
    step: int
    total_steps: int | None
    metrics: dict[str, Any]
    model: str | None
    attempt: int
    max_attempts: int
    priority: int
    queued_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    last_progress_at: datetime | None
    age_seconds: float
    run_seconds: float | None
    seconds_left: float | None
    cost: float | None
    waiting_reason: str | None
    error_code: str | None
    error_message: str | None
    error_hint: str | None
    adapter_path: str | None
    deliveries: list[dict[str, Any]]

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    def metric(self, name: str) -> float | None:
        """A number from the latest metrics; None if it is missing or not a number."""
        value = self.metrics.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Event:
    """One event of a job."""

    id: int
    job_id: UUID
    at: datetime
    kind: str
    message: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One point of a job's curve."""

    step: int
    loss: float
    validation_loss: float | None


def list_jobs(
    connection: Connection,
    *,
    ids: Sequence[UUID] | None = None,
    states: Sequence[str] | None = None,
    user_id: UUID | None = None,
    model: str | None = None,
    limit: int = 1000,
) -> list[JobRow]:
    """Lists the jobs that match, unfinished ones first. None does not filter."""
    parameters = {
        "ids": None if ids is None else list(ids),
        "states": None if states is None else list(states),
        "user_id": user_id,
        "model": model,
        "limit": limit,
    }
    rows = connection.execute(read_statement("list_jobs"), parameters).fetchall()
    reasons = _why_jobs_wait(connection, [row["job_id"] for row in rows if row["state"] == "queued"])
    return [JobRow(**row, waiting_reason=reasons.get(row["job_id"])) for row in rows]


def _why_jobs_wait(connection: Connection, ids: Sequence[UUID]) -> dict[UUID, str]:
    if not ids:
        return {}
    rows = connection.execute(read_statement("why_jobs_wait"), {"ids": list(ids)})
    return {row["job_id"]: row["waiting_reason"] for row in rows}


def read_story(connection: Connection, ids: Sequence[UUID], after: int = 0, limit: int = EVENTS_A_READ) -> list[Event]:
    """Reads at most `limit` events after an id, oldest first."""
    parameters = {"ids": list(ids), "after": after, "limit": limit}
    return [Event(**row) for row in connection.execute(read_statement("read_story"), parameters)]


def read_points(connection: Connection, job_id: UUID, after_step: int = -1) -> list[Point]:
    parameters = {"job_id": job_id, "after": after_step}
    return [Point(**row) for row in connection.execute(read_statement("read_points"), parameters)]
