"""The one connection: it says clearly that Postgres is away, and is there again when Postgres is."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import uuid4

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.database.embedded_server import EmbeddedPostgres
from daemon.errors import DatabaseAway, DatabaseUnprepared, HostUnfit
from daemon.queue.rows import Limits
from daemon.queue.sql_job_store import SqlJobStore
from daemon.schema.migrations import migrate
from tests.postgres import AppDatabase, Server


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    """A server of this module's own, to be stopped and killed."""
    with EmbeddedPostgres() as own:
        migrate(own.dsn(), local=True)
        yield own


def database_on(dsn: str, **options: float | bool) -> Database:
    return Database(dsn, application_name="test", **options)  # type: ignore[arg-type]


async def test_a_session_is_prepared_for_the_daemon(database: AppDatabase) -> None:
    async with database_on(database.dsn, statement_seconds=7) as db:
        assert db.role_warning is None
        row = (await db.fetch(
            "SELECT current_user::text AS who, current_setting('statement_timeout') AS statement, "
            "current_setting('application_name') AS name, current_setting('plan_cache_mode') AS plans"
        ))[0]  # fmt: skip
        assert row == {"who": "training_daemon", "statement": "7s", "name": "test", "plans": "force_generic_plan"}
        assert db.role_warning is not None and "ALTER ROLE training_daemon" in db.role_warning


async def test_after_a_restart_one_call_is_away_and_the_next_works_again(server: EmbeddedPostgres) -> None:
    async with database_on(server.dsn()) as db:
        await db.fetch("SELECT 1")
        server.restart()
        with pytest.raises(DatabaseAway):
            await db.fetch("SELECT 1")
        assert await db.fetch("SELECT 1 AS one") == [{"one": 1}]


async def test_calls_are_away_while_a_killed_server_is_and_work_again_after_it(server: EmbeddedPostgres) -> None:
    async with database_on(server.dsn()) as db:
        await db.fetch("SELECT 1")
        try:
            server.kill()
            for _ in range(2):
                with pytest.raises(DatabaseAway):
                    await db.fetch("SELECT 1")
        finally:
            server.start()
        assert await db.fetch("SELECT 1 AS one") == [{"one": 1}]


