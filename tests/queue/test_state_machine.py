"""Two workers and a user do whatever they like, in any order; the database must agree with a small model at each step.

The model knows states, epochs, attempts and leases, and nothing of SQL. Nor does it trust itself: it is run as well
against copies of the statements from which one condition was taken out, and must find each of them wrong.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from psycopg.types.json import Jsonb

from daemon.database.connection import Database
from daemon.database.statements import statement
from daemon.errors import LeaseLost, StatementRefused
from daemon.queue.job import ClaimedJob, Lease, Returned
from daemon.queue.outcome import Completed, Failed
from daemon.queue.rows import Ending, Limits, MetricPoint
from daemon.queue.sql_job_store import MAX_RETURNS, SqlJobStore
from daemon.queue.states import FINAL, HELD, UNFINISHED, State
from daemon.storage.interface import Location
from daemon.storage.upload_log import SqlUploadLog
from tests.lifecycle.test_peer_failures import READS, STALE_WRITES
from tests.postgres import AppDatabase, Server
from training.events import ErrorCode

T = TypeVar("T")
MAX_ATTEMPTS = 3
CAP = 2
BROKEN = Failed(ErrorCode.INTERNAL, "broke", transient=True)
WORKERS = st.sampled_from([0, 1])
# As the stale owner of STALE_WRITES says it.
UPLOADED_STEP = 1
NO_LIMITS = {"free_gpus": None, "gpu_memory_gb": None, "gpu_type": None, "models": None}
# Each ending and the states that it may lead to.
ENDINGS = {
    "complete_job": {State.COMPLETED},
    "fail_job": {State.FAILED},
    "retry_job": {State.QUEUED, State.FAILED},
    "release_job": {State.QUEUED},
    "return_job": {State.QUEUED, State.FAILED},
    "end_cancelled_job": {State.CANCELLED},
}
# Said in rules of their own, not by the holder of one lease.
SPECIAL = {"settle_cancelled_job", "return_unanswered_claims"}
# What the model knows in every state; the other fenced statements are tried by stale owners only.
MODELLED = {
    *ENDINGS, *SPECIAL, "start_job", "record_plan", "record_progress", "record_metrics", "forget_metrics",
    "record_event", "renew_lease",
}  # fmt: skip
# The conditions that say whose a job is, and in which state it may be written to. `job.lease_epoch = ended.epoch` is
# not among them: behind the lease that the same statement has just ended it can only be true.
OWNER = re.compile(
    r"\(\w+\.(?:lease_)?epoch, \w+\.(?:lease_)?token\) = \(%\(epoch\)s, %\(token\)s\)"
    r"|lease\.worker_id = %\(worker_id\)s|lease\.job_id <> ALL \(%\(known\)s::uuid\[\]\)"
)
# Its second half, which holds where a backup has given two hosts one epoch.
TOKEN = re.compile(r"\((\w+\.(?:lease_)?epoch), \w+\.(?:lease_)?token\) = \(%\(epoch\)s, %\(token\)s\)")
STATE = re.compile(r"job\.status (?:IN \('initializing', 'running'\)|= 'cancelled')")


async def say(store: SqlJobStore, name: str, lease: Lease) -> Any:
    """One statement of a lease's holder, as its method of the store says it."""
    match name:
        case "start_job":
            return await store.start_job(lease)
        case "record_plan":
            return await store.record_plan(
                lease, total_steps=1, total_epochs=1, estimated_total_cost=1, trained_with={}
            )
        case "record_progress":
            return await store.record_progress(
                lease, stage="training", progress=1, epoch=0, step=1, metrics={}, current_cost=None, seconds_left=None
            )
        case "record_metrics":
            return await store.record_metrics(lease, [MetricPoint(1, 0, 1.0, 1e-4)])
        case "forget_metrics":
            return await store.forget_metrics(lease, 0)
        case "record_event":
            return await store.record_event(lease, "notice", "x", {"epoch": lease.epoch})
        case "renew_lease":
            return await store.renew_lease(lease, 3600)
        case "complete_job":
            return await store.complete_job(lease, Completed("a", "b", 1), cost=1)
        case "fail_job":
            return await store.fail_job(lease, BROKEN, cost=1)
        case "retry_job":
            return await store.retry_job(lease, BROKEN, delay_seconds=3600, cost=1)
        case "release_job":
            return await store.release_job(lease, "x", cost=1)
        case "return_job":
            returned = Returned("work folder", ErrorCode.DISK_FULL, "full")
            return await store.return_job(lease, returned, cost=1)
        case "end_cancelled_job":
            return await store.end_cancelled_job(lease, cost=1, data={})
        case _:
            raise AssertionError(f"how does a holder say {name}?")


