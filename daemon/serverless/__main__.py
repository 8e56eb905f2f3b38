"""`python -m daemon.serverless`: RunPod's handler, its signals, its connections."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import structlog
from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from daemon.attempt.collaborators import Collaborators
from daemon.chores import Chores
from daemon.database.connection import Database
from daemon.database.listener import Listener
from daemon.database.url import NO_DATABASE
from daemon.errors import EXIT_UNFIT, HostUnfit
from daemon.host.inspect import inspect_host
from daemon.logs import configure_logs_by
from daemon.pod.lifetime import pod_environment
from daemon.pod.price import PodPrice
from daemon.pod.shutdown import keys_of
from daemon.queue.job_store import JobStore
from daemon.queue.lease import heartbeat_database
from daemon.queue.reaper import reap_forever
from daemon.queue.row_visibility import RowVisibility
from daemon.queue.sql_job_store import SqlJobStore
from daemon.read_settings import dotenv_unreadable, load_settings
from daemon.report.outbox import Outbox, SqlOutbox
from daemon.sentence import as_sentence
from daemon.serverless.memory_job_store import MemoryJobStore
from daemon.serverless.memory_outbox import MemoryOutbox
from daemon.serverless.row_store import ServerlessRows
from daemon.serverless.serverless_host import Herald, Jobs, ServerlessHost
from daemon.service import TRAINER_COMMAND
from daemon.settings import Settings
from daemon.storage.open import open_storage
from daemon.storage.upload_log import SqlUploadLog, UploadLog
from daemon.troubles import Troubles
from daemon.worker import Worker

log = structlog.get_logger()


@asynccontextmanager
async def open_host(
    settings: Settings,
    *,
    with_rows: bool,
    trainer_command: tuple[str, ...] = TRAINER_COMMAND,
    send_progress: Callable[[Mapping[str, Any], Mapping[str, Any]], Awaitable[None]] | None = None,
) -> AsyncIterator[ServerlessHost]:
    """Opens everything that a serverless worker works with, on the running loop."""
    host = inspect_host(settings)
    dsn = settings.database_url.get_secret_value()
    async with AsyncExitStack() as stack:
        herald = Herald(settings)
        troubles = Troubles()
        storage = open_storage(settings)
        stack.push_async_callback(storage.close)
        jobs: Jobs
        store: JobStore
        heartbeat: JobStore
        uploads: UploadLog
        outbox: Outbox
        reap: Callable[[], Coroutine[None, None, None]] | None = None
        if with_rows:
            jobs = await stack.enter_async_context(_opened(ServerlessRows(settings, host)))
            working = await stack.enter_async_context(Database(dsn, application_name="brightrun-trainer serverless"))
            beating = await stack.enter_async_context(heartbeat_database(settings))
            store = rows = SqlJobStore(working, troubles)
            heartbeat = SqlJobStore(beating, troubles)
            uploads, outbox = SqlUploadLog(working), SqlOutbox(working, troubles)
            reap = partial(reap_forever, rows, RowVisibility(working), settings.lease_seconds)
        else:
            outbox = MemoryOutbox()
            jobs = store = heartbeat = uploads = MemoryJobStore(host, settings.allowed_models, outbox)
        # RunPod's API knows a serverless worker as a pod, if at all; else the price in the settings is used.
        price = PodPrice(settings.pod_id, keys_of(pod_environment(settings)), settings.runpod_api)
        await price.read()
        collaborators = Collaborators.of(
            settings,
            host,
            trainer_command,
            troubles,
            store=store,
            heartbeat=heartbeat,
            uploads=uploads,
            storage=storage,
            courier=herald,
            platform_price=lambda: price.per_gpu_hour,
        )
        worker = Worker(collaborators)
        async with Chores(troubles) as chores:
            chores.start("callbacks", lambda: herald.run(outbox))
            chores.start("price of the pod", price.run)
            chores.start("waiting trainers", collaborators.trainers.tend)
            if reap is not None:
                chores.start("listener", Listener(dsn, wake=lambda: None, on_cancel=worker.cancelled).run)
                chores.start("reaper", reap)
            yield ServerlessHost(
                jobs, worker, herald, lease_seconds=settings.lease_seconds, send_progress=send_progress
            )


@asynccontextmanager
async def _opened(rows: ServerlessRows) -> AsyncIterator[ServerlessRows]:
    async with rows.open():
        yield rows


class _DatabaseOrNone(BaseSettings):
    """Whether there is a database. Without one the other settings still apply."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr | None = Field(default=None, validation_alias=AliasChoices("DATABASE_URL", "database_url"))


class Handler:
    """RunPod's handler: opens the host at its first job, because only then is there a running event loop."""

    def __init__(self, settings: Settings, *, with_rows: bool, trainer_command: tuple[str, ...]) -> None:
        self._settings = settings
        self._with_rows = with_rows
        self._trainer_command = trainer_command
        self._opening = asyncio.Lock()
        self._host: ServerlessHost | None = None
        # Closed with the process: RunPod's loop gives no notice when it ends.
        self._stack = AsyncExitStack()

    async def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        async with self._opening:
            if self._host is None:
                self._host = await self._stack.enter_async_context(
                    open_host(
                        self._settings,
                        with_rows=self._with_rows,
                        trainer_command=self._trainer_command,
                        # Only RunPod's platform accepts progress; its test server has no address for it.
                        send_progress=_send_to_runpod if os.environ.get("RUNPOD_WEBHOOK_POST_OUTPUT") else None,
                    )
                )
                _obey_term(self._host)
        return await self._host.handle(job)


def _obey_term(host: ServerlessHost) -> None:
    """Releases the job on SIGTERM, then lets RunPod's own handler end the worker."""
    theirs = signal.getsignal(signal.SIGTERM)

    def on_term() -> None:
        log.info("signal_received")
        host.shut_down()
        if callable(theirs):
            theirs(signal.SIGTERM, None)

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, on_term)


async def _send_to_runpod(job: Mapping[str, Any], output: Mapping[str, Any]) -> None:
    """Sends one progress update and waits for it. runpod's `progress_update` starts a thread per call, in no order."""
    from runpod.http_client import AsyncClientSession
    from runpod.serverless.modules.rp_http import send_result

    async with AsyncClientSession() as session:
        await send_result(session, {"status": "IN_PROGRESS", "output": dict(output)}, dict(job))


def start(trainer_command: tuple[str, ...] = TRAINER_COMMAND) -> None:
    """Hands this process to RunPod's loop. Raises HostUnfit where this host cannot work."""
    try:
        with_rows = _DatabaseOrNone().database_url is not None
    except (OSError, UnicodeDecodeError) as error:
        raise dotenv_unreadable(error) from None
    # Without a database nothing ever connects: the jobs are kept in this process's memory.
    settings = load_settings() if with_rows else load_settings(database_url=NO_DATABASE)
    configure_logs_by(settings)
    inspect_host(settings)
    log.info("serverless_started", rows=with_rows)

    import runpod

    runpod.serverless.start({"handler": Handler(settings, with_rows=with_rows, trainer_command=trainer_command)})


if __name__ == "__main__":
    try:
        start()
    except HostUnfit as unfit:
        sys.stderr.write(f"brightrun-trainer: {as_sentence(str(unfit))}\n")
        sys.exit(EXIT_UNFIT)
