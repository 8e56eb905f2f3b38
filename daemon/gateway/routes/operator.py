"""The routes for the operator's tools: health, readiness, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Response
from fastapi.params import Depends

from daemon.errors import DatabaseAway
from daemon.gateway.metrics import CONTENT_TYPE, ServiceMetrics
from daemon.gateway.routes.problems import _problems
from daemon.gateway.schemas import (
    Health,
    JobCounts,
    Problem,
    WorkerCounts,
)

READY_SECONDS = 3.0


# The version in Prometheus' content type is that of the exposition format.
_METRICS_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
    **{status: {"model": Problem} for status in (400, 401, 408, 413, 429)},
}


def _add_operator_routes(app: FastAPI, metrics: ServiceMetrics, locked: Sequence[Depends]) -> None:
    @app.get("/health", dependencies=locked, tags=["operator"], responses=_problems())
    async def health() -> Health:
        """Queue and hosts in RunPod's terms; ended jobs are counted since this gateway started."""
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
        """Metrics for Prometheus, which sends the key as its `authorization`."""
        return Response(await metrics.exposition(), media_type=CONTENT_TYPE)

    @app.get("/healthz", tags=["operator"])
    async def alive() -> dict[str, str]:
        """This process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["operator"], responses={503: {"model": Problem}})
    async def ready() -> dict[str, str]:
        """This process and the database answer."""
        try:
            await asyncio.wait_for(metrics.refresh(), READY_SECONDS)
        except TimeoutError:
            raise DatabaseAway(f"no answer within {READY_SECONDS:.0f} s") from None
        return {"status": "ready"}
