"""The app's tables as other apps have them: refused whole, with the column and the cure, or served to the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from daemon.database.connection import Database
from daemon.errors import HostUnfit
from daemon.queue.outcome import Completed, Failed
from daemon.queue.rows import MetricPoint
from daemon.queue.sql_job_store import SqlJobStore
from daemon.schema.migrations import faults, migrate
from daemon.schema.sql_script import split_statements
from tests.paths import ROOT
from tests.postgres import AppDatabase, Server, app_job, insert_statement
from tests.queue.claiming import claimed
from training.events import ErrorCode

LOCAL = ROOT / "sql" / "local" / "supabase.sql"
APP_SCHEMA = ROOT / "tests" / "app_schema.sql"
JOBS = "ALTER TABLE training_jobs "

# What the app has changed, and what is said about it: the column, and a word of the cure.
REFUSED = {
    "json hyperparameters": (JOBS + "ALTER hyperparameters TYPE json", "training_jobs.hyperparameters", "TYPE jsonb"),
    "json gpu_config": (JOBS + "ALTER gpu_config TYPE json", "training_jobs.gpu_config", "TYPE jsonb"),
    "json metrics": (JOBS + "ALTER current_metrics TYPE json", "training_jobs.current_metrics", "TYPE jsonb"),
    "naive queued_at": (JOBS + "ALTER queued_at TYPE timestamp", "training_jobs.queued_at", "with time zone"),
    "naive completed_at": (JOBS + "ALTER completed_at TYPE timestamp", "training_jobs.completed_at", "with time zone"),
    "short status": (JOBS + "ALTER status TYPE varchar(10)", "training_jobs.status", "12 characters"),
    "short stage": (JOBS + "ALTER current_stage TYPE varchar(8)", "training_jobs.current_stage", "12 characters"),
    "short message": (JOBS + "ALTER error_message TYPE varchar(200)", "training_jobs.error_message", "TYPE text"),
    "short stack": (JOBS + "ALTER error_stack TYPE varchar(1000)", "training_jobs.error_stack", "TYPE text"),
    "padded status": (JOBS + "ALTER status TYPE char(20)", "training_jobs.status", "TYPE character varying(50)"),
    "small progress": (JOBS + "ALTER progress TYPE numeric(4,2)", "training_jobs.progress", "numeric(5,2)"),
    "small cost": (JOBS + "ALTER final_cost TYPE numeric(6,2)", "training_jobs.final_cost", "numeric(10,2)"),
    "floating cost": (JOBS + "ALTER final_cost TYPE double precision", "training_jobs.final_cost", "numeric(10,2)"),
    "small step": (JOBS + "ALTER current_step TYPE smallint", "training_jobs.current_step", "TYPE integer"),
    "no current_epoch": (JOBS + "DROP COLUMN current_epoch", "training_jobs.current_epoch", "ADD COLUMN"),
    "no error_stack": (JOBS + "DROP COLUMN error_stack", "training_jobs.error_stack", "ADD COLUMN error_stack text"),
    "no dataset path": (
        "ALTER TABLE datasets DROP COLUMN storage_path", "datasets.storage_path", "ADD COLUMN storage_path text",
    ),
    "states unknown": (
        JOBS + "ADD CHECK (status IN ('queued', 'running', 'completed', 'failed'))", "training_jobs.status",
        "does not allow initializing, cancelled",
    ),
    "progress to one": (JOBS + "ADD CHECK (progress <= 1)", "training_jobs.progress", "does not allow 5, 50, 100"),
    "presets known": (
        JOBS + "ADD CHECK (preset_id LIKE 'b%')", "training_jobs.preset_id", "does not allow custom",
    ),
    "message always": (
        "UPDATE training_jobs SET error_message = ''; "
        + JOBS + "ALTER error_message SET DEFAULT '', ALTER error_message SET NOT NULL",
        "training_jobs.error_message", "DROP NOT NULL",
    ),
    "generated cost": (
        JOBS + "DROP COLUMN final_cost; "
        + JOBS + "ADD COLUMN final_cost numeric(10,2) GENERATED ALWAYS AS (current_cost * 1.2) STORED",
        "training_jobs.final_cost", "is generated",
    ),
    "an enum": (
        "CREATE TYPE job_status AS ENUM ('queued', 'initializing', 'running', 'completed', 'failed', 'cancelled'); "
        + JOBS + "ALTER status DROP DEFAULT, ALTER status TYPE job_status USING status::job_status",
        "training_jobs.status", "is public.job_status|is job_status",
    ),
    "a number of its own": (JOBS + "ADD COLUMN priority text", "training_jobs.priority", "rename yours"),
    "a flag of its own": (JOBS + "ADD COLUMN due date", "training_jobs.due", "rename yours"),
    "a table of its own": ("CREATE TABLE training_events (n int)", "training_events is a table", "rename yours"),
    "a metric in json": (
        "ALTER TABLE metrics_points ALTER training_loss TYPE text", "metrics_points.training_loss", "numeric(10,6)",
    ),
    "artifacts in json": (
        "ALTER TABLE model_artifacts ALTER artifacts TYPE json", "model_artifacts.artifacts", "TYPE jsonb",
    ),
    "many artifacts a job": (
        "ALTER TABLE model_artifacts DROP CONSTRAINT model_artifacts_job_id_key", "model_artifacts.job_id",
        "ADD UNIQUE",
    ),
    "no owner of costs": ("ALTER TABLE cost_records DROP COLUMN user_id", "cost_records.user_id", "ADD COLUMN"),
}  # fmt: skip
SERVED = {
    "as it is": "SELECT 1",
    "text everywhere": JOBS + "ALTER status TYPE text, ALTER current_stage TYPE text, ALTER preset_id TYPE text",
    "status just long enough": JOBS + "ALTER status TYPE varchar(12)",
    "large numbers": JOBS
    + "ALTER current_step TYPE bigint, ALTER progress TYPE numeric, ALTER final_cost TYPE numeric(14,4)",
    "no reference to users": JOBS + "DROP CONSTRAINT training_jobs_user_id_fkey",
    "all states known": JOBS
    + "ADD CHECK (status IN ('queued', 'initializing', 'running', 'completed', 'failed', 'cancelled', 'paused'))",
    "progress to a hundred": JOBS + "ADD CHECK (progress BETWEEN 0 AND 100), ADD CHECK (retry_count >= 0)",
    "a column of the app's": JOBS + "ADD COLUMN team text NOT NULL DEFAULT 'ours'",
    "a column that the app must fill": JOBS + "ADD COLUMN note text NOT NULL",
    "no column that we never read": "ALTER TABLE datasets DROP COLUMN sample_data",
    "a required word in the side tables": "ALTER TABLE notifications ADD COLUMN channel text NOT NULL",
    "generated of ours": JOBS + "ADD COLUMN share numeric GENERATED ALWAYS AS (progress / 100) STORED",
}


@pytest.fixture(scope="module")
def living_template(postgres: Server) -> Iterator[str]:
    with postgres.database() as name:
        app = AppDatabase(postgres.dsn(name))
        for file in (LOCAL, APP_SCHEMA):
            for statement in split_statements(file.read_text()):
                app.run(statement)
        app.insert_job(app.insert_user())
        app.close()
        yield name


@pytest.fixture
def living(postgres: Server, living_template: str) -> Iterator[AppDatabase]:
    """A Supabase database with the app's own tables and one row that waits."""
    with postgres.database(template=living_template) as name:
        app = AppDatabase(postgres.dsn(name))
        yield app
        app.close()


