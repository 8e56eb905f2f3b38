"""Typed reads for the commands: jobs, their events and curves, the hosts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from daemon.cli.data.connection import Connection, read_statement
from daemon.cli.errors import Misused
from daemon.queue.states import FINAL

# Fewer characters would match too many jobs.
MIN_PREFIX = 4
_HEX = re.compile(r"^[0-9a-f]{1,32}$")
_UUID_DIGITS = 32
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

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    def metric(self, name: str) -> float | None:
        """A number from the latest metrics; None if it is missing or not a number."""
        value = self.metrics.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class JobDetails:
    """The rest of the row: the spec and the result."""

    preset_id: str
    hyperparameters: Any
    gpu_config: Any
    dataset_id: UUID
    dataset_name: str | None
    dataset_source: str | None
    client_job_id: str | None
    run_after: datetime | None
    deadline_at: datetime | None
    max_cost: float | None
    estimated_total_cost: float | None
    lease_epoch: int
    adapter_sha256: str | None
    adapter_bytes: int | None
    result: dict[str, Any] | None
    trained_with: dict[str, Any] | None
    error_stack: str | None
    worker_id: UUID | None


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


@dataclass(frozen=True)
class WorkerRow:
    """One boot of a daemon; memory is in GB per GPU."""

    worker_id: UUID
    host: str
    pod: str | None
    state: str
    device: str
    gpu_count: int
    gpu_type: str | None
    gpu_memory_gb: float | None
    slots: int
    busy: int
    jobs: list[UUID]
    started_at: datetime
    last_seen_at: datetime
    up_seconds: float
    silent_seconds: float
    versions: dict[str, str]
    troubles: list[dict[str, Any]]


def job_digits(wanted: str) -> str:
    """The hexadecimal digits that an id begins with. Raises Misused if they cannot be one, or are too few."""
    digits = wanted.strip().lower().replace("-", "")
    if not _HEX.match(digits) or len(digits) < MIN_PREFIX:
        raise Misused(
            f"{wanted[:80]!r} is not a job's id", f"give its first {MIN_PREFIX} characters or more; `jobs` lists them"
        )
    return digits


def find_job(connection: Connection, wanted: str) -> UUID:
    """Finds the job whose id begins with `wanted`. Raises Misused if there is none, or several."""
    digits = job_digits(wanted)
    bounds = {"low": digits.ljust(_UUID_DIGITS, "0"), "high": digits.ljust(_UUID_DIGITS, "f")}
    found = [row["id"] for row in connection.execute(read_statement("find_jobs"), bounds)]
    if not found:
        raise Misused(f"there is no job {wanted}", "`jobs` lists the newest ones")
    if len(found) > 1:
        raise Misused(f"{wanted} begins several ids: {', '.join(map(str, found))}", "give more characters")
    job_id: UUID = found[0]
    return job_id


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


def read_job(connection: Connection, job_id: UUID) -> JobRow:
    """Reads one job. Raises Misused if it was deleted meanwhile."""
    rows = list_jobs(connection, ids=[job_id])
    if not rows:
        raise Misused(f"there is no job {job_id} that this login may see")
    return rows[0]


def read_details(connection: Connection, job_id: UUID) -> JobDetails:
    row = connection.execute(read_statement("read_job"), {"job_id": job_id}).fetchone()
    if row is None:
        raise Misused(f"there is no job {job_id}")
    return JobDetails(**row)


def read_story(connection: Connection, ids: Sequence[UUID], after: int = 0, limit: int = EVENTS_A_READ) -> list[Event]:
    """Reads at most `limit` events after an id, oldest first."""
    parameters = {"ids": list(ids), "after": after, "limit": limit}
    return [Event(**row) for row in connection.execute(read_statement("read_story"), parameters)]


def read_points(connection: Connection, job_id: UUID, after_step: int = -1) -> list[Point]:
    parameters = {"job_id": job_id, "after": after_step}
    return [Point(**row) for row in connection.execute(read_statement("read_points"), parameters)]


def list_workers(connection: Connection, *, everyone: bool = False) -> list[WorkerRow]:
    """Lists live hosts, and those that fell silent within a day; `everyone` adds those that left."""
    return [WorkerRow(**row) for row in connection.execute(read_statement("list_workers"), {"all": everyone})]
