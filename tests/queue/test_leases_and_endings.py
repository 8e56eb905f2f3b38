"""Fencing, heartbeats, reaping and endings: a stale owner writes nothing, and every race has one winner."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import pytest

from daemon.database.connection import Database
from daemon.errors import LeaseLost
from daemon.queue.job import Lease, Returned
from daemon.queue.outcome import Completed, Failed
from daemon.queue.rows import Ending, MetricPoint, Reaped
from daemon.queue.sql_job_store import MAX_RETURNS, SqlJobStore
from daemon.queue.states import State
from tests.postgres import AppDatabase
from tests.queue.claiming import claim, claimed
from training.events import ErrorCode

DONE = Completed("lora-models/adapters/x.tar.gz", "ab" * 32, 1234, {"adapter_model": "adapters/x.tar.gz"}, {})
BACK = Returned("work folder", ErrorCode.DISK_FULL, "the host's disk is full", hint="nothing", stack="/data: full")
BROKEN = Failed(ErrorCode.INTERNAL, "it broke", hint="mend it", stack="Traceback", transient=True)


def expire(database: AppDatabase) -> None:
    database.run("UPDATE training_leases SET expires_at = clock_timestamp() - interval '1 ms'")


def cancel(database: AppDatabase, job_id: UUID) -> None:
    database.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job_id,))


@pytest.fixture
async def lease(store: SqlJobStore, database: AppDatabase, user: UUID) -> Lease:
    """The lease of a job that a host has just claimed."""
    database.insert_job(user)
    return (await claimed(store)).lease


def endings(store: SqlJobStore, lease: Lease, cost: float) -> dict[str, Callable[[], Awaitable[Ending]]]:
    """Each way in which a host can end an attempt."""
    return {
        "complete": lambda: store.complete_job(lease, DONE, cost=cost),
        "fail": lambda: store.fail_job(lease, BROKEN, cost=cost),
        "retry": lambda: store.retry_job(lease, BROKEN, delay_seconds=60, cost=cost),
        "release": lambda: store.release_job(lease, "x", cost=cost),
        "return": lambda: store.return_job(lease, BACK, cost=cost),
        "cancel": lambda: store.end_cancelled_job(lease, cost=cost, data={}),
    }


async def every_write(store: SqlJobStore, lease: Lease) -> dict[str, BaseException | None]:
    """What each fenced write says to this lease."""
    writes: dict[str, Any] = {
        "start": lambda: store.start_job(lease),
        "plan": lambda: store.record_plan(
            lease, total_steps=1, total_epochs=1, estimated_total_cost=None, trained_with={}
        ),
        "progress": lambda: progress(store, lease, 50),
        "metrics": lambda: store.record_metrics(lease, [MetricPoint(1, 0, 1.0, 1e-4)]),
        "no metrics": lambda: store.record_metrics(lease, []),
        "forget": lambda: store.forget_metrics(lease, 0),
        "event": lambda: store.record_event(lease, "notice", "x", {}),
        "renew": lambda: store.renew_lease(lease, 60),
        **endings(store, lease, 1),
    }
    said: dict[str, BaseException | None] = {}
    for name, write in writes.items():
        try:
            await write()
            said[name] = None
        except LeaseLost as lost:
            said[name] = lost
    return said


async def progress(store: SqlJobStore, lease: Lease, percent: float, **changes: Any) -> None:
    values: dict[str, Any] = {
        "stage": "training",
        "progress": percent,
        "epoch": 1,
        "step": 5,
        "metrics": {"training_loss": 1.5},
        "current_cost": 0.5,
        "seconds_left": 60.0,
    }
    await store.record_progress(lease, **(values | changes))


async def test_a_stale_owner_can_write_nothing_once_the_job_has_a_new_one(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    database.insert_job(user)
    stale = (await claimed(store)).lease
    expire(database)
    assert await store.reap_expired_leases() == [Reaped(stale.job_id, State.QUEUED)]
    current = (await claimed(store)).lease
    await store.start_job(current)
    before = database.job(stale.job_id), database.story(stale.job_id)
    said = await every_write(store, stale)
    assert all(isinstance(answer, LeaseLost) for answer in said.values()), said
    assert (database.job(stale.job_id), database.story(stale.job_id)) == before
    assert database.run("SELECT FROM metrics_points") == []
    assert current.epoch == stale.epoch + 1
    await store.renew_lease(current, 60)


async def test_a_reaped_owner_can_write_nothing_to_the_waiting_job(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    database.insert_job(user)
    stale = (await claimed(store)).lease
    expire(database)
    await store.reap_expired_leases()
    before = database.job(stale.job_id)
    said = await every_write(store, stale)
    # A retry or a release finds what it asked for: the job waits. Nothing is written.
    assert {name for name, answer in said.items() if answer is None} == {"retry", "release", "return"}
    assert database.job(stale.job_id) == before


async def test_an_expired_lease_that_nobody_reaped_may_be_renewed(
    store: SqlJobStore, database: AppDatabase, lease: Lease
) -> None:
    expire(database)
    assert await store.renew_lease(lease, 60) is State.INITIALIZING
    assert await store.reap_expired_leases() == []


async def test_reaping_without_an_attempt_left_fails_and_says_so(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user, max_attempts=2)
    for state in (State.QUEUED, State.FAILED):
        await claimed(store)
        expire(database)
        assert await store.reap_expired_leases() == [Reaped(job_id, state)]
    row = database.job(job_id)
    assert row["error_code"] == "worker_lost" and "attempt 2 of 2" in row["error_message"]
    assert "batch_size" in row["error_hint"] and row["completed_at"] is not None
    assert database.story(job_id) == ["queued", "claimed", "reaped", "claimed", "failed"]


async def test_a_job_that_takes_its_hosts_down_waits_longer_each_time(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user, max_attempts=4)
    waits = []
    for _ in range(3):
        await claimed(store)
        expire(database)
        await store.reap_expired_leases()
        waits.append(await store.next_due_in())
        database.run("SET session_replication_role = replica")
        database.run("UPDATE training_jobs SET due = true, run_after = NULL WHERE id = %s", (job_id,))
        database.run("SET session_replication_role = origin")
    assert waits[0] is None and 14 < (waits[1] or 0) <= 15 and 29 < (waits[2] or 0) <= 30


async def test_a_job_that_the_app_keeps_locked_holds_up_the_reaping_of_no_other(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    for _ in range(3):
        database.insert_job(user)
        await claimed(store)
    expire(database)
    locked = database.run("SELECT job_id FROM training_leases ORDER BY expires_at")[0]["job_id"]
    with database.connect() as app, app.transaction():
        app.execute("UPDATE training_jobs SET max_cost = 5 WHERE id = %s", (locked,))
        async with asyncio.timeout(10):
            reaped = await store.reap_expired_leases()
        assert len(reaped) == 2 and locked not in {one.job_id for one in reaped}
    assert await store.reap_expired_leases() == [Reaped(locked, State.QUEUED)]


async def test_start_said_twice_holds(store: SqlJobStore, database: AppDatabase, lease: Lease) -> None:
    await store.start_job(lease)
    await store.start_job(lease)
    assert database.job(lease.job_id)["status"] == "running"
    assert database.story(lease.job_id) == ["queued", "claimed", "started"]


async def test_progress_never_falls_within_an_attempt_and_begins_anew_with_the_next(
    store: SqlJobStore, database: AppDatabase, lease: Lease
) -> None:
    for percent, shown in ((10, 10), (60, 60), (30, 60), (math.nan, 60), (1e9, 60), (-5, 60)):
        await progress(store, lease, percent)
        assert database.job(lease.job_id)["progress"] == shown
    await store.release_job(lease, "shutdown", cost=None)
    await claimed(store)
    assert database.job(lease.job_id)["progress"] == 0


async def test_a_completion_keeps_everything_and_ends_the_lease(
    store: SqlJobStore, database: AppDatabase, lease: Lease
) -> None:
    await store.start_job(lease)
    assert await store.complete_job(lease, DONE, cost=3.456) == Ending(True, State.COMPLETED, False)
    row = database.job(lease.job_id)
    assert (row["status"], row["progress"], float(row["final_cost"])) == ("completed", 100, 3.46)
    assert (row["adapter_path"], row["adapter_sha256"], row["adapter_bytes"]) == (DONE.adapter_path, "ab" * 32, 1234)
    assert row["completed_at"] is not None and database.run("SELECT FROM training_leases") == []


@pytest.mark.parametrize("ending", ["complete", "fail", "retry", "release", "return", "cancel"])
async def test_an_ending_whose_answer_was_lost_recognises_its_own_work(
    store: SqlJobStore, database: AppDatabase, lease: Lease, ending: str
) -> None:
    if ending == "cancel":
        cancel(database, lease.job_id)
    end = endings(store, lease, 1)
    first = await end[ending]()
    row, story = database.job(lease.job_id), database.story(lease.job_id)
    assert first.moved and await end[ending]() == first
    assert (database.job(lease.job_id), database.story(lease.job_id)) == (row, story)


async def test_a_job_cannot_be_both_finished_and_failed(
    store: SqlJobStore, database: AppDatabase, lease: Lease
) -> None:
    await store.complete_job(lease, DONE, cost=1)
    with pytest.raises(LeaseLost):
        await store.fail_job(lease, BROKEN, cost=1)
    assert database.job(lease.job_id)["status"] == "completed"


@pytest.mark.parametrize("ending", ["complete", "fail", "retry", "release", "return"])
async def test_every_ending_yields_to_a_cancel_and_records_the_true_cost(
    store: SqlJobStore, database: AppDatabase, lease: Lease, ending: str
) -> None:
    cancel(database, lease.job_id)
    assert await store.renew_lease(lease, 60) is State.CANCELLED
    with pytest.raises(LeaseLost):
        await progress(store, lease, 10)
    assert await endings(store, lease, 7.5)[ending]() == Ending(False, State.CANCELLED, False)
    row = database.job(lease.job_id)
    assert (row["status"], float(row["final_cost"]), row["adapter_path"]) == ("cancelled", 7.5, None)
    assert database.run("SELECT FROM training_leases") == []


async def test_a_cancelled_job_keeps_its_lease_until_its_child_is_gone(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user)
    database.insert_job(user)
    lease = (await claimed(store, user_cap=1)).lease
    cancel(database, job_id)
    assert (await claim(store, user_cap=1)).job is None
    await store.record_event(lease, "checkpoint_saved", "step 5", {"step": 5})
    assert await store.end_cancelled_job(lease, cost=2, data={"checkpoint": 5}) == Ending(True, State.CANCELLED, False)
    assert (await claim(store, user_cap=1)).job is not None
    assert database.story(job_id) == ["queued", "claimed", "cancelled", "checkpoint_saved", "stopped"]
    assert float(database.job(job_id)["final_cost"]) == 2


async def test_a_job_that_nobody_cancelled_is_given_back_and_never_left_running_without_a_lease(
    store: SqlJobStore, database: AppDatabase, lease: Lease
) -> None:
    await store.start_job(lease)
    # As after a cancel of the waiting job whose word comes late: it was submitted again and claimed meanwhile.
    ending = await store.end_cancelled_job(lease, cost=1, data={})
    row = database.job(lease.job_id)
    assert (ending.state, row["status"], row["attempt"], row["due"]) == (State.QUEUED, "queued", 0, True)
    assert row["final_cost"] is None and database.run("SELECT FROM training_leases") == []
    assert (await claimed(store)).id == lease.job_id


async def test_a_retry_waits_and_the_last_one_fails(store: SqlJobStore, database: AppDatabase, user: UUID) -> None:
    job_id = database.insert_job(user, max_attempts=2)
    lease = (await claimed(store)).lease
    assert await store.retry_job(lease, BROKEN, delay_seconds=0.05, cost=1) == Ending(True, State.QUEUED, False)
    row = database.job(job_id)
    assert not row["due"] and row["attempt"] == 1 and row["completed_at"] is None
    # What happened and what to do: the app's page shows this column alone.
    assert row["error_message"] == "It broke. Mend it."
    assert (await claim(store)).job is None
    database.run("SELECT pg_sleep(0.06)")
    assert await store.promote_due_jobs() == 1
    job = await claimed(store)
    assert (job.attempt, job.lease_epoch, job.spent) == (2, 2, 1.0)
    assert database.job(job_id)["error_message"] is None and database.job(job_id)["retry_count"] == 1
    assert await store.retry_job(job.lease, BROKEN, delay_seconds=0, cost=2) == Ending(True, State.FAILED, False)
    row = database.job(job_id)
    assert (row["status"], row["error_code"], row["error_hint"]) == ("failed", "internal", "Mend it.")
    assert row["run_after"] is None and row["completed_at"] is not None


async def test_a_release_costs_no_attempt_but_its_epoch_never_goes_back(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user)
    for epoch in (1, 2, 3, 4, 5):
        job = await claimed(store)
        assert (job.attempt, job.lease_epoch) == (1, epoch)
        assert await store.release_job(job.lease, "the host shuts down", cost=None) == Ending(True, State.QUEUED, False)
    row = database.one("SELECT message FROM training_events WHERE job_id = %s AND kind = 'notice' LIMIT 1", (job_id,))
    assert row["message"] == "The host shuts down."


async def test_a_job_that_hosts_give_back_loses_no_attempt_until_ten_have_and_then_comes_to_an_end(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user, max_attempts=2)
    waits = []
    for _ in range(MAX_RETURNS):
        job = await claimed(store)
        assert job.attempt == 1
        assert await store.return_job(job.lease, BACK, cost=None) == Ending(True, State.QUEUED, False)
        row = database.job(job_id)
        assert (row["error_code"], row["attempt"]) == (None, 0)
        waits.append(
            database.one(
                "SELECT extract(epoch FROM run_after - clock_timestamp()) AS s FROM training_jobs WHERE id = %s",
                (job_id,),
            )["s"]
        )
        database.run("UPDATE training_jobs SET run_after = clock_timestamp() WHERE id = %s", (job_id,))
        await store.promote_due_jobs()
    # At once the first time, since another host may be free; then later each time, at most five minutes.
    assert waits[0] is None and 4 < waits[1] <= 5 and 9 < waits[2] <= 10 and 290 < waits[-1] <= 300
    for attempt, state in ((1, State.QUEUED), (2, State.FAILED)):
        job = await claimed(store)
        assert job.attempt == attempt
        assert await store.return_job(job.lease, BACK, cost=3) == Ending(True, state, False)
        database.run(
            "UPDATE training_jobs SET run_after = clock_timestamp() WHERE id = %s AND run_after > now()", (job_id,)
        )
        await store.promote_due_jobs()
    row = database.job(job_id)
    assert (row["status"], row["error_code"], row["error_message"]) == (
        "failed",
        "disk_full",
        "The host's disk is full. Nothing.",
    )
    counted = database.run("SELECT data ->> 'counted' AS c FROM training_events WHERE kind = 'returned' ORDER BY id")
    assert [each["c"] for each in counted] == ["false"] * MAX_RETURNS + ["true"] * 2

    # Submitted again it begins anew, with all its returns.
    database.run("SELECT retry_training_job(%s)", (job_id,))
    job = await claimed(store)
    await store.return_job(job.lease, BACK, cost=None)
    assert database.job(job_id)["attempt"] == 0


async def test_a_stale_progress_write_that_waited_for_the_row_does_not_land_on_the_next_owner(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    """Trap 8 of the prototype: the write began before the reap and waits on the row's lock through it."""

    job_id = database.insert_job(user)
    stale = (await claimed(store)).lease
    expire(database)
    async with Database(database.dsn, application_name="stale") as other:
        await other.fetch("SELECT 1")
        with database.connect() as reaper:
            with reaper.transaction():
                reaper.execute("SELECT * FROM reap_expired_leases()")
                writes = [
                    asyncio.ensure_future(progress(SqlJobStore(other), stale, 77)),
                    asyncio.ensure_future(store.record_event(stale, "notice", "late", {})),
                ]
                await waiting_on_a_lock(database, 2)
            answers = await asyncio.gather(*writes, return_exceptions=True)
    assert all(isinstance(answer, LeaseLost) for answer in answers), answers
    assert database.job(job_id)["progress"] == 0 and "notice" not in database.story(job_id)


