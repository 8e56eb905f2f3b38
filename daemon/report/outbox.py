"""Callbacks waiting to be delivered. Each was written in the transaction of the state it reports."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from daemon.database.column_types import clean_text
from daemon.database.connection import Database
from daemon.database.statements import statement
from daemon.errors import StatementRefused
from daemon.queue.refused_rows import RefusedRows
from daemon.troubles import Troubles


@dataclass(frozen=True)
class Callback:
    """One outbox row, ours until its lock expires. `id` stays the same for every try, `token` does not."""

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


class Outbox(Protocol):
    """What the courier needs. A token that is no longer valid settles nothing and returns False: the lock has expired,
    and another daemon has the callback now."""

    async def claim_callbacks(self, limit: int, lock_seconds: float, /) -> list[Callback]: ...

    async def deliver_callback(self, callback_id: UUID, token: UUID, status: int | None, /) -> bool: ...

    async def postpone_callback(
        self, callback_id: UUID, token: UUID, delay_seconds: float, status: int | None, error: str | None, /
    ) -> bool: ...

    async def mark_callback_dead(
        self, callback_id: UUID, token: UUID, status: int | None, error: str | None, /
    ) -> bool: ...


class SqlOutbox:
    """The statements of training_callbacks over one Database. Raises what Database raises."""

    def __init__(self, database: Database, troubles: Troubles | None = None) -> None:
        self._database = database
        # A row that the database refuses must not hold up the others.
        self._refused = RefusedRows("callback", troubles or Troubles())

    async def claim_callbacks(self, limit: int, lock_seconds: float) -> list[Callback]:
        """Claims due callbacks, at most one per receiving host."""
        refused = self._refused
        values = {"limit": limit, "lock_seconds": lock_seconds, "skip": refused.skip, "only": None}
        try:
            return [Callback(**row) for row in await self._run("claim_callbacks", values)]
        except StatementRefused:
            due = await self._run("read_due_callbacks", {"skip": refused.skip})
        taken: list[Callback] = []
        for row in due:
            try:
                rows = await self._run("claim_callbacks", values | {"limit": 1, "only": row["id"]})
            except StatementRefused as error:
                refused.note(row["id"], error)
            else:
                taken += [Callback(**each) for each in rows]
            if len(taken) == limit:
                break
        return taken

    async def deliver_callback(self, callback_id: UUID, token: UUID, status: int | None) -> bool:
        """Marks the callback as delivered."""
        return bool(await self._run("deliver_callback", {"id": callback_id, "token": token, "status": status}))

    async def postpone_callback(
        self, callback_id: UUID, token: UUID, delay_seconds: float, status: int | None, error: str | None
    ) -> bool:
        """Schedules another try."""
        values = _attempt(callback_id, token, status, error) | {"delay_seconds": delay_seconds}
        return bool(await self._run("postpone_callback", values))

    async def mark_callback_dead(self, callback_id: UUID, token: UUID, status: int | None, error: str | None) -> bool:
        """Gives up on it; resend_callback() brings it back."""
        return bool(await self._run("mark_callback_dead", _attempt(callback_id, token, status, error)))

    async def oldest_callback_age(self) -> float | None:
        """Seconds that the oldest unsent callback has waited; None when there is none."""
        seconds: float | None = (await self._run("oldest_callback", {}))[0]["seconds"]
        return seconds

    async def _run(self, name: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        return await self._database.fetch(statement(name), parameters)


def _attempt(callback_id: UUID, token: UUID, status: int | None, error: str | None) -> dict[str, Any]:
    return {
        "id": callback_id,
        "token": token,
        "status": status,
        "error": None if error is None else clean_text(error, 1_000),
    }
