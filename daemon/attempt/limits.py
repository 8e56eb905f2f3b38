"""Enforces a running job's cost limit and deadline.

The owner sets both, and may change them or delete the job at any time: start with the values of the claim, then
follow the row.
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
# One read by primary key; the progress of the same job is written five times as often.
READ_SECONDS = 5.0


@dataclass(frozen=True)
class Allowance:
    """`ends_at` is by the event loop's clock, computed from the database's time left: no other clock is used."""

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
    """Requests a stop when the job exceeds its cost limit or deadline, or when its row is gone.

    Reads the limits every few seconds, and always before stopping: one that was just raised counts."""
    allowance = Allowance.of(job.max_cost, job.seconds_to_deadline(reporter.attempt_seconds))
    read_at = _now()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        worked()
        if allowance.used_up(reporter.cost) is not None or _now() >= read_at + READ_SECONDS:
            try:
                limits = await store.read_limits(job.id)
            except (DatabaseAway, *REFUSALS) as error:
                log.warning("limits_not_read", error=str(error))  # the last known limits hold
            else:
                if limits is None:
                    # Its lease was deleted with it; the heartbeat would notice only later.
                    stop.request(StopReason.LEASE_LOST)
                    return
                allowance = Allowance.of(*limits)
            read_at = _now()
        if (reason := allowance.used_up(reporter.cost)) is not None:
            stop.request(reason)
            return


def _now() -> float:
    return asyncio.get_running_loop().time()
