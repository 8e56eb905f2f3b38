"""Where other queues on Postgres fail, each failure as a test that this one passes.

The cases and who fails them: lost wake-ups (procrastinate), stale owners' writes (procrastinate, pgqueuer, River,
Oban), silence during a drain (procrastinate), rescue by age (River, Oban), a job both finished and failed
(Solid Queue), a requeue that wakes nobody. Outages are in test_outages.py.
"""

from __future__ import annotations

import asyncio
import random
import re
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from threading import Timer
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.database.statements import statement
from daemon.errors import LeaseLost
from daemon.queue.job import Lease, Returned
from daemon.queue.outcome import Completed, Failed
from daemon.queue.rows import Ending, Limits, MetricPoint
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.states import State
from daemon.storage.interface import Location
from daemon.storage.upload_log import SqlUploadLog
from tests.daemon_process import DaemonProcess, alive, eventually
from tests.lifecycle.queue import FINAL, Queue
from tests.paths import ROOT
from training.events import ErrorCode

# Refused within milliseconds and without a child: what is left is the queue's own speed.
REFUSED = {"base_model": "tiny", "epochs": -1}
SLOW_POLL = 60


def waits(queue: Queue) -> list[float]:
    """Seconds from each queueing to the claim that followed it, by the database's clock."""
    with queue.connect() as app:
        rows = app.execute(
            "SELECT extract(epoch FROM claimed.at - queued.at)::float8 AS seconds FROM training_events AS queued "
            "JOIN LATERAL (SELECT event.at FROM training_events AS event WHERE event.job_id = queued.job_id "
            "AND event.id > queued.id AND event.kind = 'claimed' ORDER BY event.id LIMIT 1) AS claimed ON true "
            "WHERE queued.kind IN ('queued', 'resubmitted')"
        ).fetchall()
    return [row["seconds"] for row in rows]


def test_no_wake_up_of_a_burst_is_lost(queue: Queue, tmp_path: Path) -> None:
    order = random.Random(20261122)
    with queue.daemon(tmp_path, poll_seconds=SLOW_POLL, slots=4) as daemon, queue.connect() as app:
        daemon.wait_for_log("listener_hears")
        first = queue.insert(hyperparameters=REFUSED)
        queue.wait_for(first, "failed")
        copy = (
            "INSERT INTO training_jobs (user_id, dataset_id, hyperparameters) "
            "SELECT user_id, dataset_id, hyperparameters FROM training_jobs WHERE id = %s"
        )
        for _ in range(300):
            app.execute(copy, (first,))
            if order.random() < 0.3:
                # Gaps of all lengths, so that inserts meet every moment of a claim.
                time.sleep(order.random() * 0.01)

        def all_ended() -> bool:
            row = app.execute("SELECT count(*) FILTER (WHERE status = 'failed') AS n FROM training_jobs").fetchone()
            return row is not None and row["n"] == 301

        eventually(all_ended, seconds=SLOW_POLL / 2, why=lambda: f"a wake-up was lost\n{daemon.tail()}")
    assert len(waits(queue)) == 301 and max(waits(queue)) < SLOW_POLL / 4


def test_a_requeued_job_wakes_a_sleeping_daemon(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, poll_seconds=SLOW_POLL) as daemon:
        daemon.wait_for_log("listener_hears")
        job = queue.insert(hyperparameters=REFUSED)
        queue.wait_for(job, "failed")
        with queue.connect() as app:
            app.execute("SELECT retry_training_job(%s)", (job,))
        daemon.wait_for_log("job_claimed", count=2, seconds=SLOW_POLL / 6)
    assert queue.story(job).count("claimed") == 2 and max(waits(queue)) < 2


def test_a_sleeping_daemon_sets_its_clock_to_the_next_scheduled_job(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, poll_seconds=SLOW_POLL) as daemon:
        daemon.wait_for_log("listener_hears")
        job = queue.insert(hyperparameters=REFUSED, run_after_seconds=2)
        queue.wait_for(job, "failed", seconds=SLOW_POLL / 6)
    # The two seconds run from before the insert; a machine under load is late, a slow poll would be later.
    assert 1.5 <= waits(queue)[0] < SLOW_POLL / 4