async def test_a_terminated_session_is_away_once(database: AppDatabase) -> None:
    async with database_on(database.dsn) as db:
        pid = (await db.fetch("SELECT pg_backend_pid() AS pid"))[0]["pid"]
        database.run("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        with pytest.raises(DatabaseAway):
            await db.fetch("SELECT 1")
        assert await db.fetch("SELECT 1 AS one") == [{"one": 1}]


async def test_a_session_that_ended_in_its_sleep_costs_no_try(database: AppDatabase) -> None:
    async with database_on(database.dsn) as db:
        pid = (await db.fetch("SELECT pg_backend_pid() AS pid"))[0]["pid"]
        database.run("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        async with asyncio.timeout(10):
            while db._connection is not None and not db._connection.closed:
                await asyncio.sleep(0.01)
        assert await db.fetch("SELECT 1 AS one") == [{"one": 1}]


@pytest.mark.parametrize("sqlstate", ["57P01", "XX000", "3D000", "42501", None])
async def test_whatever_is_said_by_who_hangs_up_is_away(database: AppDatabase, sqlstate: str | None) -> None:
    """Poolers end sessions in words of their own: Supavisor's are XX000."""
    fields = f"SFATAL\0VFATAL\0C{sqlstate}\0Mit was nice\0\0".encode()
    proxy = await SilenceableProxy.start(database.dsn)
    async with proxy, database_on(proxy.dsn) as db:
        await db.fetch("SELECT 1 AS one")
        proxy.last_words = b"nonsense" if sqlstate is None else b"E" + struct.pack("!I", len(fields) + 4) + fields
        with pytest.raises(DatabaseAway):
            await db.fetch("SELECT 1 AS one")
        assert await db.fetch("SELECT 1 AS one") == [{"one": 1}]


@pytest.mark.parametrize("change", ["ALTER TABLE asked ALTER answer TYPE text", None], ids=["altered", "discarded"])
async def test_a_prepared_statement_that_is_none_any_more_costs_one_try(
    database: AppDatabase, change: str | None
) -> None:
    database.run("CREATE TABLE asked (answer varchar(5)); GRANT SELECT ON asked TO training_daemon")
    async with database_on(database.dsn) as db:
        assert await db.fetch("SELECT answer FROM asked") == []
        if change is not None:
            database.run(change)
        else:
            await db.fetch("DISCARD ALL")  # as a pooler does before it gives a session to somebody else
        with pytest.raises(DatabaseAway):
            await db.fetch("SELECT answer FROM asked")
        assert await db.fetch("SELECT answer FROM asked") == []
        assert db.transaction_pooler == (change is None)


async def test_a_database_with_settings_of_its_own_is_written_and_read_as_any_other(database: AppDatabase) -> None:
    user = database.insert_user()
    wanted = {"max_cost": "12.34", "deadline_at": "2030-01-02 03:04:05+00", "hyperparameters": {"base_model": "ł/😀"}}
    job_id = database.insert_job(user, **wanted)
    name = psycopg.conninfo.conninfo_to_dict(database.dsn)["dbname"]
    for setting in (
        "datestyle = 'German'",
        "timezone = 'America/St_Johns'",
        "intervalstyle = 'sql_standard'",
        "client_encoding = 'LATIN1'",
        "extra_float_digits = -15",
        "default_transaction_isolation = 'serializable'",
        "statement_timeout = '200ms'",
        "idle_session_timeout = '1s'",
    ):
        database.run(f"ALTER DATABASE {name} SET {setting}")
    for pooler in (False, True):
        async with database_on(database.dsn, transaction_pooler=pooler) as db:
            rows = await db.fetch(
                "SELECT base_model, max_cost::float8, deadline_at, %(text)s::text AS text, "
                "current_setting('transaction_isolation') AS isolation, "
                "current_setting('idle_session_timeout') AS idle FROM training_jobs",
                {"text": "ł😀"},
            )
            assert rows == [
                {
                    "base_model": "ł/😀",
                    "max_cost": 12.34,
                    "deadline_at": datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC),
                    "isolation": "read committed",
                    "idle": "0",
                    "text": "ł😀",
                }
            ]
    async with database_on(database.dsn) as db:
        claim = await SqlJobStore(db).claim_job(uuid4(), Limits(models=["ł/😀"]), lease_seconds=30)
    assert claim.job is not None and claim.job.id == job_id and claim.job.max_cost == 12.34


async def test_a_locked_row_holds_up_the_others_for_a_moment_only(database: AppDatabase) -> None:
    """An app's open transaction on one job's row: what is written about all the other jobs waits behind it."""
    job_id = database.insert_job(database.insert_user())
    async with database_on(database.dsn, statement_seconds=60) as db:
        with database.connect() as app, app.transaction():
            app.execute("SELECT FROM training_jobs WHERE id = %s FOR UPDATE", (job_id,))
            locked = asyncio.ensure_future(db.fetch("UPDATE training_jobs SET progress = 1"))
            await asyncio.sleep(0)
            async with asyncio.timeout(15):
                assert await db.fetch("SELECT 1 AS one") == [{"one": 1}]
            with pytest.raises(DatabaseAway, match="lock timeout"):
                await locked


async def test_nobody_listening_is_away() -> None:
    async with database_on("postgresql://postgres@127.0.0.1:9/postgres") as db:
        with pytest.raises(DatabaseAway):
            await db.fetch("SELECT 1")


async def test_a_peer_that_never_answers_is_away_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        async with (
            database_on(
                f"postgresql://postgres@127.0.0.1:{port}/postgres", connect_seconds=2, statement_seconds=1
            ) as db,
            asyncio.timeout(15),
        ):
            with pytest.raises(DatabaseAway):
                await db.fetch("SELECT 1")


async def test_a_half_open_connection_is_away_in_time_and_then_made_anew(database: AppDatabase) -> None:
    proxy = await SilenceableProxy.start(database.dsn)
    async with proxy, database_on(proxy.dsn, connect_seconds=2, statement_seconds=1) as db:
        await db.fetch("SELECT 1")
        proxy.silent.set()
        async with asyncio.timeout(30):
            with pytest.raises(DatabaseAway):
                await db.fetch("SELECT 1")
        proxy.silent.clear()
        assert await db.fetch("SELECT 1 AS one") == [{"one": 1}]


class SilenceableProxy:
    """Forwards bytes to Postgres until told to swallow them: the peer is gone, and TCP has not noticed."""

    def __init__(self, dsn: str) -> None:
        self._target = psycopg.conninfo.conninfo_to_dict(dsn)
        self._tasks: set[asyncio.Task[None]] = set()
        self.silent = asyncio.Event()
        self.last_words: bytes | None = None

    @classmethod
    async def start(cls, dsn: str) -> SilenceableProxy:
        proxy = cls(dsn)
        proxy._server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
        port = proxy._server.sockets[0].getsockname()[1]
        wanted = proxy._target | {"host": "127.0.0.1", "port": port}
        proxy.dsn = psycopg.conninfo.make_conninfo(**wanted)
        return proxy

    async def __aenter__(self) -> SilenceableProxy:
        return self

    async def __aexit__(self, *ending: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(str(self._target["host"]), int(str(self._target["port"])))
        for source, sink in ((reader, there[1]), (there[0], writer)):
            task = asyncio.ensure_future(self._forward(source, sink, to_client=sink is writer))
            self._tasks.add(task)

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, to_client: bool) -> None:
        while data := await source.read(65536):
            if to_client and self.last_words is not None:
                sink.write(self.last_words)
                self.last_words = None
                break
            if not self.silent.is_set():
                sink.write(data)
                await sink.drain()
        sink.close()


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("SELECT pg_sleep(60)", "statement timeout"),
        ("DO $$ BEGIN RAISE serialization_failure; END $$", "serialization_failure"),
        ("DO $$ BEGIN RAISE deadlock_detected; END $$", "deadlock_detected"),
        ("DO $$ BEGIN RAISE SQLSTATE '25006'; END $$", "25006|read_only"),
        ("DO $$ BEGIN RAISE SQLSTATE '53100'; END $$", "53100|disk_full"),
        ("DO $$ BEGIN RAISE SQLSTATE '57P03'; END $$", "57P03|cannot_connect"),
    ],
)
async def test_not_now_is_away_and_the_next_call_works(database: AppDatabase, trouble: str, said: str) -> None:
    async with database_on(database.dsn, statement_seconds=1) as db:
        with pytest.raises(DatabaseAway, match=said):
            await db.fetch(trouble)
        assert await db.fetch("SELECT 1 AS one") == [{"one": 1}]


