"""Statements over the wire: whatever happens to one of them, the next caller gets its own answer or an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from daemon.database.connection import Database
from daemon.database.wire import Wire
from daemon.errors import DatabaseAway
from tests.daemon_process import eventually
from tests.postgres import AppDatabase


@pytest.fixture
async def wire(database: AppDatabase) -> AsyncIterator[Wire]:
    connection = await psycopg.AsyncConnection.connect(database.dsn, autocommit=True)
    wire = Wire(connection)
    yield wire
    wire.close()
    await connection.close()


async def one(wire: Wire, statement: str, **parameters: Any) -> Any:
    (row,) = await wire.fetch(statement, parameters)
    (value,) = row.values()
    return value


async def test_values_come_back_as_they_went(wire: Wire) -> None:
    key, at = uuid4(), datetime(2026, 11, 22, 17, 30, 0, 123456, tzinfo=UTC)
    row = {
        "key": key,
        "at": at,
        "n": 7,
        "x": 0.1,
        "yes": True,
        "none": None,
        "text": "it's 100 %",
        "names": ["a,b", '"'],
    }
    casts = {"key": "uuid", "at": "timestamptz", "n": "int", "x": "float8", "yes": "boolean", "none": "int"}
    columns = ", ".join(f"%({name})s::{casts.get(name, 'text')} AS {name}" for name in row if name != "names")
    assert await wire.fetch(f"SELECT {columns}, %(names)s::text[] AS names", row) == [row]
    assert await one(wire, "SELECT %(it)s::jsonb AS it", it=Jsonb({"a": [1, None]})) == {"a": [1, None]}


async def test_one_plan_serves_every_type_of_value(wire: Wire) -> None:
    statement = "SELECT %(n)s::bigint AS n"
    assert [await one(wire, statement, n=n) for n in (1, 2**15, 2**40, None)] == [1, 2**15, 2**40, None]
    assert await one(wire, "SELECT count(*)::int AS n FROM pg_prepared_statements") == 2


async def test_a_parameter_named_twice_is_sent_once_and_a_doubled_percent_is_one(wire: Wire) -> None:
    assert await one(wire, "SELECT %(a)s::int * 10 + %(b)s::int + %(a)s::int %% 2 AS n", a=3, b=4) == 35


async def test_a_statement_without_rows_gives_none(wire: Wire) -> None:
    assert await wire.fetch("CREATE TEMP TABLE kept (n int)", {}) == []
    assert await wire.fetch("INSERT INTO kept VALUES (%(n)s)", {"n": 1}) == []


async def test_an_error_is_its_callers_and_the_next_statement_works(wire: Wire) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        await wire.fetch("SELECT 1 / %(n)s::int", {"n": 0})
    with pytest.raises(psycopg.errors.SyntaxError):
        await wire.fetch("SELEKT", {})
    with pytest.raises(psycopg.ProgrammingError, match="cannot adapt"):
        await wire.fetch("SELECT %(n)s::text", {"n": object()})
    with pytest.raises(KeyError):
        await wire.fetch("SELECT %(n)s::text", {})
    assert await one(wire, "SELECT %(n)s::text AS n", n="x") == "x"


async def test_many_megabytes_go_both_ways(wire: Wire) -> None:
    """More than the socket's buffers hold: the rest is sent when there is room."""
    big = "0123456789abcdef" * (1 << 20)
    assert await one(wire, "SELECT %(big)s::text AS big", big=big) == big


async def test_what_was_sent_runs_once_and_others_wait_for_it(wire: Wire) -> None:
    await wire.fetch("CREATE TEMP TABLE sent (n int)", {})
    insert = "INSERT INTO sent VALUES (%(n)s) RETURNING n"
    assert wire.send(insert, {"n": 0}) is None, "it is not prepared yet: that takes an answer"
    await wire.fetch(insert, {"n": 1})
    sent = wire.send(insert, {"n": 2})
    assert sent is not None
    assert wire.send(insert, {"n": 3}) is None, "one at a time"
    assert await one(wire, "SELECT array_agg(n ORDER BY n) AS n FROM sent") == [1, 2]
    assert await sent.rows() == [{"n": 2}]


async def test_a_lost_connection_is_an_error_at_once_and_for_ever(database: AppDatabase, wire: Wire) -> None:
    pid = await one(wire, "SELECT pg_backend_pid() AS pid")
    await wire.fetch("SELECT 1 AS n", {})
    under_way = asyncio.ensure_future(wire.fetch("SELECT pg_sleep(60)", {}))
    await asyncio.to_thread(
        eventually,
        lambda: database.run(
            "SELECT FROM pg_stat_activity WHERE pid = %s AND query ~ 'sleep' AND state = 'active'", (pid,)
        ),
    )
    database.run("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    async with asyncio.timeout(10):
        with pytest.raises(psycopg.OperationalError):
            await under_way
        with pytest.raises(psycopg.OperationalError):
            await wire.fetch("SELECT 1 AS n", {})
    assert wire.send("SELECT 1 AS n", {}) is None


async def test_a_connection_lost_while_nobody_asks_costs_no_cpu(database: AppDatabase, wire: Wire) -> None:
    """A closed socket is readable for ever: whoever goes on to watch it never sleeps again."""
    pid = await one(wire, "SELECT pg_backend_pid() AS pid")
    database.run("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    await asyncio.sleep(0.1)
    loop, rounds = asyncio.get_running_loop(), 0
    until = loop.time() + 0.2
    while loop.time() < until:
        await asyncio.sleep(0.02)
        rounds += 1
    assert not loop.remove_reader(wire._socket) and rounds < 20


@pytest.mark.parametrize("lost_in", ["reading", "sending"])
async def test_what_a_lost_connection_leaves_takes_nothing_from_a_new_one(database: AppDatabase, lost_in: str) -> None:
    """The kernel gives the number of a closed socket to the next one: whoever closes late must leave that one alone."""
    ask = "SELECT pg_backend_pid() AS pid"
    async with (
        Database(database.dsn, application_name="one") as one,
        Database(database.dsn, application_name="two") as two,
    ):
        pids = [(await each.fetch(ask))[0]["pid"] for each in (one, two)]
        # Both at once, as a restart or a network does.
        database.run("SELECT pg_terminate_backend(pid, 5000) FROM unnest(%s::int[]) AS pid", (pids,))
        if lost_in == "reading":
            await asyncio.sleep(0.2)
        else:
            # Before the loop has looked at the sockets; the second statement of each finds them closed.
            assert [each.send(ask, {}) for each in (one, two) for _ in range(2)][1::2] == [None, None]
        async with asyncio.timeout(10):
            for each in (two, one, two, one):
                try:
                    await each.fetch(ask)
                except DatabaseAway:
                    await each.fetch(ask)


async def test_closing_ends_who_waits(wire: Wire) -> None:
    under_way = asyncio.ensure_future(wire.fetch("SELECT pg_sleep(60)", {}))
    await asyncio.sleep(0.2)
    wire.close()
    with pytest.raises(psycopg.OperationalError, match="closed before the answer"):
        await under_way
