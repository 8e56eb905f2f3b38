"""A claim without limits, as most tests want it."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from daemon.queue.job import ClaimedJob
from daemon.queue.rows import Claim, Limits
from daemon.queue.sql_job_store import SqlJobStore


async def claim(store: SqlJobStore, worker: UUID | None = None, *, lease_seconds: float = 60.0, **limits: Any) -> Claim:
    return await store.claim_job(worker or uuid4(), Limits(**limits), lease_seconds=lease_seconds)


async def claimed(store: SqlJobStore, **limits: Any) -> ClaimedJob:
    job = (await claim(store, **limits)).job
    assert job is not None
    return job
