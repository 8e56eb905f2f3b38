"""Deliveries in Postgres: one method per statement. A write whose lock is lost raises LockLost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from daemon.database.column_types import clean_json, clean_text
from daemon.database.connection import Database
from daemon.database.statements import statement
from daemon.delivery.delivery import Delivery, LockLost
from daemon.queue.outcome import DeliveryKind
from daemon.sentence import as_sentence
from daemon.storage.interface import Location

MESSAGE_CHARACTERS = 4_000


@dataclass(frozen=True)
class Reach:
    """What this host can take now. `models` None: every model. `patience_seconds`: what others may take before us."""

    worker_id: UUID
    kinds: Sequence[DeliveryKind]
    storage: str
    models: Sequence[str] | None = None
    patience_seconds: float = 0.0
    skip: Sequence[UUID] = ()

    def parameters(self) -> dict[str, Any]:
        return {
            "worker_id": self.worker_id,
            "kinds": [*self.kinds],
            "storage": self.storage,
            "models": None if self.models is None else [*self.models],
            "patience_seconds": self.patience_seconds,
            "skip": [*self.skip],
        }


@dataclass(frozen=True)
class Fault:
    """Why a delivery was not done, for the job's owner."""

    code: str
    message: str
    hint: str | None = None

    def columns(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "message": clean_text(as_sentence(self.message), MESSAGE_CHARACTERS),
            "hint": None if self.hint is None else clean_text(as_sentence(self.hint), MESSAGE_CHARACTERS),
        }


_NO_FAULT: dict[str, Any] = {"code": None, "message": None, "hint": None}


class SqlDeliveries:
    """The statements of training_deliveries over one Database. Raises what Database raises."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, reach: Reach, lock_seconds: float) -> Delivery | None:
        """Claims the delivery that is due first."""
        rows = await self._run("claim_delivery", reach.parameters() | {"lock_seconds": lock_seconds})
        return Delivery(**rows[0]) if rows else None

    async def has_due(self, reach: Reach) -> bool:
        """Whether `claim` would find one."""
        return bool((await self._run("has_due_delivery", reach.parameters()))[0]["due"])

    async def renew(self, delivery: Delivery, lock_seconds: float) -> None:
        await self._locked("renew_delivery", delivery, {"lock_seconds": lock_seconds})

    async def finish(self, delivery: Delivery, result: dict[str, Any]) -> None:
        await self._locked("finish_delivery", delivery, {"result": Jsonb(clean_json(result))})

    async def postpone(self, delivery: Delivery, fault: Fault | None, delay_seconds: float, *, counted: bool) -> None:
        """Gives it back, to be taken again after the delay. Not `counted`: this host is at fault, or leaves."""
        values = _NO_FAULT if fault is None else fault.columns()
        await self._locked("postpone_delivery", delivery, values | {"delay_seconds": delay_seconds, "counted": counted})

    async def fail(self, delivery: Delivery, fault: Fault) -> None:
        await self._locked("fail_delivery", delivery, fault.columns())

    async def record_export(self, delivery: Delivery, location: Location, objects: Sequence[str]) -> None:
        """Records objects before their first byte is sent, so that they are found if this host dies."""
        await self._locked("record_export", delivery, {"objects": [*objects]} | location.parameters())

    async def _locked(self, name: str, delivery: Delivery, values: dict[str, Any]) -> None:
        if not await self._run(name, delivery.lock() | values):
            raise LockLost(f"the delivery {delivery.kind} of job {delivery.job_id} is not this host's any more")

    async def _run(self, name: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        return await self._database.fetch(statement(name), parameters)
