"""The gateway's routes: each asks the rows one question and answers in the caller's words."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

import structlog
from fastapi import FastAPI, Path, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.params import Depends
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from daemon.dashboard.feed import Feed
from daemon.dashboard.pages import add_dashboard
from daemon.dashboard.session import Sessions
from daemon.errors import DatabaseAway, HostUnfit
from daemon.gateway_docs import add_docs
from daemon.gateway_gate import Gate
from daemon.gateway_rows import GatewayRows, Refused, Standing, unknown_job
from daemon.gateway_words import (
    Accepted,
    Health,
    JobCounts,
    Problem,
    RunRequest,
    RunStatus,
    Submission,
    Submitted,
    TrainingCancelled,
    TrainingStatus,
    WorkerCounts,
    as_job_id,
    run_status,
    training_status,
)
from daemon.metrics import CONTENT_TYPE, ServiceMetrics
from daemon.settings import Settings
from daemon.waiting import wait_at_most

log = structlog.get_logger()

# Callers of /runsync who wait at one time; one more is answered at once, as if his time had run out.
MAX_WAITING = 64
WAIT_STEP_SECONDS = 0.5
READY_SECONDS = 3.0

DESCRIPTION = """
The older HTTP contracts of the training service. A job is a row of `training_jobs`: whoever can insert one
and subscribe to it needs none of this. Cancelled jobs read as `failed` under `/training` and as `CANCELLED`
under the serverless paths.
"""

# The version in Prometheus' content type is the exposition format's.
_METRICS_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
    **{status: {"model": Problem} for status in (400, 401, 408, 413, 429)},
}

JobId = Annotated[str, Path(description="as the submit returned it")]


def build_app(
    settings: Settings, rows: GatewayRows, metrics: ServiceMetrics, feed: Feed, closing: asyncio.Event
) -> FastAPI:
    """The whole application. `closing` set: whoever waits for an ending is answered with what is known."""
    app = FastAPI(title="brightrun-trainer", description=DESCRIPTION, version="1", docs_url=None, redoc_url=None)
    keys = [key.get_secret_value() for key in settings.gateway_keys]
    sessions = Sessions(keys)
    app.add_middleware(
        Gate,
        keys=keys,
        sessions=sessions,
        requests_per_second=settings.gateway_requests_per_second,
        max_body_bytes=settings.gateway_max_body_bytes,
    )
    add_docs(app)
    _answer_errors(app)
    locked = [Security(HTTPBearer(auto_error=False))]
    _add_training_routes(app, rows, locked)
    _add_serverless_routes(app, rows, _Waiting(rows, closing, settings.gateway_wait_seconds), locked)
    _add_operator_routes(app, metrics, locked)
    add_dashboard(app, settings, rows, feed, sessions)
    return app


def _add_training_routes(app: FastAPI, rows: GatewayRows, locked: Sequence[Depends]) -> None:
    """The first contract."""

    @app.post(
        "/training/submit",
        dependencies=locked,
        tags=["training"],
        responses=_problems(409) | _next("external_job_id", "trainingStatus", "trainingCancel"),
    )
    async def submit(submission: Submission) -> Submitted:
        """Submit a job. A job_id that names a row is that job; any other is made one, once."""
        job_id = await rows.submit(submission)
        log.info("job_submitted", job_id=str(job_id), by="training")
        return Submitted(external_job_id=str(job_id))

    @app.get(
        "/training/status/{external_job_id}",
        operation_id="trainingStatus",
        dependencies=locked,
        tags=["training"],
        responses=_problems(404),
    )
    async def status(external_job_id: JobId) -> TrainingStatus:
        """Where the job stands."""
        standing = await rows.standing(_known_shape(external_job_id))
        return training_status(standing.state, standing.contract)

    @app.post(
        "/training/cancel/{external_job_id}",
        operation_id="trainingCancel",
        dependencies=locked,
        tags=["training"],
        responses=_problems(404, 409),
    )
    async def cancel(external_job_id: JobId) -> TrainingCancelled:
        """Cancel the job; twice is no error, and a job that has ended is refused with 409."""
        job_id = _known_shape(external_job_id)
        await rows.cancel(job_id)
        log.info("job_cancelled", job_id=str(job_id), by="training")
        return TrainingCancelled(external_job_id=str(job_id))


def _add_serverless_routes(app: FastAPI, rows: GatewayRows, waiting: _Waiting, locked: Sequence[Depends]) -> None:
    """The shape of RunPod's serverless API."""

    @app.post(
        "/run",
        dependencies=locked,
        tags=["serverless"],
        responses=_problems(409) | _next("id", "status", "cancel"),
    )
    async def run(request: RunRequest) -> Accepted:
        """Submit a job and return at once."""
        job_id = await rows.submit(request.input)
        log.info("job_submitted", job_id=str(job_id), by="serverless")
        standing = await rows.standing(job_id)
        return Accepted(id=str(job_id), status=_run_status(standing).status)

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
        """Submit a job and wait a while for its end; still unfinished, ask /status with its id."""
        job_id = await rows.submit(request.input)
        log.info("job_submitted", job_id=str(job_id), by="serverless")
        return _run_answer(await waiting.for_end(job_id, None if wait is None else wait / 1000.0))

    @app.get(
        "/status/{job_id}",
        operation_id="status",
        dependencies=locked,
        tags=["serverless"],
        responses=_problems(404),
        response_model=RunStatus,
    )
    async def status(job_id: JobId) -> Response:
        """Where the job stands."""
        return _run_answer(await rows.standing(_known_shape(job_id)))

    @app.post(
        "/cancel/{job_id}",
        operation_id="cancel",
        dependencies=locked,
        tags=["serverless"],
        responses=_problems(404, 409),
    )
    async def cancel(job_id: JobId) -> Accepted:
        """Cancel the job; twice is no error, and a job that has ended is refused with 409."""
        known = _known_shape(job_id)
        await rows.cancel(known)
        log.info("job_cancelled", job_id=str(known), by="serverless")
        return Accepted(id=str(known), status="CANCELLED")


