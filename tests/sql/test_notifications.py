"""Who tells a user what: the app some things itself, as the user; the trainer the rest; nobody anything twice."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from daemon.queue.sql_job_store import SqlJobStore
from tests.postgres import AppDatabase, insert_statement
from tests.queue.claiming import claimed


def note_of(user: UUID, job: UUID, kind: str) -> dict[str, Any]:
    """As the app's routes for submitting and cancelling write it."""
    return {
        "user_id": user, "type": kind, "title": "From the app", "message": "The app says so.", "priority": "low",
        "action_url": f"/training/jobs/{job}", "metadata": {"job_id": str(job), "dataset_name": "Conversations"},
    }  # fmt: skip


def insert(caller: psycopg.Connection[dict[str, Any]], note: dict[str, Any]) -> UUID:
    text, values = insert_statement("notifications", note)
    row = caller.execute(text.encode(), values).fetchone()
    assert row is not None, "the app's row was swallowed"
    return UUID(str(row["id"]))


def told(database: AppDatabase, kind: str) -> list[dict[str, Any]]:
    return database.run("SELECT * FROM notifications WHERE type = %s ORDER BY created_at", (kind,))


async def running(store: SqlJobStore, database: AppDatabase, user: UUID) -> UUID:
    job = database.insert_job(user)
    lease = (await claimed(store)).lease
    assert lease.job_id == job
    await store.start_job(lease)
    return job


def cancel_as_the_app(database: AppDatabase, user: UUID, job: UUID) -> None:
    """Its route: two requests, so two transactions."""
    with database.acting("authenticated", user) as app:
        assert app.execute("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job,)).rowcount == 1
    with database.acting("authenticated", user) as app:
        insert(app, note_of(user, job, "job_cancelled"))


def test_a_user_is_told_that_his_job_is_queued_by_the_app_itself(database: AppDatabase, user: UUID) -> None:
    job = database.insert_job(user)
    with database.acting("authenticated", user) as app:
        insert(app, note_of(user, job, "job_queued"))
        insert(app, {"user_id": user, "type": "welcome", "title": "x", "message": "x", "metadata": ["no job"]})
    assert len(told(database, "job_queued")) == 1 and database.story(job) == ["queued"]


@pytest.mark.parametrize("kind", ["job_queued", "job_cancelled", "job_completed"])
def test_nobody_writes_to_somebody_else(database: AppDatabase, user: UUID, kind: str) -> None:
    other = database.insert_user()
    with pytest.raises(psycopg.errors.InsufficientPrivilege), database.acting("authenticated", other) as stranger:
        insert(stranger, note_of(user, database.insert_job(user), kind))
    with pytest.raises(psycopg.errors.InsufficientPrivilege), database.acting("anon") as anon:
        insert(anon, note_of(user, uuid4(), kind))


async def test_a_cancelled_job_is_told_once_in_the_apps_words(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job, other = await running(store, database, user), await running(store, database, user)
    database.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (other,))
    cancel_as_the_app(database, user, job)
    assert [note["title"] for note in told(database, "job_cancelled")] == ["Training was cancelled", "From the app"]
    assert told(database, "job_cancelled")[0]["metadata"]["job_id"] == str(other), "another job's was taken back"


async def test_it_is_told_once_if_the_app_was_first(store: SqlJobStore, database: AppDatabase, user: UUID) -> None:
    job = await running(store, database, user)
    with database.acting("authenticated", user) as app:
        insert(app, note_of(user, job, "job_cancelled"))
    database.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job,))
    assert [note["title"] for note in told(database, "job_cancelled")] == ["From the app"]


async def test_a_job_that_is_tried_again_may_be_cancelled_again(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job = await running(store, database, user)
    cancel_as_the_app(database, user, job)
    database.run("DELETE FROM training_leases")
    database.run("SELECT retry_training_job(%s)", (job,))
    await store.start_job((await claimed(store)).lease)
    database.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job,))
    assert [note["title"] for note in told(database, "job_cancelled")] == ["From the app", "Training was cancelled"]


async def test_where_the_app_says_nothing_the_trainer_tells_of_a_cancel(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job = await running(store, database, user)
    with database.acting("authenticated", user) as app:
        app.execute("SELECT cancel_training_job(%s)", (job,))
    assert [note["title"] for note in told(database, "job_cancelled")] == ["Training was cancelled"]


def test_a_role_that_may_only_insert_still_may(database: AppDatabase, user: UUID) -> None:
    database.run("CREATE ROLE teller_of_notifications NOLOGIN BYPASSRLS")
    try:
        database.run("GRANT INSERT ON notifications TO teller_of_notifications")
        note = note_of(user, database.insert_job(user), "job_queued")
        text, values = insert_statement("notifications", note)
        with database.acting("teller_of_notifications") as teller:
            teller.execute(text.removesuffix(" RETURNING id").encode(), values)
        assert len(told(database, "job_queued")) == 1
    finally:
        database.run("DROP OWNED BY teller_of_notifications")
        database.run("DROP ROLE teller_of_notifications")
