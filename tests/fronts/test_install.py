"""A front is installed over the app's living table once, and repaired like the rest; or refused with what to do."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.doctor.check_result import CheckResult, Status
from daemon.doctor.service_checks import _check_fronts
from daemon.errors import HostUnfit
from daemon.schema.fronts import fronts
from daemon.schema.migrations import bring_up_to_date, faults, migrate, migrations, pending
from tests.cli.command import CommandLine
from tests.fronts.pipeline import APP, Pipeline, app_tables
from tests.postgres import AppDatabase, Server, insert_statement

FRONT = fronts()["pipeline"]


@pytest.fixture
def living(empty: AppDatabase) -> Pipeline:
    """The app's database before we came: rows in every state, some that an older dispatcher has taken."""
    app_tables(empty)
    pipeline = Pipeline(empty, empty.insert_user())
    for status in ("pending", "pending", "queued", "initializing", "running", "completed", "failed", "cancelled"):
        old_row(pipeline, status=status, runpod_job_id=None if status == "pending" else f"rp-{uuid4()}")
    return pipeline


def old_row(pipeline: Pipeline, **columns: object) -> None:
    text, values = insert_statement("pipeline_training_jobs", pipeline.wish(**columns))
    pipeline.database.run(text, values)


def install(database: AppDatabase, base_model: str | None = None) -> list[str]:
    return bring_up_to_date(database.dsn, local=True, fronts=[FRONT], base_model=base_model).applied


async def light(database: AppDatabase) -> CheckResult | None:
    """What doctor says of the front, with the daemon's own rights."""
    async with Database(database.dsn, application_name="test") as connection:
        lines = [line async for line in _check_fronts(connection)]
    assert len(lines) <= 1
    return lines[0] if lines else None


def everything(database: AppDatabase) -> list[dict[str, object]]:
    return database.run("SELECT to_jsonb(front) AS row FROM pipeline_training_jobs AS front ORDER BY id")


async def test_it_is_installed_once_over_living_tables_and_changes_no_row(living: Pipeline) -> None:
    before = everything(living.database)
    assert install(living.database)[-1] == "front_pipeline"
    assert install(living.database) == [] and migrate(living.database.dsn, local=True) == []
    assert pending(living.database.dsn) == [] and faults(living.database.dsn) == []
    assert everything(living.database) == before
    assert living.database.run("SELECT FROM training_jobs") == []
    recorded = living.database.run("SELECT * FROM supabase_migrations.schema_migrations WHERE name = 'front_pipeline'")
    assert len(recorded) == 1 and recorded[0]["version"].isdigit() and recorded[0]["statements"]
    # Again by hand, as every migration can be.
    with living.database.connect() as connection, connection.transaction():
        for statement in FRONT.statements:
            connection.execute(statement.encode())
    assert everything(living.database) == before and faults(living.database.dsn) == []
    found = await light(living.database)
    assert found is not None and found.light is Status.GREEN and "mistralai/Mistral-7B-Instruct-v0.2" in found.detail


def test_rows_that_waited_before_are_taken_over_by_the_operator(living: Pipeline) -> None:
    install(living.database)
    stranger = living.database.insert_user()
    old_row(living, runpod_job_id=None, status="failed")
    living.database.run("ALTER TABLE pipeline_training_jobs DISABLE TRIGGER USER")
    old_row(living, dataset_file_path=f"{stranger}/x.jsonl")
    living.database.run("ALTER TABLE pipeline_training_jobs ENABLE TRIGGER USER")
    with pytest.raises(psycopg.errors.InsufficientPrivilege), living.as_user() as app:
        app.execute("SELECT release_pipeline_jobs()")
    with living.as_server() as app:
        said: list[str] = []
        app.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))
        assert app.execute("SELECT release_pipeline_jobs() AS n").fetchone() == {"n": 2}
    assert len(said) == 1 and "stays as it is" in said[0] and "is not yours" in said[0]
    assert living.database.one("SELECT count(*) AS n FROM training_jobs WHERE front = 'pipeline' AND due")["n"] == 2
    left = living.database.run("SELECT dataset_file_path FROM pipeline_training_jobs WHERE status = 'pending'")
    assert [row["dataset_file_path"] for row in left] == [f"{stranger}/x.jsonl"]


