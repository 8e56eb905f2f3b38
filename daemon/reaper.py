"""Taking back jobs whose host went silent, here or anywhere.

Any process with a store may do this at any time: the database checks each lease as it ends it.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from daemon.errors import DatabaseAway
from daemon.store import Store

log = structlog.get_logger()


async def reap_for_ever(store: Store, lease_seconds: float) -> None:
    """Reap twice a lease until cancelled.

    After our own (re)connect every holder first gets one lease's time to renew: an outage of the
    database must not look like the death of all hosts."""
    while True:
        await asyncio.sleep(lease_seconds / 2)
        connected_at = store.database.connected_at
        try:
            if connected_at is None:
                # Connects, so that the waiting begins; a process without work may have nothing else to ask.
                await store.next_due_in()
            elif time.monotonic() - connected_at >= lease_seconds:
                for reaped in await store.reap_expired_leases():
                    log.warning("job_reaped", job_id=str(reaped.job_id), state=reaped.state)
        except DatabaseAway as error:
            log.debug("reap_delayed", error=str(error))
