"""Builds the gateway's application from its routes. Each reads or writes rows and answers in the caller's format."""

from __future__ import annotations

import asyncio

import structlog
from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer

from daemon.gateway.access.gate import Gate
from daemon.gateway.access.sessions import Sessions
from daemon.gateway.dashboard.broadcaster import Feed
from daemon.gateway.dashboard.routes import add_dashboard
from daemon.gateway.job_rows import GatewayRows
from daemon.gateway.metrics import ServiceMetrics
from daemon.gateway.openapi import add_docs
from daemon.gateway.routes.operator import _add_operator_routes
from daemon.gateway.routes.problems import _answer_errors
from daemon.gateway.routes.serverless import _add_serverless_routes, _Waiting
from daemon.gateway.routes.training import _add_training_routes
from daemon.settings import Settings

log = structlog.get_logger()


DESCRIPTION = """
The older HTTP contracts of the training service. A job is a row of `training_jobs`: whoever can insert one
and subscribe to it needs none of this. Cancelled jobs read as `failed` under `/training` and as `CANCELLED`
under the serverless paths.
"""


def build_app(
    settings: Settings, rows: GatewayRows, metrics: ServiceMetrics, feed: Feed, closing: asyncio.Event
) -> FastAPI:
    """Builds the whole application. Once `closing` is set, callers that wait for a job get its current state."""
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
