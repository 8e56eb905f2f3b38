"""One database reader for all browsers: it reads, finds what changed, and sends the changes to each of them.

Its cost for the database does not depend on the number of browsers. Without any, it is nothing; else one connection
that LISTENs and one that reads. It reads every half second, sooner after a NOTIFY that a job was queued or cancelled,
and at most four times a second. It reads leases, which are as few as running jobs, and the newest events, so it scans
no table and needs no index on changing columns (one on `updated_at` would prevent HOT updates: each progress write
would have to update every index). It also reads the hosts every two seconds; the head of the queue with the reasons
for waiting when a job moved, at most twice a second and for at most a twentieth of the time, because that sorts all
waiting jobs; and everything every fifteen seconds, for changes that leave no event (a priority, a deleted row). The
curve of a running job is read once and then extended from the steps in the job's row.

Progress sends no NOTIFY (which takes a database-wide lock at commit), so the reader polls.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import structlog

from daemon.chores import Chores, worked
from daemon.database.connection import Database
from daemon.database.listener import Listener
from daemon.database.retry import AWAY_SECONDS
from daemon.database.statements import statement
from daemon.errors import DatabaseAway, HostUnfit, StatementRefused
from daemon.gateway.dashboard.sse import Client, message
from daemon.gateway.dashboard.state import MOST_ENDED, Board
from daemon.queue.states import FINAL
from daemon.tasks import wait_at_most
from daemon.troubles import Troubles

log = structlog.get_logger()

LOOK_SECONDS = 0.5
SHORTEST_SECONDS = 0.25
WORKERS_SECONDS = 2.0
QUEUE_SECONDS = 10.0
QUEUE_SHORTEST_SECONDS = 0.5
# Reading the queue may take one part in this many of the time: its head is found by sorting all waiting jobs.
QUEUE_SHARE = 20
WHOLE_SECONDS = 15.0
BEAT_SECONDS = 5.0
# So that a reloaded page finds the reader still running.
LINGER_SECONDS = 3.0
STATEMENT_SECONDS = 5.0
MOST_QUEUED = 200
MOST_NEWS = 1000
CURVE_POINTS = 240
# Changes kept for browsers that lose their connection for a moment.
KEPT_CHANGES = 120
MOST_CLIENTS = 500


class TooManyWatchers(Exception):
    """No more browsers can be served."""


class Feed:
    """Run `run` as a task; each browser joins and leaves."""

    def __init__(self, dsn: str, troubles: Troubles | None = None) -> None:
        self._dsn = dsn
        self._troubles = troubles or Troubles()
        self._clients: set[Client] = set()
        self._watched = asyncio.Event()
        self._wake = asyncio.Event()
        self._board = Board()
        self._known = False
        self._away: str | None = None
        # Message numbers of an earlier run of this process are not valid here.
        self._run = uuid4().hex[:8]
        self._number = 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT_CHANGES)
        self._closed = False

    # -- browsers ----------------------------------------------------------------------------------------------

    def join(self, last_event_id: str, is_welcome: Callable[[], bool]) -> Client:
        """Connects a browser, or reconnects it after the message of this id, for as long as `is_welcome` holds.

        Raises TooManyWatchers."""
        if self._closed or len(self._clients) >= MOST_CLIENTS:
            raise TooManyWatchers
        client = Client(is_welcome)
        self._clients.add(client)
        self._watched.set()
        if self._known:
            missed = self._missed(last_event_id)
            for text in [self._snapshot()] if missed is None else missed:
                client.offer(text)
            client.offer(self._beat())
        if self._away is not None:
            client.offer(self._beat())
        return client

    def leave(self, client: Client) -> None:
        self._clients.discard(client)
        if not self._clients:
            self._watched.clear()
            self._wake.set()

    @property
    def watchers(self) -> int:
        return len(self._clients)

    def close(self) -> None:
        """Ends every stream; no browser can join any more."""
        self._closed = True
        for client in self._clients:
            client.end()

    def _missed(self, last_event_id: str) -> list[bytes] | None:
        """The changes after this message; None if some of them are no longer kept."""
        run, _, number = last_event_id.partition("-")
        if run != self._run or not (number.isascii() and number.isdigit() and len(number) < 19):
            return None
        after = int(number)
        kept = [text for place, text in self._kept if place > after]
        return kept if len(kept) == self._number - after else None

    def _tell(self, text: bytes) -> None:
        for client in list(self._clients):
            if client.is_welcome():
                client.offer(text)
            else:
                client.end()

    def _snapshot(self) -> bytes:
        return message("snapshot", _json(self._board.snapshot()), f"{self._run}-{self._number}")

    def _beat(self) -> bytes:
        return message("beat", _json({"away": self._away}))

    # -- the reader --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reads while any browser is connected, until cancelled."""
        try:
            while True:
                await self._watched.wait()
                async with Chores(self._troubles) as chores:
                    listener = Listener(self._dsn, wake=self._wake.set, on_cancel=self._hear_cancel)
                    chores.start("dashboard listener", listener.run)
                    try:
                        async with Database(
                            self._dsn,
                            application_name="brightrun-trainer dashboard",
                            statement_seconds=STATEMENT_SECONDS,
                        ) as database:
                            log.debug("dashboard_watched")
                            await self._read_while_watched(_Reader(database, self._board))
                    finally:
                        # Also after the reader failed: it starts again, and browsers get everything again.
                        self._forget()
                log.debug("dashboard_unwatched")
        except asyncio.CancelledError:
            self.close()
            raise

    def _hear_cancel(self, _job_id: UUID) -> None:
        self._wake.set()

    def _forget(self) -> None:
        self._board = Board()
        self._known, self._away = False, None
        self._run, self._number = uuid4().hex[:8], 0
        self._kept.clear()

    async def _read_while_watched(self, reader: _Reader) -> None:
        beat_at = 0.0
        while self._clients or await wait_at_most(self._watched, LINGER_SECONDS):
            self._wake.clear()
            begun = time.monotonic()
            pause = LOOK_SECONDS
            try:
                await reader.look()
            except (DatabaseAway, HostUnfit, StatementRefused) as error:
                pause = AWAY_SECONDS
                reader.begin_anew()
                if self._away is None:
                    log.warning("dashboard_without_database", error=str(error))
                    # The exact error belongs in the log, not on the page.
                    self._away = datetime.now(UTC).isoformat()
                    self._tell(self._beat())
            else:
                worked()
                self._tell_changes()
                if self._away is not None:
                    self._away = None
                    self._tell(self._beat())
            if begun - beat_at >= BEAT_SECONDS:
                beat_at = begun
                self._tell(self._beat())
            await asyncio.sleep(max(0.0, begun + SHORTEST_SECONDS - time.monotonic()))
            await wait_at_most(self._wake, max(0.0, begun + pause - time.monotonic()))

    def _tell_changes(self) -> None:
        changes = self._board.changes()
        if not self._known:
            self._known = True
            self._tell(self._snapshot())
        elif changes:
            self._number += 1
            text = message("change", _json(changes), f"{self._run}-{self._number}")
            self._kept.append((self._number, text))
            self._tell(text)


