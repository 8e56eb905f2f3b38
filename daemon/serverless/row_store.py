"""Jobs of a serverless host with a database: ordinary rows, claimed by their id."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from daemon.gateway.job_rows import GatewayRows, Refused
from daemon.gateway.schemas import Submission
from daemon.host.inspect import Host
from daemon.queue.job import ClaimedJob
from daemon.settings import Settings

# A row that we insert is reserved for us this long; if this host dies before the claim, any daemon may take it.
HOLD_SECONDS = 60.0


class ServerlessRows(GatewayRows):
    def __init__(self, settings: Settings, host: Host) -> None:
        super().__init__(settings)
        self._host = host
        self._lease_seconds = settings.lease_seconds
        self._models = list(settings.allowed_models) or None

    async def submit(self, submission: Submission, hold_seconds: float | None = HOLD_SECONDS) -> UUID:
        """Returns the row that the caller names, or inserts one that no daemon takes for `hold_seconds`."""
        return await super().submit(submission, hold_seconds)

    async def claim(self, job_id: UUID) -> ClaimedJob | None:
        """Claims this job; None when another host holds it, it is final, or it is not due yet.

        Raises Refused when this host cannot serve it."""
        host = self._host
        parameters = {
            "job_id": job_id,
            "worker_id": host.worker_id,
            "free_gpus": None if host.device == "cpu" else host.gpus_per_job,
            "gpu_memory_gb": host.gpu_memory_gb,
            "gpu_type": host.gpu_type,
            "models": self._models,
            "lease_seconds": self._lease_seconds,
        }
        rows = await self.fetch("claim_job_by_id", parameters)
        if not rows:
            return None
        lacking = rows[0].pop("lacking")
        if lacking:
            raise cannot_serve(lacking, "Its row stays queued for a host that can.")
        return ClaimedJob(**rows[0]) if rows[0]["id"] is not None else None


def cannot_serve(lacking: Sequence[str], remark: str | None = None) -> Refused:
    """Returns the error when this host lacks what the job asks for; `lacking` is in the words of claim_job_by_id."""
    advice = "Send it where the hosts have it, or ask for less in gpu_config."
    return Refused(
        422,
        f"This host cannot serve the job: it asks for {'; for '.join(lacking)}.",
        hint=f"{advice} {remark}" if remark else advice,
    )