async def test_a_heartbeat_that_came_first_saves_the_lease_from_the_reaper(
    store: SqlJobStore, database: AppDatabase, lease: Lease
) -> None:
    expire(database)
    with database.connect() as heart, heart.transaction():
        heart.execute("UPDATE training_leases SET expires_at = clock_timestamp() + interval '60 s'")
        assert await store.reap_expired_leases() == []
    assert await store.reap_expired_leases() == []
    assert await store.renew_lease(lease, 60) is State.INITIALIZING


async def test_a_completion_and_a_cancel_at_once_have_one_winner(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:

    for winner in ("cancel", "complete") * 3:
        job_id = database.insert_job(user)
        lease = (await claimed(store)).lease
        with database.connect() as app, app.transaction():
            if winner == "cancel":
                app.execute("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job_id,))
                ending = asyncio.ensure_future(store.complete_job(lease, DONE, cost=1))
                await waiting_on_a_lock(database, 1)
            else:
                assert (await store.complete_job(lease, DONE, cost=1)).moved
        if winner == "cancel":
            assert await ending == Ending(False, State.CANCELLED, False)
        assert database.job(job_id)["status"] == {"cancel": "cancelled", "complete": "completed"}[winner]
        assert database.run("SELECT FROM training_leases WHERE job_id = %s", (job_id,)) == []


async def waiting_on_a_lock(database: AppDatabase, sessions: int) -> None:
    """Return when so many sessions of this database wait for a lock."""

    async with asyncio.timeout(10):
        while True:
            row = database.one(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            if row["count"] >= sessions:
                return
            await asyncio.sleep(0.01)


# Numbers, text and JSON that Postgres or the app's columns refuse.


async def test_numbers_that_no_column_holds_never_break_the_stream(
    store: SqlJobStore, database: AppDatabase, lease: Lease
) -> None:
    for _ in range(2):  # told once, not at each batch
        await store.record_metrics(
            lease,
            [
                MetricPoint(1, 0, 1e12, 1e-4, gradient_norm=1e30, throughput=0),
                MetricPoint(2, 0, math.nan, 1e-4),
                MetricPoint(3, 0, math.inf, 5.0, validation_loss=math.nan, throughput=math.inf, gpu_utilization=1e9),
                MetricPoint(4, 0, -1e12, 2e-4, gradient_norm=9999.9999999),
                MetricPoint(5, 2**40, 1.25, math.nan),
                MetricPoint(6, 0, 1.25, 2e-4, 1.5, 9999.999999, 99999999.99, 99.5),
            ],
        )
    points = database.run("SELECT * FROM metrics_points ORDER BY step")
    assert [point["step"] for point in points] == [1, 3, 4, 6]
    assert float(points[0]["training_loss"]) == 9999.999999 and points[0]["gradient_norm"] is None
    assert points[0]["throughput"] == 0
    assert (points[1]["validation_loss"], points[1]["throughput"], points[1]["gpu_utilization"]) == (None, None, None)
    assert float(points[2]["training_loss"]) == -9999.999999 and points[2]["gradient_norm"] is None
    assert float(points[3]["gradient_norm"]) == 9999.999999 and float(points[3]["throughput"]) == 99999999.99
    notices = database.run("SELECT data FROM training_events WHERE kind = 'notice' AND job_id = %s", (lease.job_id,))
    assert len(notices) == 1 and set(notices[0]["data"]) == {
        "training_loss", "learning_rate", "gradient_norm", "validation_loss", "throughput", "gpu_utilization"
    }  # fmt: skip
    await progress(
        store, lease, 10, epoch=2**40, step=-1, current_cost=1e30, seconds_left=math.inf,
        metrics={"training_loss": math.nan, "deep": [{"x": math.inf}], "text": "a\x00\ud800"},
    )  # fmt: skip
    row = database.job(lease.job_id)
    assert row["current_metrics"] == {"training_loss": None, "deep": [{"x": None}], "text": "a\ufffd?"}
    assert row["estimated_completion_at"] is None and row["current_cost"] == 0
    await store.record_plan(lease, total_steps=2**40, total_epochs=3, estimated_total_cost=math.nan, trained_with={})
    assert float(database.job(lease.job_id)["estimated_total_cost"]) == 7.5


async def test_steps_repeated_after_a_resume_replace_their_points(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    database.insert_job(user)
    first = (await claimed(store)).lease
    await store.record_metrics(first, [MetricPoint(step, 0, 2.0, 1e-4) for step in range(1, 9)])
    await store.release_job(first, "x", cost=None)
    second = (await claimed(store)).lease
    await store.forget_metrics(second, 5)
    await store.record_metrics(second, [MetricPoint(step, 0, 1.0, 1e-4) for step in range(5, 8)])
    losses = {row["step"]: float(row["training_loss"]) for row in database.run("SELECT * FROM metrics_points")}
    assert losses == {1: 2, 2: 2, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1}


async def test_more_points_than_are_wanted_are_thinned_evenly_and_the_telling_ones_stay(
    store: SqlJobStore, database: AppDatabase, lease: Lease
) -> None:
    points = [MetricPoint(n, 0, 2.0, 1e-4, validation_loss=1.0 if n % 300 == 0 else None) for n in range(1, 1000)]
    await store.record_metrics(lease, points)
    assert await store.forget_metrics(lease, None, most=1000) == 999
    remaining = await store.forget_metrics(lease, 900, most=100)
    steps = [row["step"] for row in database.run("SELECT step FROM metrics_points ORDER BY step")]
    assert remaining == len(steps) and 50 <= len(steps) <= 56
    assert {1, 300, 600, 900} <= set(steps) and max(steps) == 900
    assert max(later - earlier for earlier, later in pairwise(steps)) <= 20
    # Every point has a validation loss: then they are thinned like others.
    for step in steps:
        database.run("UPDATE metrics_points SET validation_loss = 1 WHERE step = %s", (step,))
    assert await store.forget_metrics(lease, None, most=20) <= 20


USED = {"base_model": "acme/default", "model_revision": "abc"}


async def use(store: SqlJobStore, lease: Lease, *, started: bool, model: str = "acme/default") -> None:
    """What an attempt writes until its first step is done."""
    used = USED | {"base_model": model}
    await store.record_plan(lease, total_steps=9, total_epochs=1, estimated_total_cost=None, trained_with=used)
    if started:
        await store.start_job(lease)


async def bound_to(database: AppDatabase, job_id: UUID) -> tuple[str | None, bool]:
    row = database.job(job_id)
    assert row["status"] == "queued"
    return row["base_model"], row["trained_with"] is not None


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("back", ["release", "return", "retry", "reap"])
async def test_a_job_that_names_no_model_keeps_to_a_default_only_from_its_first_step_on(
    store: SqlJobStore, database: AppDatabase, user: UUID, back: str, started: bool
) -> None:
    job_id = database.insert_job(user, hyperparameters={})

    async def go_back(lease: Lease) -> None:
        match back:
            case "release":
                await store.release_job(lease, "x", cost=None)
            case "return":
                await store.return_job(lease, BACK, cost=None)
            case "retry":
                await store.retry_job(lease, BROKEN, delay_seconds=0, cost=None)
            case "reap":
                expire(database)
                assert await store.reap_expired_leases()

    job = await claimed(store)
    assert job.base_model is None
    await use(store, job.lease, started=started)
    assert database.job(job_id)["base_model"] == "acme/default"
    await go_back(job.lease)
    assert await bound_to(database, job_id) == (("acme/default", True) if started else (None, False))
    # An attempt that ends before a step of its own keeps what an earlier one has trained, and nothing else.
    await store.promote_due_jobs()
    again = await claimed(store)
    assert again.base_model == ("acme/default" if started else None)
    await use(store, again.lease, started=False, model="acme/default" if started else "acme/another")
    await go_back(again.lease)
    assert await bound_to(database, job_id) == (("acme/default", True) if started else (None, False))


async def test_a_job_that_was_begun_is_claimed_by_hosts_that_may_load_its_model_only(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    database.insert_job(user, hyperparameters={})
    lease = (await claimed(store)).lease
    await use(store, lease, started=True)
    await store.release_job(lease, "x", cost=None)
    assert (await claim(store, models=["acme/another"])).job is None
    assert (await claim(store, models=["acme/default"])).job is not None


async def test_a_person_who_tries_again_or_changes_the_spec_gets_the_default_of_the_day(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user, hyperparameters={})
    lease = (await claimed(store)).lease
    await use(store, lease, started=True)
    await store.fail_job(lease, BROKEN, cost=None)
    row = database.job(job_id)
    assert (row["base_model"], row["trained_with"]["model_revision"]) == ("acme/default", "abc"), "what it was is kept"
    database.run("SELECT retry_training_job(%s)", (job_id,))
    assert await bound_to(database, job_id) == (None, False)

    lease = (await claimed(store)).lease
    await use(store, lease, started=True)
    await store.release_job(lease, "x", cost=None)
    database.run("UPDATE training_jobs SET priority = 5 WHERE id = %s", (job_id,))
    assert await bound_to(database, job_id) == ("acme/default", True), "no other run"
    database.run("UPDATE training_jobs SET hyperparameters = '{\"lora_rank\": 8}' WHERE id = %s", (job_id,))
    assert await bound_to(database, job_id) == (None, False)
    database.run('UPDATE training_jobs SET hyperparameters = \'{"base_model": "a/b"}\' WHERE id = %s', (job_id,))
    assert await bound_to(database, job_id) == ("a/b", False)


async def test_a_failure_with_bytes_that_postgres_refuses_is_still_recorded(
    store: SqlJobStore, database: AppDatabase, lease: Lease
) -> None:
    await store.record_event(lease, "notice\x00", "NUL \x00 and \ud83d alone", {"k\x00": ["\x00", {1: math.nan}]})
    failed = Failed(ErrorCode.INTERNAL, "bad \x00 \udfff", "hint\x00", "x" * 1_000_000 + "the end")
    assert (await store.fail_job(lease, failed, cost=math.nan)).state is State.FAILED
    row = database.job(lease.job_id)
    assert row["error_message"] == "Bad \ufffd ?. hint\ufffd." and row["error_stack"].endswith("the end")
    assert len(row["error_stack"]) == 60_000


async def test_a_claim_whose_answer_was_lost_goes_back_at_once_and_costs_no_attempt(
    database: AppDatabase, store: SqlJobStore
) -> None:
    worker = uuid4()
    known = await claimed_by(database, store, worker)
    unknown = await claimed_by(database, store, worker)
    elsewhere = await claimed_by(database, store, uuid4())
    assert await store.return_unanswered_claims(worker, [known]) == 1
    row = database.job(unknown)
    assert (row["status"], row["attempt"], row["due"], row["lease_epoch"]) == ("queued", 0, True, 1)
    assert {database.job(job)["status"] for job in (known, elsewhere)} == {"initializing"}
    assert await store.return_unanswered_claims(worker, [known]) == 0


async def claimed_by(database: AppDatabase, store: SqlJobStore, worker: UUID) -> UUID:
    database.insert_job(database.insert_user())
    job = (await claim(store, worker)).job
    assert job is not None
    return job.id