def test_a_scheduled_job_that_is_moved_to_now_wakes_a_sleeping_daemon(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, poll_seconds=SLOW_POLL) as daemon, queue.connect() as app:
        daemon.wait_for_log("listener_hears")
        for change in ("run_after = now()", "run_after = NULL"):
            job = queue.insert(hyperparameters=REFUSED, run_after_seconds=3600)
            # The job before it went: the daemon has looked at this one as well, and sleeps.
            queue.wait_for(queue.insert(hyperparameters=REFUSED), "failed")
            app.execute(f"UPDATE training_jobs SET {change} WHERE id = %s".encode(), (job,))
            queue.wait_for(job, "failed", seconds=SLOW_POLL / 2)


def test_a_capped_users_next_job_wakes_the_idle_host_when_another_host_frees_his_slot(
    queue: Queue, tmp_path: Path
) -> None:
    with (
        queue.daemon(tmp_path, name="first", poll_seconds=SLOW_POLL, user_cap=1) as first,
        queue.daemon(tmp_path, name="second", poll_seconds=SLOW_POLL, user_cap=1) as second,
    ):
        first.wait_for_log("listener_hears")
        second.wait_for_log("listener_hears")
        running = queue.insert(script=[["steps", 400, 0.05, str(tmp_path / "never")]])
        queue.wait_for(running, "running")
        holder, idle = (first, second) if first.logged("job_claimed") else (second, first)
        # Drained, the holder itself will not take the next one.
        holder.signal(signal.SIGUSR1)
        holder.wait_for_log("worker_draining")
        waiting = queue.insert(hyperparameters=REFUSED)
        # Somebody else's job is taken by the idle host, which has thus passed over the capped user's.
        stranger = uuid4()
        queue.select("INSERT INTO auth.users (id, email) VALUES (%s, %s)", stranger, f"{stranger}@example.test")
        queue.wait_for(queue.insert(hyperparameters=REFUSED, user_id=stranger), "failed")
        assert queue.row(waiting)["status"] == "queued"
        queue.cancel_as_owner(running)
        queue.wait_for(waiting, "failed", seconds=SLOW_POLL / 2)
        assert idle.logged("job_claimed", job_id=str(waiting))


def test_a_job_longer_than_many_leases_is_never_rescued_by_age(queue: Queue, tmp_path: Path) -> None:
    with (
        queue.daemon(tmp_path, name="first", lease_seconds=1) as first,
        queue.daemon(tmp_path, name="second", lease_seconds=1) as second,
    ):
        gate = tmp_path / "gate"
        job = queue.insert(script=[["steps", 100, 0.05, str(gate)]])
        queue.wait_for(job, "running")
        begun = queue.leases()[0]["claimed_at"]
        # Three leases long, by the database's clock.
        eventually(lambda: (queue.leases()[0]["heartbeat_at"] - begun).total_seconds() > 3)
        gate.touch()
        row = queue.wait_for(job, "completed")
        assert not first.logged("job_reaped") and not second.logged("job_reaped")
    assert row["attempt"] == 1 and queue.story(job).count("claimed") == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1])
