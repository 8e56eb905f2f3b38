"""Typed reads for the commands alone: which job is meant, the rest of its row, the hosts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from daemon.cli.data.connection import Connection
from daemon.cli.errors import Misused
from daemon.database.statements import read_statement
from daemon.job_view.reads import JobRow, list_jobs

# Fewer characters would match too many jobs.
MIN_PREFIX = 4
_HEX = re.compile(r"^[0-9a-f]{1,32}$")
_UUID_DIGITS = 32


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
class ListedWorker:
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


def list_workers(connection: Connection, *, everyone: bool = False) -> list[ListedWorker]:
    """Lists live hosts, and those that fell silent within a day; `everyone` adds those that left."""
    return [ListedWorker(**row) for row in connection.execute(read_statement("list_workers"), {"all": everyone})]
