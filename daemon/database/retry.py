"""Waits out a database that is away: the same call again until it is answered.

For calls that nothing can go on without. Who may give up, has something else to do meanwhile or writes newer values
the next time has a loop of its own: the worker's and the fleet's looks (a wake-up ends their pause), the reporter,
the dashboard, an attempt's outcome (a release may be left to the reaper), the lease (it may count as lost).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from daemon.errors import DatabaseAway

log = structlog.get_logger()

# Between two tries: soon enough after a restart of Postgres, rare enough for a host with many waiting calls.
AWAY_SECONDS = 1.0

Answer = TypeVar("Answer")


async def retry_until_database_is_back(ask: Callable[[], Awaitable[Answer]], event: str, **fields: Any) -> Answer:
    """What `ask` returns, however long it takes; each wait is a warning with this event name."""
    while True:
        try:
            return await ask()
        except DatabaseAway as error:
            log.warning(event, **fields, error=str(error))
            await asyncio.sleep(AWAY_SECONDS)
