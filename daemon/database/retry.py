"""Retries a call until the database is back.

For calls that must succeed before anything else can happen. These have their own loops, because they may give up, have
other work meanwhile, or write newer values next time: the worker and the fleet (a wake-up ends their pause), the
reporter, the dashboard, an attempt's outcome (a release may be left to the reaper), the lease (it may count as lost).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from daemon.errors import DatabaseAway

log = structlog.get_logger()

# Between two tries: short enough after a restart of Postgres, long enough for a host with many waiting calls.
AWAY_SECONDS = 1.0

Answer = TypeVar("Answer")


async def retry_until_database_is_back(ask: Callable[[], Awaitable[Answer]], event: str, **fields: Any) -> Answer:
    """Returns what `ask` returns, however long that takes. Each wait logs a warning with this event name."""
    while True:
        try:
            return await ask()
        except DatabaseAway as error:
            log.warning(event, **fields, error=str(error))
            await asyncio.sleep(AWAY_SECONDS)
