"""The errors of every route, each with a code, a message and what to do next."""

from __future__ import annotations

from typing import Annotated, Any

import structlog
from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from daemon.errors import DatabaseAway, HostUnfit
from daemon.gateway.job_rows import Refused
from daemon.gateway.schemas import Problem

log = structlog.get_logger()


JobId = Annotated[str, Path(description="as the submit returned it, or the job_id that you sent")]


def _answer_errors(app: FastAPI) -> None:
    """Gives every error the same format, without internal details."""

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
                400,
                Problem(
                    error=f"The body is not JSON ({found[0].get('ctx', {}).get('error', 'it cannot be read')}).",
                    hint="Send one JSON object.",
                ),
            )
        faults = [{"field": ".".join(str(part) for part in item["loc"][1:]), "message": item["msg"]} for item in found]
        problem = Problem(error="The request cannot be read.", hint="Correct the named fields.", faults=faults)
        return answer(422, problem)

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
        hint = "The routes and their methods are listed at /docs." if error.status_code in (404, 405) else None
        return answer(error.status_code, Problem(error=str(error.detail), hint=hint), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def _broken(_request: Request, error: Exception) -> JSONResponse:
        log.error("gateway_broke", exc_info=error)
        return answer(500, Problem(error="The gateway failed.", hint="This is a fault of the service: report it."))


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in (400, 401, 408, 413, 422, 429, 503, *statuses)}


def _next(name: str, *operations: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI links: what a caller can do next with the returned id."""
    parameter = {"id": "job_id"}.get(name, name)
    links = {
        operation: {"operationId": operation, "parameters": {parameter: f"$response.body#/{name}"}}
        for operation in operations
    }
    return {200: {"links": links}}
