"""Sends prepared statements directly through libpq and reads the answers in one permanent callback of the event loop.

For each statement a psycopg cursor creates a dozen objects, a generator and two registrations with the event loop.
In a daemon that has just been woken this code is cold: it takes a fifth of the time from an insert to its claim.

Kept for a number: with this, and with the claim that a wake-up sends at once (Worker.wake), a claim follows its insert
in 1.52 times what a bare LISTEN loop takes, without both in 2.07 times (benchmarks/pickup_latency.py, four interleaved
rounds). Two is what the service promises. Of an idle queue's claim, 0.60 ms through this are 0.81 ms through a cursor.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult

_PARAMETER = re.compile(r"%(?:\((\w+)\)s|(%))")


class Wire:
    """Runs one statement at a time over a connection of its own. Raises psycopg's errors.

    Callers of `fetch` take turns; `send` may come in between. A cancelled call leaves its answer unread: close the
    wire then, and the connection with it."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._prepared: dict[str, _Prepared] = {}
        self._results: list[PGresult] = []
        self._answer: asyncio.Future[PGresult] | None = None
        self._loop = asyncio.get_running_loop()
        self._socket = self._pgconn.socket
        self._loop.add_reader(self._socket, self._read)
        self._watching = True

    def close(self) -> None:
        self._stop_watching()
        self._end(psycopg.OperationalError("the connection was closed before the answer came"))

    async def fetch(self, statement: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns the rows of one statement with `%(name)s` parameters. It is prepared at its first use and kept."""
        prepared = self._prepared.get(statement) or await self._prepare(statement)
        await self._idle()
        return await self._execute(prepared, parameters).rows()

    def send(self, statement: str, parameters: Mapping[str, Any]) -> Sent | None:
        """Sends it immediately. None if it is not prepared yet, another is running, or the connection is lost."""
        prepared = self._prepared.get(statement)
        if prepared is None or self._answer is not None:
            return None
        try:
            return self._execute(prepared, parameters)
        except psycopg.OperationalError:
            return None

    def _execute(self, prepared: _Prepared, parameters: Mapping[str, Any]) -> Sent:
        values = prepared.dump(parameters)
        return Sent(prepared, self._sent(lambda: self._pgconn.send_query_prepared(prepared.name, values)))

    async def _prepare(self, statement: str) -> _Prepared:
        await self._idle()
        prepared = _Prepared(statement, self._connection)
        # The statement itself gives the parameter types: one plan for all values.
        await self._sent(lambda: self._pgconn.send_prepare(prepared.name, prepared.text))
        self._prepared[statement] = prepared
        return prepared

    async def _idle(self) -> None:
        while self._answer is not None:
            await asyncio.wait((self._answer,))

    def _sent(self, send: Callable[[], None]) -> asyncio.Future[PGresult]:
        try:
            send()
            rest = self._pgconn.flush()
        except psycopg.Error:
            if self._connection.closed:
                self._stop_watching()
            raise
        if rest:
            self._loop.add_writer(self._socket, self._flush_rest)
        self._results = []
        self._answer = self._loop.create_future()
        return self._answer

    def _flush_rest(self) -> None:
        try:
            if self._pgconn.flush():
                return
        except psycopg.Error as error:
            self._stop_watching()
            self._end(error)
            return
        self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        try:
            self._pgconn.consume_input()
            while not self._pgconn.is_busy():
                result = self._pgconn.get_result()
                if result is None:
                    self._end()
                    return
                self._results.append(result)
        except psycopg.Error as error:
            self._stop_watching()
            self._end(error)

    def _stop_watching(self) -> None:
        """At once when the connection is lost, and only once: libpq has closed the socket, and the number of a closed
        socket is given to the next one, which may be another connection of ours."""
        if self._watching:
            self._watching = False
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)

    def _end(self, error: psycopg.Error | None = None) -> None:
        answer, self._answer = self._answer, None
        if answer is None or answer.done():
            return
        if self._results and self._results[-1].status == ExecStatus.FATAL_ERROR:
            error = psycopg.errors.error_from_result(self._results[-1])
        if error is not None:
            answer.set_exception(error)
            answer.exception()  # marks it as retrieved: no caller may be waiting for what `send` sent
        else:
            answer.set_result(self._results[-1])


@dataclass(frozen=True)
class Sent:
    """A statement that was sent and is not answered yet."""

    _prepared: _Prepared
    _answer: asyncio.Future[PGresult]

    async def rows(self) -> list[dict[str, Any]]:
        """Waits for its rows."""
        return self._prepared.load(await self._answer)


class _Prepared:
    """A prepared statement with its dumpers and loaders, which are chosen at its first answer."""

    def __init__(self, statement: str, connection: psycopg.AsyncConnection[Any]) -> None:
        # If a pooler shares this session without our knowing, a name must mean the same statement to every client.
        self.name = hashlib.blake2s(statement.encode(), digest_size=16).hexdigest().encode()
        self._parameters: list[str] = []
        self.text = _PARAMETER.sub(self._number, statement).encode()
        self._formats = [PyFormat.TEXT] * len(self._parameters)
        self._transformer = Transformer(connection)
        self._columns: tuple[str, ...] | None = None

    def _number(self, found: re.Match[str]) -> str:
        if found[2]:
            return "%"
        if found[1] not in self._parameters:
            self._parameters.append(found[1])
        return f"${self._parameters.index(found[1]) + 1}"

    def dump(self, values: Mapping[str, Any]) -> Sequence[Any]:
        return self._transformer.dump_sequence([values[name] for name in self._parameters], self._formats)

    def load(self, result: PGresult) -> list[dict[str, Any]]:
        self._transformer.set_pgresult(result, set_loaders=self._columns is None)
        if self._columns is None:
            self._columns = tuple((result.fname(i) or b"").decode() for i in range(result.nfields))
        return self._transformer.load_rows(0, result.ntuples, self._row)

    def _row(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self._columns or (), values, strict=True))
