"""The app's migrations and ours in both orders: everything applies, and the tables that we make are the app's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack

import psycopg
import pytest

from daemon.schema.catalogue import Catalogue, read_catalogue
from daemon.schema.migrations import faults, migrate, migrations
from daemon.schema.sql_script import split_statements
from tests.paths import ROOT
from tests.postgres import AppDatabase, Server, app_job, insert_statement

LOCAL = ROOT / "sql" / "local" / "supabase.sql"
# As the app's own migrations are: two modules, each whole or not at all.
APP = (ROOT / "tests" / "app_schema.sql", ROOT / "tests" / "app_pipeline_schema.sql")
# So that an insert may be short, we give these a default (sql/migrations, job_columns).
SHORTENED = {"preset_id", "hyperparameters", "gpu_config", "total_epochs", "estimated_total_cost"}


@pytest.fixture
def pair(postgres: Server) -> Iterator[tuple[AppDatabase, AppDatabase]]:
    """Two empty Supabase databases."""
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            app = AppDatabase(postgres.dsn(stack.enter_context(postgres.database())))
            stack.callback(app.close)
            run_whole(app, LOCAL.read_text())
            made.append(app)
        yield made[0], made[1]


def run_whole(database: AppDatabase, script: str) -> None:
    with database.connect() as session, session.transaction():
        for statement in split_statements(script):
            session.execute(statement.encode())


def install_app(database: AppDatabase) -> None:
    for file in APP:
        run_whole(database, file.read_text())


def works(database: AppDatabase) -> None:
    """Everything is applied, nothing is broken, and the app's insert and cancel do what they should."""
    assert faults(database.dsn) == []
    user = database.insert_user()
    text, values = insert_statement("training_jobs", app_job(user, database.insert_dataset(user)))
    with database.acting("authenticated", user) as app:
        app.execute(text.encode(), values)
    before = database.one("SELECT due, updated_at FROM training_jobs")
    with database.acting("authenticated", user) as app:
        assert app.execute("UPDATE training_jobs SET status = 'cancelled'").rowcount == 1
    assert before["due"] and database.one("SELECT updated_at FROM training_jobs")["updated_at"] > before["updated_at"]
    for name in ("pipeline_training_jobs", "pipeline_training_metrics", "training_files"):
        database.one("SELECT count(*) FROM " + name)


def test_theirs_first(pair: tuple[AppDatabase, AppDatabase]) -> None:
    database, _ = pair
    install_app(database)
    before = catalogue(database)
    migrate(database.dsn, local=True)
    after = catalogue(database)
    gone = {key for key in before if key not in after and key[0] != "right"}
    assert gone == set(), "something of the app's was dropped or renamed"
    added = {name for kind, name in set(after) - set(before) if kind == "index" and not name.startswith("training_")}
    assert added == {"cost_records_of_job"}, "an index of the app's was made a second time"
    works(database)


def test_ours_first(pair: tuple[AppDatabase, AppDatabase]) -> None:
    database, _ = pair
    migrate(database.dsn, local=True)
    install_app(database)
    assert migrate(database.dsn, local=True) == []
    works(database)


def test_ours_first_as_an_earlier_version_made_it(pair: tuple[AppDatabase, AppDatabase]) -> None:
    database, _ = pair
    migrate(database.dsn, local=True)
    older = {
        "training_jobs_of_user": "idx_training_jobs_user_id",
        "training_jobs_of_status": "idx_training_jobs_status",
        "training_jobs_of_dataset": "idx_training_jobs_dataset_id",
        "metrics_points_of_job": "idx_metrics_points_job_id",
        "notifications_of_user": "idx_notifications_user_id",
    }
    for ours, theirs in older.items():
        database.run(f"ALTER INDEX {ours} RENAME TO {theirs}")
    database.run("ALTER TRIGGER training_jobs_updated_at ON training_jobs RENAME TO update_training_jobs_updated_at")
    database.run("DROP TRIGGER training_datasets_updated_at ON datasets")
    database.run(
        "ALTER TABLE datasets DROP COLUMN error_message, ALTER name DROP NOT NULL, ALTER file_name DROP NOT NULL, "
        "ALTER file_size DROP NOT NULL"
    )
    (newest,) = (item for item in migrations() if item.name == "app_as_it_is")
    database.run("DELETE FROM supabase_migrations.schema_migrations WHERE version = %s", (newest.version,))
    assert migrate(database.dsn, local=True) == [f"{newest.version}_{newest.name}"]
    install_app(database)
    works(database)


def test_an_index_of_the_apps_keeps_its_name(pair: tuple[AppDatabase, AppDatabase]) -> None:
    """An app that has no policies, and one whose names are nullable: neither is taken for ours."""
    database, _ = pair
    run_whole(database, APP[0].read_text())
    for row in database.run("SELECT tablename, policyname FROM pg_policies WHERE tablename = 'training_jobs'"):
        database.run(f'DROP POLICY "{row["policyname"]}" ON {row["tablename"]}')
    database.run("ALTER TABLE datasets ALTER name DROP NOT NULL")
    migrate(database.dsn, local=True)
    names = {row["indexname"] for row in database.run("SELECT indexname FROM pg_indexes WHERE schemaname = 'public'")}
    assert {"idx_training_jobs_user_id", "idx_notifications_user_id"} <= names


def test_the_tables_that_we_make_are_the_apps(pair: tuple[AppDatabase, AppDatabase]) -> None:
    theirs, ours = pair
    run_whole(theirs, APP[0].read_text())
    migrate(ours.dsn, local=True)
    wanted, made = catalogue(theirs), catalogue(ours)
    for name, definition in columns(wanted).items():
        relation, _, column = name.partition(".")
        shortened = relation == "training_jobs" and column in SHORTENED
        expected = definition if not shortened else f"{definition} {columns(made)[name][len(definition) + 1 :]}"
        assert columns(made)[name] == expected, name
    for kind in ("constraint", "index", "trigger"):
        missing = nameless(wanted, kind) - nameless(made, kind)
        assert missing == set(), f"the app has another {kind}"


def catalogue(database: AppDatabase) -> Catalogue:
    with psycopg.connect(database.dsn, autocommit=True) as session:
        return read_catalogue(session)


def columns(found: Catalogue) -> dict[str, str]:
    return {name: definition for (kind, name), definition in found.items() if kind == "column"}


def nameless(found: Catalogue, kind: str) -> set[str]:
    """Definitions of a kind, with the table and without a name of their own."""
    definitions = set()
    for (this, name), definition in found.items():
        if this == kind:
            relation = "" if kind == "index" else name.partition(".")[0] + " "
            definitions.add(relation + re.sub(r"^(CREATE (?:UNIQUE )?(?:INDEX|TRIGGER)) \S+", r"\1", definition))
    return definitions