def test_the_heartbeat_goes_on_during_the_drain(queue: Queue, tmp_path: Path, how: signal.Signals) -> None:
    with (
        queue.daemon(tmp_path, name="draining", lease_seconds=1.5, drain_seconds=4) as draining,
        queue.daemon(tmp_path, name="waiting", lease_seconds=1.5, drain_seconds=4) as waiting,
    ):
        gate = tmp_path / "gate"
        job = queue.insert(script=[["ignore_term"], ["steps", 160, 0.05, str(gate)]])
        queue.wait_for(job, "running")
        holder, other = (draining, waiting) if draining.logged("job_claimed") else (waiting, draining)
        child = holder.children()[0]
        holder.signal(how)
        holder.wait_for_log("worker_draining")
        begun = queue.leases()[0]

        def outlived_a_lease() -> bool:
            lease = queue.leases()
            return bool(lease) and lease[0]["heartbeat_at"] > begun["expires_at"] and lease[0]["epoch"] == 1

        # Longer than a lease after the signal the child still ends, and its lease still lives.
        eventually(outlived_a_lease, seconds=5)
        assert alive(child) and not other.logged("job_claimed") and not other.logged("job_reaped")
        if how is signal.SIGUSR1:  # on SIGTERM it is killed at the drain's end
            gate.touch()
        assert holder.wait() == 0
        gate.touch()
        row = queue.wait_for(job, "completed", seconds=30)
    story = queue.story(job)
    assert "reaped" not in story and row["attempt"] == 1
    assert ("released" in story) == (how is signal.SIGTERM)


# -- writes of an owner whose lease has passed -------------------------------------------------------------------

COMPLETED = Completed("lora-models/adapters/stale.tar.gz", "0" * 64, 1)
FAILED = Failed(ErrorCode.INTERNAL, "stale")
RETURNED = Returned("work folder", ErrorCode.DISK_FULL, "stale")
POINT = MetricPoint(step=1, epoch=0, training_loss=9.0, learning_rate=1.0)
PROGRESS: dict[str, Any] = {
    "stage": "stale", "progress": 99.0, "epoch": 9, "step": 9, "metrics": {}, "current_cost": 9.0, "seconds_left": 9.0,
}  # fmt: skip


async def _settle_cancelled(store: SqlJobStore, lease: Lease) -> None:
    if not await store.database.fetch(statement("settle_cancelled_job"), vars(lease) | {"cost": 9.0}):
        raise LeaseLost("no row")


# Every statement that names an epoch, as its owner says it. A new one without a line here fails the test below.
STALE_WRITES: dict[str, Callable[[SqlJobStore, Lease], Awaitable[object]]] = {
    "start_job": lambda store, lease: store.start_job(lease),
    "record_plan": lambda store, lease: store.record_plan(
        lease, total_steps=9, total_epochs=9, estimated_total_cost=9.0, trained_with={"base_model": "other"}
    ),
    "record_progress": lambda store, lease: store.record_progress(lease, **PROGRESS),
    "record_metrics": lambda store, lease: store.record_metrics(lease, [POINT]),
    "forget_metrics": lambda store, lease: store.forget_metrics(lease, 0),
    "record_event": lambda store, lease: store.record_event(lease, "stale", "stale", {}),
    "record_upload": lambda store, lease: SqlUploadLog(store.database).record_upload(
        lease, "adapter", Location("s", "lora-models"), ["stale"]
    ),
    "finish_checkpoint_upload": lambda store, lease: SqlUploadLog(store.database).finish_checkpoint_upload(
        lease, 1, manifest_sha256="stale", size=1
    ),
    "renew_lease": lambda store, lease: store.renew_lease(lease, 600.0),
    "complete_job": lambda store, lease: store.complete_job(lease, COMPLETED, cost=9.0),
    "fail_job": lambda store, lease: store.fail_job(lease, FAILED, cost=9.0),
    "retry_job": lambda store, lease: store.retry_job(lease, FAILED, delay_seconds=0.0, cost=9.0),
    "release_job": lambda store, lease: store.release_job(lease, "stale", cost=9.0),
    "return_job": lambda store, lease: store.return_job(lease, RETURNED, cost=9.0),
    "end_cancelled_job": lambda store, lease: store.end_cancelled_job(lease, cost=9.0, data={}),
    # Asked only after an ending found its own lease; here as it is, since no method says it alone.
    "settle_cancelled_job": _settle_cancelled,
}
READS = {"read_job_state"}


async def claim(store: SqlJobStore, *, lease_seconds: float = 60.0) -> Lease:
    """Take the next job as some host would."""
    found = await store.claim_job(uuid4(), Limits(), lease_seconds=lease_seconds)
    assert found.job is not None
    return found.job.lease


