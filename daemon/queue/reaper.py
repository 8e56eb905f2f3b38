"""Takes back jobs whose host went silent, here or anywhere.

Any process with a store may do this at any time: the database checks each lease as it ends it.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from daemon.chores import worked
from daemon.errors import DatabaseAway
from daemon.queue.row_visibility import RowVisibility, is_blind
from daemon.queue.rows import Reaped
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.states import HELD

log = structlog.get_logger()

# Half of a heartbeat's period, and at least what a busy machine needs: a slower answer was held up somewhere, and
# so were the heartbeats of others.
PROMPT_PART = 1 / 6
PROMPT_SECONDS = 1.0


async def reap_forever(store: SqlJobStore, visibility: RowVisibility, lease_seconds: float) -> None:
    """Reaps twice per lease period until cancelled.

    After every outage of the database, each holder first gets one lease's time to renew: an outage must not look like
    the death of all hosts. An outage is a statement that fails with its connection, and also an answer that comes late:
    a pooler holds its clients' connections and statements while its server is down, and the clients see no error.
    (The database itself notices a restart of the server, and reaps nothing for the time it took.)"""
    prompt = max(lease_seconds * PROMPT_PART, PROMPT_SECONDS)
    # Started or restarted: nothing is known of the time before.
    late_at = time.monotonic()
    while True:
        await asyncio.sleep(lease_seconds / 2)
        asked_at = time.monotonic()
        try:
            # Asked before each reaping, not with it: a statement held by a pooler runs the moment its server is back.
            await store.next_due_in()
            answered_at = time.monotonic()
            if answered_at - asked_at > prompt:
                log.info("reap_paused", waited_seconds=round(answered_at - asked_at, 1))
                late_at = answered_at
            connected_at = store.database.connected_at
            if await is_blind(visibility):
                # The holders' heartbeats find no row either: each first gets one lease's time to renew.
                log.warning("reap_paused", reason="row security hides rows from training_daemon")
                late_at = time.monotonic()
            if connected_at is None or answered_at - max(connected_at, late_at) < lease_seconds:
                continue
            reaped = await store.reap_expired_leases()
            if time.monotonic() - answered_at > prompt:
                late_at = time.monotonic()  # it waited behind a lock, and so did the heartbeats of others
            _tell(store, reaped)
            worked()
        except DatabaseAway as error:
            log.debug("reap_delayed", error=str(error))
            # A table or grant that was missing here was missing for the holders as well.
            late_at = time.monotonic()


def _tell(store: SqlJobStore, leases: list[Reaped]) -> None:
    refused = [each for each in leases if each.state in HELD]
    for each in leases:
        if each.state in HELD:
            log.error("job_not_reaped", job_id=str(each.job_id), hint="its story says what refuses it")
        else:
            log.warning("job_reaped", job_id=str(each.job_id), state=each.state)
    if refused:
        store.troubles.begin(
            "reaping",
            f"the database refuses to take back {len(refused)} jobs of lost hosts, the first of them "
            f"{refused[0].job_id}: its events (training_events) say what refuses it",
        )
    else:
        store.troubles.end("reaping")
