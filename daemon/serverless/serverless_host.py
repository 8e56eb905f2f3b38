"""A RunPod serverless worker around the same trainer: `python -m daemon.serverless`.

Each RunPod job is one job of ours, claimed by its id and run by the same worker that serves the queue:

    input -> Submission -> row (or memory, without DATABASE_URL) -> claim by id -> attempt -> result

Progress goes to RunPod from one task, in order, and the result comes last.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol
from uuid import UUID

import structlog
from pydantic import ValidationError

from daemon.errors import DatabaseAway, StatementRefused
from daemon.gateway.job_rows import Refused, Standing
from daemon.gateway.schemas import Submission, run_output, run_status
from daemon.queue.job import ClaimedJob
from daemon.report.courier import CallbackCourier
from daemon.sentence import as_sentence
from daemon.settings import Settings
from daemon.worker import Worker

log = structlog.get_logger()

LOOK_SECONDS = 0.5
# RunPod may freeze this host as soon as it has the result: final callbacks are delivered before.
LAST_CALLBACKS_SECONDS = 20.0
PROGRESS_SECONDS = 20.0
CANCEL_SECONDS = 30.0

Say = Callable[[Mapping[str, Any]], None]


class Jobs(Protocol):
    """Where jobs are kept: in rows, or in this process's memory."""

    async def submit(self, submission: Submission, /) -> UUID: ...

    async def notice(self, submission: Submission, job_id: UUID, /) -> str | None: ...

    async def claim(self, job_id: UUID, /) -> ClaimedJob | None: ...

    async def standing(self, job_id: UUID, /) -> Standing: ...

    async def cancel(self, job_id: UUID, /) -> None: ...


class Herald(CallbackCourier):
    """The courier, which also passes every status that the reporter has written on to RunPod."""

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
        """Handles SIGTERM: saves a checkpoint and requeues the job; RunPod gets no result. A second one hurries."""
        if self._closing:
            self._worker.hurry()
        self._closing = True
        self._worker.shut_down()

    async def handle(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Runs one RunPod job, from input to result. The result of a job that did not complete has an `error`."""
        try:
            submission = Submission.model_validate(request["input"])
        except ValidationError as error:
            faults = (f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors())
            return {"error": as_sentence(f"The input is no job: {'; '.join(faults)}")}
        if submission.job_id is None:
            # RunPod delivers a job again when its worker died: the same id means the same job.
            submission = submission.model_copy(update={"job_id": str(request["id"])})
        try:
            job_id = await self._jobs.submit(submission)
            notice = await self._jobs.notice(submission, job_id)
            standing = await self._run_to_its_end(job_id, request)
        except StatementRefused as refused:
            log.error("serverless_job_refused", error=str(refused))
            return {"error": as_sentence(f"the database refuses the job: {refused}")}
        except Refused as refused:
            said = [
                refused.message,
                *(f"{fault.field}: {fault.message}" for fault in refused.faults),
                refused.hint or "",
            ]
            return {"error": " ".join(as_sentence(each) for each in said).strip()}
        await self._herald.flush(LAST_CALLBACKS_SECONDS)
        result = _result(standing, fit=self._worker.fit) | ({"notice": notice} if notice else {})
        # RunPod ends a worker that asks for it and starts another one, usually on another machine.
        return result if self._worker.fit else result | {"refresh_worker": True}

    async def _run_to_its_end(self, job_id: UUID, request: Mapping[str, Any]) -> Standing:
        """Runs attempts until the job is final or must be left to another host."""
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
                # No result: RunPod then gives the job to another worker, which resumes from its checkpoint.
                log.info("serverless_released", job_id=str(job_id))
                raise asyncio.CancelledError

    async def _claim(self, job_id: UUID) -> ClaimedJob | Standing:
        """Claims the job, or returns its standing if it cannot be claimed: final, or held by a live host."""
        clock = asyncio.get_running_loop().time
        # An earlier worker may have died during this job: its lease expires and is reaped within this time.
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
                    return standing  # renewed meanwhile
            elif standing.contract["attempt"]:
                until = clock() + 4 * self._lease_seconds  # a retry waits until it is due, without a lease
            if clock() > until or self._closing:
                return standing
            await asyncio.sleep(LOOK_SECONDS)

    async def _attempt(self, job: ClaimedJob) -> None:
        attempt = self._worker.begin(job)
        try:
            await asyncio.shield(attempt)
        except asyncio.CancelledError:
            # RunPod's cancel, or its execution timeout: the caller considers the job over, so cancel the row as well.
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
                # The cancel cannot be written: release the job instead, which is written as soon as possible.
                log.warning("serverless_cancel_not_written", job_id=str(job_id), error=str(error))
                self._worker.shut_down()
                return
            self._worker.cancelled(job_id)
            return

    @asynccontextmanager
    async def _progress_to_runpod(self, request: Mapping[str, Any], job_id: UUID) -> AsyncIterator[None]:
        """Sends the newest status, one at a time. Nothing is being sent any more when this block is left."""
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
                    except Exception:  # the next one supersedes it
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
        result["error"] = f"The job {answer.id} is running on another host ({where}); follow its row for progress."
    return result
