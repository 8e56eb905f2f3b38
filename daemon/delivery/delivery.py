"""A claimed delivery: what is to be done, with which adapter, and the lock that every write about it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from daemon.errors import TrainerError
from daemon.queue.outcome import DeliveryKind

EXPORTS: tuple[DeliveryKind, ...] = ("merged", "gguf", "transformers4")


class LockLost(TrainerError):
    """Another host may have the delivery now: store nothing and write nothing more."""


@dataclass(frozen=True)
class Delivery:
    """A row of training_deliveries as the claim returned it, with what is needed of its job.

    `attempts` counts this one. `claims` is part of the names of everything that is stored. `earlier_result` is what a
    delivery that was done before has left: it is in use until this one is done."""

    id: UUID
    token: UUID
    job_id: UUID
    user_id: UUID
    kind: DeliveryKind
    target: str
    attempts: int
    claims: int
    earlier_result: dict[str, Any] | None
    lease_epoch: int
    base_model: str | None
    trained_with: dict[str, Any] | None
    hyperparameters: Any
    adapter_path: str | None
    adapter_sha256: str | None
    adapter_bytes: int | None
    artifact_id: UUID | None = None

    def lock(self) -> dict[str, Any]:
        return {"id": self.id, "token": self.token}

    @property
    def model_name(self) -> str | None:
        """The base model that the adapter was trained on."""
        return (self.trained_with or {}).get("base_model") or self.base_model

    @property
    def model_revision(self) -> str | None:
        """The commit of the base model that the adapter was trained on, if it was known."""
        return (self.trained_with or {}).get("model_revision")
