"""One connection to Postgres, lazily made and made again, that says clearly when Postgres is away.

Every statement is a transaction of its own. Nothing here retries: one attempt a call, and the next
call connects anew, so that the caller alone decides how long to wait for the database.
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
# What says "not now" rather than "never", beside psycopg's OperationalError: a standby after a failover.
_AWAY = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction, OSError)
# Our prepared statements are not there, or another's are: a transaction pooler on a port of its own choice.
_NOT_OUR_SESSION = (psycopg.errors.InvalidSqlStatementName, psycopg.errors.DuplicatePreparedStatement)
# A right that the daemon's role lacks comes with the migrations too.
_UNPREPARED = (*NOT_MIGRATED, psycopg.errors.InsufficientPrivilege)
# Raised by our own triggers where a statement would leave a job half moved: row security hides the other half.
_ROWS_HIDDEN = "PT503"
# How long an app's transaction on one job's row may hold up what we write about all the others.
_LOCK_MILLISECONDS = 1000


class _Connection(psycopg.AsyncConnection[dict[str, Any]]):
    """A connection that is given up together with its statement.

    Left to itself, psycopg answers a cancellation by asking the server to stop and waiting for its answer, which a dead
    peer never gives."""

    async def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:  # noqa: ASYNC109
        return await wait_async(gen, self.pgconn.socket, interval=interval, timeout=timeout)


class Database:
    """One connection under a lock. `fetch` is the interface; `send` and `answer` are its halves, for who is in a hurry.

    Raises DatabaseAway for whatever means that Postgres is not there or could not answer now (refused, broken,
    timed out, deadlock, serialization, read-only), HostUnfit where waiting would not help, StatementRefused where
    Postgres objects to what the statement does. Once `proven`, what is missing is missing for a while
    (DatabaseUnprepared, a DatabaseAway): it ends no daemon that was healthy."""

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
        # Set by whoever has had real work done here.
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
        """What the operator should mend about the login, once connected; None when it is the daemon's own."""
        if self._session_user is None or self._session_user == ROLE:
            return None
        return (
            f"logged in as {self._session_user}, working as {ROLE} by SET ROLE: "
            f"give the daemon a login of its own (ALTER ROLE {ROLE} LOGIN PASSWORD '...') and put it into DATABASE_URL"
        )

    async def fetch(self, statement: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Run one statement in a transaction of its own and return its rows (none for one that returns nothing)."""
        async with self._lock:
            return await self._in_time(self._fetch(statement, parameters or {}))

    def send(self, statement: str, parameters: Mapping[str, Any]) -> Sent | None:
        """Send a statement at once, for `answer` to await; None where it would have to wait for its turn."""
        return None if self._wire is None else self._wire.send(statement, parameters)

    async def answer(self, sent: Sent) -> list[dict[str, Any]]:
        """The rows of a statement that `send` has sent."""
        return await self._in_time(sent.rows())

    async def close(self) -> None:
        """Close the connection if there is one; the next `fetch` makes a new one."""
        connection, self._connection = self._connection, None
        self.connected_at = None
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()
        if connection is not None:
            await connection.close()

    async def _in_time(self, answer: Coroutine[Any, Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        connecting = self._connect_seconds if self._connection is None else 0.0
        # Postgres itself ends what is late; the margin is for one that does not answer at all.
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
            # The answer may still be on its way: nobody else must read it.
            await self.close()
            raise
        except (psycopg.Error, OSError) as error:
            # Whatever a pooler said as it hung up (XX000, 3D000, nothing that is Postgres's): hung up is away.
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
                # No right is missing: a policy of somebody's binds the daemon's role as well.
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
        """Twice in a row without an answer in between: whatever was made anew (role, schema, tables), a new session
        finds it. Not at once: one table of the app's may refuse for months what everything else takes."""
        self._unprepared_in_a_row += 1
        if self.proven and self._unprepared_in_a_row > 1:
            await self.close()

    async def _fetch(self, statement: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self._connection is not None and self._connection.closed:
            await self.close()  # it ended while nobody asked
        connection = self._connection or await self._connect()
        if self._wire is not None:
            return await self._wire.fetch(statement, parameters)
        # Behind a pooler a session is anybody's: whatever is set is set for one transaction.
        async with connection.transaction():
            await connection.execute("; ".join(line.replace("SET ", "SET LOCAL ", 1) for line in self._setup).encode())
            return await _rows(connection, statement, parameters)

    async def _connect(self) -> _Connection:
        try:
            connection = await _Connection.connect(
                self._dsn,
                autocommit=True,
                row_factory=dict_row,
                # Only where a session is ours, by the wire; never where the next client inherits it.
                prepare_threshold=None,
                connect_timeout=max(2, round(self._connect_seconds)),
                application_name=self._application_name,
                # Ours, whatever the role or the database is set to; poolers know this one.
                client_encoding="UTF8",
                **KEEPALIVE,
            )
        except psycopg.OperationalError as error:
            # Only before the first success: later a pooler may say anything while its database restarts.
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
        # Last: from now on nobody else reads from this connection.
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
            # Our statements are few and their plans do not depend on the values: halves the claim.
            "SET plan_cache_mode = force_generic_plan",
            # Each of them walks an index in its order. Statistics of an empty queue, or of one with a single user,
            # talk the planner into reading and sorting the whole table instead: 5,000 rows for one claim were seen.
            "SET enable_seqscan = off",
            "SET enable_sort = off",
            "SET jit = off",
            "SET search_path = public",
            # What the role or the database may be set to otherwise: instants that psycopg cannot read, numbers cut
            # short, statements that fail because another one ran beside them, sessions that end in their sleep.
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
    """JSON of a tenant's. What Postgres stores and Python cannot read (a number of 5,000 digits, 3,000 brackets deep)
    stays text, which the row's own check reports as an invalid spec; raised here, it would end the daemon."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text if isinstance(text, str) else text.decode(errors="replace")


def _connection_survives(error: BaseException) -> bool:
    # The statement was given up, the session lives: timeout, lock timeout, deadlock, serialization.
    return isinstance(error, psycopg.Error) and error.sqlstate in {"57014", "55P03", "40P01", "40001"}


def _is_altered(error: BaseException) -> bool:
    # A column of a prepared statement has another type now, by a migration of the app's: a new session prepares anew.
    return (
        isinstance(error, psycopg.errors.FeatureNotSupported) and error.diag.source_function == "RevalidateCachedQuery"
    )


def _breaks_a_policy(error: BaseException) -> bool:
    """A new row that row security does not admit: the same SQLSTATE as a missing right, told by where it was raised."""
    return (
        isinstance(error, psycopg.errors.InsufficientPrivilege) and error.diag.source_function == "ExecWithCheckOptions"
    )


# A database that is there and will not: a right that is missing, a trigger of the app's own that objects.
REFUSALS = (HostUnfit, StatementRefused)
