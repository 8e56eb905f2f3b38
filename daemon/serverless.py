"""A RunPod serverless worker around the same trainer: `python -m daemon.serverless`.

Each RunPod job is one job of ours, claimed by its id and run by the same worker that serves the queue:

    input -> Submission -> row (or memory, without DATABASE_URL) -> claim by id -> attempt -> result

Progress goes to RunPod from one place, in order, and the result comes last.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol
from uuid import UUID

import structlog
from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from daemon.attempt import Collaborators
from daemon.callback import CallbackCourier
from daemon.chores import Chores
from daemon.database import Database
from daemon.database_url import NO_DATABASE
from daemon.errors import EXIT_UNFIT, DatabaseAway, HostUnfit, StatementRefused
from daemon.fitness import Fitness
from daemon.gateway_rows import Refused, Standing
from daemon.gateway_words import Submission, run_output, run_status
from daemon.host import inspect_host
from daemon.job import ClaimedJob
from daemon.lease import LeaseKeeper
from daemon.listener import Listener
from daemon.logs import configure_logs_by
from daemon.pod_end import keys_of
from daemon.pod_life import PodPrice, pod_environment
from daemon.reaper import reap_for_ever
from daemon.rowless import RowlessStore
from daemon.serverless_rows import ServerlessRows
from daemon.service import TRAINER_COMMAND
from daemon.settings import Settings, dotenv_unreadable, load_settings
from daemon.storage import open_storage
from daemon.store import Store
from daemon.troubles import Troubles
from daemon.warm import Trainers
from daemon.worker import Worker

log = structlog.get_logger()

LOOK_SECONDS = 0.5
# RunPod may freeze this host as soon as it has the result: endings are delivered before.
LAST_CALLBACKS_SECONDS = 20.0
PROGRESS_SECONDS = 20.0
CANCEL_SECONDS = 30.0

Say = Callable[[Mapping[str, Any]], None]


class Jobs(Protocol):
    """Where jobs live: rows, or this process's memory."""

    async def submit(self, submission: Submission, /) -> UUID: ...

    async def claim(self, job_id: UUID, /) -> ClaimedJob | None: ...

    async def standing(self, job_id: UUID, /) -> Standing: ...

    async def cancel(self, job_id: UUID, /) -> None: ...


