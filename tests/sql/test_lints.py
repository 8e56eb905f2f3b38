"""Supabase's linter finds nothing in our schema but what the security page names and says why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from daemon.schema.fronts import fronts
from daemon.schema.migrations import bring_up_to_date, faults, migrate
from tests.fronts.pipeline import app_tables
from tests.paths import ROOT
from tests.postgres import AppDatabase, Server
from tests.sql.lints import RULES, findings

PAGE = (ROOT / "docs" / "how-to" / "security.md").read_text()
# Meant for users: each checks first that what it is asked about is the caller's own.
INTENDED = {
    "authenticated_security_definer_function_executable: training_owns_file(owner uuid, path text)",
    "authenticated_security_definer_function_executable: retry_training_job(job_id uuid)",
    "authenticated_security_definer_function_executable: resend_callback(callback_id uuid)",
    "authenticated_security_definer_function_executable: redeliver(job_id uuid, kind text, target text)",
}
# The app's policies are for PUBLIC, so they count for every role; ours stand beside them, for one role each.
BESIDE_THE_APPS = {
    f"multiple_permissive_policies: {table} {verb} {role}"
    for table, verbs in (
        ("datasets", ("SELECT", "INSERT", "UPDATE")),
        ("training_jobs", ("SELECT", "INSERT")),
        ("model_artifacts", ("SELECT",)),
    )
    for verb in verbs
    for role in ("authenticated", "training_daemon")
}
# Older projects grant every API role everything on new objects; projects of today grant nothing.
GENEROUS = [
    f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON {what} TO anon, authenticated, service_role"
    for what in ("TABLES", "SEQUENCES", "FUNCTIONS")
]
FLAWED = """
    CREATE TABLE public.flawed (kind regproc, email text);
    CREATE TABLE public.policed (id int PRIMARY KEY);
    CREATE TABLE public.closed (id int PRIMARY KEY, mail text REFERENCES auth.users (email))
        WITH (autovacuum_enabled = off);
    ALTER TABLE public.closed ENABLE ROW LEVEL SECURITY;
    CREATE TABLE public.open (id int PRIMARY KEY, owner uuid);
    ALTER TABLE public.open ENABLE ROW LEVEL SECURITY;
    CREATE POLICY one ON public.policed USING (auth.uid() IS NULL OR id = 1);
    CREATE POLICY two ON public.policed USING ((SELECT auth.jwt()) -> 'user_metadata' IS NOT NULL);
    CREATE POLICY three ON public.open FOR INSERT TO authenticated WITH CHECK (true);
    CREATE INDEX a ON public.policed (id);
    CREATE INDEX b ON public.policed (id);
    UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'public.b'::regclass;
    CREATE VIEW public.people AS SELECT id FROM auth.users;
    CREATE MATERIALIZED VIEW public.copied AS SELECT 1 AS one;
    GRANT SELECT ON public.people TO anon;
    CREATE FUNCTION public.mighty() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1';
    CREATE EXTENSION citext SCHEMA public;
"""


@contextmanager
def opened(server: Server, *scripts: str) -> Iterator[AppDatabase]:
    with server.database() as name:
        app = AppDatabase(server.dsn(name))
        app_tables(app, scripts)
        yield app
        app.close()


@pytest.fixture
def ours(postgres: Server, migrated_template: str) -> Iterator[AppDatabase]:
    with postgres.database(template=migrated_template) as name:
        app = AppDatabase(postgres.dsn(name))
        yield app
        app.close()


def test_our_schema_alone_has_no_finding_but_the_intended(ours: AppDatabase) -> None:
    assert findings(ours) == INTENDED


def test_nor_where_every_role_is_granted_everything_on_new_objects(postgres: Server) -> None:
    with opened(postgres, "sql/local/supabase.sql") as database:
        for statement in GENEROUS:
            database.run(statement)
        migrate(database.dsn, local=True)
        assert findings(database) == INTENDED


@pytest.mark.parametrize("front", [False, True], ids=["app", "front"])
def test_over_the_apps_tables_we_add_no_finding_but_the_named(postgres: Server, front: bool) -> None:
    pipeline = ["tests/app_pipeline_schema.sql"] if front else []
    with opened(postgres, "sql/local/supabase.sql", "tests/app_schema.sql", *pipeline) as database:
        before = findings(database)
        bring_up_to_date(database.dsn, local=True, fronts=list(fronts().values()) if front else [])
        after = findings(database)
        assert after - before == INTENDED | BESIDE_THE_APPS
        mended = {one.split(": ")[1].split(".")[0] for one in before - after}
        assert {"cost_records", "model_artifacts", "training_jobs", "metrics_points", "notifications"} <= mended
        assert faults(database.dsn) == []
        for row in database.run(
            "SELECT format('DROP POLICY %%I ON %%I', policyname, tablename) AS drop FROM pg_policies "
            "WHERE tablename = ANY(%s) AND NOT starts_with(policyname, 'trainer_')",
            ([*{one.split()[1] for one in BESIDE_THE_APPS}],),
        ):
            database.run(row["drop"])
        assert findings(database) - before == INTENDED and faults(database.dsn) == []


def test_where_the_apps_migrations_come_after_ours_an_index_that_is_there_twice_may_be_dropped(
    ours: AppDatabase,
) -> None:
    app_tables(ours, ("tests/app_schema.sql",))
    twice = [one.split(": ")[2].split(", ") for one in findings(ours) if one.startswith("duplicate_index")]
    assert twice, "the app has made none of our indexes again"
    for pair in twice:
        (made_by_us,) = (name for name in pair if not name.startswith("idx_"))
        ours.run(f"DROP INDEX {made_by_us}")
    assert not any(one.startswith("duplicate_index") for one in findings(ours))
    assert faults(ours.dsn) == []


def test_the_security_page_names_every_exception() -> None:
    for finding in INTENDED | BESIDE_THE_APPS:
        rule, subject = finding.split(": ")
        name = subject.split("(")[0].split()[0]
        assert f"`{rule}`" in PAGE and f"`{name}" in PAGE, finding


def test_an_index_of_the_app_counts_as_ours_and_ours_may_be_dropped_for_it(ours: AppDatabase) -> None:
    ours.run("DROP INDEX training_artifacts_of_dataset")
    assert faults(ours.dsn) == ["index training_artifacts_of_dataset is missing"]
    ours.run("CREATE INDEX artifacts_by_dataset ON model_artifacts (dataset_id, created_at)")
    assert faults(ours.dsn) == [] and findings(ours) == INTENDED
    ours.run("DROP INDEX artifacts_by_dataset")
    ours.run("CREATE INDEX artifacts_by_dataset ON model_artifacts (dataset_id) WHERE deleted_at IS NULL")
    assert faults(ours.dsn) == ["index training_artifacts_of_dataset is missing"]
    migrate(ours.dsn, local=True)
    assert faults(ours.dsn) == [] and findings(ours) == INTENDED


def test_every_rule_finds_its_flaw(postgres: Server) -> None:
    with opened(postgres, "sql/local/supabase.sql") as database:
        database.run("ALTER TABLE auth.users ADD UNIQUE (email)")
        for statement in FLAWED.split(";\n"):
            if statement.strip():
                database.run(statement)
        assert set(RULES) - {one.split(": ")[0] for one in findings(database)} == set()
