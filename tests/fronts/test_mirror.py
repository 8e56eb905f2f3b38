"""What becomes of a job stands in its row of the front: in the same transaction, once, never at the job's expense."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from uuid import UUID

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.queue.outcome import Completed, Failed
from daemon.queue.rows import MetricPoint
from daemon.queue.sql_job_store import SqlJobStore
from tests.fronts.pipeline import Pipeline
from tests.postgres import AppDatabase
from tests.queue.claiming import claimed
from training.events import ErrorCode

METRICS = {"training_loss": 1.25, "learning_rate": 1e-4, "gradient_norm": 0.5, "throughput": 1800.0}
PATH = "lora-models/adapters/one.tar.gz"
DONE = Completed(PATH, "0" * 64, 1_000, summary={"final_training_loss": 0.75, "final_loss": 0.75})

# Counts the writes to both tables, and the database webhook that starts the app's deployment: once with a look at the
# old row and once, naively, without.
WATCH = """
CREATE TABLE seen (n serial, what text, row_id uuid, path text);
CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN INSERT INTO public.seen (what, row_id) VALUES (TG_ARGV[0], NEW.id); RETURN NULL; END $$;
CREATE TRIGGER see_job AFTER UPDATE ON training_jobs FOR EACH ROW EXECUTE FUNCTION see('job');
CREATE TRIGGER see_front AFTER UPDATE ON pipeline_training_jobs FOR EACH ROW EXECUTE FUNCTION see('front');
CREATE TRIGGER webhook_naive AFTER UPDATE ON pipeline_training_jobs FOR EACH ROW
    WHEN (NEW.status = 'completed' AND NEW.adapter_file_path IS NOT NULL) EXECUTE FUNCTION see('naive');