def test_before_the_apps_table_it_says_what_comes_first_and_changes_nothing(empty: AppDatabase) -> None:
    migrate(empty.dsn, local=True)
    with pytest.raises(HostUnfit, match=r"pipeline_training_jobs is missing: apply the app's own migration"):
        install(empty)
    assert empty.run("SELECT FROM pg_attribute WHERE attname = 'front' AND attrelid = 'training_jobs'::regclass") == []
    app_tables(empty, APP[2:])
    assert install(empty) == ["front_pipeline"]


def test_by_supabases_tool_it_comes_after_the_trainers_tables_and_says_so(living: Pipeline) -> None:
    with living.database.connect() as connection, pytest.raises(psycopg.Error, match="after the tables of the trainer"):
        for statement in FRONT.statements:
            connection.execute(statement.encode())


async def test_a_copy_that_supabases_tool_has_applied_is_known_verified_and_repaired(living: Pipeline) -> None:
    dsn = living.database.dsn
    migrate(dsn, local=True)
    found = await light(living.database)
    assert found is not None and found.light is Status.YELLOW and "migrate --front pipeline" in str(found.advice)
    with living.database.connect() as connection, connection.transaction():
        for statement in FRONT.statements:
            connection.execute(statement.encode())
        connection.execute(
            "INSERT INTO supabase_migrations.schema_migrations (version, name, statements) "
            "VALUES ('20270101000000', 'front_pipeline', '{}')"
        )
    assert migrate(dsn, local=True) == install(living.database) == []
    living.database.run("DROP TRIGGER training_pipeline_mirror ON training_jobs")
    assert faults(dsn) == ["trigger training_jobs.training_pipeline_mirror is missing"]


# What somebody has done, and a word of what is said about it. Few enough of a kind for each to be named.
BROKEN = [
    {
        "DROP TRIGGER training_pipeline_insert ON pipeline_training_jobs": "training_pipeline_insert is missing",
        "ALTER TABLE metrics_points DISABLE TRIGGER training_pipeline_measure": "pipeline_measure is switched off",
        "ALTER FUNCTION training_pipeline_cancel() SECURITY INVOKER": "training_pipeline_cancel() is another one",
        "ALTER FUNCTION training_pipeline_delete() RESET search_path": "training_pipeline_delete() is another one",
        "DROP INDEX training_pipeline_metrics_of_step": "training_pipeline_metrics_of_step is missing",
        "GRANT UPDATE ON training_fronts TO authenticated": "training_fronts: UPDATE of authenticated should not",
        "GRANT EXECUTE ON FUNCTION sync_pipeline_jobs() TO anon": "EXECUTE of anon should not",
        "ALTER TABLE training_front_lags DISABLE ROW LEVEL SECURITY": "training_front_lags has its row security",
    },
    {"DROP FUNCTION training_pipeline_mirror CASCADE": "training_pipeline_mirror() is missing"},
]


