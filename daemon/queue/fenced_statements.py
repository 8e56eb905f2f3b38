"""Runs statements by name. A write that names a lease fails with LeaseLost once the lease is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from daemon.database.connection import Database
from daemon.database.statements import statement
from daemon.errors import LeaseLost, RowsHidden
from daemon.queue.job import Lease
from daemon.queue.rows import FoundJob
from daemon.queue.states import HELD

# These writes also find no row once the job is final; all others find theirs as long as the lease exists.
_OF_A_RUNNING_JOB = {"start_job", "record_plan", "record_progress"}
_HIDDEN = "rows are hidden from the daemon by row security"


class FencedStatements:
    """The job statements over one Database. Raises what Database raises."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, name: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        return await self._database.fetch(statement(name), parameters)

    async def fenced(self, name: str, lease: Lease, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Runs one write to a claimed job and returns its rows. Raises LeaseLost or RowsHidden if it finds none."""
        rows = await self.run(name, {**lease.parameters(), **values})
        if not rows:
            raise await self.why_no_row(name, lease)
        return rows

    async def why_no_row(self, name: str, lease: Lease) -> LeaseLost | RowsHidden:
        """Finds out why a fenced write found no row: the lease is lost, or row security hides it."""
        found = await self.find_job(lease.job_id)
        if not found.can_tell:
            return RowsHidden(f"whether the lease of job {lease.job_id} is still there is not known: {_HIDDEN}")
        if found.is_held_by(lease) and (name not in _OF_A_RUNNING_JOB or found.state in HELD):
            return RowsHidden(f"the lease of job {lease.job_id} is ours, and {_HIDDEN}")
        return LeaseLost(
            f"the lease {lease.epoch} of job {lease.job_id} is not this host's any more, or the job is final"
        )

    async def find_job(self, job_id: UUID) -> FoundJob:
        """Returns what exists of a job, even if row security hides it from us."""
        return FoundJob(**(await self.run("find_job", {"job_id": job_id}))[0])
