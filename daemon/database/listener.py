"""Wakes the daemon: one connection that LISTENs, checks that notifications arrive, and always reconnects.

A notification is only a reason to look at the rows. The daemon also polls slowly, because a NOTIFY
sent while we reconnect is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from uuid import UUID, uuid4

import psycopg
import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from daemon.chores import worked
from daemon.database.login import KEEPALIVE, login_reason

log = structlog.get_logger()

CHANNEL = "training_jobs"
# The same interval and timeout as pg-boss (docs/api/constructor, `heartbeat`): a half-open
# connection is found within fifteen seconds instead of the two hours of TCP's own keepalive.
PROBE_SECONDS = 10.0
PROBE_LIMIT_SECONDS = 5.0
PROOF_LIMIT_SECONDS = 30.0


class Listener:
    """Calls `wake` when a job may be claimable, `on_cancel` when a job was cancelled, and `on_delivery` when a delivery
    may be due."""

    def __init__(
        self,
        dsn: str,
        *,
        wake: Callable[[], None],
        on_cancel: Callable[[UUID], None],
        on_delivery: Callable[[], None] = lambda: None,
    ) -> None:
        self._dsn = dsn
        self._wake = wake
        self._on_cancel = on_cancel
        self._on_delivery = on_delivery
        self._warned_deaf = False
        self._probed = False
        self._nonce: str | None = None
        self._ended: asyncio.Future[None] | None = None
        self.hears = asyncio.Event()

    async def run(self) -> None:
        """Listens until cancelled, reconnecting with capped, jittered backoff."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type((psycopg.Error, OSError, TimeoutError)),
            wait=wait_random_exponential(multiplier=0.2, max=15.0),
        ):
            with attempt:
                self._probed = False
                try:
                    await self._listen_once()
                except (psycopg.Error, OSError, TimeoutError) as error:
                    self.hears.clear()
                    if self._probed:
                        # A good connection resets the backoff: the first retry after the next loss is immediate.
                        attempt.retry_state.attempt_number = 1
                    log.warning(
                        "listener_lost",
                        error=login_reason(str(error)) or type(error).__name__,
                        attempt=attempt.retry_state.attempt_number,
                    )
                    raise

    async def _listen_once(self) -> None:
        async with await self._connect() as connection:
            connection.add_notify_handler(lambda notification: self._handle(notification.payload))
            async with asyncio.timeout(PROOF_LIMIT_SECONDS):
                await connection.execute(f"LISTEN {CHANNEL}")
                await self._prove(connection)
                if self.hears.is_set():
                    # The session is idle between two probes. Not behind a transaction pooler, where the next client
                    # would inherit the setting; the probe has ruled that out.
                    await connection.execute("SET idle_session_timeout = 0")
            # Notifications before this moment were missed: always look once.
            self._wake()
            while True:
                await self._hear(connection, PROBE_SECONDS)
                await self._probe(connection)
                self._probed = True
                worked()

    async def _connect(self) -> psycopg.AsyncConnection:
        return await psycopg.AsyncConnection.connect(
            self._dsn,
            autocommit=True,
            connect_timeout=10,
            prepare_threshold=None,
            application_name="brightrun-trainer listener",
            **KEEPALIVE,
        )

    async def _hear(self, connection: psycopg.AsyncConnection, seconds: float) -> None:
        """Handles notifications for `seconds`, or until our own nonce arrives, directly from the event loop.

        psycopg's generator would prepare for the next notification before this one is handled.
        Raises OperationalError when the connection is lost."""
        loop = asyncio.get_running_loop()
        socket = connection.pgconn.socket
        ended = self._ended = loop.create_future()

        def read() -> None:
            try:
                connection.pgconn.consume_input()
                while (notice := connection.pgconn.notifies()) is not None:
                    self._handle(notice.extra.decode())
            except psycopg.Error as error:
                loop.remove_reader(socket)
                if not ended.done():
                    ended.set_exception(error)

        loop.add_reader(socket, read)
        # A notification may have come with the answer to our last statement: the socket will not be readable for it.
        read()
        try:
            async with asyncio.timeout(seconds):
                await ended
        except TimeoutError:
            return
        finally:
            # The number of a lost connection's socket may be another connection's by now.
            if not connection.closed:
                loop.remove_reader(socket)

    async def _prove(self, connection: psycopg.AsyncConnection) -> None:
        """Sends a nonce from another session and waits for it.

        Behind a transaction pooler LISTEN raises no error, but notifications reach another client's
        connection. A nonce sent from this connection could still come back by luck.
        """
        self.hears.clear()
        self._nonce = f"nonce {uuid4()}"
        async with await self._connect() as other:
            await other.execute("SELECT pg_notify(%s, %s)", (CHANNEL, self._nonce))
        await self._hear(connection, PROBE_LIMIT_SECONDS)
        if self.hears.is_set():
            self._warned_deaf = False
            log.info("listener_hears", channel=CHANNEL)
        elif not self._warned_deaf:
            self._warned_deaf = True
            log.error(
                "listener_deaf",
                port=connection.info.port,
                advice="Notifications do not arrive: this looks like a transaction pooler (port 6543 on Supabase). "
                "Use the session pooler (port 5432) or the direct connection in DATABASE_URL. Until then jobs are "
                "found by the slow poll only.",
            )

    async def _probe(self, connection: psycopg.AsyncConnection) -> None:
        async with asyncio.timeout(PROBE_LIMIT_SECONDS):
            cursor = await connection.execute("SELECT %s IN (SELECT pg_listening_channels())", (CHANNEL,))
        row = await cursor.fetchone()
        if self.hears.is_set() and (row is None or not row[0]):
            raise psycopg.OperationalError("this connection no longer listens")

    def _handle(self, payload: str) -> None:
        word, _, job_id = payload.partition(" ")
        if word == "cancelled":
            try:
                self._on_cancel(UUID(job_id))
            except ValueError:
                log.warning("notification_not_understood", payload=payload[:80])
        elif word == "queued":
            self._wake()
        elif word == "delivery":
            self._on_delivery()
        elif payload == self._nonce:
            self.hears.set()
            if self._ended is not None and not self._ended.done():
                self._ended.set_result(None)