class Herald(CallbackCourier):
    """The courier, which tells RunPod as well: it hears every status that the reporter has written."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.listeners: dict[UUID, Say] = {}

    def send_progress(self, job: ClaimedJob, status: Mapping[str, Any]) -> None:
        super().send_progress(job, status)
        if (say := self.listeners.get(job.id)) is not None:
            say(status)


class ServerlessHost:
    """Runs RunPod's jobs one after the other; `handle` is RunPod's handler."""

    def __init__(
        self,
        jobs: Jobs,
        worker: Worker,
        herald: Herald,
        *,
        lease_seconds: float,
        send_progress: Callable[[Mapping[str, Any], Mapping[str, Any]], Awaitable[None]] | None,
    ) -> None:
        self._jobs = jobs
        self._worker = worker
        self._herald = herald
        self._lease_seconds = lease_seconds
        self._send_progress = send_progress
        self._closing = False

    def shut_down(self) -> None:
        """TERM: a checkpoint, the job goes back to its queue, and RunPod gets no result. A second one does not wait."""
        if self._closing:
            self._worker.hurry()
        self._closing = True
        self._worker.shut_down()

    async def handle(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One RunPod job, from its input to its result. A job that ended badly carries `error` in its result."""
        try:
            submission = Submission.model_validate(request["input"])
        except ValidationError as error:
            faults = (f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors())
            return {"error": f"The input is no job: {'; '.join(faults)}"}
        if submission.job_id is None:
            # RunPod delivers a job again when its worker died: the same id is the same job.
            submission = submission.model_copy(update={"job_id": str(request["id"])})
        try:
            job_id = await self._jobs.submit(submission)
            standing = await self._run_to_its_end(job_id, request)
        except StatementRefused as refused:
            log.error("serverless_job_refused", error=str(refused))
            return {"error": f"The database refuses the job: {refused}."}
        except Refused as refused:
            faults = (f"{fault.field}: {fault.message}" for fault in refused.faults)
            return {"error": " ".join([refused.message, *faults, refused.hint or ""]).strip()}
        await self._herald.flush(LAST_CALLBACKS_SECONDS)
        result = _result(standing, fit=self._worker.fit)
        # RunPod ends a worker that asks for it and starts another one, on another machine as a rule.
        return result if self._worker.fit else result | {"refresh_worker": True}

    async def _run_to_its_end(self, job_id: UUID, request: Mapping[str, Any]) -> Standing:
        """Attempt after attempt, as long as they are ours to make."""
        while True:
            claimed = await self._claim(job_id)
            if isinstance(claimed, Standing):
                return claimed
            async with self._progress_to_runpod(request, job_id):
                await self._attempt(claimed)
            standing = await self._jobs.standing(job_id)
            if standing.is_final or not self._worker.fit:
                return standing
            if self._closing:
                # No result: RunPod gives a job whose worker left to another one, which resumes its checkpoint.
                log.info("serverless_released", job_id=str(job_id))
                raise asyncio.CancelledError

    async def _claim(self, job_id: UUID) -> ClaimedJob | Standing:
        """Our job, or where it stands if it is not to be had: final, or held by a host that lives."""
        clock = asyncio.get_running_loop().time
        # An earlier worker of this job may have died under it: its lease runs out and is reaped within this.
        until = clock() + 4 * self._lease_seconds
        first_expiry = None
        while True:
            if (job := await self._jobs.claim(job_id)) is not None:
                return job
            standing = await self._jobs.standing(job_id)
            if standing.is_final:
                return standing
            if standing.lease_expires_at is not None:
                first_expiry = first_expiry or standing.lease_expires_at
                if standing.lease_expires_at > first_expiry:
                    return standing  # renewed while we looked
            elif standing.contract["attempt"]:
                until = clock() + 4 * self._lease_seconds  # a retry waits for its time; nobody holds it
            if clock() > until or self._closing:
                return standing
            await asyncio.sleep(LOOK_SECONDS)

    async def _attempt(self, job: ClaimedJob) -> None:
        attempt = self._worker.begin(job)
        try:
            await asyncio.shield(attempt)
        except asyncio.CancelledError:
            # RunPod's cancel, or its execution timeout: to the caller the job is over, and so it is in its row.
            await self._cancel(job.id)
            await asyncio.wait({attempt})
            await self._herald.flush(LAST_CALLBACKS_SECONDS)
            raise

    async def _cancel(self, job_id: UUID) -> None:
        clock = asyncio.get_running_loop().time
        until = clock() + CANCEL_SECONDS
        while True:
            try:
                await self._jobs.cancel(job_id)
            except Refused:
                return  # it has just ended by itself
            except (DatabaseAway, StatementRefused) as error:
                if clock() < until:
                    await asyncio.sleep(LOOK_SECONDS)
                    continue
                # The row cannot be told: then the job is given back, which is written as soon as it can be.
                log.warning("serverless_cancel_not_written", job_id=str(job_id), error=str(error))
                self._worker.shut_down()
                return
            self._worker.cancelled(job_id)
            return

    @asynccontextmanager
    async def _progress_to_runpod(self, request: Mapping[str, Any], job_id: UUID) -> AsyncIterator[None]:
        """Send each status in turn, the newest when several have come; none is on its way when this block is left."""
        if self._send_progress is None:
            yield
            return
        newest: list[Mapping[str, Any]] = []
        news = asyncio.Event()
        ended = False

        def say(status: Mapping[str, Any]) -> None:
            newest[:] = [status]
            news.set()

        async def send_in_turn(send: Callable[[Mapping[str, Any], Mapping[str, Any]], Awaitable[None]]) -> None:
            while not ended:
                await news.wait()
                news.clear()
                if newest and not ended:
                    try:
                        await send(request, run_output(newest.pop()).model_dump())
                    except Exception:  # the next one says more
                        log.exception("serverless_progress_not_sent")

        self._herald.listeners[job_id] = say
        sending = asyncio.create_task(send_in_turn(self._send_progress))
        try:
            yield
        finally:
            del self._herald.listeners[job_id]
            ended = True
            news.set()
            await asyncio.wait({sending}, timeout=PROGRESS_SECONDS)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


def _result(standing: Standing, *, fit: bool) -> dict[str, Any]:
    answer = run_status(standing.job_id, standing.state, standing.contract)
    result: dict[str, Any] = {**answer.output.model_dump(), "job_id": answer.id}
    if answer.error is not None:
        result["error"] = answer.error
    elif not standing.is_final and not fit:
        result["error"] = (
            f"This worker cannot work and is replaced; the job {answer.id} waits for another: send it again."
        )
    elif not standing.is_final:
        where = f"{standing.state}, {answer.output.progress:.0f} %"
        result["error"] = f"The job {answer.id} is in other hands ({where}): its own row goes on telling how it does."
    return result


