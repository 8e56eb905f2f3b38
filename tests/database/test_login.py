"""The first login: what never heals by waiting is told apart from an outage, with what to do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from daemon.cli.data.connection import connect as connect_a_command
from daemon.database.connection import Database
from daemon.database.embedded_server import EmbeddedPostgres
from daemon.database.login import login_fault
from daemon.errors import DatabaseAway, HostUnfit, TrainerError
from daemon.schema.migrations import migrate, pending
from tests.doubles.pooler import PretendedPooler


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    """A server of this module's own: its rules of access are rewritten."""
    with EmbeddedPostgres() as own:
        migrate(own.dsn(), local=True)
        with psycopg.connect(own.dsn(), autocommit=True) as admin:
            admin.execute(f"CREATE ROLE unloved NOLOGIN PASSWORD '{own.password}'")
            admin.execute(f"CREATE ROLE lonely LOGIN CONNECTION LIMIT 0 PASSWORD '{own.password}'")
            for name in ("only_tls", "rejected", "unlisted"):
                admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{own.password}'")
            _let_in(
                admin,
                "local all postgres scram-sha-256",
                "hostssl all only_tls all scram-sha-256",
                "host all rejected all reject",
                "host all postgres,unloved,lonely,nobody,somebody all scram-sha-256",
            )
        yield own


def _let_in(admin: psycopg.Connection[tuple[object, ...]], *rules: str) -> None:
    row = admin.execute("SHOW hba_file").fetchone()
    assert row is not None
    Path(str(row[0])).write_text("\n".join(rules) + "\n")
    admin.execute("SELECT pg_reload_conf()")


async def fault_of(dsn: str, seconds: float = 10.0) -> TrainerError:
    """What a daemon's first login says; a command's and migrate's say the same."""
    async with Database(dsn, application_name="test", connect_seconds=seconds) as database:
        with pytest.raises((HostUnfit, DatabaseAway)) as daemons:
            await database.fetch("SELECT 1")
    for other in (lambda: migrate(dsn, local=False), lambda: pending(dsn)) if seconds == 10.0 else ():
        with pytest.raises(type(daemons.value)) as its:
            other()
        assert str(its.value) == str(daemons.value)
    return daemons.value  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("user", "database", "query", "words"),
    [
        ("only_tls", "postgres", "", ("no pg_hba.conf entry", "sslmode=require")),
        ("rejected", "postgres", "", ("pg_hba.conf rejects", "Network Restrictions")),
        ("unlisted", "postgres", "", ("no pg_hba.conf entry", "Network Restrictions")),
        ("postgres", "postgres", "?sslmode=require", ("does not support SSL", "sslmode=disable")),
        ("postgres", "nowhere", "", ('database "nowhere" does not exist', "correct the database's name")),
        ("nobody", "postgres", "", ("password authentication failed", "check user and password")),
        ("unloved", "postgres", "", ("not permitted to log in", "ALTER ROLE")),
    ],
)
async def test_what_a_server_refuses_for_good(
    server: EmbeddedPostgres, user: str, database: str, query: str, words: tuple[str, ...]
) -> None:
    fault = await fault_of(server.dsn(database, user) + query)
    assert isinstance(fault, HostUnfit), fault
    for word in words:
        assert word in str(fault)
    assert "\n" not in str(fault) and server.password not in str(fault)


async def test_a_server_whose_connections_are_all_taken_is_waited_for(server: EmbeddedPostgres) -> None:
    fault = await fault_of(server.dsn(user="lonely"))
    assert isinstance(fault, DatabaseAway) and "this passes when others disconnect" in str(fault)


async def test_a_certificate_that_is_not_trusted_is_told_with_what_to_do(tmp_path: Path) -> None:
    with EmbeddedPostgres() as server:
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            row = admin.execute("SHOW data_directory").fetchone()
            assert row is not None
            key, certificate = (Path(str(row[0])) / name for name in ("server.key", "server.crt"))
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                 "-days", "2", "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)],
                check=True, capture_output=True,
            )  # fmt: skip
            owner = Path(str(row[0])).stat()
            for file in (key, certificate):
                file.chmod(0o600)
                os.chown(file, owner.st_uid, owner.st_gid)
            admin.execute("ALTER SYSTEM SET ssl = on")
            admin.execute("SELECT pg_reload_conf()")
        other = tmp_path / "other.crt"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-days", "2", "-subj", "/CN=other", "-keyout", str(tmp_path / "key"), "-out", str(other)],
            check=True, capture_output=True,
        )  # fmt: skip
        dsn = f"host=127.0.0.1 port={server.port} user=postgres password={server.password} dbname=postgres"
        for query, words in (
            (f"sslmode=verify-ca sslrootcert={other}", "certificate verify failed"),
            (f"sslmode=verify-ca sslrootcert={tmp_path}/absent.crt", "root certificate file"),
            (f"sslmode=verify-full sslrootcert={certificate}", "does not match"),
        ):
            with pytest.raises(HostUnfit, match=words) as unfit:
                async with Database(f"{dsn} {query}", application_name="test") as database:
                    await database.fetch("SELECT 1")
            assert "sslmode" in str(unfit.value)


