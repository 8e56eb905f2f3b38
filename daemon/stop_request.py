"""Stop requests: why an attempt is asked to end early. One of the two signals that move against the flow of events."""

from __future__ import annotations

import asyncio
from enum import StrEnum


class StopReason(StrEnum):
    CANCELLED = "cancelled"
    LEASE_LOST = "lease_lost"
    SHUTDOWN = "shutdown"
    DEADLINE = "deadline"
    BUDGET = "budget"

    @property
    def saves_a_checkpoint(self) -> bool:
        """True if the job will go on elsewhere or later: only then is a checkpoint worth waiting for."""
        return self in {StopReason.SHUTDOWN, StopReason.DEADLINE, StopReason.BUDGET}


class Stop:
    """A request to end one attempt. The first reason stands, except that a lost lease overrides every other: without
    the lease nothing may be written."""

    def __init__(self) -> None:
        self._requested = asyncio.Event()
        self._lease_lost = asyncio.Event()
        self._reason: StopReason | None = None
        self.hurried = False

    def hurry(self) -> None:
        """Ends every grace period at once."""
        self.hurried = True

    def request(self, reason: StopReason) -> None:
        if self._reason is None or reason is StopReason.LEASE_LOST:
            self._reason = reason
        if reason is StopReason.LEASE_LOST:
            self._lease_lost.set()
        self._requested.set()

    async def wait(self) -> StopReason:
        await self._requested.wait()
        assert self._reason is not None
        return self._reason

    async def wait_for_lost_lease(self) -> None:
        """Waits until the lease is lost, or counts as lost in a partition, whatever was requested before."""
        await self._lease_lost.wait()

    @property
    def reason(self) -> StopReason | None:
        return self._reason

    @property
    def saves_a_checkpoint(self) -> bool:
        """True if a stop was requested, for a reason after which the job goes on."""
        return self._reason is not None and self._reason.saves_a_checkpoint