@asynccontextmanager
async def open_host(
    settings: Settings,
    *,
    with_rows: bool,
    trainer_command: tuple[str, ...] = TRAINER_COMMAND,
    send_progress: Callable[[Mapping[str, Any], Mapping[str, Any]], Awaitable[None]] | None = None,
) -> AsyncIterator[ServerlessHost]:
    """Everything that a serverless worker works with, on the running loop."""
    host = inspect_host(settings)
    dsn = settings.database_url.get_secret_value()
    async with AsyncExitStack() as stack:
        herald = Herald(settings)
        troubles = Troubles()
        storage = open_storage(settings)
        stack.push_async_callback(storage.close)
        jobs: Jobs
        if with_rows:
            jobs = await stack.enter_async_context(_opened(ServerlessRows(settings, host)))
            names = ("brightrun-trainer serverless", "brightrun-trainer heartbeat")
            store, heartbeat = [
                Store(await stack.enter_async_context(Database(dsn, application_name=name)), troubles) for name in names
            ]
        else:
            jobs = store = heartbeat = RowlessStore(host, settings.allowed_models)
        # A serverless worker is a pod to RunPod's API where it is one at all; else the setting's price counts.
        price = PodPrice(settings.pod_id, keys_of(pod_environment(settings)), settings.runpod_api)
        await price.read()
        trainers = Trainers(settings, host, trainer_command)
        worker = Worker(
            Collaborators(
                settings=settings,
                host=host,
                store=store,
                leases=LeaseKeeper(
                    heartbeat,
                    lease_seconds=settings.lease_seconds,
                    on_partition=settings.on_partition,
                    troubles=troubles,
                ),
                storage=storage,
                courier=herald,
                trainers=trainers,
                fitness=Fitness(settings, host, trainer_command, troubles),
                platform_price=lambda: price.per_gpu_hour,
                troubles=troubles,
            )
        )
        async with Chores(troubles) as chores:
            chores.start("callbacks", lambda: herald.run(store))
            chores.start("price of the pod", price.run)
            chores.start("waiting trainers", trainers.tend)
            if with_rows:
                chores.start("listener", Listener(dsn, wake=lambda: None, on_cancel=worker.cancelled).run)
                chores.start("reaper", lambda: reap_for_ever(store, settings.lease_seconds))
            yield ServerlessHost(
                jobs, worker, herald, lease_seconds=settings.lease_seconds, send_progress=send_progress
            )


@asynccontextmanager
async def _opened(rows: ServerlessRows) -> AsyncIterator[ServerlessRows]:
    async with rows.open():
        yield rows


class _DatabaseOrNone(BaseSettings):
    """Whether there is a database; without one the other settings still hold."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr | None = Field(default=None, validation_alias=AliasChoices("DATABASE_URL", "database_url"))


class Handler:
    """RunPod's handler: opens the host at its first job, because only then is there a loop to open it on."""

    def __init__(self, settings: Settings, *, with_rows: bool, trainer_command: tuple[str, ...]) -> None:
        self._settings = settings
        self._with_rows = with_rows
        self._trainer_command = trainer_command
        self._opening = asyncio.Lock()
        self._host: ServerlessHost | None = None
        # Closed with the process: RunPod's loop tells nobody that it ends.
        self._stack = AsyncExitStack()

    async def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        async with self._opening:
            if self._host is None:
                self._host = await self._stack.enter_async_context(
                    open_host(
                        self._settings,
                        with_rows=self._with_rows,
                        trainer_command=self._trainer_command,
                        # Only RunPod's own address listens; its test server has none.
                        send_progress=_send_to_runpod if os.environ.get("RUNPOD_WEBHOOK_POST_OUTPUT") else None,
                    )
                )
                _obey_term(self._host)
        return await self._host.handle(job)


def _obey_term(host: ServerlessHost) -> None:
    """Release the job on TERM, then let RunPod's own handler end the worker."""
    theirs = signal.getsignal(signal.SIGTERM)

    def on_term() -> None:
        log.info("signal_received")
        host.shut_down()
        if callable(theirs):
            theirs(signal.SIGTERM, None)

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, on_term)


async def _send_to_runpod(job: Mapping[str, Any], output: Mapping[str, Any]) -> None:
    """One progress update, awaited. runpod's own `progress_update` starts a thread a call, in no order."""
    from runpod.http_client import AsyncClientSession
    from runpod.serverless.modules.rp_http import send_result

    async with AsyncClientSession() as session:
        await send_result(session, {"status": "IN_PROGRESS", "output": dict(output)}, dict(job))


def start(trainer_command: tuple[str, ...] = TRAINER_COMMAND) -> None:
    """Hand this process to RunPod's loop. Raises HostUnfit where this host cannot work."""
    try:
        with_rows = _DatabaseOrNone().database_url is not None
    except (OSError, UnicodeDecodeError) as error:
        raise dotenv_unreadable(error) from None
    # Without one nothing ever connects: the worker's store is this process's memory.
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
        sys.stderr.write(f"brightrun-trainer: {unfit}\n")
        sys.exit(EXIT_UNFIT)
