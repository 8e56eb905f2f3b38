"""Keeping a claim alive: a heartbeat on a connection of its own, until the child is gone.

The heartbeat is independent of training, reporting and uploading, so that none of them can make
a living host look dead, and it goes on through the drain.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, Protocol

import structlog

from daemon.chores import Chores, worked
from daemon.database.connection import Database
from daemon.errors import DatabaseAway, HostUnfit, LeaseLost, StatementRefused
from daemon.queue.job import Lease
from daemon.queue.states import HELD, State
from daemon.settings import Settings
from daemon.stop_request import Stop, StopReason
from daemon.tasks import wait_at_most
from daemon.troubles import Troubles

log = structlog.get_logger()

# Three renewals fit into a lease: one may be lost and one late before anybody thinks us dead.
RENEWALS_A_LEASE = 3


def heartbeat_database(settings: Settings) -> Database:
    """The connection that renews leases, and does nothing else.

    A renewal without an answer is given up after a third of the lease: found half open, its connection is made anew
    before anybody else may think us dead."""
    patience = settings.lease_seconds / 6
    return Database(
        settings.database_url.get_secret_value(),
        application_name="brightrun-trainer heartbeat",
        connect_seconds=patience,
        statement_seconds=patience,
    )


class Renewing(Protocol):
    async def renew_lease(self, lease: Lease, lease_seconds: float) -> State: ...


class HeldLease:
    """A lease while its attempt lasts. `doubt` has it renewed at once, to learn what became of it."""

    def __init__(self) -> None:
        self._doubted = asyncio.Event()
        self.renewed_at = asyncio.get_running_loop().time()

    def doubt(self) -> None:
        self._doubted.set()

    async def wait(self, seconds: float) -> None:
        """Until the next renewal is due, or somebody doubts."""
        if await wait_at_most(self._doubted, seconds):
            self._doubted.clear()


class LeaseKeeper:
    """Renews leases and turns what it learns into stop requests."""

    def __init__(
        self,
        store: Renewing,
        *,
        lease_seconds: float,
        on_partition: Literal["continue", "stop"],
        troubles: Troubles | None = None,
    ) -> None:
        self._troubles = troubles or Troubles()
        self._store = store
        self._lease_seconds = lease_seconds
        self._on_partition = on_partition

    @asynccontextmanager
    async def hold(self, lease: Lease, stop: Stop) -> AsyncIterator[HeldLease]:
        """Keep this lease until the block ends. Lost or cancelled, it asks the attempt to stop."""
        held = HeldLease()
        async with Chores(self._troubles) as chores:
            chores.start(_chore_of(lease), lambda: self._renew_for_ever(lease, held, stop))
            yield held

    async def _renew_for_ever(self, lease: Lease, held: HeldLease, stop: Stop) -> None:
        clock = asyncio.get_running_loop().time
        period = self._lease_seconds / RENEWALS_A_LEASE
        # Begun again after a failure: the last renewal is as old as it is.
        wait_seconds = max(min(period, held.renewed_at + period - clock()), 0.0)
        while True:
            await held.wait(wait_seconds)
            try:
                state = await self._store.renew_lease(lease, self._lease_seconds)
            except LeaseLost:
                log.warning("lease_lost", lease_epoch=lease.epoch)
                stop.request(StopReason.LEASE_LOST)
                return
            # A right that is missing for a while is no death either: whoever ceased to renew would train on unheard.
            except (DatabaseAway, HostUnfit, StatementRefused) as error:
                silent_seconds = clock() - held.renewed_at
                log.warning("lease_not_renewed", silent_seconds=round(silent_seconds, 1), error=str(error))
                # Nobody reaps while the database is away, and a reaper waits one lease after its own
                # reconnect: going on is safe. Who prefers to save the GPU in a partition says so.
                if self._on_partition == "stop" and silent_seconds > self._lease_seconds:
                    stop.request(StopReason.LEASE_LOST)
                    return
                if isinstance(error, StatementRefused):
                    self._troubles.begin(_chore_of(lease), f"the database refuses to renew the lease: {error}")
                wait_seconds = min(period, 1.0)
                continue
            held.renewed_at, wait_seconds = clock(), period
            worked()
            if state is State.CANCELLED:
                # Keep renewing: a cancelled job holds its lease until its child is gone.
                stop.request(StopReason.CANCELLED)
            elif state not in HELD:
                log.error("lease_without_job", state=state, lease_epoch=lease.epoch)
                stop.request(StopReason.LEASE_LOST)
                return


def _chore_of(lease: Lease) -> str:
    return f"heartbeat of job {lease.job_id}"
