"""One connection to Postgres, opened when needed and reopened after a loss.

Every statement is its own transaction. Nothing here retries: each call makes one attempt and the next
call reconnects, so the caller alone decides how long to wait for the database.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.rows import dict_row
from psycopg.types.json import set_json_loads
from psycopg.waiting import wait_async

from daemon.database.login import KEEPALIVE, login_fault
from daemon.database.refusal import NOT_MIGRATED, first_line, is_of_the_app, refusal_of
from daemon.database.url import is_transaction_pooler
from daemon.database.wire import Sent, Wire
from daemon.errors import (
    DatabaseAway,
    DatabaseUnprepared,
    HostUnfit,
    RowsHidden,
    StatementRefused,
    TrainerError,
)

ROLE = "training_daemon"
_MIGRATE = "run `brightrun-trainer migrate` against this database"
# Errors that pass with time. ReadOnlySqlTransaction: we reached a standby after a failover.
_AWAY = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction, OSError)
# Our prepared statements are missing, or another client's are here: a transaction pooler on an unusual port.
_NOT_OUR_SESSION = (psycopg.errors.InvalidSqlStatementName, psycopg.errors.DuplicatePreparedStatement)
# Migrations also grant the rights of the daemon's role.
_UNPREPARED = (*NOT_MIGRATED, psycopg.errors.InsufficientPrivilege)
# Raised by our own triggers when a statement would move only part of a job because row security hides the rest.
_ROWS_HIDDEN = "PT503"
# How long an app's transaction on one job's row may delay our writes about all other jobs.
_LOCK_MILLISECONDS = 1000


class _Connection(psycopg.AsyncConnection[dict[str, Any]]):
    """A connection that is dropped when its statement is cancelled.

    On cancellation, psycopg asks the server to stop and waits for the answer, which a dead server never sends."""

    async def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:  # noqa: ASYNC109
        return await wait_async(gen, self.pgconn.socket, interval=interval, timeout=timeout)


class Database:
    """One connection under a lock. `fetch` runs a statement. `send` and `answer` split it in two, so that a caller can
    send before it waits.

    Raises DatabaseAway when Postgres is unreachable or cannot answer now (refused, broken, timed out, deadlock,
    serialization, read-only), HostUnfit when waiting would not help, StatementRefused when Postgres rejects what the
    statement does. Once `proven`, missing tables or rights raise DatabaseUnprepared (a DatabaseAway) instead of
    HostUnfit, so that they do not end a healthy daemon."""

    def __init__(
        self,
        dsn: str,
        *,
        application_name: str,
        connect_seconds: float = 10.0,
        statement_seconds: float = 30.0,
        transaction_pooler: bool | None = None,
    ) -> None:
        self._dsn = dsn
        self._application_name = application_name
        self._connect_seconds = connect_seconds
        self._statement_seconds = statement_seconds
        self.transaction_pooler = is_transaction_pooler(dsn) if transaction_pooler is None else transaction_pooler
        self._connection: _Connection | None = None
        self._wire: Wire | None = None
        self._lock = asyncio.Lock()
        self._setup: tuple[str, ...] = ()
        self._session_user: str | None = None
        self.connected_at: float | None = None
        # Set by the caller once a real statement has succeeded.
        self.proven = False
        self._unprepared_in_a_row = 0

    async def __aenter__(self) -> Database:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def role_warning(self) -> str | None:
        """What the operator should change about the login. None if it is the daemon's own, or before we connect."""
        if self._session_user is None or self._session_user == ROLE:
            return None
        return (
            f"logged in as {self._session_user}, working as {ROLE} by SET ROLE: "
            f"give the daemon a login of its own (ALTER ROLE {ROLE} LOGIN PASSWORD '...') and put it into DATABASE_URL"
        )

    async def fetch(self, statement: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Runs one statement in its own transaction and returns its rows (empty if it returns none)."""
        async with self._lock:
            return await self._in_time(self._fetch(statement, parameters or {}))

    def send(self, statement: str, parameters: Mapping[str, Any]) -> Sent | None:
        """Sends a statement immediately; `answer` awaits it. None if another statement would have to finish first."""
        return None if self._wire is None else self._wire.send(statement, parameters)

    async def answer(self, sent: Sent) -> list[dict[str, Any]]:
        """Awaits the rows of a statement that `send` has sent."""
        return await self._in_time(sent.rows())

    async def close(self) -> None:
        """Closes the connection if there is one; the next `fetch` opens a new one."""
        connection, self._connection = self._connection, None
        self.connected_at = None
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()
        if connection is not None:
            await connection.close()

    async def _in_time(self, answer: Coroutine[Any, Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        connecting = self._connect_seconds if self._connection is None else 0.0
        # Postgres ends slow statements itself; the extra time is for a server that does not answer at all.
        allowed = self._statement_seconds + connecting + min(5.0, self._statement_seconds)
        try:
            async with asyncio.timeout(allowed):
                rows = await answer
            self._unprepared_in_a_row = 0
            return rows
        except TimeoutError:
            await self.close()
            raise DatabaseAway(f"no answer within {allowed:.0f} s") from None
        except asyncio.CancelledError:
            # The answer may still arrive: the next statement must not read it as its own.
            await self.close()
            raise
        except (psycopg.Error, OSError) as error:
            # A closed connection counts as away, whatever error a pooler gave as it closed (XX000, 3D000).
            lost = self._connection is not None and self._connection.closed
            if shared := isinstance(error, _NOT_OUR_SESSION):
                self.transaction_pooler = True
            if lost or shared or isinstance(error, _AWAY) or _is_altered(error):
                if not _connection_survives(error):
                    await self.close()
                raise DatabaseAway(first_line(error)) from error
            if isinstance(error, psycopg.Error) and error.sqlstate == _ROWS_HIDDEN:
                raise RowsHidden(first_line(error)) from error
            if _breaks_a_policy(error) and not is_of_the_app(error):
                # No right is missing: one of the app's policies also applies to the daemon's role.
                raise RowsHidden(f"{first_line(error)}; doctor names the policy") from error
            if isinstance(error, _UNPREPARED) and not is_of_the_app(error):
                await self._renew_session()
                raise self._missing(
                    f"the database is not prepared for this version ({first_line(error)}): {_MIGRATE}"
                ) from error
            if isinstance(error, psycopg.Error):
                raise refusal_of(error) from error
            raise

    def _missing(self, message: str) -> TrainerError:
        return DatabaseUnprepared(message) if self.proven else HostUnfit(message)

    async def _renew_session(self) -> None:
        """Closes the connection after two such errors in a row: a new session finds a recreated role, schema or table.
        Not after the first: one of the app's tables may refuse us for months while everything else works."""
        self._unprepared_in_a_row += 1
        if self.proven and self._unprepared_in_a_row > 1:
            await self.close()

    async def _fetch(self, statement: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self._connection is not None and self._connection.closed:
            await self.close()  # it was lost between two calls
        connection = self._connection or await self._connect()
        if self._wire is not None:
            return await self._wire.fetch(statement, parameters)
        # Behind a pooler other clients share the session: settings may last for one transaction only.
        async with connection.transaction():
            await connection.execute("; ".join(line.replace("SET ", "SET LOCAL ", 1) for line in self._setup).encode())
            return await _rows(connection, statement, parameters)

    async def _connect(self) -> _Connection:
        try:
            connection = await _Connection.connect(
                self._dsn,
                autocommit=True,
                row_factory=dict_row,
                # Only Wire prepares statements, and only in a session that no other client inherits.
                prepare_threshold=None,
                connect_timeout=max(2, round(self._connect_seconds)),
                application_name=self._application_name,
                # Overrides the setting of the role or database; poolers accept this startup parameter.
                client_encoding="UTF8",
                **KEEPALIVE,
            )
        except psycopg.OperationalError as error:
            # Only before the first success: later, a pooler may report any error while its database restarts.
            if self._session_user is None:
                raise login_fault(error) from error
            raise
        set_json_loads(_read_json, connection)
        await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
        try:
            await self._prepare(connection)
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        # Last: from now on only Wire reads from this connection.
        self._wire = None if self.transaction_pooler else Wire(connection)
        self.connected_at = time.monotonic()
        return connection

    async def _prepare(self, connection: _Connection) -> None:
        rows = await _rows(
            connection,
            "SELECT session_user::text AS login, role.oid IS NOT NULL AS role_exists, "
            "pg_has_role(session_user, role.oid, 'MEMBER') AS member "
            "FROM (SELECT) AS always LEFT JOIN pg_roles AS role ON role.rolname = %(role)s",
            {"role": ROLE},
        )
        login, exists, member = rows[0]["login"], rows[0]["role_exists"], rows[0]["member"]
        if not exists:
            raise self._missing(f"the role {ROLE} does not exist: {_MIGRATE}")
        if not member:
            raise self._missing(f"{login} may not work as {ROLE}: log in as {ROLE}, or GRANT {ROLE} TO {login}")
        milliseconds = round(self._statement_seconds * 1000)
        self._setup = (
            *((f"SET ROLE {ROLE}",) if login != ROLE else ()),
            f"SET statement_timeout = {milliseconds}",
            f"SET lock_timeout = {min(_LOCK_MILLISECONDS, milliseconds // 2)}",
            f"SET idle_in_transaction_session_timeout = {milliseconds}",
            # We have few statements and their plans do not depend on the values. This halves the claim's time.
            "SET plan_cache_mode = force_generic_plan",
            # Each statement reads an index in order. With statistics of an empty queue, or of one with a single user,
            # the planner reads and sorts the whole table instead: we saw 5,000 rows read for one claim.
            "SET enable_seqscan = off",
            "SET enable_sort = off",
            "SET jit = off",
            "SET search_path = public",
            # Settings of the role or database can break us: timestamps that psycopg cannot parse, numbers with too
            # few digits, statements that fail because of concurrent ones, sessions that end while idle.
            "SET datestyle = 'ISO'",
            "SET timezone = 'UTC'",
            "SET extra_float_digits = 1",
            "SET default_transaction_isolation = 'read committed'",
            "SET idle_session_timeout = 0",
        )
        if not self.transaction_pooler:
            # After connecting, not as startup parameters: PgBouncer refuses those.
            await connection.execute("; ".join(self._setup).encode())
        self._session_user = login


async def _rows(connection: _Connection, statement: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    cursor = await connection.execute(statement.encode(), parameters)
    return await cursor.fetchall() if cursor.description is not None else []


def _read_json(text: str | bytes) -> Any:
    """Parses a tenant's JSON. What Python cannot parse but Postgres stores (a number of 5,000 digits, 3,000 nested
    brackets) stays text: the job's check then reports an invalid spec. An exception here would end the daemon."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text if isinstance(text, str) else text.decode(errors="replace")


def _connection_survives(error: BaseException) -> bool:
    # Only the statement failed, the session is intact: timeout, lock timeout, deadlock, serialization.
    return isinstance(error, psycopg.Error) and error.sqlstate in {"57014", "55P03", "40P01", "40001"}


def _is_altered(error: BaseException) -> bool:
    # The app's migration changed the type of a column that a prepared statement uses: a new session prepares it again.
    return (
        isinstance(error, psycopg.errors.FeatureNotSupported) and error.diag.source_function == "RevalidateCachedQuery"
    )


def _breaks_a_policy(error: BaseException) -> bool:
    """Whether row security rejected a new row. Its SQLSTATE is that of a missing right; only the source differs."""
    return (
        isinstance(error, psycopg.errors.InsufficientPrivilege) and error.diag.source_function == "ExecWithCheckOptions"
    )


# The database is available but refuses: a missing right, or a trigger of the app that raises.
REFUSALS = (HostUnfit, StatementRefused)
