"""What the statements take and give: typed rows, without a database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from daemon.queue.job import ClaimedJob
from daemon.queue.states import State


@dataclass(frozen=True)
class Limits:
    """What a host can serve now; None means no limit. Memory is of one GPU, in GB.

    `warm_models` (an empty name stands for jobs that name none) go before older jobs of the same priority that have
    waited less than `warm_first_seconds`."""

    free_gpus: int | None = None
    gpu_memory_gb: float | None = None
    gpu_type: str | None = None
    models: Sequence[str] | None = None
    user_cap: int | None = None
    warm_models: Sequence[str] = ()
    warm_first_seconds: float = 0.0
    # Jobs that a claim passes over: the database would not let this daemon have them.
    skip: Sequence[UUID] = ()

    def parameters(self, window: int) -> dict[str, Any]:
        return {
            "free_gpus": self.free_gpus,
            "gpu_memory_gb": self.gpu_memory_gb,
            "gpu_type": self.gpu_type,
            "models": None if self.models is None else list(self.models),
            "user_cap": self.user_cap,
            "warm_models": list(self.warm_models),
            "warm_first_seconds": self.warm_first_seconds,
            "skip": list(self.skip),
            "window": window,
        }


@dataclass(frozen=True)
class Claim:
    """What a claim found. `contested`: there is work, but others were quicker or hold it still; ask again soon."""

    job: ClaimedJob | None
    contested: bool = False


@dataclass(frozen=True)
class Ending:
    """How an ending ended: `moved` False means that the job was cancelled (or submitted again) meanwhile.

    `state` is where the job is now: a retry without an attempt left says `failed` here. `noted` False: nothing of
    the job lies in Storage."""

    moved: bool
    state: State | None
    noted: bool


@dataclass(frozen=True)
class MetricPoint:
    """One point of the app's charts; loss and learning rate are its NOT NULL columns."""

    step: int
    epoch: int
    training_loss: float
    learning_rate: float
    validation_loss: float | None = None
    gradient_norm: float | None = None
    throughput: float | None = None
    gpu_utilization: float | None = None
    at: datetime | None = None


@dataclass(frozen=True)
class Reaped:
    """An expired lease that was ended, and where its job is now. Still held: the database would not move it."""

    job_id: UUID
    state: State


WorkerState = Literal["idle", "busy", "draining", "out_of_service"]


Wish = Literal["serve", "drain"]


@dataclass(frozen=True)
class WorkerRow:
    """One boot of a daemon and what its host can do. `models` None: whatever is asked for. Memory is of one GPU."""

    id: UUID
    host: str
    device: str
    pod: str | None = None
    gpus: Sequence[Mapping[str, Any]] = ()
    gpu_count: int = 0
    gpu_memory_gb: float | None = None
    gpu_type: str | None = None
    models: Sequence[str] | None = None
    slots: int = 1
    user_cap: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


UploadKind = Literal["adapter", "checkpoint"]


@dataclass(frozen=True)
class NotedUpload:
    """Objects that one attempt may have stored, the archive first or the manifest last.

    `manifest_sha256` stands when a checkpoint is whole; `named` when the job's own row names the objects."""

    job_id: UUID
    epoch: int
    kind: UploadKind
    step: int
    objects: list[str]
    manifest_sha256: str | None = None
    named: bool = False


@dataclass(frozen=True)
class Callback:
    """One outbox row, ours until its lock runs out. `id` stays the same at each try, `token` does not."""

    id: UUID
    token: UUID
    job_id: UUID
    sequence: int
    url: str
    host: str
    event: str
    payload: dict[str, Any]
    attempts: int
    created_at: datetime


@dataclass(frozen=True)
class Location:
    """Which bucket, and of which storage: two projects, or two hosts' folders, may each have one of the same name."""

    storage: str
    bucket: str