def everything(queue: Queue) -> list[dict[str, Any]]:
    """All that a stale write could touch."""
    with queue.connect() as connection:
        return [
            row
            for table in (
                "training_jobs",
                "training_leases",
                "metrics_points",
                "training_events",
                "training_callbacks",
                "training_uploads",
            )
            for row in connection.execute(f"SELECT to_jsonb(t) AS row FROM {table} AS t ORDER BY 1").fetchall()
        ]


def test_every_statement_that_names_an_epoch_is_tried_by_a_stale_owner() -> None:
    fenced = {
        file.stem
        for file in (ROOT / "sql" / "queries").glob("*/[!_]*.sql")
        if re.search(r"%\(epoch\)s", statement(file.stem))
    }
    assert fenced - READS == set(STALE_WRITES)


@pytest.mark.parametrize("now", ["claimed by an heir", "queued again", "cancelled", "completed by an heir"])
@pytest.mark.parametrize("write", STALE_WRITES)
async def test_a_stale_owner_changes_nothing(queue: Queue, write: str, now: str) -> None:
    queue.insert(callback_url="https://example.test/hook")
    async with Database(queue.dsn, application_name="heir and stale owner") as database:
        store = SqlJobStore(database)
        stale = await reaped_lease(store)
        if now != "queued again":
            heir = await claim(store)
            assert heir.epoch == stale.epoch + 1
            await store.start_job(heir)
            await store.record_metrics(heir, [MetricPoint(step=5, epoch=0, training_loss=1.0, learning_rate=1.0)])
            if now == "cancelled":
                queue.cancel_as_owner(heir.job_id)
            elif now == "completed by an heir":
                await store.complete_job(heir, COMPLETED, cost=1.0)
        before = everything(queue)
        if now == "queued again" and write in {"retry_job", "release_job", "return_job"}:
            # Where it wanted the job the job already is, under its own epoch: a lost answer looks the same.
            assert await STALE_WRITES[write](store, stale) == Ending(True, State.QUEUED, noted=False)
        else:
            with pytest.raises(LeaseLost):
                await STALE_WRITES[write](store, stale)
        assert everything(queue) == before


async def reaped_lease(store: SqlJobStore) -> Lease:
    """A lease that was held, ran out and was reaped."""
    stale = await claim(store, lease_seconds=0.001)
    await asyncio.sleep(0.01)
    assert [reaped.job_id for reaped in await store.reap_expired_leases()] == [stale.job_id]
    return stale


async def test_a_job_is_never_both_finished_and_failed(queue: Queue) -> None:
    """Everything that can end a job says so at the same moment, each on a connection of its own."""
    order = random.Random(20261122)
    jobs = [queue.insert(max_attempts=1) for _ in range(40)]
    async with (
        Database(queue.dsn, application_name="one") as first,
        Database(queue.dsn, application_name="two") as second,
        Database(queue.dsn, application_name="three") as third,
    ):
        for _ in jobs:
            lease = await claim(SqlJobStore(first), lease_seconds=0.002)
            endings = [
                SqlJobStore(first).complete_job(lease, COMPLETED, cost=1.0),
                SqlJobStore(second).fail_job(lease, FAILED, cost=1.0),
                SqlJobStore(third).reap_expired_leases(),
                asyncio.to_thread(cancel_if_unfinished, queue, lease.job_id),
            ]
            order.shuffle(endings)
            for answer in await asyncio.gather(*endings, return_exceptions=True):
                assert not isinstance(answer, BaseException) or isinstance(answer, LeaseLost), answer
    ends = []
    for job in jobs:
        told = [kind for kind in queue.story(job) if kind in FINAL]
        assert len(told) == 1 and queue.row(job)["status"] == told[0]
        ends += told
    assert len(set(ends)) > 1, f"one ending always came first, nothing raced: {ends}"