def shape(database: AppDatabase) -> list[dict[str, Any]]:
    """Everything in the catalogue that a migration could have changed."""
    return database.run(
        "SELECT 'column' AS kind, table_schema || '.' || table_name || '.' || column_name AS name, "
        "concat_ws(' ', data_type, column_default, is_nullable) AS what FROM information_schema.columns "
        "WHERE table_schema NOT IN ('pg_catalog', 'information_schema') "
        "UNION ALL SELECT 'trigger', tgname, tgenabled::text FROM pg_trigger WHERE NOT tgisinternal "
        "UNION ALL SELECT 'function', oid::regprocedure::text, prosrc FROM pg_proc "
        "WHERE pronamespace = 'public'::regnamespace "
        "UNION ALL SELECT 'policy', tablename || policyname, concat(qual, with_check) FROM pg_policies "
        "UNION ALL SELECT 'schema', nspname, '' FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_%' "
        "UNION ALL SELECT 'acl', relname, relacl::text FROM pg_class WHERE relnamespace = 'public'::regnamespace "
        "ORDER BY 1, 2"
    )


def insert_as_the_app(database: AppDatabase, **columns: Any) -> None:
    user = database.insert_user()
    dataset = database.insert_dataset(user)
    with database.acting("authenticated", user) as app:
        text, values = insert_statement("training_jobs", app_job(user, dataset) | columns)
        app.execute(text.encode(), values)


