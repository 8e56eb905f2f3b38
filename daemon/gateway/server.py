"""Runs the HTTP gateway: the older contracts for callers that cannot insert a row.

It also cleans up for dead hosts: it requeues their jobs and, if it has their callback settings,
delivers the callbacks that they left.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import structlog
import uvicorn

from daemon.chores import Chores
from daemon.database.connection import Database
from daemon.errors import DatabaseAway, HostUnfit
from daemon.gateway.app import build_app
from daemon.gateway.dashboard.broadcaster import Feed
from daemon.gateway.job_rows import GatewayRows
from daemon.gateway.metrics import ServiceMetrics
from daemon.logs import configure_logs_by
from daemon.queue.reaper import reap_forever
from daemon.queue.row_visibility import RowVisibility
from daemon.queue.sql_job_store import SqlJobStore
from daemon.report.courier import CallbackCourier
from daemon.report.outbox import SqlOutbox
from daemon.settings import Settings
from daemon.troubles import Troubles

log = structlog.get_logger()

# With more open connections than this, it answers 503 immediately.
MAX_CONNECTIONS = 4000
BACKLOG = 4096
# How long requests may continue after the signal; /runsync answers with the job's current state.
GRACE_SECONDS = 10


async def serve_gateway(settings: Settings) -> None:
    """Serves until TERM or INT. Raises HostUnfit if the settings make that impossible."""
    configure_logs_by(settings)
    closing = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, closing.set)
    await run_gateway(settings, closing)


async def run_gateway(settings: Settings, closing: asyncio.Event) -> None:
    """Serves until `closing` is set; for callers that have set up signals and logs."""
    if not settings.gateway_keys:
        raise HostUnfit(
            "TRAINER_GATEWAY_KEYS is empty, so every call would be refused. `openssl rand -hex 32` makes a good key."
        )
    with _listening_socket(settings.gateway_host, settings.gateway_port) as listening:
        dsn = settings.database_url.get_secret_value()
        async with (
            GatewayRows(settings).open() as rows,
            Database(dsn, application_name="brightrun-trainer gateway chores") as chores,
        ):
            metrics = ServiceMetrics(rows)
            await _first_look(metrics)
            troubles = Troubles()
            store, visibility = SqlJobStore(chores, troubles), RowVisibility(chores)
            outbox = SqlOutbox(chores, troubles)
            feed = Feed(dsn, troubles)
            server = _Server(
                uvicorn.Config(
                    build_app(settings, rows, metrics, feed, closing),
                    log_config=None,
                    access_log=False,
                    lifespan="off",
                    server_header=False,
                    limit_concurrency=MAX_CONNECTIONS,
                    timeout_graceful_shutdown=GRACE_SECONDS,
                )
            )
            ending = asyncio.create_task(_end_when(closing, server, feed))
            host, port = listening.getsockname()[:2]
            log.info(
                "gateway_started",
                host=host,
                port=port,
                keys=len(settings.gateway_keys),
                delivers_callbacks=bool(settings.callback_secrets),
            )
            async with Chores(troubles, on_failure=metrics.count_chore_failure) as watched:
                watched.start("reaper", lambda: reap_forever(store, visibility, settings.lease_seconds))
                watched.start("dashboard", feed.run)
                # Without the secrets it would send callbacks unsigned that the daemons would sign.
                if settings.callback_secrets:
                    courier = CallbackCourier(settings)
                    watched.start("callbacks", lambda: courier.run(outbox))
                try:
                    await server.serve(sockets=[listening])
                finally:
                    ending.cancel()
                    await asyncio.gather(ending, return_exceptions=True)
    log.info("gateway_ended")


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the caller handles signals and ends it by `should_exit`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _end_when(closing: asyncio.Event, server: uvicorn.Server, feed: Feed) -> None:
    await closing.wait()
    # Streams never end by themselves: the server would wait its whole grace period for them.
    feed.close()
    server.should_exit = True


async def _first_look(metrics: ServiceMetrics) -> None:
    """Fails immediately if waiting cannot help (no migration, no right); waits if it can."""
    try:
        await metrics.refresh()
    except DatabaseAway as error:
        log.warning("database_away_at_start", error=str(error))


def _listening_socket(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise HostUnfit(
            f"cannot listen on {host}:{port} ({error.strerror}): set TRAINER_GATEWAY_HOST and TRAINER_GATEWAY_PORT"
        ) from error
