"""Installing: on an empty database, over the app's living tables, twice, beside traffic, and not as a superuser."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from daemon.database.connection import Database
from daemon.database.embedded_server import EmbeddedPostgres
from daemon.errors import DatabaseAway, HostUnfit
from daemon.queue.rows import Claim
from daemon.queue.sql_job_store import SqlJobStore
from daemon.schema.migrations import migrate, migrations, pending
from daemon.schema.sql_script import split_statements
from tests.paths import ROOT
from tests.postgres import BINARIES, AppDatabase, Server, app_job, hosted_project, insert_statement
from tests.queue.claiming import claim

LOCAL = ROOT / "sql" / "local" / "supabase.sql"
APP_SCHEMA = ROOT / "tests" / "app_schema.sql"


@pytest.fixture
def living(empty: AppDatabase) -> AppDatabase:
    """The app's database before we came: its tables, and rows in every state."""
    run_script(empty, LOCAL)
    run_script(empty, APP_SCHEMA)
    user = empty.insert_user()
    for status in ("queued", "queued", "initializing", "running", "completed", "failed", "cancelled"):
        old_job(empty, user, status)
    return empty


def old_job(database: AppDatabase, user: UUID, status: str) -> UUID:
    job = app_job(user, database.insert_dataset(user)) | {"status": status, "progress": 33}
    text, values = insert_statement("training_jobs", job)
    job_id: UUID = database.one(text, values)["id"]
    return job_id


def run_script(database: AppDatabase, path: Path) -> None:
    for statement in split_statements(path.read_text()):
        database.run(statement)


def shape(database: AppDatabase) -> dict[str, Any]:
    """Every column of the app's tables with its type and nullability."""
    rows = database.run(
        "SELECT table_name, column_name, data_type, character_maximum_length, numeric_precision, numeric_scale, "
        "is_nullable FROM information_schema.columns WHERE table_schema = 'public'"
    )
    return {f"{row['table_name']}.{row['column_name']}": tuple(row.values())[2:] for row in rows}


def test_an_empty_postgres_becomes_ours_and_the_record_is_supabases(empty: AppDatabase) -> None:
    names = [f"{item.version}_{item.name}" for item in migrations()]
    assert pending(empty.dsn) == names
    assert migrate(empty.dsn, local=True) == names
    assert pending(empty.dsn) == [] and migrate(empty.dsn, local=True) == []
    rows = empty.run("SELECT * FROM supabase_migrations.schema_migrations ORDER BY version")
    assert [f"{row['version']}_{row['name']}" for row in rows] == names
    assert all(len(row["version"]) == 14 and row["version"].isdigit() and row["statements"] for row in rows)


def test_installing_over_living_tables_changes_no_row_and_no_column(living: AppDatabase) -> None:
    before = shape(living)
    names = [name.split(".")[1] for name in before if name.startswith("training_jobs.")]
    everything = f"SELECT {', '.join(name for name in names if name != 'updated_at')} FROM training_jobs ORDER BY id"
    rows = living.run(everything)
    file = living.one("SELECT pg_relation_filenode('training_jobs') AS node")
    migrate(living.dsn, local=True)
    after = shape(living)
    assert {name: after[name] for name in before} == before
    assert living.run(everything) == rows
    assert living.one("SELECT pg_relation_filenode('training_jobs') AS node") == file, "the table was rewritten"


async def test_rows_queued_before_are_held_until_the_operator_releases_them(living: AppDatabase) -> None:
    migrate(living.dsn, local=True)
    async with Database(living.dsn, application_name="test") as connection:
        store = SqlJobStore(connection)
        assert await claim(store) == Claim(None)
        reasons = {row["waiting_reason"] for row in living.run("SELECT waiting_reason FROM training_queue")}
        assert reasons == {"held: queued before the trainer was installed"}
        assert living.one("SELECT release_held_jobs() AS n")["n"] == 2
        job = (await claim(store)).job
        assert job is not None and job.need_gpus == 1 and job.base_model == "mistralai/Mistral-7B-v0.1"
        assert (await claim(store)).job is not None and (await claim(store)).job is None
    orphans = living.run("SELECT status FROM training_orphans ORDER BY status")
    assert [row["status"] for row in orphans] == ["initializing", "running"]