def _add_operator_routes(app: FastAPI, metrics: ServiceMetrics, locked: Sequence[Depends]) -> None:
    @app.get("/health", dependencies=locked, tags=["operator"], responses=_problems())
    async def health() -> Health:
        """Queue and hosts in RunPod's words; what has ended is counted since this gateway started."""
        await metrics.refresh()
        now, totals = metrics.now, metrics.totals
        return Health(
            jobs=JobCounts(
                completed=totals["completed"],
                failed=totals["failed"] + totals["cancelled"],
                inProgress=now["initializing"] + now["running"],
                inQueue=now["due"] + now["scheduled"],
                retried=totals["retrying"] + totals["reaped"],
            ),
            workers=WorkerCounts(idle=now["workers"].get("idle", 0), running=now["workers"].get("busy", 0)),
        )

    @app.get("/metrics", dependencies=locked, tags=["operator"], response_class=Response, responses=_METRICS_ANSWERS)
    async def prometheus() -> Response:
        """For Prometheus; it sends the key as its `authorization`."""
        return Response(await metrics.exposition(), media_type=CONTENT_TYPE)

    @app.get("/healthz", tags=["operator"])
    async def alive() -> dict[str, str]:
        """This process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["operator"], responses={503: {"model": Problem}})
    async def ready() -> dict[str, str]:
        """The database answers as well."""
        try:
            await asyncio.wait_for(metrics.refresh(), READY_SECONDS)
        except TimeoutError:
            raise DatabaseAway(f"no answer within {READY_SECONDS:.0f} s") from None
        return {"status": "ready"}


class _Waiting:
    """Callers of /runsync. Endings are not announced by NOTIFY, so each waiting job is looked at now and then."""

    def __init__(self, rows: GatewayRows, closing: asyncio.Event, longest_seconds: float) -> None:
        self._rows = rows
        self._closing = closing
        self._longest_seconds = longest_seconds
        self._waiting = 0

    async def for_end(self, job_id: UUID, seconds: float | None) -> Standing:
        """The job when it has ended or the time is over."""
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


def _answer_errors(app: FastAPI) -> None:
    """One shape for every refusal, and no word in it about what is inside."""

    def answer(status: int, problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(problem.model_dump(exclude_none=True), status, headers)

    @app.exception_handler(Refused)
    async def _refused(_request: Request, refused: Refused) -> JSONResponse:
        faults = [{"field": fault.field, "message": fault.message} for fault in refused.faults]
        return answer(refused.status, Problem(error=refused.message, hint=refused.hint, faults=faults or None))

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()
        if any(item["type"] == "json_invalid" for item in found):
            return answer(
                400, Problem(error="The body is no JSON.", hint=str(found[0].get("ctx", {}).get("error", "")))
            )
        faults = [{"field": ".".join(str(part) for part in item["loc"][1:]), "message": item["msg"]} for item in found]
        return answer(422, Problem(error="The request cannot be read.", faults=faults))

    @app.exception_handler(DatabaseAway)
    async def _away(_request: Request, error: DatabaseAway) -> JSONResponse:
        log.warning("gateway_without_database", error=str(error))
        problem = Problem(error="The database does not answer.", hint="Nothing is lost: send the request again.")
        return answer(503, problem, {"Retry-After": "5"})

    @app.exception_handler(HostUnfit)
    async def _unfit(_request: Request, error: HostUnfit) -> JSONResponse:
        log.error("gateway_unfit", error=str(error))
        return answer(503, Problem(error="The service is not set up.", hint="Its operator's log says what is missing."))

    @app.exception_handler(HTTPException)
    async def _http(_request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, Problem(error=f"{error.detail}."), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def _broken(_request: Request, error: Exception) -> JSONResponse:
        log.error("gateway_broke", exc_info=error)
        return answer(500, Problem(error="The gateway failed.", hint="This is a fault of the service: report it."))


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in (400, 401, 408, 413, 422, 429, 503, *statuses)}


def _next(name: str, *operations: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI links: what a caller does next with the id that he was given."""
    parameter = {"id": "job_id"}.get(name, name)
    links = {
        operation: {"operationId": operation, "parameters": {parameter: f"$response.body#/{name}"}}
        for operation in operations
    }
    return {200: {"links": links}}


def _known_shape(text: str) -> UUID:
    job_id = as_job_id(text)
    if job_id is None:
        raise unknown_job()
    return job_id


def _run_status(standing: Standing) -> RunStatus:
    return run_status(standing.job_id, standing.state, standing.contract)


def _run_answer(standing: Standing) -> JSONResponse:
    answer = _run_status(standing)
    # `error` is absent, not null, while there is none: older callers ask whether the key is there.
    return JSONResponse(answer.model_dump(exclude={"error"} if answer.error is None else None))
