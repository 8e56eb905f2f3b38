"""States, the legal moves between them, and the ways an attempt can end.

The database enforces the same table (sql/migrations, the guard); a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from training.events import ErrorCode, HostPart


class State(StrEnum):
    """training_jobs.status, in the app's own words."""

    QUEUED = "queued"
    INITIALIZING = "initializing"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNFINISHED = frozenset({State.QUEUED, State.INITIALIZING, State.RUNNING})
HELD = frozenset({State.INITIALIZING, State.RUNNING})
FINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})


@dataclass(frozen=True)
class Move:
    """One legal change of state: its name, where it may start, where it leads, and why it exists."""

    name: str
    origins: frozenset[State]
    target: State
    reason: str


MOVES: tuple[Move, ...] = (
    Move("claim", frozenset({State.QUEUED}), State.INITIALIZING, "a daemon takes the job under a fresh lease"),
    Move("start", frozenset({State.INITIALIZING}), State.RUNNING, "the first optimizer step is done"),
    Move("complete", HELD, State.COMPLETED, "the uploaded adapter was verified"),
    Move("retry", HELD, State.QUEUED, "a transient failure with attempts left: later, with backoff"),
    Move("fail", HELD, State.FAILED, "a failure that another attempt would repeat, or no attempt left"),
    Move("release", HELD, State.QUEUED, "shutdown or preemption: at once, the attempt is given back"),
    Move("return", HELD, State.QUEUED, "the host cannot work: the attempt is given back, up to a limit"),
    Move("cancel", UNFINISHED, State.CANCELLED, "the owner's wish, by UPDATE or by function"),
    Move("reap", HELD, State.QUEUED, "the lease expired: the host died or was cut off"),
    Move("reap_for_good", HELD, State.FAILED, "the lease expired and no attempt is left"),
    Move("resubmit", frozenset({State.FAILED, State.CANCELLED}), State.QUEUED, "the owner or operator tries again"),
)


@dataclass(frozen=True)
class Lease:
    """A daemon's dated claim on a job: every write names all three.

    The epoch rises with each claim. The token is drawn at random for it: rows that a backup has taken back in time give
    an epoch a second time, and never a token."""

    job_id: UUID
    epoch: int
    token: UUID


@dataclass(frozen=True)
class JobDataset:
    """All that a job's row and its dataset's row say of the data. Equal ones name the same, for the same owner."""

    job_id: UUID
    user_id: UUID
    dataset_id: UUID
    dataset_url: str | None
    storage_bucket: str | None
    storage_path: str | None
    dataset_user_id: UUID | None


@dataclass(frozen=True)
class ClaimedJob:
    """A row as the claim returned it, with the lease that makes it ours. Not parsed yet."""

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
    # Tells the table that the job was claimed in from one that was made anew since; None without a database.
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
        """By the database's clock at the claim and the time since; None without a deadline."""
        if self.deadline_at is None:
            return None
        return (self.deadline_at - self.claimed_at).total_seconds() - attempt_seconds


@dataclass(frozen=True)
class Completed:
    """The adapter is stored and verified."""

    adapter_path: str
    adapter_sha256: str
    adapter_bytes: int
    artifacts: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """The attempt ended badly; `transient` decides between retry and fail. `host`: the part of this host that is to
    blame for it, if one is."""

    code: ErrorCode
    message: str
    hint: str | None = None
    stack: str | None = None
    transient: bool = False
    host: HostPart | None = None


@dataclass(frozen=True)
class Released:
    """The host gives the job back unharmed: shutdown, preemption."""

    reason: str


@dataclass(frozen=True)
class Returned:
    """The host cannot work, whatever the job: it goes back, uncounted as long as hosts are to blame within reason.

    `code`, `message` and `hint` are written only where no attempt is left."""

    part: HostPart
    code: ErrorCode
    message: str
    hint: str | None = None
    stack: str | None = None


@dataclass(frozen=True)
class Cancelled:
    """The row was cancelled while we worked; our child is gone now."""


@dataclass(frozen=True)
class Superseded:
    """The lease is no longer ours: whatever we know about this job is history."""


Outcome = Completed | Failed | Released | Returned | Cancelled | Superseded