@pytest.mark.parametrize("damage", BROKEN, ids=["many things", "the mirror gone"])
def test_what_is_broken_is_found_and_repaired(pipeline: Pipeline, damage: dict[str, str]) -> None:
    database = pipeline.database
    row_id = pipeline.insert()
    # The app's own things stay its own.
    database.run("GRANT SELECT ON pipeline_training_jobs TO PUBLIC")
    database.run("CREATE FUNCTION own() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    database.run("CREATE TRIGGER own BEFORE UPDATE ON pipeline_training_jobs FOR EACH ROW EXECUTE FUNCTION own()")
    assert faults(database.dsn) == []
    for change in damage:
        database.run(change)
    found = faults(database.dsn)
    done = bring_up_to_date(database.dsn, local=True)
    assert found is not None and done.applied == []
    for words in damage.values():
        assert any(words in line for line in found) and any(words in line for line in done.repaired), (words, found)
    assert faults(database.dsn) == [] and bring_up_to_date(database.dsn, local=True).repaired == []
    assert pipeline.row(row_id)["status"] == pipeline.job(row_id)["status"] == "queued"


async def test_a_column_that_the_app_has_dropped_is_named_with_what_to_do(pipeline: Pipeline) -> None:
    pipeline.database.run("ALTER TABLE pipeline_training_jobs DROP COLUMN tokens_per_second")
    cure = "ALTER TABLE pipeline_training_jobs ADD COLUMN tokens_per_second double precision"
    found = await light(pipeline.database)
    assert found is not None and found.light is Status.RED and cure in found.detail
    with pytest.raises(HostUnfit, match="tokens_per_second is missing"):
        migrate(pipeline.database.dsn, local=True)
    pipeline.database.run(cure)
    assert migrate(pipeline.database.dsn, local=True) == []


async def test_a_table_that_the_app_has_dropped_keeps_nothing_from_being_migrated(pipeline: Pipeline) -> None:
    pipeline.database.run("DROP TABLE pipeline_training_jobs CASCADE")
    assert migrate(pipeline.database.dsn, local=True) == []
    found = await light(pipeline.database)
    assert found is not None and found.light is Status.RED and "pipeline_training_jobs is missing" in found.detail


async def test_doctor_says_which_rows_lag_behind(pipeline: Pipeline) -> None:
    row_id = pipeline.insert()
    pipeline.database.run("INSERT INTO training_front_lags VALUES (%s, 'pipeline', 'no')", (row_id,))
    found = await light(pipeline.database)
    assert found is not None and found.light is Status.YELLOW and "sync_pipeline_jobs()" in str(found.advice)


async def test_without_the_apps_table_doctor_says_nothing_of_it(empty: AppDatabase) -> None:
    migrate(empty.dsn, local=True)
    assert await light(empty) is None


def test_the_command_installs_it_and_sets_its_base_model(living: Pipeline, tmp_path: Path) -> None:
    cli = CommandLine(tmp_path, DATABASE_URL=living.database.dsn)
    unknown = cli.run("migrate", "--front", "nonsense")
    assert unknown.status == 2 and "choose one of: pipeline" in unknown.err.lower()
    assert cli.run("migrate", "--base-model", "a/b").status == 2
    assert cli.run("migrate", "--front", "pipeline", "--base-model", "../x").status == 2
    assert living.database.run("SELECT FROM pg_namespace WHERE nspname = 'supabase_migrations'") == []
    said = cli.ok("migrate", "--front", "pipeline", "--base-model", "acme/small", "--json").lines
    assert said[0]["applied"] == [*(f"{item.version}_{item.name}" for item in migrations()), "front_pipeline"]
    assert living.job(living.insert())["base_model"] == "acme/small"
    assert "already up to date" in cli.ok("migrate", "--front", "pipeline").out
    assert living.job(living.insert())["base_model"] == "acme/small"
    cli.ok("migrate", "--front", "pipeline", "--base-model", "acme/large")
    assert living.job(living.insert())["base_model"] == "acme/large"


def test_an_owner_without_superuser_installs_it_as_on_supabase(postgres: Server) -> None:
    """As Supabase makes it: not a superuser, owns the database and the app's tables, bypasses row security."""
    owner = f"app_owner_{uuid4().hex[:8]}"
    admin = AppDatabase(postgres.url)
    admin.run(f"CREATE ROLE {owner} LOGIN PASSWORD 'x' NOSUPERUSER CREATEROLE BYPASSRLS")
    admin.run(f"GRANT training_daemon, anon, authenticated, service_role TO {owner}")
    with postgres.database() as name:
        database = AppDatabase(postgres.dsn(name))
        app_tables(database, APP[:1])
        database.run(f"ALTER DATABASE {name} OWNER TO {owner}")
        database.run(f"GRANT ALL ON SCHEMA public TO {owner} WITH GRANT OPTION")
        database.run(f"GRANT USAGE ON SCHEMA auth TO {owner} WITH GRANT OPTION")
        database.run(f"GRANT ALL ON auth.users TO {owner}")
        database.run(f"SET ROLE {owner}")
        app_tables(database, APP[1:])
        database.run("RESET ROLE")
        dsn = postgres.dsn(name).replace("//" + postgres.dsn(name).split("//")[1].split("@")[0], f"//{owner}:x")
        done = bring_up_to_date(dsn, local=False, fronts=[FRONT])
        assert done.applied[-1] == "front_pipeline" and done.repaired == []
        pipeline = Pipeline(database, database.insert_user())
        row = pipeline.insert()
        assert pipeline.cancel(row) == 1 and pipeline.job(row)["status"] == "cancelled"
        database.close()
    admin.run(f"DROP OWNED BY {owner}")
    admin.run(f"DROP ROLE {owner}")
    admin.close()
