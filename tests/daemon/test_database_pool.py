"""A database that a test gets from the pool is as fresh as one of its own."""

from __future__ import annotations

import pytest

from tests.database_pool import DatabasePool
from tests.postgres import AppDatabase, Server

TRACES = [
    "ALTER TABLE training_jobs ADD remark text",
    "ALTER TABLE training_jobs DISABLE TRIGGER USER",
    "ALTER TABLE training_jobs REPLICA IDENTITY FULL",
    "REVOKE SELECT ON training_leases FROM training_daemon",
    "REVOKE USAGE ON SCHEMA public FROM PUBLIC",
    "CREATE POLICY hides ON training_jobs AS RESTRICTIVE USING (false)",
    "CREATE OR REPLACE FUNCTION reap_expired_leases() RETURNS SETOF record LANGUAGE sql AS 'SELECT WHERE false'",
    "CREATE PUBLICATION everything FOR TABLE training_jobs",
    "CREATE TABLE of_the_app (n int)",
    "CREATE INDEX ON training_jobs (progress)",
    "ALTER SEQUENCE training_events_id_seq INCREMENT 5",
    "INSERT INTO supabase_migrations.schema_migrations (version) VALUES ('9')",
    "DELETE FROM supabase_migrations.schema_migrations",
    "SELECT lo_create(0)",
    "ANALYZE training_jobs",
    "COMMENT ON TABLE training_jobs IS 'of the app'",
    "COMMENT ON SCHEMA public IS 'of the app'",
    "DROP SCHEMA public CASCADE",
]


@pytest.mark.parametrize("trace", TRACES)
def test_a_database_that_keeps_a_trace_is_lent_to_nobody_else(
    postgres: Server, database_pool: DatabasePool, trace: str
) -> None:
    with database_pool.database() as first:
        app = AppDatabase(postgres.dsn(first))
        app.insert_job(app.insert_user())
        app.run("DROP FUNCTION reap_expired_leases" if "REPLACE FUNCTION" in trace else "SELECT")
        app.run(trace)
        app.close()
    with database_pool.database() as second:
        assert second != first


def test_rows_sequences_sessions_and_settings_are_gone_before_the_next_test(
    postgres: Server, migrated_template: str
) -> None:
    with DatabasePool(postgres, migrated_template) as pool:
        firsts = []
        for _ in range(2):
            with pool.database() as name:
                app = AppDatabase(postgres.dsn(name))
                assert app.run("SELECT FROM training_jobs") == app.run("SELECT FROM auth.users") == []
                assert (
                    app.one("SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database()")["n"] == 1
                )
                job = app.insert_job(app.insert_user())
                firsts.append((name, app.one("SELECT id FROM training_events WHERE job_id = %s", (job,))["id"]))
                app.run("SELECT pg_advisory_lock(1)")
                assert app.run("SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") == []
        assert firsts[0] == firsts[1]


def test_the_planner_knows_no_more_of_an_emptied_table_than_of_a_new_one(
    postgres: Server, migrated_template: str
) -> None:
    numbers = (
        "SELECT relname, relpages, reltuples, pg_relation_size(oid) FROM pg_class "
        "WHERE relkind = 'r' AND relname LIKE 'training%' ORDER BY 1"
    )
    with DatabasePool(postgres, migrated_template) as pool:
        seen = []
        for _ in range(2):
            with pool.database() as name:
                app = AppDatabase(postgres.dsn(name))
                seen.append((name, app.run(numbers)))
                user = app.insert_user()
                for _ in range(100):
                    app.insert_job(user)
                app.run("VACUUM training_jobs")
                app.close()
        assert seen[0] == seen[1]


def test_a_database_that_is_refused_to_everybody_is_no_end_of_the_tests(
    postgres: Server, migrated_template: str
) -> None:
    with DatabasePool(postgres, migrated_template) as pool:
        with pool.database() as first:
            admin = AppDatabase(postgres.url)
            admin.run(f"ALTER DATABASE {first} ALLOW_CONNECTIONS false")
            admin.close()
        with pool.database() as second:
            assert second != first
