"""What a change of status says: the story, the outbox, the wake-up, and the app's own rows, in one transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any
from uuid import UUID

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.queue.job import Lease
from daemon.queue.outcome import Completed, Failed
from daemon.queue.rows import MetricPoint
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.states import State
from daemon.report.outbox import Callback, SqlOutbox
from tests.postgres import AppDatabase
from tests.queue.claiming import claim, claimed
from tests.sql.world import held, orphan
from training.events import ErrorCode

SUMMARY = {
    "final_training_loss": 0.8,
    "final_loss": 0.8,
    "final_validation_loss": 0.9,
    "perplexity": 2.46,
    "loss_reduction_percent": 40.0,
    "convergence_quality": "good",
    "overall_score": 4,
    "epochs_completed": 3.0,
    "total_steps": 300,
}
ARTIFACTS = {"adapter_model": "adapters/x.tar.gz", "adapter_config": "adapters/x/adapter_config.json"}
DONE = Completed("lora-models/adapters/x.tar.gz", "ab" * 32, 1234, ARTIFACTS, SUMMARY)
BROKEN = Failed(ErrorCode.OUT_OF_MEMORY, "out of memory", hint="reduce batch_size")


class Ear:
    """A listener that says what it has heard, in order."""

    def __init__(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        self._connection = connection
        connection.execute("LISTEN training_jobs")

    def heard(self) -> list[str]:
        # The fence is delivered after everything that was committed before it.
        self._connection.execute("SELECT pg_notify('training_jobs', 'fence')")
        payloads: list[str] = []
        for notification in self._connection.notifies(timeout=5):
            if notification.payload == "fence":
                return payloads
            payloads.append(notification.payload)
        raise AssertionError("the fence was not heard")


@pytest.fixture
def ear(database: AppDatabase) -> Iterator[Ear]:
    with database.connect() as connection:
        yield Ear(connection)


async def test_daemons_are_woken_by_insert_requeue_and_cancel_and_by_nothing_else(
    store: SqlJobStore, database: AppDatabase, user: UUID, ear: Ear
) -> None:
    job_id = database.insert_job(user, callback_url="https://app.example.org/hook")
    assert ear.heard() == [f"queued {job_id}"]
    lease = (await claimed(store)).lease
    await store.start_job(lease)
    await store.record_plan(lease, total_steps=10, total_epochs=1, estimated_total_cost=1, trained_with={})
    for step in range(5):
        await store.record_progress(
            lease, stage="training", progress=step, epoch=0, step=step, metrics={}, current_cost=0, seconds_left=1
        )
        await store.record_metrics(lease, [MetricPoint(step, 0, 1.0, 1e-4)])
        await store.record_event(lease, "notice", "x", {})
        await store.renew_lease(lease, 60)
    assert ear.heard() == []
    await store.retry_job(lease, BROKEN, delay_seconds=0, cost=None)
    assert ear.heard() == [f"queued {job_id}"]
    await store.release_job((await claimed(store)).lease, "x", cost=None)
    assert ear.heard() == [f"queued {job_id}"]
    lease = (await claimed(store)).lease
    database.run("UPDATE training_leases SET expires_at = clock_timestamp()")
    await store.reap_expired_leases()
    assert ear.heard() == [f"queued {job_id}"]
    database.run("UPDATE training_jobs SET run_after = NULL")
    assert ear.heard() == ["queued"]
    await store.fail_job((await claimed(store)).lease, BROKEN, cost=None)
    assert ear.heard() == []
    database.run("SELECT retry_training_job(%s)", (job_id,))
    assert ear.heard() == [f"queued {job_id}"]
    database.run("UPDATE training_jobs SET status = 'cancelled'")
    assert ear.heard() == [f"cancelled {job_id}"]


async def test_each_change_of_state_is_told_in_a_sentence(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user)
    await store.release_job((await claimed(store)).lease, "the host is shutting down", cost=None)
    lease = (await claimed(store)).lease
    await store.start_job(lease)
    await store.retry_job(lease, BROKEN, delay_seconds=0, cost=None)
    await store.fail_job((await claimed(store)).lease, BROKEN, cost=None)
    database.run("SELECT retry_training_job(%s)", (job_id,))
    database.run("UPDATE training_jobs SET status = 'cancelled'")
    database.run("SELECT retry_training_job(%s)", (job_id,))
    lease = (await claimed(store)).lease
    await store.start_job(lease)
    await store.complete_job(lease, DONE, cost=1)
    told = database.run("SELECT kind, message FROM training_events WHERE job_id = %s ORDER BY id", (job_id,))
    claim_again = ("claimed", "A host has claimed the job (attempt 1 of 3).")
    assert [(line["kind"], line["message"]) for line in told] == [
        ("queued", "Waits for a host."),
        claim_again,
        ("notice", "The host is shutting down."),
        ("released", "Back in the queue unharmed: this attempt does not count."),
        claim_again,
        ("started", "Training has begun: the first step is done."),
        ("retrying", "Out of memory. Reduce batch_size."),
        ("claimed", "A host has claimed the job (attempt 2 of 3)."),
        ("failed", "Out of memory. Reduce batch_size."),
        ("resubmitted", "Submitted again, with all its attempts."),
        ("cancelled", "Cancelled by request."),
        ("resubmitted", "Submitted again, with all its attempts."),
        claim_again,
        ("started", "Training has begun: the first step is done."),
        ("completed", "Completed: the adapter is stored and verified."),
    ]
    later = database.insert_job(user, run_after=datetime(2126, 11, 22, 9, 30, tzinfo=UTC))
    told = database.run("SELECT message FROM training_events WHERE job_id = %s", (later,))
    assert [line["message"] for line in told] == ["Scheduled for 2126-11-22 09:30 UTC."]


async def test_a_scheduled_insert_and_a_delayed_retry_wake_as_well_so_that_timers_are_set(
    store: SqlJobStore, database: AppDatabase, user: UUID, ear: Ear
) -> None:
    later = database.one("SELECT now() + interval '1 hour' AS at")["at"]
    scheduled = database.insert_job(user, run_after=later)
    assert ear.heard() == [f"queued {scheduled}"]
    job_id = database.insert_job(user)
    await store.retry_job((await claimed(store)).lease, BROKEN, delay_seconds=3600, cost=None)
    assert ear.heard() == [f"queued {job_id}", f"queued {job_id}"]


EDITS = {
    "run_after = now() + interval '1 minute'": True,
    "run_after = NULL": True,
    "run_after = now() - interval '1 minute'": True,
    "run_after = now() + interval '1 day'": False,
    "priority = 1": True,
    "priority = -1": False,
    'gpu_config = \'{"count": 1, "gpu_memory_gb": 24}\'': True,
    'hyperparameters = \'{"base_model": "Qwen/Qwen3-8B"}\'': True,
    "hyperparameters = hyperparameters || '{\"lora_rank\": 8}'": False,
    "max_cost = 5": False,
}


def test_an_edit_of_waiting_jobs_wakes_once_and_only_if_one_may_be_taken_sooner(
    database: AppDatabase, user: UUID, ear: Ear
) -> None:
    later = database.one("SELECT now() + interval '1 hour' AS at")["at"]
    heard = {}
    for change in EDITS:
        for _ in range(3):
            database.insert_job(user, run_after=later)
        ear.heard()
        with database.acting("service_role") as service:
            service.execute(f"UPDATE training_jobs SET {change}".encode())
        heard[change] = ear.heard()
        database.delete_jobs()
    assert heard == {change: ["queued"] if wakes else [] for change, wakes in EDITS.items()}


def test_an_edit_of_a_job_that_does_not_wait_wakes_nobody(database: AppDatabase, user: UUID, ear: Ear) -> None:
    held(database, user)
    orphan(database, user)
    ear.heard()
    with database.acting("service_role") as service:
        service.execute("UPDATE training_jobs SET priority = 7, max_cost = 3 WHERE status = 'queued'")
        service.execute("UPDATE training_jobs SET max_cost = 3, progress = 50 WHERE status = 'running'")
    assert ear.heard() == []


def insert_job_that_came_due_unannounced(database: AppDatabase, user: UUID, ear: Ear) -> None:
    soon = database.one("SELECT clock_timestamp() + interval '300 ms' AS at")["at"]
    database.insert_job(user, run_after=soon)
    ear.heard()
    database.run("SELECT pg_sleep(0.35)")


async def test_a_promotion_wakes_those_who_looked_a_moment_too_early(
    store: SqlJobStore, database: AppDatabase, user: UUID, ear: Ear
) -> None:
    insert_job_that_came_due_unannounced(database, user, ear)
    assert await store.promote_due_jobs() == 1 and ear.heard() == ["queued"]
    assert await store.promote_due_jobs() == 0 and ear.heard() == []


async def test_an_edit_at_the_very_moment_leaves_the_wake_up_to_the_promotion(
    store: SqlJobStore, database: AppDatabase, user: UUID, ear: Ear
) -> None:
    insert_job_that_came_due_unannounced(database, user, ear)
    with database.acting("service_role") as service:
        service.execute("UPDATE training_jobs SET max_cost = 5")
    # A daemon that looked just before finds the job when it asks what comes next, and not after a whole poll.
    assert await store.next_due_in() == 0
    assert await store.promote_due_jobs() == 1 and ear.heard() == ["queued"]


async def _complete(store: SqlJobStore, lease: Lease) -> object:
    return await store.complete_job(lease, DONE, cost=1)


async def _fail(store: SqlJobStore, lease: Lease) -> object:
    return await store.fail_job(lease, BROKEN, cost=1)


async def _retry(store: SqlJobStore, lease: Lease) -> object:
    return await store.retry_job(lease, BROKEN, delay_seconds=3600, cost=1)


async def _release(store: SqlJobStore, lease: Lease) -> object:
    return await store.release_job(lease, "x", cost=1)


async def _end_cancelled(store: SqlJobStore, lease: Lease) -> object:
    return await store.end_cancelled_job(lease, cost=1, data={})


async def _return_unanswered(store: SqlJobStore, lease: Lease) -> object:
    row = await store.database.fetch(
        "SELECT worker_id FROM training_leases WHERE job_id = %(id)s", {"id": lease.job_id}
    )
    return await store.return_unanswered_claims(row[0]["worker_id"], [])


async def _reap(store: SqlJobStore, lease: Lease) -> object:
    await store.renew_lease(lease, -1)
    return await store.reap_expired_leases()


ENDINGS: list[Callable[[SqlJobStore, Lease], Awaitable[object]]] = [
    _complete,
    _fail,
    _retry,
    _release,
    _end_cancelled,
    _return_unanswered,
    _reap,
]


async def test_whatever_ends_a_capped_users_lease_wakes_the_host_that_could_take_his_next_job(
    store: SqlJobStore, database: AppDatabase, user: UUID, ear: Ear
) -> None:
    for end in ENDINGS:
        for _ in range(2):
            database.insert_job(user)
        lease = (await claimed(store, user_cap=1)).lease
        assert (await claim(store, user_cap=1)).job is None
        ear.heard()
        await end(store, lease)
        # A requeued job's own announcement wakes everybody; a word more would be wasted. (Nobody cancelled this one.)
        requeues = end in (_retry, _release, _end_cancelled, _return_unanswered, _reap)
        assert ear.heard() == [f"queued {lease.job_id}" if requeues else "queued"], end.__name__
        assert (await claim(store, user_cap=1)).job is not None, end.__name__
        database.delete_jobs()


async def test_without_a_cap_or_without_a_waiting_job_an_ending_wakes_nobody(
    store: SqlJobStore, database: AppDatabase, user: UUID, ear: Ear
) -> None:
    for _ in range(2):
        database.insert_job(user)
    lease = (await claimed(store)).lease
    ear.heard()
    await store.fail_job(lease, BROKEN, cost=None)
    assert ear.heard() == []
    lease = (await claimed(store, user_cap=1)).lease
    # Somebody else's waiting job was never kept by this user's lease.
    database.insert_job(database.insert_user())
    ear.heard()
    await store.fail_job(lease, BROKEN, cost=None)
    assert ear.heard() == []


async def test_whatever_ends_the_old_lease_of_a_job_submitted_again_says_that_it_is_free(
    store: SqlJobStore, database: AppDatabase, user: UUID, ear: Ear
) -> None:
    for end in ENDINGS:
        job_id = database.insert_job(user)
        lease = (await claimed(store)).lease
        database.run("UPDATE training_jobs SET status = 'cancelled'")
        database.run("SELECT retry_training_job(%s)", (job_id,))
        assert (await claim(store)).job is None, end.__name__
        ear.heard()
        await end(store, lease)
        assert ear.heard() == [f"queued {job_id}"], end.__name__
        assert (await claim(store)).job is not None, end.__name__
        database.delete_jobs()


def test_a_rolled_back_insert_wakes_nobody(database: AppDatabase, user: UUID, ear: Ear) -> None:
    with database.connect() as app, app.transaction(force_rollback=True):
        app.execute("INSERT INTO training_jobs (user_id, dataset_url) VALUES (%s, 'https://x.org/a')", (user,))
    assert ear.heard() == []


async def test_the_outbox_gets_every_state_change_of_a_job_with_a_callback(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user, callback_url="https://me:pw@App.Example.org:8443/hook?x=1")
    await store.release_job((await claimed(store)).lease, "x", cost=None)
    lease = (await claimed(store)).lease
    await store.start_job(lease)
    await store.complete_job(lease, DONE, cost=2.5)
    rows = database.run("SELECT * FROM training_callbacks ORDER BY sequence")
    assert [row["event"] for row in rows] == [
        "job.initializing", "job.released", "job.initializing", "job.started", "job.completed"
    ]  # fmt: skip
    assert {row["host"] for row in rows} == {"app.example.org:8443"} and {row["user_id"] for row in rows} == {user}
    assert all(row["payload"]["sequence"] == row["sequence"] for row in rows)
    assert [row["payload"]["status"] for row in rows] == ["running"] * 4 + ["completed"]
    last = rows[-1]["payload"]
    assert (last["job_id"], last["event"], last["progress"]) == (str(job_id), "job.completed", 100)
    assert last["adapter_path"] == DONE.adapter_path and last["error_message"] is None and last["cost"] == 2.5
    assert set(last) >= {"status", "progress", "current_epoch", "current_step", "stage", "metrics", "error_message"}


async def test_a_callback_to_a_host_with_an_endless_name_holds_up_no_job(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user, callback_url=f"https://{token_hex(5_000)}.example.org/hook")
    assert (await claimed(store)).id == job_id
    assert len(database.one("SELECT host FROM training_callbacks")["host"]) == 260


async def test_a_job_without_a_callback_fills_no_outbox(store: SqlJobStore, database: AppDatabase, user: UUID) -> None:
    database.insert_job(user)
    await store.fail_job((await claimed(store)).lease, BROKEN, cost=None)
    assert database.run("SELECT FROM training_callbacks") == []


def test_the_apps_cancel_reaches_story_and_outbox_without_rights_on_them(database: AppDatabase, user: UUID) -> None:
    job_id = database.insert_job(user, callback_url="https://app.example.org/hook")
    with database.acting("authenticated", user) as owner:
        owner.execute("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job_id,))
    row = database.one("SELECT event, payload FROM training_callbacks")
    assert row["event"] == "job.cancelled" and row["payload"]["status"] == "failed"
    assert row["payload"]["error_message"].startswith("Cancelled by")


# The outbox's own life.


async def test_a_callback_is_taken_delivered_postponed_and_buried(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    outbox = SqlOutbox(store.database)
    assert await outbox.claim_callbacks(10, 30) == [] and await outbox.oldest_callback_age() is None
    for _ in range(3):
        database.insert_job(user, callback_url="https://app.example.org/hook")
        await store.fail_job((await claimed(store)).lease, BROKEN, cost=None)
    database.run("DELETE FROM training_callbacks WHERE event <> 'job.failed'")
    age = await outbox.oldest_callback_age()
    assert age is not None and age >= 0
    (first,) = await outbox.claim_callbacks(10, 30)
    assert await outbox.claim_callbacks(10, 30) == [], "one at a time to one host"
    assert await outbox.deliver_callback(first.id, first.token, 200)
    (second,) = await outbox.claim_callbacks(10, 30)
    assert await outbox.postpone_callback(second.id, second.token, 0, 503, "busy\x00")
    (third,) = await outbox.claim_callbacks(10, 30)
    assert await outbox.mark_callback_dead(third.id, third.token, 410, None)
    assert first.sequence < second.sequence < third.sequence and first.attempts == 1
    states = {row["id"]: row for row in database.run("SELECT * FROM training_callbacks")}
    assert [states[callback.id]["state"] for callback in (first, second, third)] == ["delivered", "pending", "dead"]
    (again,) = await outbox.claim_callbacks(10, 30)
    assert again.id == second.id and again.token != second.token and again.attempts == 2
    assert not await outbox.deliver_callback(second.id, second.token, 200)
    assert await outbox.deliver_callback(again.id, again.token, 200)
    with database.acting("authenticated", user) as owner:
        owner.execute("SELECT resend_callback(%s)", (third.id,))
    (resent,) = await outbox.claim_callbacks(10, 30)
    assert resent.id == third.id and resent.attempts == 1


async def test_a_callback_whose_deliverer_died_is_due_again(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    outbox = SqlOutbox(store.database)
    database.insert_job(user, callback_url="https://app.example.org/hook")
    await claimed(store)
    (first,) = await outbox.claim_callbacks(10, 0.05)
    assert await outbox.claim_callbacks(10, 30) == []
    database.run("SELECT pg_sleep(0.06)")
    (again,) = await outbox.claim_callbacks(10, 30)
    assert again.id == first.id
    assert not await outbox.postpone_callback(first.id, first.token, 0, None, "late")


async def test_one_dead_host_with_many_rows_holds_up_nobody(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    outbox = SqlOutbox(store.database)
    for host in ("dead.example", "one.example", "two.example"):
        database.insert_job(user, callback_url=f"https://{host}/hook")
        await claimed(store)
    database.run(
        "INSERT INTO training_callbacks (job_id, user_id, url, host, event, payload, next_at) "
        "SELECT job_id, user_id, url, host, event, payload, next_at - interval '1 h' "
        "FROM training_callbacks, generate_series(1, 500) WHERE host = 'dead.example'"
    )
    taken: list[Callback] = await outbox.claim_callbacks(10, 30)
    assert sorted(callback.host for callback in taken) == ["dead.example", "one.example", "two.example"]
    # One at a time for each host, over all daemons: the next when this one is settled.
    assert await outbox.claim_callbacks(10, 30) == []
    dead = next(callback for callback in taken if callback.host == "dead.example")
    await outbox.postpone_callback(dead.id, dead.token, 3600, None, "refused")
    (following,) = await outbox.claim_callbacks(10, 30)
    assert following.host == "dead.example" and following.id != dead.id


async def test_two_daemons_never_take_the_same_callback(store: SqlJobStore, database: AppDatabase, user: UUID) -> None:
    outbox = SqlOutbox(store.database)
    for number in range(6):
        database.insert_job(user, callback_url=f"https://h{number}.example/hook")
        await claimed(store)
    with database.connect() as rival, rival.transaction():
        rival.execute("SELECT FROM training_callbacks WHERE host IN ('h0.example', 'h1.example') FOR UPDATE")
        taken = await outbox.claim_callbacks(10, 30)
    assert sorted(callback.host for callback in taken) == [f"h{number}.example" for number in range(2, 6)]


# The app's own rows.


async def test_a_completion_writes_artifact_cost_and_notifications(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user)
    lease = (await claimed(store)).lease
    await store.start_job(lease)
    await store.complete_job(lease, DONE, cost=2.5)
    artifact = database.one("SELECT * FROM model_artifacts")
    row = database.job(job_id)
    assert row["artifact_id"] == artifact["id"] and artifact["job_id"] == job_id and artifact["user_id"] == user
    assert artifact["artifacts"] == ARTIFACTS and artifact["dataset_id"] == row["dataset_id"]
    assert artifact["quality_metrics"] == {name: SUMMARY[name] for name in (
        "final_training_loss", "final_validation_loss", "perplexity", "loss_reduction_percent",
        "convergence_quality", "overall_score",
    )}  # fmt: skip
    summary = artifact["training_summary"]
    assert (summary["epochs_completed"], summary["total_steps"], summary["final_loss"]) == (3.0, 300, 0.8)
    assert summary["total_cost"] == 2.5 and summary["training_duration_hours"] >= 0
    assert artifact["configuration"]["hyperparameters"] == row["hyperparameters"]
    cost = database.one("SELECT * FROM cost_records")
    assert (cost["cost_type"], float(cost["amount"]), cost["billing_period"].day) == ("training_compute", 2.5, 1)
    assert {"gpu_type", "gpu_count", "duration_hours"} <= set(cost["details"])
    types = [row["type"] for row in database.run("SELECT type FROM notifications ORDER BY created_at, type")]
    assert sorted(types) == ["artifact_ready", "job_completed", "job_started"]
    links = {row["action_url"] for row in database.run("SELECT action_url FROM notifications")}
    assert links == {f"/training/jobs/{job_id}", f"/models/{artifact['id']}"}


@pytest.mark.parametrize("message", ["Out of memory. Reduce batch_size.", "Out of memory."], ids=["ours", "older"])
async def test_a_notification_of_a_failure_says_once_what_to_do_whichever_version_wrote_the_message(
    store: SqlJobStore, database: AppDatabase, user: UUID, message: str
) -> None:
    job_id = database.insert_job(user)
    await store.fail_job((await claimed(store)).lease, BROKEN, cost=None)
    (told,) = database.run("DELETE FROM notifications WHERE type = 'job_failed' RETURNING message")
    assert told["message"] == "Out of memory. Reduce batch_size."
    with database.connect() as connection, connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        connection.execute("UPDATE training_jobs SET error_message = %s WHERE id = %s", (message, job_id))
        connection.execute("SELECT training_notify_user(job, 'failed') FROM training_jobs AS job")
    (told,) = database.run("SELECT message FROM notifications WHERE type = 'job_failed'")
    assert told["message"] == "Out of memory. Reduce batch_size."


async def test_a_cancelled_jobs_cost_record_is_corrected_when_its_child_is_gone(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    database.insert_job(user)
    lease = (await claimed(store)).lease
    database.run("UPDATE training_jobs SET status = 'cancelled'")
    await store.end_cancelled_job(lease, cost=3.25, data={})
    assert float(database.one("SELECT amount FROM cost_records")["amount"]) == 3.25


async def test_each_run_of_a_job_submitted_again_has_its_own_cost_record(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user)
    for cost in (1.0, 2.0):
        await store.fail_job((await claimed(store)).lease, BROKEN, cost=cost)
        database.run("SELECT retry_training_job(%s)", (job_id,))
    amounts = [float(row["amount"]) for row in database.run("SELECT amount FROM cost_records ORDER BY amount")]
    assert amounts == [1.0, 2.0]


def hours_ago(database: AppDatabase, kind: str, hours: float) -> None:
    """Moves the newest event of a kind into the past."""
    database.run(
        "UPDATE training_events SET at = clock_timestamp() - %s * interval '1 hour' "
        "WHERE id = (SELECT max(id) FROM training_events WHERE kind = %s)",
        (hours, kind),
    )


def past_the_guard(database: AppDatabase, statement: bytes) -> None:
    with database.connect() as session, session.transaction():
        session.execute("SET LOCAL session_replication_role = replica")
        session.execute(statement)


def started_ago(database: AppDatabase, hours: int) -> None:
    past_the_guard(
        database, f"UPDATE training_jobs SET started_at = clock_timestamp() - interval '{hours} hours'".encode()
    )


def held_hours(database: AppDatabase) -> float:
    (cost,) = database.run("SELECT details FROM cost_records ORDER BY recorded_at DESC LIMIT 1")
    return float(cost["details"]["duration_hours"])


@pytest.mark.parametrize("first_ending", ["retrying", "released", "reaped"])
async def test_the_hours_of_a_cost_are_those_that_hosts_spent_on_the_job(
    store: SqlJobStore, database: AppDatabase, user: UUID, first_ending: str
) -> None:
    """Three hours after the first claim: one hour held, one and a half in the queue, half an hour held."""
    database.insert_job(user)
    lease = (await claimed(store)).lease
    hours_ago(database, "claimed", 3)
    if first_ending == "retrying":
        await store.retry_job(lease, BROKEN, delay_seconds=0, cost=1.0)
    elif first_ending == "released":
        await store.release_job(lease, "the host is shutting down", cost=1.0)
    else:
        past_the_guard(database, b"UPDATE training_leases SET expires_at = clock_timestamp() - interval '1 minute'")
        await store.reap_expired_leases()
        database.run("UPDATE training_jobs SET run_after = NULL")
    hours_ago(database, first_ending, 2)
    started_ago(database, 3)
    lease = (await claimed(store)).lease
    hours_ago(database, "claimed", 0.5)
    await store.complete_job(lease, DONE, cost=1.5)
    artifact = database.one("SELECT training_summary FROM model_artifacts")["training_summary"]
    assert held_hours(database) == pytest.approx(1.5, abs=0.01)
    assert artifact["training_duration_hours"] == pytest.approx(1.5, abs=0.01) and artifact["total_cost"] == 1.5


async def test_a_job_submitted_again_begins_its_hours_anew(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = database.insert_job(user)
    lease = (await claimed(store)).lease
    hours_ago(database, "claimed", 5)
    await store.fail_job(lease, BROKEN, cost=5.0)
    assert held_hours(database) == pytest.approx(5, abs=0.01)
    database.run("SELECT retry_training_job(%s)", (job_id,))
    lease = (await claimed(store)).lease
    hours_ago(database, "claimed", 2)
    await store.fail_job(lease, BROKEN, cost=2.0)
    assert held_hours(database) == pytest.approx(2, abs=0.01)
    database.run("SELECT retry_training_job(%s)", (job_id,))
    database.run("UPDATE training_jobs SET status = 'cancelled'")
    assert held_hours(database) == 0


async def test_a_cancelled_job_is_held_until_its_trainer_has_ended(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    database.insert_job(user)
    lease = (await claimed(store)).lease
    hours_ago(database, "claimed", 1)
    database.run("UPDATE training_jobs SET status = 'cancelled'")
    assert held_hours(database) == pytest.approx(1, abs=0.01)
    # Half an hour later, as the story has it.
    hours_ago(database, "claimed", 1.5)
    await store.end_cancelled_job(lease, cost=1.5, data={})
    assert held_hours(database) == pytest.approx(1.5, abs=0.01)


async def test_without_a_story_the_hours_are_those_from_the_first_start(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    database.insert_job(user)
    lease = (await claimed(store)).lease
    database.run("DELETE FROM training_events")
    started_ago(database, 2)
    await store.fail_job(lease, BROKEN, cost=2.0)
    assert held_hours(database) == pytest.approx(2, abs=0.01)


REFUSING = (
    "CREATE FUNCTION public.sabotage() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {what}; RETURN NEW; END $$;;"
    "CREATE TRIGGER sabotage {when} ON {{table}} {how} FOR EACH ROW EXECUTE FUNCTION public.sabotage()"
)


@pytest.mark.parametrize(
    "sabotage",
    [
        "DROP TABLE {table} CASCADE",
        "ALTER TABLE {table} ADD COLUMN must_have integer NOT NULL DEFAULT NULL",
        "REVOKE ALL ON {table} FROM training_daemon",
        REFUSING.format(what="RAISE EXCEPTION 'not in my table'", when="BEFORE INSERT OR UPDATE", how=""),
        REFUSING.format(what="ASSERT false", when="AFTER INSERT OR UPDATE", how=""),
        # Longer than a statement may take: that is a cancellation, which OTHERS does not catch.
        REFUSING.format(what="PERFORM pg_sleep(600)", when="BEFORE INSERT OR UPDATE", how=""),
        # Refused when the transaction ends, long after the row was taken.
        REFUSING.format(
            what="RAISE EXCEPTION 'too late'",
            when="AFTER INSERT OR UPDATE",
            how="DEFERRABLE INITIALLY DEFERRED",
        ).replace("CREATE TRIGGER", "CREATE CONSTRAINT TRIGGER"),
    ],
    ids=["absent", "another column", "no grant", "a trigger refuses", "an assertion", "a trigger hangs", "at the end"],
)
@pytest.mark.parametrize("table", ["model_artifacts", "cost_records", "notifications"])
async def test_a_side_table_that_fails_never_fails_a_training(
    database: AppDatabase, user: UUID, table: str, sabotage: str
) -> None:
    for statement in sabotage.replace("{table}", table).split(";;"):
        database.run(statement)
    job_id = database.insert_job(user)
    async with Database(database.dsn, application_name="test", statement_seconds=1.0) as connection:
        store = SqlJobStore(connection)
        lease = (await claimed(store)).lease
        await store.start_job(lease)
        ending = await store.complete_job(lease, DONE, cost=1)
    assert ending.moved and ending.state is State.COMPLETED
    assert database.job(job_id)["status"] == "completed"
    notices = database.run(
        "SELECT message, data FROM training_events WHERE job_id = %s AND data ->> 'code' = 'side_table_failed'",
        (job_id,),
    )
    if sabotage.startswith("DROP"):
        assert notices == []
    else:
        assert {notice["data"]["table"] for notice in notices} == {table}
        assert all(one["message"].startswith(f"The row in {table} could not be written: ") for one in notices)
        assert all(one["message"].endswith(".") and not one["message"].endswith("..") for one in notices)


@pytest.mark.parametrize("table", ["model_artifacts", "cost_records", "notifications"])
async def test_a_side_table_that_stays_locked_never_fails_a_training(
    store: SqlJobStore, database: AppDatabase, user: UUID, table: str
) -> None:
    job_id = database.insert_job(user)
    lease = (await claimed(store)).lease
    await store.start_job(lease)
    with database.connect() as owner, owner.transaction():
        owner.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
        ending = await store.complete_job(lease, DONE, cost=1)
    assert ending.moved and ending.state is State.COMPLETED
    (notice,) = database.run(
        "SELECT data FROM training_events WHERE job_id = %s AND data ->> 'code' = 'side_table_failed'", (job_id,)
    )
    assert (notice["data"]["table"], notice["data"]["sqlstate"]) == (table, "55P03")


async def test_an_older_dispatchers_endings_make_no_rows_of_ours(database: AppDatabase, user: UUID) -> None:
    job_id = database.insert_job(user)
    with database.connect() as connection, connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        connection.execute("UPDATE training_jobs SET status = 'running', due = false WHERE id = %s", (job_id,))
    with database.acting("service_role") as service:
        service.execute("UPDATE training_jobs SET status = 'completed', final_cost = 3 WHERE id = %s", (job_id,))
    for table in ("model_artifacts", "cost_records", "notifications"):
        assert database.run(f"SELECT FROM {table}") == []
