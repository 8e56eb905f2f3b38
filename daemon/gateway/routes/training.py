"""The older HTTP contract: submit, status, cancel."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from fastapi import FastAPI
from fastapi.params import Depends

from daemon.gateway.job_rows import GatewayRows
from daemon.gateway.routes.problems import JobId, _next, _problems
from daemon.gateway.schemas import (
    Submission,
    Submitted,
    TrainingCancelled,
    TrainingStatus,
    training_status,
)

log = structlog.get_logger()


def _add_training_routes(app: FastAPI, rows: GatewayRows, locked: Sequence[Depends]) -> None:
    """Adds the routes of the older contract."""

    @app.post(
        "/training/submit",
        dependencies=locked,
        tags=["training"],
        responses=_problems(409) | _next("external_job_id", "trainingStatus", "trainingCancel"),
        response_model_exclude_none=True,
    )
    async def submit(submission: Submission) -> Submitted:
        """Submit a job. A job_id that names a row submits that job; any other creates one job, also when repeated.

        The row is what runs: values of the submit that differ from it change nothing and are listed in `notice`."""
        job_id = await rows.submit(submission)
        log.info("job_submitted", job_id=str(job_id), by="training")
        return Submitted(external_job_id=str(job_id), notice=await rows.notice(submission, job_id))

    @app.get(
        "/training/status/{external_job_id:path}",
        operation_id="trainingStatus",
        dependencies=locked,
        tags=["training"],
        responses=_problems(404),
    )
    async def status(external_job_id: JobId) -> TrainingStatus:
        """The job's status."""
        standing = await rows.standing(await rows.find(external_job_id))
        return training_status(standing.state, standing.contract)

    @app.post(
        "/training/cancel/{external_job_id:path}",
        operation_id="trainingCancel",
        dependencies=locked,
        tags=["training"],
        responses=_problems(404, 409),
    )
    async def cancel(external_job_id: JobId) -> TrainingCancelled:
        """Cancel the job. Cancelling twice is no error; a job that has ended is refused with 409."""
        job_id = await rows.find(external_job_id)
        await rows.cancel(job_id)
        log.info("job_cancelled", job_id=str(job_id), by="training")
        return TrainingCancelled(external_job_id=str(job_id))
