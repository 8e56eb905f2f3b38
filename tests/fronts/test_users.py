"""A user may update his own row, and changes nothing that matters; the app's server and an older dispatcher neither."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.queue.outcome import Completed
from daemon.queue.sql_job_store import SqlJobStore
from tests.fronts.pipeline import Pipeline
from tests.postgres import AppDatabase, insert_statement
from tests.queue.claiming import claimed

DONE = Completed("lora-models/adapters/one.tar.gz", "0" * 64, 1_000, summary={"final_loss": 0.75})
# What a user may write into his row: words, and settings that only describe how the numbers came about.
HIS = {
    "job_name", "training_sensitivity", "training_progression", "training_repetition", "dataset_name", "engine_id",
    "engine_name", "engine_features", "updated_at",
}  # fmt: skip
# The app's server writes what follows after a training.
SERVERS = HIS | {"adapter_status", "adapter_download_url", "runpod_endpoint_id"}


@pytest.fixture
async def store(database: AppDatabase) -> AsyncIterator[SqlJobStore]:
    async with Database(database.dsn, application_name="test") as connection:
        yield SqlJobStore(connection)


def other_value(pipeline: Pipeline, column: str, kind: str) -> Any:
    named = {"user_id": pipeline.database.insert_user(), "status": "completed", "id": uuid4()}
    if column == "dataset_id":
        return pipeline.database.insert_dataset(pipeline.user)
    by_kind = {
        "text": "lora-models/adapters/of-somebody-else.tar.gz", "integer": 77, "double precision": 0.125, "numeric": 9,
        "timestamp with time zone": "2020-01-01T00:00:00Z", "jsonb": "[1]", "uuid": uuid4(),
    }  # fmt: skip
    return named.get(column, by_kind[kind])


@pytest.mark.parametrize("server", [False, True], ids=["user", "server"])
async def test_each_column_that_matters_stays_as_it_is(pipeline: Pipeline, store: SqlJobStore, server: bool) -> None:
    completed, running, queued = (pipeline.insert() for _ in range(3))
    lease = (await claimed(store)).lease
    await store.complete_job(lease, DONE, cost=1.5)
    await store.start_job((await claimed(store)).lease)
    assert [pipeline.row(one)["status"] for one in (completed, running, queued)] == ["completed", "running", "queued"]
    columns = pipeline.database.run(
        "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = 'pipeline_training_jobs'"
    )
    for row_id in (completed, running, queued):
        changed = set()
        for name, kind in ((column["column_name"], column["data_type"]) for column in columns):
            before, job = pipeline.row(row_id), pipeline.job(row_id)
            assert pipeline.update(row_id, {name: other_value(pipeline, name, kind)}, server=server) == 1, name
            after = pipeline.row(row_id)
            changed |= {column for column in after if after[column] != before[column]}
            assert pipeline.job(row_id) == job, name
        assert changed - {"updated_at"} == (SERVERS if server else HIS) - {"updated_at"}


async def test_a_page_that_sends_its_whole_row_back_cancels_or_changes_nothing(
    pipeline: Pipeline, store: SqlJobStore
) -> None:
    row_id = pipeline.insert()
    stale = pipeline.row(row_id)
    await store.start_job((await claimed(store)).lease)
    running = pipeline.row(row_id)
    kept = {name: value for name, value in stale.items() if name != "engine_features"}
    assert pipeline.update(row_id, kept) == 1
    assert pipeline.row(row_id) | {"updated_at": None} == running | {"updated_at": None}
    assert pipeline.update(row_id, kept | {"status": "cancelled", "completed_at": "2020-01-01"}) == 1
    row = pipeline.row(row_id)
    assert row["status"] == pipeline.job(row_id)["status"] == "cancelled"
    assert row["completed_at"] == pipeline.job(row_id)["completed_at"] and row["started_at"] == running["started_at"]


async def test_a_page_that_upserts_its_row_cancels_or_changes_nothing(pipeline: Pipeline, store: SqlJobStore) -> None:
    row_id = pipeline.insert()
    await store.start_job((await claimed(store)).lease)
    running = pipeline.row(row_id)

    def upsert(status: str) -> None:
        row = {"id": row_id, "user_id": pipeline.user, "job_name": status, "status": status, "progress": 99}
        text, values = insert_statement("pipeline_training_jobs", row)
        changes = ", ".join(f"{name} = excluded.{name}" for name in row)
        with pipeline.as_user() as app:
            app.execute(
                text.replace(" RETURNING", f" ON CONFLICT (id) DO UPDATE SET {changes} RETURNING").encode(), values
            )

    for status in ("pending", "running", "completed"):
        upsert(status)
        assert pipeline.row(row_id) | {"updated_at": None} == running | {"updated_at": None, "job_name": status}
    upsert("cancelled")
    assert pipeline.row(row_id)["status"] == pipeline.job(row_id)["status"] == "cancelled"
    assert pipeline.database.one("SELECT count(*) AS n FROM training_jobs")["n"] == 1


def test_another_users_row_is_not_there(pipeline: Pipeline) -> None:
    row_id = pipeline.insert()
    stranger = pipeline.database.insert_user()
    assert pipeline.update(row_id, {"status": "cancelled"}, user=stranger) == 0
    assert pipeline.job(row_id)["status"] == "queued"
    with pipeline.database.acting("anon") as anon:
        assert anon.execute("UPDATE pipeline_training_jobs SET status = 'cancelled'").rowcount == 0


def test_a_row_that_runs_elsewhere_can_be_cancelled_by_its_owner_and_nothing_else(pipeline: Pipeline) -> None:
    row_id = pipeline.insert(server=True, status="running", runpod_job_id="rp-1")
    faked = {"status": "completed", "adapter_file_path": "lora-models/adapters/x.tar.gz", "runpod_job_id": str(row_id)}
    assert pipeline.update(row_id, faked) == 1
    row = pipeline.row(row_id)
    assert (row["status"], row["adapter_file_path"], row["runpod_job_id"]) == ("running", None, "rp-1")
    assert pipeline.cancel(row_id) == 1 and pipeline.row(row_id)["status"] == "cancelled"


# The older dispatcher: a cron that acts as the app's server ---------------------------------------------------------


def take_waiting(pipeline: Pipeline) -> list[UUID]:
    """Its first half: takes what waits, asks for a signed URL, posts /run, and writes the id that came back."""
    with pipeline.as_server() as cron:
        rows = cron.execute(
            "SELECT id FROM pipeline_training_jobs WHERE status IN ('pending', 'queued') AND runpod_job_id IS NULL"
        ).fetchall()
        for row in rows:
            cron.execute("UPDATE pipeline_training_jobs SET status = 'initializing' WHERE id = %s", (row["id"],))
            cron.execute(
                "UPDATE pipeline_training_jobs SET status = 'queued', runpod_job_id = %s, runpod_endpoint_id = 'ep', "
                "started_at = now() WHERE id = %s",
                (f"rp-{row['id']}", row["id"]),
            )
    return [row["id"] for row in rows]


def poll(pipeline: Pipeline) -> int:
    """Its second half: asks RunPod for what runs, which knows nothing of our jobs, and writes what it hears."""
    with pipeline.as_server() as cron:
        rows = cron.execute(
            "SELECT id FROM pipeline_training_jobs WHERE status IN ('queued', 'initializing', 'running') "
            "AND runpod_job_id IS NOT NULL"
        ).fetchall()
        for row in rows:
            cron.execute(
                "UPDATE pipeline_training_jobs SET status = 'failed', error_message = 'job not found', progress = 0, "
                "completed_at = now(), updated_at = now() WHERE id = %s",
                (row["id"],),
            )
    return len(rows)


async def test_the_older_dispatcher_does_a_job_of_ours_no_harm(pipeline: Pipeline, store: SqlJobStore) -> None:
    row_id = pipeline.insert()
    assert take_waiting(pipeline) == [], "it has an id already: not one that waits for it"
    assert poll(pipeline) == 1
    assert pipeline.row(row_id)["status"] == pipeline.job(row_id)["status"] == "queued"
    lease = (await claimed(store)).lease
    await store.start_job(lease)
    before = pipeline.row(row_id)
    assert take_waiting(pipeline) == [] and poll(pipeline) == 1
    after = pipeline.row(row_id)
    assert after | {"updated_at": None} == before | {"updated_at": None}
    await store.complete_job(lease, DONE, cost=1.5)
    assert poll(pipeline) == 0 and pipeline.row(row_id)["status"] == "completed"


def test_the_older_dispatchers_own_rows_are_left_to_it(pipeline: Pipeline) -> None:
    old = pipeline.insert(server=True, status="running", runpod_job_id="rp-1")
    assert poll(pipeline) == 1
    assert pipeline.row(old)["status"] == "failed" and pipeline.row(old)["error_message"] == "job not found"
    assert pipeline.database.run("SELECT FROM training_jobs") == []


async def test_the_deployment_writes_on_after_the_training(pipeline: Pipeline, store: SqlJobStore) -> None:
    row_id = pipeline.insert()
    await store.complete_job((await claimed(store)).lease, DONE, cost=1.5)
    pipeline.update(row_id, {"adapter_status": "active", "adapter_download_url": "https://x.example"}, server=True)
    row = pipeline.row(row_id)
    assert (row["adapter_status"], row["adapter_download_url"]) == ("active", "https://x.example")
    with pytest.raises(psycopg.Error, match="already completed"):
        pipeline.cancel(row_id)