@dataclass(frozen=True)
class ModelJob:
    """What is known of a job without asking the database."""

    state: State = State.QUEUED
    due: bool = True
    epoch: int = 0
    token: UUID | None = None
    attempt: int = 0
    leased: bool = False
    completions: int = 0
    noted: bool = False
    returns: int = 0

    @property
    def claimable(self) -> bool:
        return self.state is State.QUEUED and self.due and not self.leased


@dataclass(frozen=True)
class Mutant:
    """A statement without one of its conditions."""

    name: str
    condition: str
    text: str

    def __str__(self) -> str:
        return f"{self.name} without {self.condition}"


class MutableDatabase(Database):
    """Runs the mutant, while there is one, in place of its statement."""

    mutant: Mutant | None = None

    async def fetch(self, text: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        if self.mutant is not None and text == statement(self.mutant.name):
            text = self.mutant.text
        return await super().fetch(text, parameters)


class TwoWorkers(RuleBasedStateMachine):
    """Each rule does one thing to both, and compares the answers."""

    app: AppDatabase
    owner: psycopg.Connection[dict[str, Any]]
    loop: asyncio.AbstractEventLoop
    databases: tuple[MutableDatabase, MutableDatabase]

    def __init__(self) -> None:
        super().__init__()
        # The jobs go with their datasets; TRUNCATE would cost twenty times as much.
        self.app.delete_jobs()
        self.user = self.app.insert_user()
        self.dataset = self.app.insert_dataset(self.user)
        self.jobs: dict[UUID, ModelJob] = {}
        self.leases: tuple[list[Lease], list[Lease]] = ([], [])
        self.stores = tuple(SqlJobStore(database) for database in self.databases)
        self.ids = (uuid4(), uuid4())

    def do(self, call: Awaitable[T]) -> T:
        return self.loop.run_until_complete(call)

    def lease_of(self, worker: int, pick: int) -> Lease | None:
        """Any lease that this worker ever had, the stale ones too."""
        held = self.leases[worker]
        return held[pick % len(held)] if held else None

    def is_current(self, lease: Lease) -> bool:
        job = self.jobs[lease.job_id]
        return job.leased and self.is_last(lease)

    def is_last(self, lease: Lease) -> bool:
        """Nobody has claimed the job since."""
        job = self.jobs[lease.job_id]
        return (job.epoch, job.token) == (lease.epoch, lease.token)

    def took(self, worker: int, job: ClaimedJob) -> None:
        """A claim has answered with this job: it must be a fresh lease on the job as the model knows it."""
        before = self.jobs[job.id]
        assert (job.lease_epoch, job.attempt) == (before.epoch + 1, before.attempt + 1)
        assert all(job.lease_token != lease.token for leases in self.leases for lease in leases)
        self.jobs[job.id] = replace(
            before, state=State.INITIALIZING, due=False, epoch=before.epoch + 1, token=job.lease_token,
            attempt=before.attempt + 1, leased=True,
        )  # fmt: skip
        self.leases[worker].append(job.lease)

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
        answer = self.do(self.stores[worker].claim_job(self.ids[worker], Limits(user_cap=CAP), lease_seconds=3600))
        free = [job_id for job_id, job in self.jobs.items() if job.claimable]
        running = sum(job.leased for job in self.jobs.values())
        if not free or running >= CAP:
            assert answer.job is None
            return
        assert answer.job is not None and answer.job.id in free
        self.took(worker, answer.job)

    @rule(worker=WORKERS, pick=st.integers(0, 9))
    def claim_by_id(self, worker: int, pick: int) -> None:
        job_id = list(self.jobs)[pick % len(self.jobs)]
        job = self.jobs[job_id]
        rows = self.do(self.databases[worker].fetch(statement("claim_job_by_id"), NO_LIMITS | {
            "job_id": job_id, "worker_id": self.ids[worker], "lease_seconds": 3600.0
        }))  # fmt: skip
        # A new job is taken before its time, a retry is not.
        free = job.state is State.QUEUED and not job.leased and (job.due or job.attempt == 0)
        assert len(rows) == free
        if rows:
            assert rows[0].pop("lacking") == []
            self.took(worker, ClaimedJob(**rows[0]))

    @rule(worker=WORKERS, pick=st.integers(0, 9), name=st.sampled_from(sorted(MODELLED - set(ENDINGS) - SPECIAL)))
    def report(self, worker: int, pick: int, name: str) -> None:
        lease = self.lease_of(worker, pick)
        if lease is None:
            return
        job = self.jobs[lease.job_id]
        # Of a cancelled job the story and the points go on until its child is gone; its columns are final.
        needs_state = name in {"start_job", "record_plan", "record_progress"}
        allowed = self.is_current(lease) and (not needs_state or job.state in HELD)
        try:
            answer = self.do(say(self.stores[worker], name, lease))
        except LeaseLost:
            assert not allowed, (name, job, lease)
            return
        assert allowed, (name, job, lease)
        if name == "renew_lease":
            assert answer is job.state
        if name == "start_job":
            self.jobs[lease.job_id] = replace(job, state=State.RUNNING)

    @rule(worker=WORKERS, pick=st.integers(0, 9))
    def settle(self, worker: int, pick: int) -> None:
        """The second half of an ending that found its job cancelled."""
        lease = self.lease_of(worker, pick)
        if lease is None:
            return
        job = self.jobs[lease.job_id]
        rows = self.do(self.databases[worker].fetch(statement("settle_cancelled_job"), {
            "job_id": lease.job_id, "epoch": lease.epoch, "token": lease.token, "cost": 1
        }))  # fmt: skip
        assert len(rows) == (job.state is State.CANCELLED and self.is_last(lease)), (job, lease)

    @rule(worker=WORKERS, cancelled=st.booleans(), picks=st.sets(st.integers(0, 4)))
    def return_unanswered(self, worker: int, cancelled: bool, picks: set[int]) -> None:
        """This worker knows some of its jobs: the others, and nobody else's, go back."""
        lease = self.hold(worker)
        if lease is not None and cancelled:
            self.cancel(list(self.jobs).index(lease.job_id))
        held = [lease for lease in self.leases[worker] if self.is_current(lease)]
        known = [lease.job_id for number, lease in enumerate(held) if number in picks]
        back = 0
        for lease in held:
            job = self.jobs[lease.job_id]
            if lease.job_id in known:
                continue
            gone = replace(job, leased=False)
            if job.state in HELD:
                back += 1
                gone = replace(gone, state=State.QUEUED, due=True, attempt=job.attempt - 1)
            self.jobs[lease.job_id] = gone
        assert self.do(self.stores[worker].return_unanswered_claims(self.ids[worker], known)) == back

    @rule(worker=WORKERS, claimed_anew=st.booleans())
    def a_job_changes_hands_and_its_old_owner_comes_back(self, worker: int, claimed_anew: bool) -> None:
        """Its host falls silent, the other one reaps it; then the first wakes and says all that it can say."""
        lease = self.hold(worker)
        if lease is None:
            return
        self.reap(lease, by=1 - worker)
        if claimed_anew and self.jobs[lease.job_id].state is State.QUEUED:
            self.time_passes_for_the_scheduled()
            self.claim_by_id(1 - worker, list(self.jobs).index(lease.job_id))
            if self.jobs[lease.job_id].leased:
                # The heir has begun the very upload that its predecessor will call finished.
                heir = self.leases[1 - worker][-1]
                self.do(
                    SqlUploadLog(self.databases[1 - worker]).record_upload(
                        heir, "checkpoint", Location("s", "b"), ["heir"], step=UPLOADED_STEP
                    )
                )
                self.jobs[lease.job_id] = replace(self.jobs[lease.job_id], noted=True)
        self.everything_that_a_stale_owner_says_is_refused(worker, lease)

    @rule(worker=WORKERS, ending=st.sampled_from([None, *sorted(ENDINGS)]))
    def the_rows_go_back_in_time_and_another_host_gets_the_same_epoch(self, worker: int, ending: str | None) -> None:
        """A backup from before the claim is restored and the other host claims: the first one may say nothing."""
        self.insert()
        waiting = [number for number, job in enumerate(self.jobs.values()) if job.claimable]
        if not waiting:
            return
        place = waiting[0]
        job_id = list(self.jobs)[place]
        before = self.jobs[job_id]
        row = self.app.one("SELECT to_jsonb(job) AS row FROM training_jobs AS job WHERE id = %s", (job_id,))["row"]
        self.claim_by_id(worker, place)
        lease = self.leases[worker][-1]
        self.restore(job_id, row)
        self.jobs[job_id] = before
        self.claim_by_id(1 - worker, place)
        heir = self.leases[1 - worker][-1]
        assert heir.epoch == lease.epoch
        self.do(
            SqlUploadLog(self.databases[1 - worker]).record_upload(
                heir, "checkpoint", Location("s", "b"), ["x"], step=UPLOADED_STEP
            )
        )
        self.jobs[job_id] = replace(self.jobs[job_id], noted=True)
        if ending is not None:
            if ending == "end_cancelled_job":
                self.cancel(place)
            self.end(1 - worker, len(self.leases[1 - worker]) - 1, ending)
        self.everything_that_a_stale_owner_says_is_refused(worker, lease)

    def restore(self, job_id: UUID, row: dict[str, Any]) -> None:
        names = ", ".join(row)
        self.app.run("SET session_replication_role = replica")
        self.app.run("DELETE FROM training_leases WHERE job_id = %s", (job_id,))
        self.app.run(
            f"UPDATE training_jobs AS job SET ({names}) = (SELECT {names} FROM jsonb_populate_record(job, %s)) "
            "WHERE id = %s",
            (Jsonb(row), job_id),
        )
        self.app.run("SET session_replication_role = origin")

    @rule(worker=WORKERS, again=st.booleans())
    def jobs_are_cancelled_under_their_host(self, worker: int, again: bool) -> None:
        """Whatever the host says then, and by whichever ending it gives the job up: the cancel stands."""
        for name in ENDINGS:
            lease = self.hold(worker)
            if lease is None:
                return
            self.app.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (lease.job_id,))
            self.jobs[lease.job_id] = replace(self.jobs[lease.job_id], state=State.CANCELLED, due=False)
            if again:
                self.resubmit(list(self.jobs).index(lease.job_id))
            place = self.leases[worker].index(lease)
            for report in ("start_job", "record_plan", "record_progress", "renew_lease"):
                self.report(worker, place, report)
            self.end(worker, place, name)
            self.settle(worker, place)

    def hold(self, worker: int) -> Lease | None:
        """A job that this worker holds, taken now if it has none; None when there is none to take."""
        for _ in range(2):
            for lease in self.leases[worker]:
                if self.is_current(lease) and self.jobs[lease.job_id].state in HELD:
                    return lease
            self.insert()
            waiting = [number for number, job in enumerate(self.jobs.values()) if job.claimable]
            if not waiting:
                return None
            self.claim_by_id(worker, waiting[0])
        return None

    @rule(worker=WORKERS, pick=st.integers(0, 9))
    def an_old_owner_comes_back(self, worker: int, pick: int) -> None:
        stale = [lease for lease in self.leases[worker] if not self.is_current(lease)]
        if stale:
            self.everything_that_a_stale_owner_says_is_refused(worker, stale[pick % len(stale)])

    def everything_that_a_stale_owner_says_is_refused(self, worker: int, lease: Lease) -> None:
        before, job = self.written(), self.jobs[lease.job_id]
        for name in STALE_WRITES:
            # An ending whose answer was lost finds its own epoch in the state that it asked for, and is content.
            content = self.is_last(lease) and job.state in ENDINGS.get(name, {})
            own_settling = name == "settle_cancelled_job" and self.is_last(lease) and job.state is State.CANCELLED
            if own_settling:
                continue
            try:
                self.do(STALE_WRITES[name](self.stores[worker], lease))
            except LeaseLost:
                assert not content, (name, job, lease)
            else:
                assert content, (name, job, lease)
        assert self.written() == before

    def written(self) -> list[dict[str, Any]]:
        """All that a stale owner could have touched."""
        return self.app.run(
            "SELECT to_jsonb(job) AS row FROM training_jobs AS job UNION ALL "
            "SELECT to_jsonb(lease) FROM training_leases AS lease UNION ALL "
            "SELECT to_jsonb(upload) FROM training_uploads AS upload UNION ALL "
            "SELECT jsonb_build_object('points', count(*), 'steps', sum(step)) FROM metrics_points UNION ALL "
            "SELECT jsonb_build_object('events', count(*)) FROM training_events"
        )

    @rule(
        worker=WORKERS,
        pick=st.integers(0, 9),
        name=st.sampled_from(sorted(ENDINGS)),
    )
    def end(self, worker: int, pick: int, name: str) -> None:
        lease = self.lease_of(worker, pick)
        if lease is None:
            return
        before = self.jobs[lease.job_id]
        after, said = self.expected_ending(before, lease, name)
        try:
            answer = self.do(say(self.stores[worker], name, lease))
        except LeaseLost:
            answer = None
        assert answer == said, (name, before, lease)
        self.jobs[lease.job_id] = after

    def expected_ending(self, job: ModelJob, lease: Lease, name: str) -> tuple[ModelJob, Ending | None]:
        if not self.is_current(lease):
            # Nothing is written; only our own epoch in the state that was asked for is recognised.
            if self.is_last(lease) and job.state in ENDINGS[name]:
                return job, Ending(True, job.state, job.noted)
            return job, None
        gone = replace(job, leased=False)
        if name == "end_cancelled_job" and job.state not in HELD:
            return gone, Ending(job.state is State.CANCELLED, job.state, job.noted)
        if job.state not in HELD:
            return gone, Ending(False, job.state, job.noted)
        match name:
            case "complete_job":
                after = replace(gone, state=State.COMPLETED, completions=job.completions + 1)
            case "fail_job":
                after = replace(gone, state=State.FAILED)
            case "retry_job" if job.attempt < MAX_ATTEMPTS:
                after = replace(gone, state=State.QUEUED, due=False)
            case "retry_job":
                after = replace(gone, state=State.FAILED)
            case "return_job":
                back = replace(gone, state=State.QUEUED, due=job.returns == 0, returns=job.returns + 1)
                if job.returns < MAX_RETURNS:
                    after = replace(back, attempt=job.attempt - 1)
                else:
                    after = back if job.attempt < MAX_ATTEMPTS else replace(back, state=State.FAILED, due=True)
            case _:
                after = replace(gone, state=State.QUEUED, due=True, attempt=job.attempt - 1)
        return after, Ending(True, after.state, job.noted)

    @rule(pick=st.integers(0, 9))
    def cancel(self, pick: int) -> None:
        job_id = list(self.jobs)[pick % len(self.jobs)]
        job = self.jobs[job_id]
        try:
            with self.owner.transaction():
                claims = {"role": "authenticated", "sub": str(self.user)}
                self.owner.execute("SELECT set_config('request.jwt.claims', %s, true)", (json.dumps(claims),))
                self.owner.execute("SET LOCAL ROLE authenticated")
                self.owner.execute("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job_id,))
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
        self.jobs[job_id] = replace(job, state=State.QUEUED, due=True, attempt=0, returns=0)

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
        if lease is not None:
            self.reap(lease, by=1 - worker)

    def reap(self, lease: Lease, by: int) -> None:
        self.app.run("UPDATE training_leases SET expires_at = now() WHERE job_id = %s AND epoch = %s",
                     (lease.job_id, lease.epoch))  # fmt: skip
        reaped = self.do(self.stores[by].reap_expired_leases())
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


@pytest.fixture(scope="module")
def machine(postgres: Server, migrated_template: str) -> Iterator[type[TwoWorkers]]:
    with postgres.database(template=migrated_template) as name:
        loop = asyncio.new_event_loop()
        app = AppDatabase(postgres.dsn(name))
        databases = tuple(MutableDatabase(app.dsn, application_name=f"worker {number}") for number in (0, 1))
        with app.connect() as owner:
            given = {"app": app, "owner": owner, "loop": loop, "databases": databases}
            yield type("Machine", (TwoWorkers,), given)
        for database in databases:
            loop.run_until_complete(database.close())
        loop.close()
        app.close()


def run(machine: type[TwoWorkers], examples: int, *phases: Phase) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            phases=phases or tuple(Phase),
            report_multiple_bugs=False,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=True,
        ),
    )


