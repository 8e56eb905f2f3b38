"""The outbox of a serverless worker without a database: callbacks wait in this process's memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

from daemon.report.outbox import Callback


class MemoryOutbox:
    """An Outbox for one process: no other one delivers from it, so a token is never out of date."""

    def __init__(self) -> None:
        self._callbacks: dict[UUID, Callback] = {}
        self._not_before: dict[UUID, float] = {}
        self._sequence = 0

    def next_sequence(self) -> int:
        """Returns the number of the next message, whether a callback or a progress report."""
        self._sequence += 1
        return self._sequence

    def add(self, job_id: UUID, url: str, event: str, payload: Mapping[str, Any]) -> None:
        """Adds a callback that reports this event."""
        sequence, now = self.next_sequence(), datetime.now(UTC)
        told = {"job_id": str(job_id), "event": event, "sequence": sequence, "at": now.isoformat()}
        callback = Callback(
            id=uuid4(),
            token=uuid4(),
            job_id=job_id,
            sequence=sequence,
            url=url,
            host=urlsplit(url).netloc.rpartition("@")[2].lower(),
            event=event,
            payload={**payload, **told},
            attempts=0,
            created_at=now,
        )
        self._callbacks[callback.id] = callback

    async def claim_callbacks(self, limit: int, lock_seconds: float) -> list[Callback]:
        # Like the SQL statement: the first of each host, one at a time, so that a dead receiver delays no others.
        first: dict[str, Callback] = {}
        for callback in self._callbacks.values():
            first.setdefault(callback.host, callback)
        now = time.monotonic()
        due = [callback for callback in first.values() if self._not_before.get(callback.id, 0.0) <= now]
        claimed = [replace(callback, attempts=callback.attempts + 1) for callback in due[:limit]]
        for callback in claimed:
            self._callbacks[callback.id] = callback
            self._not_before[callback.id] = now + lock_seconds
        return claimed

    async def deliver_callback(self, callback_id: UUID, token: UUID, status: int | None) -> bool:  # noqa: ARG002
        return self._callbacks.pop(callback_id, None) is not None

    async def postpone_callback(
        self,
        callback_id: UUID,
        token: UUID,  # noqa: ARG002
        delay_seconds: float,
        status: int | None,  # noqa: ARG002
        error: str | None,  # noqa: ARG002
    ) -> bool:
        self._not_before[callback_id] = time.monotonic() + delay_seconds
        return callback_id in self._callbacks

    async def mark_callback_dead(self, callback_id: UUID, token: UUID, status: int | None, error: str | None) -> bool:  # noqa: ARG002
        return self._callbacks.pop(callback_id, None) is not None
