"""A claim without limits, as most tests want it."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from daemon.job import ClaimedJob
from daemon.store import Claim, Store


async def claim(store: Store, worker: UUID | None = None, **limits: Any) -> Claim:
    given: dict[str, Any] = {
        "free_gpus": None,
        "gpu_memory_gb": None,
        "gpu_type": None,
        "models": None,
        "user_cap": None,
        "lease_seconds": 60.0,
    }
    return await store.claim_job(worker or uuid4(), **(given | limits))


async def claimed(store: Store, **limits: Any) -> ClaimedJob:
    job = (await claim(store, **limits)).job
    assert job is not None
    return job
