"""How an attempt can end. The worker maps each outcome to one move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from daemon.queue.job import Returned
from training.events import ErrorCode, HostPart

DeliveryKind = Literal["merged", "gguf", "transformers4", "hub", "endpoint"]


@dataclass(frozen=True)
class Wanted:
    """What is to be done with the adapter once the job is completed. `target`: a repository of the hub, say."""

    kind: DeliveryKind
    target: str = ""


@dataclass(frozen=True)
class Completed:
    """The adapter is stored and verified. `deliveries` follow."""

    adapter_path: str
    adapter_sha256: str
    adapter_bytes: int
    artifacts: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    deliveries: tuple[Wanted, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The attempt ended badly; `transient` decides between retry and fail. `host` is the part of this host that caused
    it, if one did."""

    code: ErrorCode
    message: str
    hint: str | None = None
    stack: str | None = None
    transient: bool = False
    host: HostPart | None = None


@dataclass(frozen=True)
class Released:
    """The host gives the job back: shutdown or preemption."""

    reason: str


@dataclass(frozen=True)
class Cancelled:
    """The row was cancelled during the attempt; the child is gone now."""


@dataclass(frozen=True)
class Superseded:
    """The lease is no longer ours: nothing about this job may be written."""


Outcome = Completed | Failed | Released | Returned | Cancelled | Superseded
