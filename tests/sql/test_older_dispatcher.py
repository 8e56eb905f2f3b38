"""The older dispatcher left running: its writes once a minute, as its edge function makes them, do no harm.

It writes as the service role, each statement a request of its own, and looks at no answer.
"""

from __future__ import annotations

import contextlib
from typing import Any
from uuid import UUID

import psycopg

from daemon.queue.outcome import Completed, Failed
from daemon.queue.sql_job_store import SqlJobStore
from tests.postgres import AppDatabase, insert_statement
from tests.queue.claiming import claimed
from tests.sql.world import held, orphan
from training.events import ErrorCode

DONE = Completed("lora-models/adapters/one.tar.gz", "0" * 64, 1_000)
BROKEN = Failed(ErrorCode.NON_FINITE_LOSS, "the loss became NaN", "lower it")


class Dispatcher:
    """One run of it is `cycle`; `external_ids` are the jobs that it believes to have submitted."""

    def __init__(self, database: AppDatabase, *, endpoint_answers: bool = True) -> None:
        self._database = database
        self._endpoint_answers = endpoint_answers
        self.submitted: list[UUID] = []

    def cycle(self, remote: str = "IN_PROGRESS") -> None:
        for job in self._read("status = 'queued' ORDER BY created_at LIMIT 5"):
            self._update(job, status="initializing", current_stage="initializing")
            if self._endpoint_answers:
                self.submitted.append(job["id"])
                self._update(job, external_job_id=f"run-{job['id']}", status="running", current_stage="queued_on_gpu")
                self._notify(job, "job_started", "Training Started")
            else:
                self._update(job, status="failed", error_message="submission failed", error_stack="…")
                self._notify(job, "job_failed", "Training Failed")
        for job in self._read("status IN ('running', 'initializing') AND external_job_id IS NOT NULL"):
            self._insert("metrics_points", {
                "job_id": job["id"], "epoch": 1, "step": 1, "training_loss": 1, "learning_rate": 0.0001,
            })  # fmt: skip
            if remote != "COMPLETED":
                self._update(job, progress=50, current_cost=1)
                continue
            self._insert("cost_records", {
                "user_id": job["user_id"], "job_id": job["id"], "cost_type": "training_compute", "amount": 1,
                "billing_period": "2026-11-01",
            })  # fmt: skip
            self._notify(job, "job_completed", "Training Complete")
            self._update(job, status="completed", progress=100, final_cost=1)

    def _read(self, where: str) -> list[dict[str, Any]]:
        with self._database.acting("service_role") as service:
            return service.execute(f"SELECT * FROM training_jobs WHERE {where}".encode()).fetchall()

    def _update(self, job: dict[str, Any], **changes: Any) -> None:
        sets = ", ".join(f"{name} = %({name})s" for name in changes)
        with contextlib.suppress(psycopg.Error), self._database.acting("service_role") as service:
            service.execute(f"UPDATE training_jobs SET {sets} WHERE id = %(id)s".encode(), changes | {"id": job["id"]})

    def _notify(self, job: dict[str, Any], kind: str, title: str) -> None:
        self._insert("notifications", {
            "user_id": job["user_id"], "type": kind, "title": title, "message": "…", "priority": "high",
            "action_url": f"/training/jobs/{job['id']}", "metadata": {"job_id": str(job["id"])},
        })  # fmt: skip

    def _insert(self, table: str, row: dict[str, Any]) -> None:
        text, values = insert_statement(table, row)
        with contextlib.suppress(psycopg.Error), self._database.acting("service_role") as service:
            service.execute(text.encode(), values)


def told(database: AppDatabase, job: UUID) -> list[str]:
    rows = database.run(
        "SELECT type, title FROM notifications WHERE metadata ->> 'job_id' = %s ORDER BY created_at, type", (str(job),)
    )
    return [f"{row['type']}: {row['title']}" for row in rows]


async def test_jobs_of_the_trainer_are_told_of_once_and_by_the_trainer(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    for answers in (True, False):
        dispatcher = Dispatcher(database, endpoint_answers=answers)
        job = database.insert_job(user)
        before = database.job(job)
        for _ in range(3):
            dispatcher.cycle()
        assert database.job(job) == before, "it moved a job that waits"
        assert told(database, job) == [], "it told of a start, or of a failure, that was none"
        lease = (await claimed(store)).lease
        dispatcher.cycle()
        await store.start_job(lease)
        dispatcher.cycle()
        if answers:
            await store.complete_job(lease, DONE, cost=1.5)
        else:
            await store.fail_job(lease, BROKEN, cost=0.5)
        for _ in range(3):
            dispatcher.cycle("COMPLETED")
        kinds = [line.partition(":")[0] for line in told(database, job)]
        ending = ["artifact_ready", "job_completed"] if answers else ["job_failed"]
        assert kinds == ["job_started", *ending]
        assert all("Training Started" not in line for line in told(database, job))
        assert len(database.run("SELECT FROM cost_records WHERE job_id = %s", (job,))) == 1
        assert database.run("SELECT FROM metrics_points WHERE job_id = %s", (job,)) == []
        assert database.story(job).count("notice") == 1, "its traces are told once a day"
    noted = database.run("SELECT data FROM training_events WHERE kind = 'notice' ORDER BY id")
    assert [row["data"]["code"] for row in noted] == ["older_dispatcher"] * 2


def test_a_held_row_is_left_alone_and_its_user_in_peace(database: AppDatabase, user: UUID) -> None:
    job = held(database, user)
    dispatcher = Dispatcher(database)
    for _ in range(5):
        dispatcher.cycle()
    assert told(database, job) == [] and database.job(job)["status"] == "queued" and database.job(job)["held"]


def test_rows_that_it_runs_itself_are_told_of_by_it(database: AppDatabase, user: UUID) -> None:
    job = orphan(database, user)
    with database.acting("service_role") as service:
        service.execute("UPDATE training_jobs SET external_job_id = 'run-1' WHERE id = %s", (job,))
    dispatcher = Dispatcher(database)
    dispatcher.cycle()
    assert database.job(job)["progress"] == 50
    for _ in range(3):
        dispatcher.cycle("COMPLETED")
    assert database.job(job)["status"] == "completed"
    assert told(database, job) == ["job_completed: Training Complete"]