# How the child ends, and where its job then stands if nobody cancelled it.
ENDS: dict[str, list[list[object]]] = {
    "completed": [],
    "failed": [["say", "failed", {"code": "internal", "message": "It ends here.", "transient": False}], ["exit", 1]],
}


def test_a_cancel_at_the_moment_of_the_childs_end_leaves_one_ending_and_says_which(
    queue: Queue, tmp_path: Path
) -> None:
    slots, rounds = 4, 10
    raced: list[tuple[UUID, bool]] = []

    def race(lane: int) -> None:
        """Job after job in its own slot, each cancelled about when its child ends."""
        order = random.Random(20261122 + lane)
        late = 0.1  # seconds from the moment at which the child may end to the cancel
        for number in range(rounds):
            gate = tmp_path / f"gate-{lane}-{number}"
            last = ENDS[order.choice(list(ENDS)) if number > 1 else list(ENDS)[lane % len(ENDS)]]
            job = queue.insert(script=[["steps", 4, 0.0, str(gate)], *last], max_attempts=1)
            eventually(lambda job=job: queue.row(job)["status"] == "running")
            # No machine may be so slow or so quick that one side wins each race: the first two are decided.
            if number == 0:
                gate.touch()
                daemon.wait_for_log("attempt_settled", job_id=str(job))
                accepted = cancel_was_accepted(queue, job)
            elif number == 1:
                accepted = cancel_was_accepted(queue, job)
                gate.touch()
            else:
                opening = Timer(max(-late, 0.0), gate.touch)
                opening.start()
                time.sleep(max(late, 0.0))
                accepted = cancel_was_accepted(queue, job)
                opening.join()
                # Whoever was second this time gets a start.
                late += order.uniform(0.0, 0.06) * (1 if accepted else -1)
            raced.append((job, accepted))
            daemon.wait_for_log("attempt_settled", job_id=str(job))

    with queue.daemon(tmp_path, slots=slots, poll_seconds=SLOW_POLL, cost_per_gpu_hour=3600) as daemon:
        daemon.wait_for_log("listener_hears")
        with ThreadPoolExecutor(slots) as lanes:
            for lane in [lanes.submit(race, lane) for lane in range(slots)]:
                lane.result()
        assert queue.leases() == []
        eventually(lambda: not queue.select("SELECT FROM training_uploads"))
    assert len(raced) == slots * rounds
    for job, accepted in raced:
        row, told = queue.row(job), [kind for kind in queue.story(job) if kind in FINAL]
        # Who cancelled was told the truth, and what he was told holds.
        assert told == [row["status"]] and (row["status"] == "cancelled") == accepted, (row, queue.story(job))
        # At a dollar a second: what the child took is paid for, whoever ended it.
        took = logged_at(daemon, job, "trainer_waits", "trainer_ended") - logged_at(daemon, job, "job_claimed")
        assert row["final_cost"] == row["current_cost"] and float(row["final_cost"]) > took - 0.1
        stored = list((tmp_path / "storage" / "lora-models" / "adapters").glob(f"{job}*"))
        assert (row["adapter_path"] is not None) == bool(stored) == (row["status"] == "completed")
    ends = {queue.row(job)["status"] for job, _accepted in raced}
    assert ends == set(FINAL)


def logged_at(daemon: DaemonProcess, job: UUID, *events: str) -> float:
    lines = [line for line in daemon.log() if line.get("job_id") == str(job) and line["event"] in events]
    return datetime.fromisoformat(lines[-1]["timestamp"]).timestamp()


def cancel_was_accepted(queue: Queue, job: UUID) -> bool:
    try:
        queue.cancel_as_owner(job)
    except psycopg.Error as error:
        assert error.sqlstate == "PT409", error
        return False
    return True


def cancel_if_unfinished(queue: Queue, job: UUID) -> None:
    with queue.connect() as app:
        app.execute(
            "UPDATE training_jobs SET status = 'cancelled' WHERE id = %s AND status IN ('queued', 'initializing')",
            (job,),
        )
