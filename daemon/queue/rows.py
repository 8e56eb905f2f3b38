"""Parameters and results of the job statements as typed rows, without a database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from daemon.host.inspect import Host
from daemon.queue.job import ClaimedJob, Lease
from daemon.queue.states import State
from daemon.settings import Settings


@dataclass(frozen=True)
class Limits:
    """What a host can serve now; None means no limit. Memory is of one GPU, in GB.

    Jobs for `warm_models` (an empty name stands for jobs that name none) are claimed before older jobs of the same
    priority that have waited less than `warm_first_seconds`."""

    free_gpus: int | None = None
    gpu_memory_gb: float | None = None
    gpu_type: str | None = None
    models: Sequence[str] | None = None
    user_cap: int | None = None
    warm_models: Sequence[str] = ()
    warm_first_seconds: float = 0.0
    # Jobs that a claim skips because the database refused to let this daemon have them.
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


def limits_of(
    settings: Settings, host: Host, free_gpus: int | None, warm_models: Sequence[str], skip: Sequence[UUID]
) -> Limits:
    """Returns what this host serves and what of it is free; the same rules for a claim and for a prefetch."""
    return Limits(
        free_gpus=free_gpus,
        gpu_memory_gb=host.gpu_memory_gb,
        gpu_type=host.gpu_type,
        models=settings.allowed_models or None,
        user_cap=settings.user_cap,
        warm_models=warm_models,
        warm_first_seconds=settings.warm_first_seconds,
        skip=skip,
    )


@dataclass(frozen=True)
class Claim:
    """What a claim found. `contested`: there is work, but other hosts took or locked it first; ask again soon."""

    job: ClaimedJob | None
    contested: bool = False


@dataclass(frozen=True)
class Ending:
    """The result of ending a job. `moved` False: the job was cancelled, or submitted again, in the meantime.

    `state` is the job's state now: failed, for instance, after a retry without attempts left. `noted` False: the
    job has no objects in storage."""

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
    """An expired lease that was ended, and its job's state now. A held state: the database refused to move the job."""

    job_id: UUID
    state: State


@dataclass(frozen=True)
class FoundJob:
    """What exists of a job, from a function that row security cannot filter. `holder` is its lease.

    `can_tell` False: the other fields mean nothing. `tables`: see ClaimedJob."""

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