class _Reader:
    """Decides what to read at each look."""

    def __init__(self, database: Database, board: Board) -> None:
        self._database = database
        self._board = board
        self.begin_anew()

    def begin_anew(self) -> None:
        """Makes the next look read everything: at the start, and after the database was away."""
        self._after: int | None = None
        self._whole_at = self._workers_at = self._queue_at = float("-inf")
        self._queue_read_at = self._queue_seconds = 0.0
        self._day_is_old = True

    async def look(self) -> None:
        """Brings the board up to date. Raises what Database raises."""
        now = time.monotonic()
        whole = now - self._whole_at >= WHOLE_SECONDS
        if now >= self._queue_at:
            await self._read_queue()
        if now - self._workers_at >= WORKERS_SECONDS:
            self._workers_at = now
            self._board.take_workers(await self._fetch("list_workers", all=False))
        await self._read_jobs(whole=whole)
        if whole:
            self._whole_at = now
        # The jobs that moved have changed the queue: send it with them, if it may be read again now.
        if time.monotonic() >= self._queue_at:
            await self._read_queue()
            if self._board.missing_jobs():
                await self._read_jobs(whole=False)

    async def _read_jobs(self, *, whole: bool) -> None:
        board = self._board
        ids = [job_id for job_id, _ in board.queue["order"]] if whole else board.missing_jobs()
        with_day = whole or self._day_is_old
        row = (
            await self._fetch(
                "read_board",
                after=self._after,
                whole=whole,
                day=with_day,
                ids=ids,
                most_news=MOST_NEWS,
                most_ended=MOST_ENDED,
            )
        )[0]
        self._after = row["settled"]
        board.take_jobs(row["jobs"], whole=whole)
        if missing := board.missing_curves():
            board.take_curves(missing, await self._fetch("read_curves", ids=missing, most=CURVE_POINTS))
        moved = board.take_story(row["news"], row["settled"])
        if moved:
            # The queue's order and reasons have changed: read it soon, but within its share of the time.
            self._queue_at = min(self._queue_at, self._queue_read_at + self._queue_gap)
        if with_day:
            board.take_day(row["day"])
        self._day_is_old = bool(moved & FINAL)

    @property
    def _queue_gap(self) -> float:
        return max(QUEUE_SHORTEST_SECONDS, QUEUE_SHARE * self._queue_seconds)

    async def _read_queue(self) -> None:
        begun = time.monotonic()
        self._board.take_queue(await self._fetch("read_queue", most=MOST_QUEUED))
        self._queue_read_at = time.monotonic()
        self._queue_seconds = self._queue_read_at - begun
        self._queue_at = self._queue_read_at + max(QUEUE_SECONDS, self._queue_gap)

    async def _fetch(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        return await self._database.fetch(statement(name, "reads"), parameters)


def _json(value: dict[str, Any]) -> str:
    """Adds the gateway's time, so that the page can compute ages even if the browser's clock is wrong."""
    return json.dumps({"now": datetime.now(UTC).isoformat(), **value}, separators=(",", ":"), default=str)
