"""The doctor finds an older dispatcher by its schedule, whatever its name, and by what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from daemon.database.connection import Database
from daemon.database.embedded_server import EmbeddedPostgres
from daemon.doctor.check_result import CheckResult, Status
from daemon.doctor.dispatcher_check import check_older_dispatcher
from daemon.schema.migrations import migrate
from tests.postgres import BINARIES, AppDatabase
from tests.sql.world import orphan

# As pg_cron makes it: readable by everybody who may use the schema, and each sees only his own.
CRON = """
    CREATE SCHEMA cron;
    CREATE TABLE cron.job (
        jobid bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, schedule text NOT NULL, command text NOT NULL,
        database text NOT NULL DEFAULT current_database(), username text NOT NULL DEFAULT current_user,
        active boolean NOT NULL DEFAULT true, jobname name
    );
    GRANT SELECT ON cron.job TO public;
    ALTER TABLE cron.job ENABLE ROW LEVEL SECURITY;
    CREATE POLICY cron_job_policy ON cron.job USING (username = current_user);
"""
POST = (
    "SELECT net.http_post(url := 'https://project.supabase.co/functions/v1/{}', "
    'headers := \'{{"Authorization": "Bearer eyJsecret"}}\'::jsonb)'
)
DISPATCHING = {
    "by the function's name": ("every minute", POST.format("process-training-jobs")),
    "of the newer module": ("tick", POST.format("process-pipeline-jobs")),
    "by its own name": ("lora-dispatcher", POST.format("run")),
    "through a function of the database": ("nightly", "SELECT public.poke()"),
    "straight to the endpoint": ("tick", "SELECT net.http_post(url := 'https://api.runpod.ai/v2/x/run')"),
    "by its own statement": ("tick", "UPDATE training_jobs SET status = 'initializing' WHERE status = 'queued'"),
}


@pytest.fixture
def cron(database: AppDatabase) -> AppDatabase:
    for statement in CRON.split(";"):
        if statement.strip():
            database.run(statement)
    return database


def schedule(database: AppDatabase, name: str | None, command: str) -> None:
    database.run("INSERT INTO cron.job (schedule, command, jobname) VALUES ('* * * * *', %s, %s)", (command, name))


async def check(dsn: str) -> CheckResult:
    async with Database(dsn, application_name="test") as connection:
        return await check_older_dispatcher(connection)


@pytest.mark.parametrize("way", DISPATCHING)
async def test_a_schedule_that_dispatches_is_named_with_what_it_calls(cron: AppDatabase, way: str) -> None:
    name, command = DISPATCHING[way]
    cron.run(f"CREATE FUNCTION poke() RETURNS text LANGUAGE sql AS $x$ SELECT $y${POST.format('train')}$y$ $x$")
    schedule(cron, name, command)
    schedule(cron, "ours", "SELECT reap_expired_leases(); SELECT prune_training_history('90 days')")
    schedule(cron, None, POST.format("send-mails"))
    found = await check(cron.dsn)
    assert found.light is Status.YELLOW and found.detail.startswith("Still scheduled: ") and name in found.detail
    assert "ours" not in found.detail and "send-mails" not in found.detail and "eyJ" not in found.detail
    assert found.advice is not None and "cron.unschedule" in found.advice
    cron.run("UPDATE cron.job SET active = false WHERE jobname = %s", (name,))
    after = await check(cron.dsn)
    assert after.light is Status.GREEN and "job 3 (* * * * *, calls send-mails)" in after.detail


async def test_a_webhook_on_new_jobs_is_named(database: AppDatabase) -> None:
    database.run("CREATE SCHEMA supabase_functions")
    database.run(
        "CREATE FUNCTION supabase_functions.http_request() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RETURN NEW; END $$"
    )
    for name, verb, called in (("hook", "INSERT", "training-dispatch"), ("mail", "UPDATE", "training-mail")):
        database.run(
            f"CREATE TRIGGER {name} AFTER {verb} ON training_jobs FOR EACH ROW EXECUTE FUNCTION "
            f"supabase_functions.http_request('https://p.supabase.co/functions/v1/{called}', 'POST', 'Bearer eyJx')"
        )
    found = await check(database.dsn)
    assert found.light is Status.YELLOW and "eyJ" not in found.detail and "mail" not in found.detail
    assert "hook (an insert into training_jobs, calls training-dispatch)" in found.detail


async def test_one_whose_schedule_is_elsewhere_is_seen_by_what_it_does(database: AppDatabase) -> None:
    assert (await check(database.dsn)).light is Status.GREEN
    user = database.insert_user()
    job = database.insert_job(user)
    with database.acting("service_role") as service:
        service.execute(
            "INSERT INTO notifications (user_id, type, title, message, metadata) "
            "VALUES (%s, 'job_started', 'x', 'x', jsonb_build_object('job_id', %s::uuid))",
            (user, job),
        )
    found = await check(database.dsn)
    assert found.light is Status.YELLOW and "was at work" in found.detail
    assert found.advice is not None and "elsewhere" in found.advice
    database.run("UPDATE training_events SET at = at - interval '3 days'")
    assert (await check(database.dsn)).light is Status.GREEN
    orphan(database, user)
    assert "1 row that one runs itself was changed" in (await check(database.dsn)).detail


async def test_what_cannot_be_looked_at_is_said(cron: AppDatabase) -> None:
    cron.run("CREATE ROLE maker_of_doctor NOSUPERUSER NOLOGIN")
    try:
        # The one who migrated is neither a superuser nor above row security: pg_cron shows him his own jobs at most.
        cron.run("GRANT CREATE ON SCHEMA public TO maker_of_doctor")
        cron.run("ALTER FUNCTION training_find_dispatchers() OWNER TO maker_of_doctor")
        schedule(cron, "every minute", POST.format("process-training-jobs"))
        assert "cannot be read" in (await check(cron.dsn)).detail
        cron.run("GRANT USAGE ON SCHEMA cron TO maker_of_doctor")
        found = await check(cron.dsn)
        assert found.light is Status.YELLOW and "only the jobs of the role" in found.detail
        assert found.advice is not None and "as the administrator" in found.advice
    finally:
        cron.run("ALTER FUNCTION training_find_dispatchers() OWNER TO CURRENT_USER")
        cron.run("DROP OWNED BY maker_of_doctor")
        cron.run("DROP ROLE maker_of_doctor")


@contextmanager
def real_pg_cron() -> Iterator[tuple[AppDatabase, str]]:
    """A server with pg_cron loaded, and the daemon's own login. Skips where no server on this machine has it."""
    for binaries in BINARIES.values():
        with EmbeddedPostgres(binaries) as server:
            app = AppDatabase(server.dsn())
            has = app.run("SELECT FROM pg_available_extensions WHERE name = 'pg_cron'")
            app.close()
        if has:
            with EmbeddedPostgres(binaries, settings={"shared_preload_libraries": "pg_cron"}) as server:
                app = AppDatabase(server.dsn())
                app.run("CREATE EXTENSION pg_cron")
                migrate(app.dsn, local=True)
                app.run(f"ALTER ROLE training_daemon LOGIN PASSWORD '{server.password}'")
                yield app, server.dsn(user="training_daemon")
                app.close()
            return
    pytest.skip("no server here has pg_cron (apt-get install postgresql-15-cron)")


@pytest.mark.system
async def test_a_job_of_the_real_pg_cron_is_found_by_the_daemons_own_login() -> None:
    with real_pg_cron() as (app, daemon):
        app.run("SELECT cron.schedule('every minute', '* * * * *', %s)", (POST.format("process-training-jobs"),))
        # Its own eyes would see nothing, and say that all is well.
        app.run("GRANT USAGE ON SCHEMA cron TO training_daemon")
        app.run("SET ROLE training_daemon")
        assert app.run("SELECT jobname FROM cron.job") == []
        app.run("RESET ROLE")
        found = await check(daemon)
        assert found.light is Status.YELLOW
        assert "every minute (* * * * *, calls process-training-jobs)" in found.detail
        app.run("SELECT cron.unschedule('every minute')")
        assert (await check(daemon)).light is Status.GREEN
