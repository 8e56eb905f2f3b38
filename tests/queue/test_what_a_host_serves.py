"""Whether a host can serve a job: five places say it, each in its own way, and all say the same."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from psycopg.types.json import Jsonb

from daemon.fleet import rules
from daemon.gateway.job_rows import Refused
from daemon.gateway.schemas import Submission
from daemon.host.gpus import Gpu
from daemon.host.inspect import Host
from daemon.queue.rows import Limits
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.worker_registry import WorkerRegistry, WorkerRow
from daemon.serverless.memory_job_store import MemoryJobStore
from daemon.serverless.memory_outbox import MemoryOutbox
from tests.postgres import AppDatabase

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", 79.6)
L4 = Gpu(0, "NVIDIA L4", 24.0)
HOSTS = {
    "one H100": Host("cuda", (H100,)),
    "two H100": Host("cuda", (H100, replace(H100, index=1))),
    "one L4": Host("cuda", (L4,)),
    "a large and a small card": Host("cuda", (H100, replace(L4, index=1))),
    "a CPU": Host("cpu"),
}
MODELS = [None, ["a/b"]]
JOBS: list[tuple[dict[str, Any], str]] = [
    *(({"num_gpus": gpus}, "a/b") for gpus in (1, 2, 3)),
    # Five percent are forgiven: 25.26 GB is the most that a card of 24 serves, 83.78 the most of one of 79.6.
    *(({"gpu_memory_gb": memory}, "a/b") for memory in (24, 25.26, 25.27, 80, 83.78, 83.8)),
    *(({"gpu_type": kind}, "a/b") for kind in ("H100", "h100 80gb", "L4", "%", "A100")),
    ({}, "a/other"),
    ({"num_gpus": 2, "gpu_memory_gb": 80, "gpu_type": "H100"}, "a/b"),
]


@pytest.mark.parametrize("models", MODELS)
@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
async def test_all_places_agree_on_what_a_host_serves(
    store: SqlJobStore, database: AppDatabase, user: UUID, host: Host, models: list[str] | None
) -> None:
    gpus = None if host.device == "cpu" else len(host.gpus)
    limits = Limits(gpus, host.gpu_memory_gb, host.gpu_type, models)
    worker = WorkerRow(
        uuid4(), "h", host.device, gpu_count=len(host.gpus), gpu_memory_gb=host.gpu_memory_gb, gpu_type=host.gpu_type,
        models=models,
    )  # fmt: skip
    await WorkerRegistry(store.database).register_worker(worker)
    in_memory = MemoryJobStore(host, models or (), MemoryOutbox())
    answers = set()
    for wanted, model in JOBS:
        parameters = {"base_model": model}
        job_id = database.insert_job(user, gpu_config=wanted, hyperparameters=Jsonb(parameters))
        row = database.job(job_id)
        reason = database.one("SELECT waiting_reason FROM training_queue WHERE job_id = %s", (job_id,))
        said = {
            "claim_job": await store.peek_next_job(limits) is not None,
            "training_queue": reason["waiting_reason"] == "next",
            "fleet": _has_room(worker, row),
            "without a database": await _is_taken(in_memory, wanted, parameters),
            "claim_job_by_id": await store.claim_job_by_id(uuid4(), job_id, limits, lease_seconds=60) is not None,
        }
        assert len(set(said.values())) == 1, (wanted, model, said)
        answers |= set(said.values())
        database.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job_id,))
        database.run("DELETE FROM training_leases")
    assert answers == ({True} if host.device == "cpu" and models is None else {True, False})


def _has_room(worker: WorkerRow, row: dict[str, Any]) -> bool:
    now = datetime.now(UTC)
    memory = row["need_gpu_memory_gb"]
    job = rules.WaitingJob(
        row["id"], row["user_id"], row["need_gpus"], None if memory is None else float(memory), row["need_gpu_type"],
        row["base_model"], now,
    )  # fmt: skip
    seen = rules.WorkerSeen(
        worker.id, None, worker.device, worker.gpu_count, worker.gpu_memory_gb, worker.gpu_type, worker.models,
        slots=1, busy=0, state="idle", last_seen_at=now, leases=0,
    )  # fmt: skip
    limits = rules.FleetLimits(0, 0.0, 1, 600.0, 600.0, None, ())
    return not rules.weigh(rules.View(now, [job], [seen], [], {}), [], (), limits).unservable


async def _is_taken(store: MemoryJobStore, wanted: dict[str, Any], parameters: dict[str, Any]) -> bool:
    url = "https://files.example.com/d.jsonl"
    try:
        await store.submit(Submission(dataset_url=url, hyperparameters=parameters, gpu_config=wanted))
    except Refused:
        return False
    return True