async def test_a_cancelled_caller_leaves_a_usable_connection(database: AppDatabase) -> None:
    async with database_on(database.dsn) as db:
        call = asyncio.ensure_future(db.fetch("SELECT pg_sleep(30)"))
        async with asyncio.timeout(10):
            while not database.run(
                "SELECT FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(30)' AND state = 'active'"
            ):
                await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await db.fetch("SELECT 1 AS one") == [{"one": 1}]


async def test_calls_at_once_take_turns(database: AppDatabase) -> None:
    async with database_on(database.dsn) as db:
        answers = await asyncio.gather(*(db.fetch("SELECT %(n)s::int AS n", {"n": n}) for n in range(20)))
    assert [rows[0]["n"] for rows in answers] == list(range(20))


async def test_a_database_without_our_migration_says_which_command_to_run(postgres: Server) -> None:
    with postgres.database() as name:
        async with database_on(postgres.dsn(name)) as db:
            with pytest.raises(HostUnfit, match="brightrun-trainer migrate"):
                await db.fetch("SELECT FROM training_jobs")


async def test_a_cluster_without_our_role_says_which_command_to_run() -> None:
    with EmbeddedPostgres() as bare:
        async with database_on(bare.dsn()) as db:
            with pytest.raises(HostUnfit, match=r"training_daemon does not exist.*brightrun-trainer migrate"):
                await db.fetch("SELECT 1")


async def test_a_login_that_may_not_be_the_daemon_is_told_so(server: EmbeddedPostgres) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE ROLE somebody LOGIN PASSWORD '{server.password}'")
    async with database_on(server.dsn(user="somebody")) as db:
        with pytest.raises(HostUnfit, match="GRANT training_daemon TO somebody"):
            await db.fetch("SELECT 1")


async def test_a_wrong_password_is_no_outage(server: EmbeddedPostgres) -> None:
    async with database_on(server.dsn().replace(server.password, "wrong")) as db:
        with pytest.raises(HostUnfit, match="password authentication failed"):
            await db.fetch("SELECT 1")


