"""What a job may cost and how long it may take, kept in view while it runs.

Both are the owner's and may be changed at any time, as the job itself may be deleted: the claim's answer is where they
begin, the row is the truth.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from daemon.chores import worked
from daemon.database.connection import REFUSALS
from daemon.errors import DatabaseAway
from daemon.queue.job import ClaimedJob
from daemon.queue.job_store import JobStore
from daemon.report.reporter import Reporter
from daemon.stop_request import Stop, StopReason

log = structlog.get_logger()

LOOK_SECONDS = 1.0
# One look by primary key; the progress of the same job is written five times as often.
READ_SECONDS = 5.0


@dataclass(frozen=True)
class Allowance:
    """`ends_at` is by the event loop's clock, reckoned from the time left by the database's: no other clock counts."""

    max_cost: float | None
    ends_at: float | None

    @classmethod
    def of(cls, max_cost: float | None, seconds_left: float | None) -> Allowance:
        return cls(max_cost, None if seconds_left is None else _now() + seconds_left)

    def used_up(self, cost: float | None) -> StopReason | None:
        if self.max_cost is not None and (cost or 0.0) >= self.max_cost:
            return StopReason.BUDGET
        if self.ends_at is not None and _now() >= self.ends_at:
            return StopReason.DEADLINE
        return None


async def enforce_limits(job: ClaimedJob, reporter: Reporter, store: JobStore, stop: Stop) -> None:
    """Ask for an end when the job passes what its owner set, money or time, or when its row is gone.

    Read anew every few seconds, and always before the end: what was raised a moment ago counts."""
    allowance = Allowance.of(job.max_cost, job.seconds_to_deadline(reporter.attempt_seconds))
    read_at = _now()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        worked()
        if allowance.used_up(reporter.cost) is not None or _now() >= read_at + READ_SECONDS:
            try:
                limits = await store.read_limits(job.id)
            except (DatabaseAway, *REFUSALS) as error:
                log.warning("limits_not_read", error=str(error))  # what was known holds
            else:
                if limits is None:
                    # Its lease was deleted with it; the heartbeat of a silent trainer would say so much later.
                    stop.request(StopReason.LEASE_LOST)
                    return
                allowance = Allowance.of(*limits)
            read_at = _now()
        if (reason := allowance.used_up(reporter.cost)) is not None:
            stop.request(reason)
            return


def _now() -> float:
    return asyncio.get_running_loop().time()