# The words of Supavisor (lib/supavisor/errors), PgBouncer (src/client.c) and Postgres, and what they mean for us.
FOR_GOOD = [
    ("XX000", "Tenant or user not found", "ROLE.PROJECT"),
    ("XX000", "(ENOTFOUND) tenant/user training_daemon.abcdef not found", "ROLE.PROJECT"),
    ("XX000", "(ENOIDENTIFIER) no tenant identifier provided (external_id or sni_hostname required)", "ROLE.PROJECT"),
    ("XX000", "Address not in tenant allow_list: {192, 0, 2, 1}", "Network Restrictions"),
    ("XX000", "(EADDRNOTALLOWED) address not in tenant allow_list: {192, 0, 2, 1}", "Network Restrictions"),
    ("XX000", "SSL connection is required", "sslmode=require"),
    ("XX000", "(ESSLREQUIRED) SSL connection is required for user: training_daemon", "sslmode=require"),
    ("XX000", "(EBANNED) tenant is banned: unpaid", "dashboard"),
    ("28P01", 'password authentication failed for user "training_daemon"', "check user and password"),
    ("08P01", "SSL required", "sslmode=require"),
    ("08P01", "no such user: training_daemon", "create the role"),
    ("08P01", "no such database: postgres", "correct the database's name"),
    ("08P01", "SASL authentication failed", "check user and password"),
    ("08P01", "unsupported startup parameter in options: reference", "options"),
    ("42501", 'permission denied for database "postgres"', "GRANT CONNECT"),
]
PASSES = [
    ("53300", "sorry, too many clients already", "passes"),
    ("53300", "remaining connection slots are reserved for roles with the SUPERUSER attribute", "passes"),
    ("XX000", "MaxClientsInSessionMode: max clients reached - in Session mode max clients are limited to 15", "passes"),
    ("XX000", "(EMAXCLIENTSESSION) max clients reached in session mode - pool_size: 15", "pass"),
    ("XX000", "Max client connections reached", "passes"),
    ("08P01", "no more connections allowed (max_client_conn)", "passes"),
    ("08P01", "server login has been failing, try again later (server_login_retry)", "login has been failing"),
    ("XX000", "(EDBHANDLEREXITED) connection to database closed. Check logs for more information", "closed"),
    ("57P03", "the database system is starting up", "starting up"),
    ("57P03", "the database system is shutting down", "shutting down"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "message", "words"), FOR_GOOD)
async def test_what_a_pooler_refuses_for_good(state: str, message: str, words: str) -> None:
    with PretendedPooler((state, message)) as pooler:
        fault = await fault_of(pooler.dsn)
    assert isinstance(fault, HostUnfit), fault
    assert message in str(fault) and words in str(fault) and "\n" not in str(fault)


@pytest.mark.parametrize(("state", "message", "words"), PASSES)
async def test_what_a_pooler_refuses_for_a_while(state: str, message: str, words: str) -> None:
    with PretendedPooler((state, message)) as pooler:
        fault = await fault_of(pooler.dsn)
    assert isinstance(fault, DatabaseAway), fault
    assert message in str(fault) and words in str(fault) and "\n" not in str(fault)


async def test_what_is_no_postgres_is_told_so() -> None:
    with PretendedPooler(b"HTTP/1.1 400 Bad Request\r\n\r\n") as web:
        fault = await fault_of(web.dsn)
    assert isinstance(fault, HostUnfit) and "no Postgres" in str(fault)


async def test_a_closed_port_and_a_host_that_answers_nothing_are_waited_for() -> None:
    with PretendedPooler(None) as silent:
        assert isinstance(await fault_of(silent.dsn, seconds=2.0), DatabaseAway)
    # Its port is closed now.
    assert isinstance(await fault_of(silent.dsn), DatabaseAway)


async def test_a_host_that_no_dns_knows_is_waited_for_and_named() -> None:
    fault = await fault_of("postgresql://me:x@nowhere.invalid/app")
    assert isinstance(fault, DatabaseAway) and "nowhere.invalid" in str(fault) and "paused project" in str(fault)


def test_an_ipv6_host_without_a_way_there_is_sent_to_the_session_pooler() -> None:
    """libpq's words where the kernel has no route to an IPv6 address, written from its source (fe-connect.c)."""
    said = (
        'connection failed: connection to server at "2600:1f18::1", port 5432 failed: Network is unreachable\n'
        "\tIs the server running on that host and accepting TCP/IP connections?"
    )
    fault = login_fault(psycopg.OperationalError(said))
    assert isinstance(fault, HostUnfit) and "session pooler" in str(fault) and "\n" not in str(fault)
    # A network that is down has IPv4 addresses as well.
    down = said.replace("2600:1f18::1", "192.0.2.1")
    assert isinstance(login_fault(psycopg.OperationalError(down)), DatabaseAway)
    both = f"{down}\nMultiple connection attempts failed. All failures were:\n- host: 'h', hostaddr: '2600::1': {said}"
    assert isinstance(login_fault(psycopg.OperationalError(both)), DatabaseAway)


async def test_after_the_first_success_no_word_of_a_pooler_ends_the_daemon(server: EmbeddedPostgres) -> None:
    async with Database(server.dsn(), application_name="test") as database:
        await database.fetch("SELECT 1")
        await database.close()
        with PretendedPooler(("XX000", "Tenant or user not found")) as pooler:
            database._dsn = pooler.dsn
            with pytest.raises(DatabaseAway, match="Tenant or user not found"):
                await database.fetch("SELECT 1")


def test_a_command_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with PretendedPooler(("XX000", "Tenant or user not found")) as pooler:
        monkeypatch.setenv("DATABASE_URL", pooler.dsn)
        with pytest.raises(HostUnfit, match=r"ROLE\.PROJECT"):
            connect_a_command()