def apply(database: AppDatabase, change: str) -> None:
    for statement in split_statements(change):
        database.run(statement)


def together() -> list[list[str]]:
    """All oddities in as few databases as they fit into: in each, no column is odd twice."""
    groups: list[list[str]] = []
    for oddity, (_change, column, _cure) in REFUSED.items():
        free = (group for group in groups if all(REFUSED[other][1] != column for other in group))
        if (group := next(free, None)) is None:
            groups.append(group := [])
        group.append(oddity)
    return groups


@pytest.mark.parametrize("oddities", together(), ids=len)
def test_all_that_cannot_be_served_is_told_together_with_its_columns_and_nothing_is_changed(
    living: AppDatabase, oddities: list[str]
) -> None:
    for oddity in oddities:
        apply(living, REFUSED[oddity][0])
    before = shape(living)
    with pytest.raises(HostUnfit) as refusal:
        migrate(living.dsn, local=True)
    head, *lines = str(refusal.value).splitlines()
    assert "nothing was changed" in head and len(lines) == len(oddities), lines
    for _change, column, cure in map(REFUSED.__getitem__, oddities):
        (line,) = (line for line in lines if line.strip().startswith(column))
        assert any(word in line for word in cure.split("|")), line
    assert shape(living) == before


@pytest.mark.system  # one by one they take twenty seconds
@pytest.mark.parametrize("oddity", REFUSED)
def test_what_cannot_be_served_is_refused_with_its_column_and_nothing_is_changed(
    living: AppDatabase, oddity: str
) -> None:
    change, column, cure = REFUSED[oddity]
    apply(living, change)
    before = shape(living)
    with pytest.raises(HostUnfit) as refusal:
        migrate(living.dsn, local=True)
    lines = str(refusal.value).splitlines()
    assert "nothing was changed" in lines[0]
    assert len(lines) == 2 and lines[1].strip().startswith(column), lines
    assert any(word in lines[1] for word in cure.split("|")), lines
    assert shape(living) == before
    if not column.startswith("datasets"):
        insert_as_the_app(living)


@pytest.mark.parametrize("oddity", SERVED)
async def test_what_is_let_through_is_served_through_every_state(living: AppDatabase, oddity: str) -> None:
    if "must fill" in oddity:
        living.run("DELETE FROM training_jobs")
    apply(living, SERVED[oddity])
    await asyncio.to_thread(migrate, living.dsn, local=True)
    own = {"note": "of the app"} if "must fill" in oddity else {}
    for _ in range(3):
        insert_as_the_app(living, **own)
    async with Database(living.dsn, application_name="test") as connection:
        store = SqlJobStore(connection)
        completed, failed, cancelled = [(await claimed(store)).lease for _ in range(3)]
        for lease in (completed, failed, cancelled):
            await store.start_job(lease)
            await store.record_progress(
                lease, stage="downloading", progress=99.5, epoch=1, step=9, metrics={"loss": 1}, current_cost=12.34,
                seconds_left=60,
            )  # fmt: skip
            await store.record_metrics(lease, [MetricPoint(1, 0, 1.0, 1e-4)])
        done = Completed("lora-models/a.tar.gz", "ab" * 32, 9, {"adapter": "a"}, {"final_training_loss": 1})
        await store.complete_job(completed, done, cost=1234.5)
        await store.fail_job(failed, Failed(ErrorCode.INTERNAL, "x" * 8_000, "y", "z" * 60_000), cost=1)
        living.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (cancelled.job_id,))
        await store.end_cancelled_job(cancelled, cost=1, data={})
    states = living.run("SELECT status FROM training_jobs WHERE lease_epoch > 0 ORDER BY status")
    assert [row["status"] for row in states] == ["cancelled", "completed", "failed"]
    assert living.one("SELECT count(*) AS n FROM model_artifacts")["n"] == 1
    assert await asyncio.to_thread(faults, living.dsn) == []


def test_the_check_is_made_again_before_an_update(living: AppDatabase) -> None:
    migrate(living.dsn, local=True)
    living.run(JOBS + "ALTER error_stack TYPE varchar(1000)")
    with pytest.raises(HostUnfit, match=r"training_jobs\.error_stack"):
        migrate(living.dsn, local=True)
    living.run(JOBS + "ALTER error_stack TYPE text")
    assert migrate(living.dsn, local=True) == []
