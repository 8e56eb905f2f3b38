"""States, the legal moves between them, and the ways an attempt can end.

The database enforces the same table (sql/migrations, the guard); a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from training.events import ErrorCode, HostPart


@dataclass(frozen=True)
class Lease:
    """A daemon's dated claim on a job: every write names all three fields.

    The epoch rises with each claim. The token is random: after a restore from a backup the same epoch can be given out
    again, but never the same token."""

    job_id: UUID
    epoch: int
    token: UUID

    def parameters(self) -> dict[str, Any]:
        return {"job_id": self.job_id, "epoch": self.epoch, "token": self.token}


@dataclass(frozen=True)
class JobDataset:
    """All facts about the data in a job's row and its dataset's row. Equal ones mean the same data and owner."""

    job_id: UUID
    user_id: UUID
    dataset_id: UUID
    dataset_url: str | None
    storage_bucket: str | None
    storage_path: str | None
    dataset_user_id: UUID | None


@dataclass(frozen=True)
class ClaimedJob:
    """A row as the claim returned it, with the lease that this host holds on it. Not parsed yet."""

    id: UUID
    lease_epoch: int
    lease_token: UUID
    attempt: int
    max_attempts: int
    user_id: UUID
    dataset_id: UUID
    need_gpus: int
    hyperparameters: Any
    gpu_config: Any
    dataset_url: str | None
    storage_bucket: str | None
    storage_path: str | None
    dataset_user_id: UUID | None
    callback_url: str | None
    queued_at: datetime
    claimed_at: datetime
    started_at: datetime | None
    spent: float = 0.0
    max_cost: float | None = None
    deadline_at: datetime | None = None
    base_model: str | None = None
    # Identifies the table that the job was claimed in, if it is recreated later; None without a database.
    tables: str | None = None

    @property
    def lease(self) -> Lease:
        return Lease(self.id, self.lease_epoch, self.lease_token)

    @property
    def dataset(self) -> JobDataset:
        return JobDataset(
            job_id=self.id,
            user_id=self.user_id,
            dataset_id=self.dataset_id,
            dataset_url=self.dataset_url,
            storage_bucket=self.storage_bucket,
            storage_path=self.storage_path,
            dataset_user_id=self.dataset_user_id,
        )

    @property
    def waited_seconds(self) -> float:
        return (self.claimed_at - self.queued_at).total_seconds()

    def seconds_to_deadline(self, attempt_seconds: float) -> float | None:
        """By the database's clock at the claim plus the time since; None without a deadline."""
        if self.deadline_at is None:
            return None
        return (self.deadline_at - self.claimed_at).total_seconds() - attempt_seconds


@dataclass(frozen=True)
class Returned:
    """The host cannot work, whatever the job. The job is requeued; the attempt counts only after many returns.

    `code`, `message` and `hint` are written only when no attempt is left. `works_again`: a probe of the part passed."""

    part: HostPart
    code: ErrorCode
    message: str
    hint: str | None = None
    stack: str | None = None
    works_again: bool = False
