"""Jobs of a serverless host that has a database: rows like everybody's, claimed by their id."""

from __future__ import annotations

from uuid import UUID

from daemon.gateway_rows import GatewayRows
from daemon.gateway_words import Submission
from daemon.job import ClaimedJob
from daemon.settings import Settings

# A row that we insert is ours for so long; if this host dies before it claims it, any daemon may.
HOLD_SECONDS = 60.0


class ServerlessRows(GatewayRows):
    def __init__(self, settings: Settings, worker_id: UUID) -> None:
        super().__init__(settings)
        self._worker_id = worker_id
        self._lease_seconds = settings.lease_seconds

    async def submit(self, submission: Submission, hold_seconds: float | None = HOLD_SECONDS) -> UUID:
        """The row that the caller names, or one that is made and that no daemon takes meanwhile."""
        return await super().submit(submission, hold_seconds)

    async def claim(self, job_id: UUID) -> ClaimedJob | None:
        """Take this job; None when somebody else holds it, or it is final, or its time has not come."""
        parameters = {"job_id": job_id, "worker_id": self._worker_id, "lease_seconds": self._lease_seconds}
        rows = await self.fetch("claim_job_by_id", parameters)
        return ClaimedJob(**rows[0]) if rows else None
