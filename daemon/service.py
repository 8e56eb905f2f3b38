"""The daemon as a process: its connections, its signals, its shutdown."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass

import structlog

from daemon.attempt.collaborators import Collaborators
from daemon.chores import Chores
from daemon.database.connection import Database
from daemon.database.listener import Listener
from daemon.delivery.runner import delivery_runner
from daemon.errors import DatabaseAway, HostUnfit
from daemon.host.inspect import inspect_host
from daemon.logs import configure_logs_by
from daemon.pod.lifetime import PodLife, pod_environment
from daemon.pod.price import PodPrice
from daemon.pod.shutdown import chosen_end, end_own_pod, keys_of
from daemon.queue.lease import heartbeat_database
from daemon.queue.row_visibility import RowVisibility
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.worker_registry import WorkerRegistry
from daemon.read_settings import load_settings
from daemon.report.courier import CallbackCourier
from daemon.report.outbox import SqlOutbox
from daemon.settings import Settings
from daemon.storage.open import open_storage
from daemon.storage.sweep import sweep_forever
from daemon.storage.upload_log import SqlUploadLog
from daemon.troubles import Troubles
from daemon.worker import Queue, Worker

log = structlog.get_logger()

TRAINER_COMMAND = (sys.executable, "-m", "training")
# Callbacks that no receiver accepts are no reason to keep a GPU: the outbox outlives this process.
LAST_CALLBACKS_SECONDS = 30.0
# startsecs in supervisord.conf.
SUPERVISOR_START_SECONDS = 15.0


def run_service(trainer_command: tuple[str, ...] = TRAINER_COMMAND) -> None:
    """Reads the settings and serves. Raises HostUnfit where this host cannot work.

    Under supervisord, an exit of our own waits until startsecs is over, so that it does not count as a failed start."""
    began = time.monotonic()
    try:
        signalled = asyncio.run(serve(load_settings(), trainer_command))
    except HostUnfit:
        _outlast_the_start(began)
        raise
    if not signalled:
        _outlast_the_start(began)


def _outlast_the_start(began: float) -> None:
    """Waits until startsecs is over: supervisord retries an earlier exit as a failed start, whatever its code.

    Only a stop by supervisord itself may end the process sooner; its SIGTERM cuts this wait short."""
    if "SUPERVISOR_ENABLED" in os.environ:
        time.sleep(max(0.0, began + SUPERVISOR_START_SECONDS + 1.0 - time.monotonic()))


async def serve(settings: Settings, trainer_command: tuple[str, ...] = TRAINER_COMMAND) -> bool:
    """Serves the queue until told to leave. Returns True after a signal, False after a drain or the pod's end.

    Raises HostUnfit where this host cannot work."""
    configure_logs_by(settings)
    host = inspect_host(settings)
    dsn = settings.database_url.get_secret_value()
    async with AsyncExitStack() as stack:
        # Three connections: one for the work, one that keeps the leases alive, one that listens.
        database = await stack.enter_async_context(Database(dsn, application_name="brightrun-trainer"))
        heartbeat = await stack.enter_async_context(heartbeat_database(settings))
        storage = open_storage(settings)
        stack.push_async_callback(storage.close)
        troubles = Troubles()
        store, outbox, uploads = SqlJobStore(database, troubles), SqlOutbox(database, troubles), SqlUploadLog(database)
        visibility = RowVisibility(database)
        courier = CallbackCourier(settings)
        environment = pod_environment(settings)
        price = PodPrice(settings.pod_id, keys_of(environment), settings.runpod_api)
        deliveries = delivery_runner(settings, host, troubles, storage, database, on_told=courier.wake)
        worker = Worker(
            Collaborators.of(
                settings,
                host,
                trainer_command,
                troubles,
                store=store,
                heartbeat=SqlJobStore(heartbeat),
                uploads=uploads,
                storage=storage,
                courier=courier,
                platform_price=lambda: price.per_gpu_hour,
                deliveries=deliveries,
            ),
            Queue(store, visibility, WorkerRegistry(database)),
        )
        await _check_database(database)
        signals = _obey_signals(worker)
        log.info("daemon_started", worker_id=str(host.worker_id), device=host.device, gpus=len(host.gpus))
        await price.read()
        listener = Listener(dsn, wake=worker.wake, on_cancel=worker.cancelled, on_delivery=deliveries.wake)
        life = None
        if settings.pod_id is not None:
            life = PodLife(
                settings,
                worker,
                endings_wait=lambda: _has_callbacks(outbox),
                delivery_waits=deliveries.has_work,
                end_pod=lambda: end_own_pod(str(settings.pod_id), chosen_end(environment), environment),
            )
        async with Chores(troubles) as chores:
            chores.start("listener", listener.run)
            chores.start("callbacks", lambda: courier.run(outbox))
            chores.start("price of the pod", price.run)
            chores.start("clean-up of Storage", lambda: sweep_forever(uploads, visibility, storage, settings.keep_days))
            if life is not None:
                chores.start("life of the pod", life.run)
            await worker.run()
            await _unless_hurried(courier.flush(LAST_CALLBACKS_SECONDS), signals.hurried)
            if life is not None and not signals.told.is_set():
                await life.end_drained()
        log.info("daemon_ended")
        return signals.told.is_set()


async def _has_callbacks(outbox: SqlOutbox) -> bool:
    return await outbox.oldest_callback_age() is not None


async def _check_database(database: Database) -> None:
    """Fails at once where waiting cannot help (no migration, no grant); goes on if the database is away."""
    try:
        await database.fetch("SELECT FROM training_leases LIMIT 0")
        # The newest table and function that a job needs: without them the migrations are older than this daemon.
        await database.fetch("SELECT FROM training_find_job(NULL)")
        await database.fetch("SELECT FROM training_deliveries LIMIT 0")
    except DatabaseAway as error:
        log.warning("database_away_at_start", error=str(error))
        return
    if database.role_warning is not None:
        log.warning("database_role", advice=database.role_warning)


@dataclass(frozen=True)
class _Signals:
    """The signals so far: `told` to shut down, `hurried` to do so without waiting."""

    told: asyncio.Event
    hurried: asyncio.Event


def _obey_signals(worker: Worker) -> _Signals:
    """SIGTERM and SIGINT shut down, a second one skips the waiting, SIGUSR1 drains."""
    signals = _Signals(asyncio.Event(), asyncio.Event())
    loop = asyncio.get_running_loop()

    def on_term() -> None:
        hurried = signals.told.is_set()
        log.info("signal_received", hurried=hurried)
        signals.told.set()
        worker.shut_down()
        if hurried:
            signals.hurried.set()
            worker.hurry()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_term)
    loop.add_signal_handler(signal.SIGUSR1, worker.drain)
    return signals


async def _unless_hurried(step: Coroutine[None, None, object], hurried: asyncio.Event) -> None:
    """Awaits a last step, or abandons it when hurried: the outbox outlives this process."""
    last, told = asyncio.create_task(step), asyncio.create_task(hurried.wait())
    try:
        await asyncio.wait({last, told}, return_when=asyncio.FIRST_COMPLETED)
        if last.done():
            await last
    finally:
        last.cancel()
        told.cancel()
        await asyncio.gather(last, told, return_exceptions=True)
