"""What a restore leaves behind is found by doctor's own look and set right by migrate, which says what it found."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from uuid import UUID

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.database.embedded_server import EmbeddedPostgres, installed_binaries, wheel_binaries
from daemon.errors import HostUnfit
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.states import State
from daemon.schema.migrations import bring_up_to_date, faults
from daemon.schema.sql_script import split_statements
from tests.paths import ROOT
from tests.postgres import AppDatabase, Server
from tests.queue.claiming import claimed
from tests.sql.world import populate

LOCAL = ROOT / "sql" / "local" / "supabase.sql"
GUARD = "training_jobs_guard_update"

# What somebody has done, and a word of what is said about it.
BROKEN = {
    "a trigger switched off": (f"ALTER TABLE training_jobs DISABLE TRIGGER {GUARD}", f"{GUARD} is switched off"),
    "all triggers switched off": ("ALTER TABLE training_jobs DISABLE TRIGGER ALL", "triggers, among them"),
    "references unchecked": ("ALTER TABLE metrics_points DISABLE TRIGGER ALL", "does not check its foreign keys"),
    "a trigger for replicas only": (f"ALTER TABLE training_jobs ENABLE REPLICA TRIGGER {GUARD}", f"{GUARD}"),
    "a trigger gone": (f"DROP TRIGGER {GUARD} ON training_jobs", f"{GUARD} is missing"),
    "another trigger gone": ("DROP TRIGGER training_leases_wake ON training_leases", "training_leases_wake is missing"),
    "a trigger of statements gone": (
        "DROP TRIGGER training_leases_end_with_a_move ON training_leases", "training_leases_end_with_a_move is missing",
    ),
    "a policy gone": (
        "DROP POLICY trainer_training_daemon_all ON training_jobs", "trainer_training_daemon_all is missing",
    ),
    "a policy widened": (
        "ALTER POLICY trainer_authenticated_select ON training_jobs USING (true)",
        "training_jobs.trainer_authenticated_select is another one",
    ),
    "row security off": (
        "ALTER TABLE metrics_points DISABLE ROW LEVEL SECURITY", "metrics_points has its row security switched off",
    ),
    "a right gone": ("REVOKE INSERT ON training_events FROM training_daemon", "training_events: INSERT of"),
    "a column's right gone": (
        "REVOKE UPDATE (lease_token) ON training_jobs FROM training_daemon", "training_jobs.lease_token: UPDATE",
    ),
    "anon let in": ("GRANT SELECT ON training_jobs TO anon", "training_jobs: SELECT of anon should not be there"),
    "everybody let in": ("GRANT SELECT ON training_callbacks TO PUBLIC", "SELECT of PUBLIC should not be there"),
    "users let in": ("GRANT UPDATE ON training_leases TO authenticated", "UPDATE of authenticated should not"),
    "a function for everybody": (
        "GRANT EXECUTE ON FUNCTION release_held_jobs() TO authenticated", "EXECUTE of authenticated should not",
    ),
    "an owner changed": (
        "ALTER FUNCTION reap_expired_leases(integer) OWNER TO CURRENT_USER", "reap_expired_leases(most integer)",
    ),
    "a definer no more": (
        "ALTER FUNCTION training_jobs_announce() SECURITY INVOKER", "training_jobs_announce() is another one",
    ),
    "a search path taken away": (
        "ALTER FUNCTION retry_training_job(uuid) RESET search_path", "retry_training_job(job_id uuid) is another one",
    ),
    "a body of an older version": (
        "CREATE OR REPLACE FUNCTION training_jobs_wake() RETURNS trigger LANGUAGE plpgsql SET search_path = '' "
        "AS 'BEGIN RETURN NULL; END'",
        "training_jobs_wake() is another one",
    ),
    "a function gone": ("DROP FUNCTION training_job_status(uuid)", "training_job_status(job_id uuid) is missing"),
    "functions gone with their triggers": ("DROP FUNCTION training_jobs_announce() CASCADE", "training_jobs_announce"),
    "the claim's index gone": ("DROP INDEX training_jobs_due", "index training_jobs_due is missing"),
    "the claim's index another one": (
        "DROP INDEX training_jobs_due; CREATE INDEX training_jobs_due ON training_jobs (id) WHERE due",
        "index training_jobs_due is another one",
    ),
    "the claim's index invalid": (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'training_jobs_due'::regclass",
        "index training_jobs_due is another one",
    ),
    "a view gone": ("DROP VIEW training_orphans", "view training_orphans is missing"),
    "a view that looks past row security": (
        "ALTER VIEW training_job_status SET (security_invoker = false)", "view training_job_status is another one",
    ),
    "a view with another column": (
        "DROP VIEW training_throughput; CREATE VIEW training_throughput AS SELECT 1 AS n",
        "view training_throughput is another one",
    ),
    "a constraint gone": (
        "ALTER TABLE training_callbacks DROP CONSTRAINT training_callbacks_state_known",
        "training_callbacks.training_callbacks_state_known is missing",
    ),
    "a constraint not validated": (
        "ALTER TABLE training_callbacks DROP CONSTRAINT training_callbacks_state_known; "
        "ALTER TABLE training_callbacks ADD CONSTRAINT training_callbacks_state_known "
        "CHECK (state IN ('pending', 'delivered', 'dead')) NOT VALID",
        "training_callbacks.training_callbacks_state_known is another one",
    ),
    "the cap's key gone": (
        "ALTER TABLE training_leases DROP CONSTRAINT training_leases_user_slot", "training_leases_user_slot is missing",
    ),
    "a default gone": ("ALTER TABLE training_jobs ALTER gpu_config DROP DEFAULT", "gpu_config has no default"),
    "a column gone": ("ALTER TABLE training_jobs DROP COLUMN error_hint CASCADE", "error_hint is missing"),
    "not published": (
        "CREATE PUBLICATION supabase_realtime FOR TABLE training_jobs", "publication training_events is missing",
    ),
    "the record unreadable": (
        "REVOKE ALL ON FUNCTION training_find_job(uuid) FROM training_daemon", "training_find_job",
    ),
}  # fmt: skip

# One of each kind.
SEVERAL = (
    "a trigger gone", "a policy widened", "row security off", "a right gone", "a definer no more",
    "the claim's index another one", "a view with another column", "a constraint gone", "a default gone",
)  # fmt: skip


@contextmanager
def installation(postgres: Server, template: str) -> Iterator[AppDatabase]:
    """Looked at once where it is, so that its rows are at home; a job waits, and the app has things of its own."""
    with postgres.database(template=template) as name:
        database = AppDatabase(postgres.dsn(name))
        _install(database)
        yield database
        database.close()


def _install(database: AppDatabase) -> None:
    for statement in (
        "CREATE POLICY own ON training_jobs FOR SELECT TO authenticated USING (false)",
        "CREATE FUNCTION own() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "CREATE TRIGGER own BEFORE UPDATE ON training_jobs FOR EACH ROW EXECUTE FUNCTION own()",
        "ALTER TABLE training_jobs DISABLE TRIGGER own",
        "GRANT SELECT ON datasets TO service_role",
    ):
        database.run(statement)
    assert bring_up_to_date(database.dsn, local=True).repaired == []
    database.insert_job(database.insert_user())
    assert faults(database.dsn) == []


@pytest.fixture
def installed(postgres: Server, migrated_template: str) -> Iterator[AppDatabase]:
    with installation(postgres, migrated_template) as database:
        yield database


@pytest.fixture(scope="module")
def repaired_before(postgres: Server, migrated_template: str) -> Iterator[Callable[[], AppDatabase]]:
    """One database for all damages: each test leaves it whole. Replaced after one that did not."""
    with ExitStack() as stack:
        databases: list[AppDatabase] = []

        def get() -> AppDatabase:
            if not databases or faults(databases[-1].dsn) != []:
                databases.append(stack.enter_context(installation(postgres, migrated_template)))
            return databases[-1]

        yield get


@pytest.mark.parametrize("damage", BROKEN)
def test_what_is_broken_is_found_and_repaired_and_the_apps_own_is_left(
    repaired_before: Callable[[], AppDatabase], damage: str
) -> None:
    installed = repaired_before()
    change, words = BROKEN[damage]
    for statement in split_statements(change):
        installed.run(statement)
    found = faults(installed.dsn)
    assert found is not None and any(words in line for line in found), found
    done = bring_up_to_date(installed.dsn, local=True)
    assert done.applied == [] and any(words in line for line in done.repaired), done
    assert faults(installed.dsn) == []
    own = installed.one("SELECT tgenabled FROM pg_trigger WHERE tgname = 'own'")["tgenabled"]
    assert own in ("D", b"D")
    assert installed.run("SELECT FROM pg_policies WHERE policyname = 'own'") != []
    job = installed.one("SELECT due, held FROM training_jobs")
    assert (job["due"], job["held"]) == (True, False), "a repair holds nobody's job"


def test_what_was_repaired_is_not_repaired_again(installed: AppDatabase) -> None:
    for statement in split_statements("; ".join(BROKEN[damage][0] for damage in SEVERAL)):
        installed.run(statement)
    assert len(bring_up_to_date(installed.dsn, local=True).repaired) >= len(SEVERAL)
    assert bring_up_to_date(installed.dsn, local=True).repaired == []


def test_what_cannot_be_repaired_is_said_and_nothing_is_half_done(installed: AppDatabase) -> None:
    installed.run("DROP INDEX training_jobs_due")
    installed.run("DROP VIEW training_throughput")
    installed.run("CREATE VIEW training_throughput AS SELECT 1 AS n")
    installed.run("CREATE VIEW of_the_app AS SELECT * FROM training_throughput")
    with pytest.raises(HostUnfit, match="view training_throughput is another one"):
        bring_up_to_date(installed.dsn, local=True)
    assert installed.run("SELECT FROM pg_indexes WHERE indexname = 'training_jobs_due'") == []


# -- a dump into another cluster ---------------------------------------------------------------------------------------


def dump(server: EmbeddedPostgres, *options: str) -> bytes:
    return run_tool("pg_dump", *options, "--dbname", server.dsn())


def run_tool(name: str, *arguments: str, text: bytes | None = None) -> bytes:
    folder = installed_binaries() or wheel_binaries()
    assert folder is not None
    done = subprocess.run([str(folder / name), *arguments], input=text, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def as_supabase(server: EmbeddedPostgres) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        for statement in split_statements(LOCAL.read_text()):
            admin.execute(statement.encode())


async def fill(dsn: str) -> tuple[UUID, UUID]:
    """A job of every state; returns one that runs, and its host."""
    app = AppDatabase(dsn)
    async with Database(dsn, application_name="test") as connection:
        jobs = await populate(SqlJobStore(connection), app, app.insert_user())
    worker = app.one("SELECT worker_id FROM training_leases WHERE job_id = %s", (jobs.running,))["worker_id"]
    app.close()
    return jobs.running, worker


async def claim_one(dsn: str) -> UUID:
    async with Database(dsn, application_name="test") as connection:
        store = SqlJobStore(connection)
        job = await claimed(store)
        await store.start_job(job.lease)
        return job.id


@pytest.mark.parametrize("schema_first", [False, True], ids=["whole dump", "data only with triggers off"])
def test_a_dump_restored_into_a_cluster_without_our_role_is_made_whole(schema_first: bool) -> None:
    folder = installed_binaries() or wheel_binaries()
    with EmbeddedPostgres(folder) as old, EmbeddedPostgres(folder) as new:
        as_supabase(old)
        bring_up_to_date(old.dsn(), local=True)
        running, _worker = asyncio.run(fill(old.dsn()))
        with psycopg.connect(old.dsn(), autocommit=True) as admin:
            # The backup is older than its leases are long.
            admin.execute("UPDATE training_leases SET expires_at = now() - interval '1 h'")
        as_supabase(new)
        if schema_first:
            bring_up_to_date(new.dsn(), local=True)
            text = dump(old, "--data-only", "--disable-triggers", "--table=public.*", "--table=auth.users")
        else:
            with psycopg.connect(new.dsn(), autocommit=True) as admin:
                admin.execute("DROP SCHEMA auth CASCADE")
            text = dump(old)
        run_tool("psql", "--quiet", "--dbname", new.dsn(), text=text)
        app = AppDatabase(new.dsn())
        if not schema_first:
            with pytest.raises(HostUnfit, match="training_daemon"):
                faults(new.dsn())
        else:
            assert faults(new.dsn()) != []
        done = bring_up_to_date(new.dsn(), local=True)
        assert done.applied == [] and done.repaired != []
        assert faults(new.dsn()) == [] and bring_up_to_date(new.dsn(), local=True).repaired == []
        row = app.job(running)
        assert (row["status"], row["attempt"]) == (State.QUEUED, 0), "a restore is not the host's death"
        assert asyncio.run(claim_one(new.dsn())) == running
        app.close()


# -- rows ------------------------------------------------------------------------------------------------------------


def past_the_triggers(database: AppDatabase, *statements: str) -> None:
    with database.connect() as session, session.transaction():
        session.execute("SET LOCAL session_replication_role = replica")
        for statement in statements:
            session.execute(statement.encode())


def set_right(database: AppDatabase, words: str) -> None:
    found = faults(database.dsn)
    assert found is not None and any(words in line for line in found), found
    done = bring_up_to_date(database.dsn, local=True)
    assert any(words in line for line in done.repaired), done
    assert faults(database.dsn) == []


async def test_jobs_inserted_with_triggers_off_are_queued(installed: AppDatabase) -> None:
    installed.run("DELETE FROM training_jobs")
    user = installed.insert_user()
    dataset = installed.insert_dataset(user)
    config = """'{"num_gpus": 4, "gpu_type": "H100"}', '{"base_model": "tiny"}'"""
    past_the_triggers(
        installed,
        "INSERT INTO training_jobs (user_id, dataset_id, gpu_config, hyperparameters, queued_at) "
        f"VALUES ('{user}', '{dataset}', {config}, NULL)",
    )
    await asyncio.to_thread(set_right, installed, "1 queued jobs that no claim can see")
    row = installed.one("SELECT * FROM training_jobs")
    assert (row["due"], row["need_gpus"], row["need_gpu_type"], row["base_model"]) == (True, 4, "H100", "tiny")
    assert row["queued_at"] is not None
    assert await claim_one(installed.dsn) == row["id"]


async def test_a_run_without_its_lease_goes_back_uncounted(installed: AppDatabase) -> None:
    job = await claim_one(installed.dsn)
    past_the_triggers(installed, "DELETE FROM training_leases")
    await asyncio.to_thread(set_right, installed, "1 jobs that say they run though nobody holds them")
    assert (installed.job(job)["status"], installed.job(job)["attempt"]) == ("queued", 0)
    assert "notice" in installed.story(job)


async def test_a_lease_of_no_run_is_ended(installed: AppDatabase) -> None:
    job = await claim_one(installed.dsn)
    past_the_triggers(installed, "UPDATE training_jobs SET status = 'queued', due = true, lease_epoch = 0, attempt = 0")
    await asyncio.to_thread(set_right, installed, "1 leases of no run")
    assert await claim_one(installed.dsn) == job


async def test_a_lease_that_ran_out_at_home_is_the_reapers(installed: AppDatabase) -> None:
    job = await claim_one(installed.dsn)
    installed.run("UPDATE training_leases SET expires_at = now() - interval '1 h'")
    assert await asyncio.to_thread(faults, installed.dsn) == []
    assert (await asyncio.to_thread(bring_up_to_date, installed.dsn, local=True)).repaired == []
    assert installed.job(job)["status"] == "running"


def test_numbers_that_would_be_given_twice_go_on_behind_the_highest(installed: AppDatabase) -> None:
    job = installed.one("SELECT id FROM training_jobs")["id"]
    past_the_triggers(
        installed,
        f"INSERT INTO training_events (id, job_id, kind) OVERRIDING SYSTEM VALUE VALUES (900, '{job}', 'notice')",
    )
    done = bring_up_to_date(installed.dsn, local=True)
    assert any("training_events" in line for line in done.repaired)
    assert installed.one("SELECT nextval('training_events_id_seq') AS n")["n"] == 901