async def test_behind_a_transaction_pooler_nothing_is_left_on_the_session(database: AppDatabase) -> None:
    async with database_on(database.dsn, transaction_pooler=True) as db:
        rows = await db.fetch("SELECT current_user::text AS who, current_setting('statement_timeout') AS timeout")
        assert rows == [{"who": "training_daemon", "timeout": "30s"}]
        for _ in range(8):
            await db.fetch("SELECT 1 AS one")
        assert db._connection is not None
        cursor = await db._connection.execute(
            "SELECT current_user::text AS who, (SELECT count(*) FROM pg_prepared_statements) AS prepared"
        )
        assert await cursor.fetchone() == {"who": "postgres", "prepared": 0}
    assert database_on("postgresql://u@h.example:6543/postgres").transaction_pooler
    assert not database_on("postgresql://u@h.example:5432/postgres").transaction_pooler


# -- what was there and is missing for a while -------------------------------------------------------------------

SIGHT = "SELECT FROM training_leases LIMIT 0"


@pytest.mark.parametrize(
    ("taken", "given_back"),
    [
        ("REVOKE SELECT ON training_leases FROM training_daemon", "GRANT SELECT ON training_leases TO training_daemon"),
        ("REVOKE USAGE ON SCHEMA public FROM training_daemon, PUBLIC", "GRANT USAGE ON SCHEMA public TO PUBLIC"),
        ("ALTER TABLE training_leases RENAME TO gone", "ALTER TABLE gone RENAME TO training_leases"),
        ("ALTER SCHEMA public RENAME TO gone", "ALTER SCHEMA gone RENAME TO public"),
    ],
    ids=["right", "right on the schema", "table", "schema"],
)
async def test_what_has_served_us_and_is_missing_is_an_outage(
    database: AppDatabase, taken: str, given_back: str
) -> None:
    async with database_on(database.dsn) as db:
        await db.fetch(SIGHT)
        database.run(taken)
        with pytest.raises(HostUnfit, match="brightrun-trainer migrate"):
            await db.fetch(SIGHT)
        db.proven = True
        for _ in range(3):
            with pytest.raises(DatabaseUnprepared, match="brightrun-trainer migrate"):
                await db.fetch(SIGHT)
        database.run(given_back)
        assert await db.fetch(SIGHT) == []


async def test_a_login_that_was_the_daemon_and_may_not_be_for_a_while_is_an_outage(server: EmbeddedPostgres) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE ROLE somebody_else LOGIN PASSWORD '{server.password}'")
        admin.execute("GRANT training_daemon TO somebody_else")
        async with database_on(server.dsn(user="somebody_else")) as db:
            await db.fetch(SIGHT)
            db.proven = True
            admin.execute("REVOKE training_daemon FROM somebody_else")
            await db.close()
            with pytest.raises(DatabaseUnprepared, match="GRANT training_daemon TO somebody_else"):
                await db.fetch(SIGHT)
            admin.execute("GRANT training_daemon TO somebody_else")
            assert await db.fetch(SIGHT) == []


async def test_one_table_that_refuses_for_months_costs_no_connection(database: AppDatabase) -> None:
    database.run("REVOKE ALL ON metrics_points FROM training_daemon")
    async with database_on(database.dsn) as db:
        await db.fetch(SIGHT)
        db.proven, connected_at = True, db.connected_at
        for _ in range(3):
            with pytest.raises(DatabaseUnprepared):
                await db.fetch("SELECT FROM metrics_points LIMIT 0")
            await db.fetch(SIGHT)
        assert db.connected_at == connected_at


async def test_tables_that_were_made_anew_are_found_by_statements_that_were_prepared_before(postgres: Server) -> None:
    with postgres.database() as name:
        migrate(postgres.dsn(name), local=True)
        app = AppDatabase(postgres.dsn(name))
        async with database_on(app.dsn) as db:
            store, user_id = SqlJobStore(db), app.insert_user()
            app.insert_job(user_id)
            assert (await store.claim_job(uuid4(), Limits(), lease_seconds=60)).job is not None
            app.run("DROP SCHEMA public CASCADE")
            app.run("DROP SCHEMA supabase_migrations CASCADE")
            with pytest.raises(DatabaseUnprepared):
                await store.claim_job(uuid4(), Limits(), lease_seconds=60)
            app.run("CREATE SCHEMA public")
            migrate(app.dsn, local=True)
            anew = app.insert_job(app.insert_user())
            job = (await store.claim_job(uuid4(), Limits(), lease_seconds=60)).job
            assert job is not None and job.id == anew
        app.close()
