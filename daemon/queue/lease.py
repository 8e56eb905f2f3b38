"""Keeps a claim alive: a heartbeat on its own connection, until the child is gone.

The heartbeat is independent of training, reporting and uploading, so that none of them can make
a living host look dead, and it goes on during a drain.
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

# Three renewals fit into a lease: one may be lost and one late before the lease expires.
RENEWALS_A_LEASE = 3


def heartbeat_database(settings: Settings) -> Database:
    """Creates the connection that renews leases, and does nothing else.

    A renewal without an answer is abandoned after a third of the lease: a half-open connection is replaced before the
    lease expires."""
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
    """A lease during its attempt. `doubt` renews it at once, to find out whether it is still held."""

    def __init__(self) -> None:
        self._doubted = asyncio.Event()
        self.renewed_at = asyncio.get_running_loop().time()

    def doubt(self) -> None:
        self._doubted.set()

    async def wait(self, seconds: float) -> None:
        """Waits until the next renewal is due, or `doubt` is called."""
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
        """Keeps this lease until the block ends. When it is lost or the job is cancelled, asks the attempt to stop."""
        held = HeldLease()
        async with Chores(self._troubles) as chores:
            chores.start(_chore_of(lease), lambda: self._renew_for_ever(lease, held, stop))
            yield held

    async def _renew_for_ever(self, lease: Lease, held: HeldLease, stop: Stop) -> None:
        clock = asyncio.get_running_loop().time
        period = self._lease_seconds / RENEWALS_A_LEASE
        # Restarted after a failure: count from the last renewal.
        wait_seconds = max(min(period, held.renewed_at + period - clock()), 0.0)
        while True:
            await held.wait(wait_seconds)
            try:
                state = await self._store.renew_lease(lease, self._lease_seconds)
            except LeaseLost:
                log.warning("lease_lost", lease_epoch=lease.epoch)
                stop.request(StopReason.LEASE_LOST)
                return
            # A missing grant does not end the loop either: without a heartbeat, training would go on past a lost lease.
            except (DatabaseAway, HostUnfit, StatementRefused) as error:
                silent_seconds = clock() - held.renewed_at
                log.warning("lease_not_renewed", silent_seconds=round(silent_seconds, 1), error=str(error))
                # No lease is reaped while the database is away, and a reaper waits one lease after its own
                # reconnect: going on is safe. TRAINER_ON_PARTITION=stop saves the GPU instead.
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