def test_any_order_of_statements_by_two_workers_agrees_with_the_model(machine: type[TwoWorkers]) -> None:
    run(machine, 12)


def mutants() -> list[Mutant]:
    """Every statement that names a lease, without one of its conditions, each in turn."""
    found = []
    for name in sorted(MODELLED | set(STALE_WRITES) | READS):
        text = statement(name)
        conditions = [OWNER, STATE] if name in MODELLED else [OWNER]
        places = [place for condition in conditions for place in condition.finditer(text)]
        found += [Mutant(name, place[0], text[: place.start()] + "true" + text[place.end() :]) for place in places]
        found += [
            Mutant(name, "the token", f"{text[: place.start()]}{place[1]} = %(epoch)s{text[place.end() :]}")
            for place in TOKEN.finditer(text)
        ]
    return found


def test_every_statement_that_names_a_lease_has_its_mutants() -> None:
    names = {mutant.name for mutant in mutants()}
    assert names == MODELLED | set(STALE_WRITES) | READS


@pytest.mark.parametrize("mutant", mutants(), ids=str)
def test_a_statement_without_one_of_its_conditions_disagrees_with_the_model(
    machine: type[TwoWorkers], mutant: Mutant
) -> None:
    try:
        for database in machine.databases:
            database.mutant = mutant
        with pytest.raises((AssertionError, psycopg.Error, StatementRefused)) as found:
            run(machine, 30, Phase.generate)
    finally:
        for database in machine.databases:
            database.mutant = None
    # The guard's refusal of an impossible move counts as found; a mutant that is no SQL does not.
    assert isinstance(found.value, AssertionError) or found.value.sqlstate == "PT409", found.value
