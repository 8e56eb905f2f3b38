"""The routes of RunPod's serverless API: /run, /runsync, /status, /cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated
from uuid import UUID

import structlog
from fastapi import FastAPI, Query, Response
from fastapi.params import Depends
from fastapi.responses import JSONResponse

from daemon.gateway.job_rows import GatewayRows, Standing
from daemon.gateway.routes.problems import JobId, _next, _problems
from daemon.gateway.schemas import (
    Accepted,
    RunRequest,
    RunStatus,
    run_status,
)
from daemon.tasks import wait_at_most

log = structlog.get_logger()


# Most callers of /runsync that wait at one time; one more gets the job's state immediately.
MAX_WAITING = 64


WAIT_STEP_SECONDS = 0.5


def _add_serverless_routes(app: FastAPI, rows: GatewayRows, waiting: _Waiting, locked: Sequence[Depends]) -> None:
    """Adds the routes of RunPod's serverless API."""

    @app.post(
        "/run",
        dependencies=locked,
        tags=["serverless"],
        responses=_problems(409) | _next("id", "status", "cancel"),
        response_model_exclude_none=True,
    )
    async def run(request: RunRequest) -> Accepted:
        """Submit a job and return immediately."""
        job_id = await rows.submit(request.input)
        log.info("job_submitted", job_id=str(job_id), by="serverless")
        notice = await rows.notice(request.input, job_id)
        standing = await rows.standing(job_id)
        return Accepted(id=str(job_id), status=_run_status(standing).status, notice=notice)

    @app.post(
        "/runsync",
        dependencies=locked,
        tags=["serverless"],
        responses=_problems(409) | _next("id", "status", "cancel"),
        response_model=RunStatus,
    )
    async def runsync(
        request: RunRequest,
        wait: Annotated[int | None, Query(ge=0, le=300_000, description="milliseconds, as RunPod counts")] = None,
    ) -> Response:
        """Submit a job and wait a while for its end. If it is still unfinished, call /status with its id."""
        job_id = await rows.submit(request.input)
        log.info("job_submitted", job_id=str(job_id), by="serverless")
        notice = await rows.notice(request.input, job_id)
        return _run_answer(await waiting.for_end(job_id, None if wait is None else wait / 1000.0), notice)

    @app.get(
        "/status/{job_id:path}",
        operation_id="status",
        dependencies=locked,
        tags=["serverless"],
        responses=_problems(404),
        response_model=RunStatus,
    )
    async def status(job_id: JobId) -> Response:
        """The job's status."""
        return _run_answer(await rows.standing(await rows.find(job_id)))

    @app.post(
        "/cancel/{job_id:path}",
        operation_id="cancel",
        dependencies=locked,
        tags=["serverless"],
        responses=_problems(404, 409),
        response_model_exclude_none=True,
    )
    async def cancel(job_id: JobId) -> Accepted:
        """Cancel the job. Cancelling twice is no error; a job that has ended is refused with 409."""
        known = await rows.find(job_id)
        await rows.cancel(known)
        log.info("job_cancelled", job_id=str(known), by="serverless")
        return Accepted(id=str(known), status="CANCELLED")


class _Waiting:
    """The waiting callers of /runsync. The end of a job sends no NOTIFY, so each waiting job is polled."""

    def __init__(self, rows: GatewayRows, closing: asyncio.Event, longest_seconds: float) -> None:
        self._rows = rows
        self._closing = closing
        self._longest_seconds = longest_seconds
        self._waiting = 0

    async def for_end(self, job_id: UUID, seconds: float | None) -> Standing:
        """Returns the job once it has ended or the time is over."""
        clock = asyncio.get_running_loop().time
        allowed = self._longest_seconds if seconds is None else min(seconds, self._longest_seconds)
        until = clock() + (allowed if self._waiting < MAX_WAITING else 0.0)
        self._waiting += 1
        try:
            while True:
                standing = await self._rows.standing(job_id)
                left = until - clock()
                if standing.is_final or left <= 0 or self._closing.is_set():
                    return standing
                await wait_at_most(self._closing, min(WAIT_STEP_SECONDS, left))
        finally:
            self._waiting -= 1


def _run_status(standing: Standing) -> RunStatus:
    return run_status(standing.job_id, standing.state, standing.contract)


def _run_answer(standing: Standing, notice: str | None = None) -> JSONResponse:
    answer = _run_status(standing).model_copy(update={"notice": notice})
    # Without an error, leave `error` out instead of null: older callers check whether the key exists.
    return JSONResponse(answer.model_dump(exclude={name for name in ("error", "notice") if not getattr(answer, name)}))