CREATE TRIGGER webhook AFTER UPDATE ON pipeline_training_jobs FOR EACH ROW
    WHEN (NEW.status = 'completed' AND NEW.adapter_file_path IS NOT NULL
          AND OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION see('webhook')
"""


@pytest.fixture
async def store(database: AppDatabase) -> AsyncIterator[SqlJobStore]:
    async with Database(database.dsn, application_name="test") as connection:
        yield SqlJobStore(connection)


@pytest.fixture
def watched(pipeline: Pipeline) -> Iterator[Pipeline]:
    with pipeline.database.connect() as admin:
        admin.execute(WATCH.encode())
    yield pipeline


def seen(pipeline: Pipeline) -> dict[str, int]:
    rows = pipeline.database.run("SELECT what, count(*) AS n FROM seen GROUP BY what")
    pipeline.database.run("TRUNCATE seen")
    return {row["what"]: row["n"] for row in rows}


def notices(pipeline: Pipeline, job: UUID) -> list[str]:
    rows = pipeline.database.run(
        "SELECT message FROM training_events WHERE job_id = %s AND data ->> 'code' = 'front_failed' ORDER BY id", (job,)
    )
    return [row["message"] for row in rows]


async def progress(store: SqlJobStore, lease: object, step: int = 10, percent: float = 40.9) -> None:
    await store.record_progress(
        lease, stage="training", progress=percent, epoch=1, step=step, metrics=METRICS, current_cost=0.25,  # type: ignore[arg-type]
        seconds_left=60,
    )  # fmt: skip


async def test_the_row_follows_its_job_with_one_write_for_each_of_ours(watched: Pipeline, store: SqlJobStore) -> None:
    row_id = watched.insert()
    assert seen(watched) == {}
    lease = (await claimed(store)).lease
    row = watched.row(row_id)
    assert (row["status"], row["started_at"]) == ("initializing", watched.job(row_id)["started_at"])
    assert seen(watched) == {"job": 1, "front": 1}
    await store.record_plan(lease, total_steps=30, total_epochs=3, estimated_total_cost=1.0, trained_with={})
    await store.start_job(lease)
    await store.renew_lease(lease, 60)
    await progress(store, lease)
    row = watched.row(row_id)
    assert (row["status"], row["progress"], row["current_epoch"]) == ("running", 40, 1)
    assert (row["current_step"], row["total_steps"], float(row["actual_cost"])) == (10, 30, 0.25)
    assert (row["current_loss"], row["current_learning_rate"], row["tokens_per_second"]) == (1.25, 1e-4, 1800.0)
    assert row["adapter_file_path"] is row["adapter_status"] is row["completed_at"] is row["final_loss"] is None
    counts = seen(watched)
    assert counts["front"] <= counts["job"] == 3
    await store.complete_job(lease, DONE, cost=1.5)
    row, job = watched.row(row_id), watched.job(row_id)
    assert (row["status"], row["progress"], row["adapter_file_path"], row["adapter_status"]) == (
        "completed", 100, PATH, "stored",
    )  # fmt: skip
    assert (row["final_loss"], float(row["actual_cost"]), row["completed_at"]) == (0.75, 1.5, job["completed_at"])
    assert row["training_time_seconds"] == round((job["completed_at"] - job["started_at"]).total_seconds())
    assert row["error_message"] is row["error_details"] is None and row["runpod_job_id"] == str(row_id)
    assert seen(watched) == {"job": 1, "front": 1, "webhook": 1, "naive": 1}
    assert notices(watched, row_id) == []


async def test_a_failure_says_what_happened_and_what_to_do(pipeline: Pipeline, store: SqlJobStore) -> None:
    row_id = pipeline.insert()
    lease = (await claimed(store)).lease
    failed = Failed(ErrorCode.NON_FINITE_LOSS, "The loss became NaN.", "Lower learning_rate.", stack="/secret/path")
    await store.fail_job(lease, failed, cost=0.5)
    row = pipeline.row(row_id)
    assert row["status"] == "failed" and float(row["actual_cost"]) == 0.5 and row["completed_at"] is not None
    assert row["error_message"].count("Lower learning_rate") == 1 and "NaN" in row["error_message"]
    assert row["error_details"]["code"] == "non_finite_loss" and "/secret" not in str(row["error_details"])
    # Tried again by its owner: the row begins anew.
    with pipeline.as_user() as app:
        app.execute("SELECT retry_training_job(%s)", (row_id,))
    again = pipeline.row(row_id)
    assert (again["status"], again["completed_at"], again["adapter_file_path"]) == ("queued", None, None)
    await claimed(store)
    again = pipeline.row(row_id)
    assert (again["status"], again["error_message"], again["error_details"]) == ("initializing", None, None)


async def test_a_lost_host_shows_and_is_forgotten(pipeline: Pipeline, store: SqlJobStore) -> None:
    row_id = pipeline.insert()
    lease = (await claimed(store)).lease
    await store.start_job(lease)
    pipeline.database.run(
        "UPDATE training_leases SET expires_at = now() - interval '1 ms', heartbeat_at = now() - interval '2 ms'"
    )
    assert [reaped.job_id for reaped in await store.reap_expired_leases()] == [row_id]
    row = pipeline.row(row_id)
    assert row["status"] == "queued" and row["error_details"]["code"] == "worker_lost"
    await claimed(store)
    assert (pipeline.row(row_id)["status"], pipeline.row(row_id)["error_message"]) == ("initializing", None)


# Cancel ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["row", "job", "server"])
async def test_a_cancel_goes_both_ways_in_every_state(pipeline: Pipeline, store: SqlJobStore, by: str) -> None:
    for state in ("queued", "initializing", "running"):
        row_id, lease = pipeline.insert(), None
        if state != "queued":
            lease = (await claimed(store)).lease
            if state == "running":
                await store.start_job(lease)
                await progress(store, lease)
        if by == "row":
            assert pipeline.cancel(row_id) == 1
        elif by == "server":
            assert pipeline.update(row_id, {"status": "cancelled"}, server=True) == 1
        else:
            with pipeline.as_user() as app:
                app.execute("SELECT cancel_training_job(%s)", (row_id,))
        row, job = pipeline.row(row_id), pipeline.job(row_id)
        assert row["status"] == job["status"] == "cancelled" and row["completed_at"] == job["completed_at"]
        assert pipeline.database.story(row_id).count("cancelled") == 1
        assert pipeline.cancel(row_id) == 1, "cancelled twice: nothing happens"
        assert pipeline.row(row_id)["completed_at"] == job["completed_at"]
        if lease is not None:
            await store.end_cancelled_job(lease, cost=0.75, data={})
            assert float(pipeline.row(row_id)["actual_cost"]) == 0.75


@pytest.mark.parametrize("ending", ["completed", "failed"])
async def test_what_has_ended_cannot_be_cancelled(pipeline: Pipeline, store: SqlJobStore, ending: str) -> None:
    row_id = pipeline.insert()
    lease = (await claimed(store)).lease
    if ending == "completed":
        await store.complete_job(lease, DONE, cost=1.5)
    else:
        await store.fail_job(lease, Failed(ErrorCode.INTERNAL, "x"), cost=None)
    before = pipeline.row(row_id)
    with pytest.raises(psycopg.Error, match=f"already {ending}"):
        pipeline.cancel(row_id)
    assert pipeline.row(row_id) == before


async def test_a_cancel_that_meets_the_ending_waits_for_no_deadlock_and_shows_the_ending(
    pipeline: Pipeline, store: SqlJobStore
) -> None:
    """The user holds the row and wants the job; the daemon holds the job and wants the row."""
    row_id = pipeline.insert()
    lease = (await claimed(store)).lease
    with pipeline.as_user() as app:
        app.execute("UPDATE pipeline_training_jobs SET job_name = 'mine' WHERE id = %s", (row_id,))
        ending = asyncio.create_task(store.complete_job(lease, DONE, cost=1.5))
        await asyncio.sleep(0.3)
        cancel = "UPDATE pipeline_training_jobs SET status = 'cancelled' WHERE id = %s"
        await asyncio.to_thread(app.execute, cancel, (row_id,))
        await ending
    row = pipeline.row(row_id)
    assert (row["status"], row["adapter_file_path"], row["job_name"]) == ("completed", PATH, "mine")
    assert pipeline.job(row_id)["status"] == "completed"


# Faults of the app's table -----------------------------------------------------------------------------------------

FAULTS = {
    "a check": (
        "ALTER TABLE pipeline_training_jobs ADD CONSTRAINT no CHECK (status IN ('pending', 'queued')) NOT VALID",
        "ALTER TABLE pipeline_training_jobs DROP CONSTRAINT no",
    ),
    "a column gone": (
        "ALTER TABLE pipeline_training_jobs RENAME COLUMN current_loss TO old_loss",
        "ALTER TABLE pipeline_training_jobs RENAME COLUMN old_loss TO current_loss",
    ),
    "a trigger that raises": (
        "CREATE FUNCTION bad() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no''; END'; "
        "CREATE TRIGGER bad BEFORE UPDATE ON pipeline_training_jobs FOR EACH ROW EXECUTE FUNCTION bad()",
        "DROP TRIGGER bad ON pipeline_training_jobs",
    ),
    "a check at the end of the transaction": (
        "CREATE FUNCTION bad() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no''; END'; "
        "CREATE CONSTRAINT TRIGGER bad AFTER UPDATE ON pipeline_training_jobs DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION bad()",
        "DROP TRIGGER bad ON pipeline_training_jobs",
    ),
    "the table gone": (
        "ALTER TABLE pipeline_training_jobs RENAME TO elsewhere",
        "ALTER TABLE elsewhere RENAME TO pipeline_training_jobs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_row_that_cannot_be_written_never_costs_the_job_and_is_written_later(
    pipeline: Pipeline, store: SqlJobStore, fault: str
) -> None:
    broken, mended = FAULTS[fault]
    row_id, other = pipeline.insert(), pipeline.insert()
    with pipeline.database.connect() as admin:
        admin.execute(broken.encode())
    lease = (await claimed(store)).lease
    await store.start_job(lease)
    for step in range(3):
        await progress(store, lease, step, 10.0 + step)
    await store.renew_lease(lease, 60)
    await store.complete_job(lease, DONE, cost=1.5)
    assert pipeline.job(row_id)["status"] == "completed"
    assert len(notices(pipeline, row_id)) == 1, "told once"
    with pipeline.database.connect() as admin:
        admin.execute(mended.encode())
    assert pipeline.row(row_id)["status"] == "queued"
    lag = pipeline.database.one("SELECT * FROM training_front_lags")
    assert lag["job_id"] == row_id and lag["front"] == "pipeline" and lag["reason"]
    await claimed(store)  # the next move of any job of the front
    assert pipeline.row(other)["status"] == "initializing"
    assert pipeline.row(row_id)["status"] == "completed" and pipeline.row(row_id)["adapter_file_path"] == PATH
    assert pipeline.database.run("SELECT FROM training_front_lags") == []


async def test_a_row_that_the_app_keeps_locked_delays_a_job_for_less_than_a_second(
    pipeline: Pipeline, store: SqlJobStore
) -> None:
    row_id = pipeline.insert()
    lease = (await claimed(store)).lease
    with pipeline.as_server() as app:
        app.execute("SELECT FROM pipeline_training_jobs WHERE id = %s FOR UPDATE", (row_id,))
        begun = time.monotonic()
        await progress(store, lease)
        assert time.monotonic() - begun < 5
        assert notices(pipeline, row_id) == [], "more progress follows"
    assert pipeline.row(row_id)["progress"] == 0
    await progress(store, lease, 11)
    assert pipeline.row(row_id)["current_step"] == 11
    assert pipeline.database.run("SELECT FROM training_front_lags") == []


async def test_the_operator_writes_rows_again_that_differ(pipeline: Pipeline, store: SqlJobStore) -> None:
    row_id = pipeline.insert()
    await claimed(store)
    pipeline.database.run("UPDATE pipeline_training_jobs SET status = 'queued', started_at = NULL")
    with pipeline.as_server() as app:
        answer = app.execute("SELECT sync_pipeline_jobs() AS n, sync_pipeline_jobs() AS again").fetchone()
    assert answer == {"n": 1, "again": 0} and pipeline.row(row_id)["status"] == "initializing"
    with pytest.raises(psycopg.errors.InsufficientPrivilege), pipeline.as_user() as app:
        app.execute("SELECT sync_pipeline_jobs()")


# Deletion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["queued", "running", "completed"])
async def test_a_deleted_row_takes_its_unfinished_job_with_it(
    pipeline: Pipeline, store: SqlJobStore, state: str
) -> None:
    row_id = pipeline.insert()
    if state != "queued":
        lease = (await claimed(store)).lease
        await store.start_job(lease)
        await store.record_metrics(lease, [MetricPoint(1, 0, 2.0, 1e-4)])
        if state == "completed":
            await store.complete_job(lease, DONE, cost=1.5)
    with pipeline.as_server() as app:
        assert app.execute("DELETE FROM pipeline_training_jobs WHERE id = %s", (row_id,)).rowcount == 1
    left = pipeline.database.run("SELECT status, front FROM training_jobs WHERE id = %s", (row_id,))
    # Artifacts and costs belong to a job that has ended.
    assert left == ([{"status": "completed", "front": None}] if state == "completed" else [])


async def test_a_deleted_job_does_not_leave_a_row_that_says_running(pipeline: Pipeline, store: SqlJobStore) -> None:
    row_id = pipeline.insert()
    await store.start_job((await claimed(store)).lease)
    pipeline.database.run("DELETE FROM training_jobs WHERE id = %s", (row_id,))
    row = pipeline.row(row_id)
    assert (row["status"], row["error_message"]) == ("cancelled", "The job was deleted.")


async def test_a_user_who_is_deleted_takes_all_with_him(pipeline: Pipeline, store: SqlJobStore) -> None:
    pipeline.insert()
    await claimed(store)
    pipeline.insert()
    pipeline.database.run("DELETE FROM auth.users WHERE id = %s", (pipeline.user,))
    everything = "SELECT FROM pipeline_training_jobs UNION ALL SELECT FROM training_jobs UNION ALL SELECT FROM datasets"
    assert pipeline.database.run(everything) == []


# Curves ------------------------------------------------------------------------------------------------------------


async def test_the_apps_curves_have_a_row_a_metric_and_are_thinned_as_ours(
    pipeline: Pipeline, store: SqlJobStore
) -> None:
    row_id = pipeline.insert()
    lease = (await claimed(store)).lease
    await store.record_metrics(lease, [MetricPoint(step, 0, 2.0 / step, 1e-4, throughput=900) for step in (1, 2, 3)])
    await store.record_metrics(lease, [MetricPoint(3, 1, 0.5, 1e-4, validation_loss=0.6, gradient_norm=0.1)])
    found = {(one["step_number"], one["metric_name"]): one for one in pipeline.metrics(row_id)}
    assert len(found) == len(pipeline.metrics(row_id)), "a step that is written again replaces its rows"
    assert {name for step, name in found if step == 1} == {"training_loss", "learning_rate", "tokens_per_second"}
    assert found[3, "training_loss"]["value"] == 0.5 and found[3, "validation_loss"]["value"] == 0.6
    one = found[1, "tokens_per_second"]
    assert (one["metric_id"], one["metric_level"], one["unit"]) == ("tokens_per_second", "universal", "tokens/s")
    assert (found[3, "training_loss"]["epoch_number"], one["measured_at"] is not None) == (1, True)
    # Thinned, or resumed from an earlier step: the same steps are left.
    pipeline.database.run("DELETE FROM metrics_points WHERE job_id = %s AND step = 2", (row_id,))
    assert {one["step_number"] for one in pipeline.metrics(row_id)} == {1, 3}
    await store.forget_metrics(lease, 1)
    assert {one["step_number"] for one in pipeline.metrics(row_id)} == {1}
    with pipeline.as_user() as app:
        assert len(app.execute("SELECT FROM pipeline_training_metrics").fetchall()) == 3


async def test_curves_that_cannot_be_written_are_told_once(pipeline: Pipeline, store: SqlJobStore) -> None:
    row_id = pipeline.insert()
    lease = (await claimed(store)).lease
    pipeline.database.run("ALTER TABLE pipeline_training_metrics ADD CONSTRAINT no CHECK (value > 100) NOT VALID")
    for step in (1, 2):
        await store.record_metrics(lease, [MetricPoint(step, 0, 2.0, 1e-4)])
    assert len(pipeline.database.run("SELECT FROM metrics_points WHERE job_id = %s", (row_id,))) == 2
    assert pipeline.metrics(row_id) == [] and len(notices(pipeline, row_id)) == 1


async def test_points_of_other_jobs_are_no_business_of_the_front(pipeline: Pipeline, store: SqlJobStore) -> None:
    pipeline.database.insert_job(pipeline.user)
    lease = (await claimed(store)).lease
    await store.record_metrics(lease, [MetricPoint(1, 0, 2.0, 1e-4)])
    await store.forget_metrics(lease, 0)
    await store.complete_job(lease, DONE, cost=1.5)
    assert pipeline.database.run("SELECT FROM pipeline_training_metrics") == []
