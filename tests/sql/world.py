"""One database with a row of every kind for two users, made by the product's own statements."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import UUID, uuid4

from daemon.queue.outcome import Completed, Failed, Wanted
from daemon.queue.rows import MetricPoint
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.worker_registry import WorkerRegistry, WorkerRow
from daemon.report.outbox import SqlOutbox
from tests.postgres import AppDatabase
from tests.queue.claiming import claimed
from training.events import ErrorCode

RECEIVER = "https://app.example.org/hook"
ADAPTER = Completed(
    "lora-models/adapters/one.tar.gz",
    "0" * 64,
    1_000,
    artifacts={"adapter_model": "adapters/one/adapter_model.safetensors"},
    summary={"final_training_loss": 0.5, "final_validation_loss": 0.6, "overall_score": 4},
)


@dataclass(frozen=True)
class Jobs:
    """A user's jobs, one in each state but queued; `dead_callback` was given up by its receiver's answer."""

    owner: UUID
    scheduled: UUID
    running: UUID
    completed: UUID
    failed: UUID
    cancelled: UUID
    dead_callback: UUID


async def populate(store: SqlJobStore, database: AppDatabase, owner: UUID) -> Jobs:
    """Insert the jobs and take each as far as its name says. Nothing else may be waiting."""
    registry = WorkerRegistry(store.database)
    completed = database.insert_job(owner, callback_url=RECEIVER)
    lease = (await claimed(store)).lease
    await store.start_job(lease)
    points = [MetricPoint(step, 0, 2.0 / step, 1e-4, validation_loss=2.1 / step) for step in range(1, 31)]
    await store.record_metrics(lease, points)
    await store.complete_job(lease, replace(ADAPTER, deliveries=(Wanted("merged"),)), cost=1.5)

    failed = database.insert_job(owner, callback_url=RECEIVER)
    lease = (await claimed(store)).lease
    await store.start_job(lease)
    await store.fail_job(lease, Failed(ErrorCode.NON_FINITE_LOSS, "the loss became NaN", "lower it"), cost=0.5)
    delivered, dead = await _settle_callbacks(store)
    assert delivered != dead

    cancelled = database.insert_job(owner)
    database.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (cancelled,))

    running = database.insert_job(owner, callback_url=RECEIVER)
    worker = WorkerRow(uuid4(), "host", "cuda", gpu_count=1, gpu_memory_gb=79.6, gpu_type="NVIDIA H100")
    await registry.register_worker(worker)
    lease = (await claimed(store, worker=worker.id)).lease
    await store.start_job(lease)
    await store.record_event(lease, "checkpoint_saved", "Checkpoint at step 2.", {"step": 2})
    await store.record_metrics(lease, [MetricPoint(step, 0, 2.0 / step, 1e-4) for step in (1, 2)])
    await registry.touch_worker(worker.id, state="busy", busy=1, data={})

    tomorrow = database.one("SELECT now() + interval '1 day' AS at")["at"]
    scheduled = database.insert_job(owner, run_after=tomorrow + timedelta(hours=1))
    return Jobs(owner, scheduled, running, completed, failed, cancelled, dead)


def orphan(database: AppDatabase, owner: UUID) -> UUID:
    """A row that an older dispatcher took and runs itself: written past the guard, as it was before the guard came."""
    return _past_the_guard(database, owner, "status = 'running', due = false")


def held(database: AppDatabase, owner: UUID) -> UUID:
    """A row that was queued before the trainer was installed."""
    return _past_the_guard(database, owner, "held = true, due = false")


def _past_the_guard(database: AppDatabase, owner: UUID, change: str) -> UUID:
    job_id = database.insert_job(owner)
    with database.connect() as session, session.transaction():
        session.execute("SET LOCAL session_replication_role = replica")
        session.execute(f"UPDATE training_jobs SET {change} WHERE id = %s".encode(), (job_id,))
    return job_id


async def _settle_callbacks(store: SqlJobStore) -> tuple[UUID, UUID]:
    """Deliver the first that waits and give up the next."""
    outbox = SqlOutbox(store.database)
    first = (await outbox.claim_callbacks(1, 60.0))[0]
    await outbox.deliver_callback(first.id, first.token, 200)
    second = (await outbox.claim_callbacks(1, 60.0))[0]
    await outbox.mark_callback_dead(second.id, second.token, 410, "the receiver wants no more messages (410)")
    return first.id, second.id
