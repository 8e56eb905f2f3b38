"""What the job statements take and give: typed rows, without a database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from daemon.queue.job import ClaimedJob, Lease
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


@dataclass(frozen=True)
class FoundJob:
    """What there is of a job, as a statement says that row security cannot filter. `holder`: its lease.

    `can_tell` False: nothing else in it means anything. `tables`: see ClaimedJob."""

    can_tell: bool
    job_exists: bool
    epoch: int | None
    state: str | None
    dataset_exists: bool
    holder: Mapping[str, Any] | None
    checkpoints: int
    tables: str

    @property
    def is_deleted(self) -> bool:
        return self.can_tell and not self.job_exists

    def is_held_by(self, lease: Lease) -> bool:
        holder = self.holder
        return holder is not None and all(
            str(holder[name]) == str(value) for name, value in lease.parameters().items() if name in holder
        )
