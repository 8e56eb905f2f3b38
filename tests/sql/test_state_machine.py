"""Two workers and a user do whatever they like, in any order; the database must agree with a small model at each step.

The model knows states, epochs, attempts and leases, and nothing of SQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from daemon.database import Database
from daemon.errors import LeaseLost
from daemon.job import FINAL, HELD, UNFINISHED, Completed, Failed, Lease, State
from daemon.store import Ending, MetricPoint, Store
from tests.postgres import AppDatabase, Server
from training.events import ErrorCode

T = TypeVar("T")
MAX_ATTEMPTS = 3
CAP = 2
BROKEN = Failed(ErrorCode.INTERNAL, "broke", transient=True)
WORKERS = st.sampled_from([0, 1])


@dataclass(frozen=True)
class ModelJob:
    """What is known of a job without asking the database."""

    state: State = State.QUEUED
    due: bool = True
    epoch: int = 0
    attempt: int = 0
    leased: bool = False
    completions: int = 0

    @property
    def claimable(self) -> bool:
        return self.state is State.QUEUED and self.due and not self.leased


class TwoWorkers(RuleBasedStateMachine):
    """Each rule does one thing to both, and compares the answers."""

    app: AppDatabase
    loop: asyncio.AbstractEventLoop
    databases: tuple[Database, Database]

    def __init__(self) -> None:
        super().__init__()
        self.app.run("TRUNCATE auth.users CASCADE")
        self.user = self.app.insert_user()
        self.dataset = self.app.insert_dataset(self.user)
        self.jobs: dict[UUID, ModelJob] = {}
        self.leases: tuple[list[Lease], list[Lease]] = ([], [])
        self.stores = tuple(Store(database) for database in self.databases)
        self.ids = (uuid4(), uuid4())

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(call)

    def lease_of(self, worker: int, pick: int) -> Lease | None:
        """Any lease that this worker ever had, the stale ones too."""
        held = self.leases[worker]
        return held[pick % len(held)] if held else None

    def is_current(self, lease: Lease) -> bool:
        job = self.jobs[lease.job_id]
        return job.leased and job.epoch == lease.epoch

    @initialize(count=st.integers(1, 3))
    def some_jobs(self, count: int) -> None:
        for _ in range(count):
            self.insert()

    @rule()
    def insert(self) -> None:
        if len(self.jobs) < 5:
            self.jobs[self.app.insert_job(self.user, self.dataset, max_attempts=MAX_ATTEMPTS)] = ModelJob()

    @rule(worker=WORKERS)
    def claim(self, worker: int) -> None:
        answer = self.do(
            self.stores[worker].claim_job(
                self.ids[worker], free_gpus=None, gpu_memory_gb=None, gpu_type=None, models=None, user_cap=CAP,
                lease_seconds=3600,
            )
        )  # fmt: skip
        free = [job_id for job_id, job in self.jobs.items() if job.claimable]
        running = sum(job.leased for job in self.jobs.values())
        if not free or running >= CAP:
            assert answer.job is None
            return
        assert answer.job is not None and answer.job.id in free
        before = self.jobs[answer.job.id]
        assert (answer.job.lease_epoch, answer.job.attempt) == (before.epoch + 1, before.attempt + 1)
        self.jobs[answer.job.id] = replace(
            before, state=State.INITIALIZING, epoch=before.epoch + 1, attempt=before.attempt + 1, leased=True
        )
        self.leases[worker].append(answer.job.lease)

    @rule(
        worker=WORKERS, pick=st.integers(0, 9), kind=st.sampled_from(["start", "progress", "metrics", "event", "renew"])
    )
    def report(self, worker: int, pick: int, kind: str) -> None:
        lease = self.lease_of(worker, pick)
        if lease is None:
            return
        store, job = self.stores[worker], self.jobs[lease.job_id]
        calls: dict[str, Coroutine[Any, Any, Any]] = {
            "start": store.start_job(lease),
            "progress": store.record_progress(
                lease, stage="training", progress=1, epoch=0, step=1, metrics={}, current_cost=None, seconds_left=None
            ),
            "metrics": store.record_metrics(lease, [MetricPoint(1, 0, 1.0, 1e-4)]),
            "event": store.record_event(lease, "notice", "x", {"epoch": lease.epoch}),
            "renew": store.renew_lease(lease, 3600),
        }
        chosen = calls.pop(kind)
        for other in calls.values():
            other.close()
        allowed = self.is_current(lease) and (kind not in {"start", "progress"} or job.state in HELD)
        try:
            answer = self.do(chosen)
        except LeaseLost:
            assert not allowed
            return
        assert allowed
        if kind == "renew":
            assert answer is job.state
        if kind == "start":
            self.jobs[lease.job_id] = replace(job, state=State.RUNNING)

    @rule(
        worker=WORKERS,
        pick=st.integers(0, 9),
        kind=st.sampled_from(["complete", "fail", "retry", "release", "end_cancelled"]),
    )
    def end(self, worker: int, pick: int, kind: str) -> None:
        lease = self.lease_of(worker, pick)
        if lease is None:
            return
        before = self.jobs[lease.job_id]
        after, said = self.expected_ending(before, lease, kind)
        try:
            answer: Ending | None = self.do(self.ending(self.stores[worker], lease, kind))
        except LeaseLost:
            answer = None
        assert answer == said, (kind, before, lease)
        self.jobs[lease.job_id] = after

    def ending(self, store: Store, lease: Lease, kind: str) -> Coroutine[Any, Any, Ending]:
        match kind:
            case "complete":
                return store.complete_job(lease, Completed("a", "b", 1), cost=1)
            case "fail":
                return store.fail_job(lease, BROKEN, cost=1)
            case "retry":
                return store.retry_job(lease, BROKEN, delay_seconds=3600, cost=1)
            case "release":
                return store.release_job(lease, "x", cost=1)
            case _:
                return store.end_cancelled_job(lease, cost=1, data={})

    def expected_ending(self, job: ModelJob, lease: Lease, kind: str) -> tuple[ModelJob, Ending | None]:
        wanted = {
            "complete": {State.COMPLETED},
            "fail": {State.FAILED},
            "retry": {State.QUEUED, State.FAILED},
            "release": {State.QUEUED},
            "end_cancelled": {State.CANCELLED},
        }[kind]
        if not self.is_current(lease):
            # Nothing is written; only our own epoch in the state that was asked for is recognised.
            if job.epoch == lease.epoch and job.state in wanted:
                return job, Ending(True, job.state)
            return job, None
        gone = replace(job, leased=False)
        if kind == "end_cancelled":
            return gone, Ending(job.state is State.CANCELLED, job.state)
        if job.state not in HELD:
            return gone, Ending(False, job.state)
        match kind:
            case "complete":
                after = replace(gone, state=State.COMPLETED, completions=job.completions + 1)
            case "fail":
                after = replace(gone, state=State.FAILED)
            case "retry" if job.attempt < MAX_ATTEMPTS:
                after = replace(gone, state=State.QUEUED, due=False)
            case "retry":
                after = replace(gone, state=State.FAILED)
            case _:
                after = replace(gone, state=State.QUEUED, due=True, attempt=job.attempt - 1)
        return after, Ending(True, after.state)

    @rule(pick=st.integers(0, 9))
    def cancel(self, pick: int) -> None:
        job_id = list(self.jobs)[pick % len(self.jobs)]
        job = self.jobs[job_id]
        try:
            with self.app.acting("authenticated", self.user) as owner:
                owner.execute("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job_id,))
        except psycopg.Error as error:
            assert error.sqlstate == "PT409" and job.state in FINAL - {State.CANCELLED}
            return
        assert job.state in UNFINISHED | {State.CANCELLED}
        self.jobs[job_id] = replace(job, state=State.CANCELLED, due=False)

    @rule(pick=st.integers(0, 9))
    def resubmit(self, pick: int) -> None:
        job_id = list(self.jobs)[pick % len(self.jobs)]
        job = self.jobs[job_id]
        try:
            self.app.run("SELECT retry_training_job(%s)", (job_id,))
        except psycopg.Error as error:
            assert error.sqlstate == "PT409" and job.state not in {State.FAILED, State.CANCELLED}
            return
        assert job.state in {State.FAILED, State.CANCELLED}
        self.jobs[job_id] = replace(job, state=State.QUEUED, due=True, attempt=0)

    @rule()
    def time_passes_for_the_scheduled(self) -> None:
        self.app.run("SET session_replication_role = replica")
        self.app.run("UPDATE training_jobs SET run_after = now() - interval '1 s' WHERE run_after IS NOT NULL")
        self.app.run("SET session_replication_role = origin")
        waiting = [job_id for job_id, job in self.jobs.items() if job.state is State.QUEUED and not job.due]
        assert self.do(self.stores[0].promote_due_jobs()) == len(waiting)
        for job_id in waiting:
            self.jobs[job_id] = replace(self.jobs[job_id], due=True)

    @rule(worker=WORKERS, pick=st.integers(0, 9))
    def a_host_falls_silent_and_is_reaped(self, worker: int, pick: int) -> None:
        lease = self.lease_of(worker, pick)
        if lease is None:
            return
        self.app.run("UPDATE training_leases SET expires_at = now() WHERE job_id = %s AND epoch = %s",
                     (lease.job_id, lease.epoch))  # fmt: skip
        reaped = self.do(self.stores[1 - worker].reap_expired_leases())
        if not self.is_current(lease):
            assert reaped == []
            return
        job = replace(self.jobs[lease.job_id], leased=False)
        if job.state in HELD:
            again = job.attempt < MAX_ATTEMPTS
            job = replace(job, state=State.QUEUED if again else State.FAILED, due=again and job.attempt < 2)
        self.jobs[lease.job_id] = job
        assert [(one.job_id, one.state) for one in reaped] == [(lease.job_id, job.state)]

    @invariant()
    def the_database_agrees(self) -> None:
        rows = {row["id"]: row for row in self.app.run(
            "SELECT job.*, lease.epoch AS held_epoch FROM training_jobs AS job "
            "LEFT JOIN training_leases AS lease ON lease.job_id = job.id"
        )}  # fmt: skip
        assert set(rows) == set(self.jobs)
        for job_id, job in self.jobs.items():
            row = rows[job_id]
            said = (row["status"], row["lease_epoch"], row["attempt"], row["held_epoch"])
            assert said == (job.state, job.epoch, job.attempt, job.epoch if job.leased else None), job
            if job.state is State.QUEUED:
                assert row["due"] == job.due
            assert (row["completed_at"] is not None) == (job.state in FINAL)
        events = self.app.run("SELECT job_id, count(*) AS n FROM training_events WHERE kind = 'completed' GROUP BY 1")
        assert {row["job_id"]: row["n"] for row in events} == {
            job_id: job.completions for job_id, job in self.jobs.items() if job.completions
        }


@pytest.fixture
def machine(postgres: Server, migrated_template: str) -> Iterator[type[TwoWorkers]]:
    with postgres.database(template=migrated_template) as name:
        loop = asyncio.new_event_loop()
        app = AppDatabase(postgres.dsn(name))
        databases = tuple(Database(app.dsn, application_name=f"worker {number}") for number in (0, 1))
        yield type("Machine", (TwoWorkers,), {"app": app, "loop": loop, "databases": databases})
        for database in databases:
            loop.run_until_complete(database.close())
        loop.close()
        app.close()


def test_any_order_of_statements_by_two_workers_agrees_with_the_model(machine: type[TwoWorkers]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=True,
        ),
    )