def test_the_apps_insert_and_cancel_work_after_the_installation(living: AppDatabase) -> None:
    migrate(living.dsn, local=True)
    user = living.insert_user()
    dataset = living.insert_dataset(user)
    with living.acting("authenticated", user) as app:
        text, values = insert_statement("training_jobs", app_job(user, dataset))
        inserted = app.execute(text.encode(), values).fetchone()
        assert inserted is not None
        cancel = "UPDATE training_jobs SET status = 'cancelled', completed_at = now(), final_cost = 0 WHERE id = %s"
        assert app.execute(cancel, (inserted["id"],)).rowcount == 1
        # A URL alone, over tables whose columns are stricter than the facts say.
        app.execute(
            "INSERT INTO training_jobs (user_id, dataset_url) VALUES (%s, 'https://x.example/a.jsonl')", (user,)
        )
    with pytest.raises(psycopg.errors.InsufficientPrivilege), living.acting("anon") as anon:
        anon.execute("SELECT FROM training_leases")
    for table in ("metrics_points", "cost_records", "notifications", "training_events"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), living.acting("anon") as anon:
            anon.execute(sql.SQL("SELECT FROM {}").format(sql.Identifier(table)))


def test_every_file_can_run_twice(living: AppDatabase) -> None:
    migrate(living.dsn, local=True)
    living.run("SELECT release_held_jobs()")
    before = living.run("SELECT * FROM training_jobs ORDER BY id"), shape(living)
    with living.connect() as connection:
        for migration in migrations():
            with connection.transaction():
                for statement in split_statements(migration.sql):
                    connection.execute(statement.encode())
    assert (living.run("SELECT * FROM training_jobs ORDER BY id"), shape(living)) == before


def test_the_publication_gets_our_tables_once(living: AppDatabase) -> None:
    living.run("CREATE PUBLICATION supabase_realtime FOR TABLE training_jobs")
    migrate(living.dsn, local=True)
    rows = living.run("SELECT tablename FROM pg_publication_tables WHERE pubname = 'supabase_realtime'")
    published = {"training_jobs", "training_events", "metrics_points", "training_deliveries"}
    assert {row["tablename"] for row in rows} == published


def test_a_reader_in_the_way_is_waited_for(living: AppDatabase) -> None:
    with living.connect() as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM training_jobs")
        threading.Timer(1.5, lambda: reader.execute("COMMIT")).start()
        assert len(migrate(living.dsn, local=True)) == len(migrations())


def test_a_plain_postgres_is_told_about_local(empty: AppDatabase) -> None:
    with pytest.raises(HostUnfit, match="migrate --local"):
        migrate(empty.dsn, local=False)


def test_two_at_once_do_it_once(empty: AppDatabase) -> None:
    done = _at_once(3, empty.dsn)
    assert sorted(name for names in done for name in names) == [f"{item.version}_{item.name}" for item in migrations()]


def test_many_at_once_write_down_together_what_they_verified(empty: AppDatabase) -> None:
    migrate(empty.dsn, local=True)
    empty.run("DROP TABLE supabase_migrations.brightrun_trainer")
    assert _at_once(4, empty.dsn) == [[]] * 4


def _at_once(many: int, dsn: str) -> list[list[str]]:
    with ThreadPoolExecutor(many) as pool:
        return [one.result(60) for one in [pool.submit(migrate, dsn, local=True) for _ in range(many)]]


def test_a_database_that_is_not_there_is_away(postgres: Server) -> None:
    with pytest.raises(DatabaseAway):
        migrate("postgresql://postgres:x@127.0.0.1:9/postgres", local=True)


@pytest.mark.parametrize("binaries", BINARIES.values(), ids=BINARIES.keys())
def test_an_owner_without_superuser_installs_it_as_on_supabase(binaries: Path) -> None:
    """Its own server: roles belong to the cluster, and there must be none of ours in it yet."""
    with EmbeddedPostgres(binaries) as server:
        owner = hosted_project(server)
        assert len(migrate(owner, local=False)) == len(migrations())
        with psycopg.connect(owner, autocommit=True) as again:
            for migration in migrations():
                with again.transaction():
                    for statement in split_statements(migration.sql):
                        again.execute(statement.encode())
        app = AppDatabase(server.dsn("app"))
        user = app.insert_user()
        with app.acting("authenticated", user) as caller:
            caller.execute(
                "INSERT INTO training_jobs (user_id, dataset_url, callback_url) "
                "VALUES (%s, 'https://x.example/a.jsonl', 'https://x.example/hook')",
                (user,),
            )
        app.run(f"ALTER ROLE training_daemon LOGIN PASSWORD '{server.password}'")
        for login in ("app_owner", "training_daemon"):
            assert asyncio.run(claim_and_give_back(server.dsn("app", quote(login)))) == (login == "app_owner")
        app.run("SELECT cancel_training_job(id), retry_training_job(id) FROM training_jobs")
        assert app.one("SELECT status FROM training_jobs")["status"] == "queued"
        app.close()


async def claim_and_give_back(dsn: str) -> bool:
    """Whether the login was warned about."""
    async with Database(dsn, application_name="test") as connection:
        store = SqlJobStore(connection)
        job = (await claim(store)).job
        assert job is not None
        await store.start_job(job.lease)
        await store.release_job(job.lease, "x", cost=None)
        assert await store.reap_expired_leases() == []
        return connection.role_warning is not None
