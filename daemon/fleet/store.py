"""The fleet's statements: reads the database, and records each decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from daemon.database.column_types import clean_text
from daemon.database.connection import Database
from daemon.database.statements import statement
from daemon.fleet.pod_plan import GpuKind
from daemon.fleet.rules import PodRow, WaitingJob, WorkerSeen
from daemon.pod.runpod_api import Pod

# More waiting jobs than any fleet has pods for; the queue may have millions.
MOST_JOBS = 200


@dataclass(frozen=True)
class Failures:
    """How many pods of one GPU type in a row ended without reporting in."""

    gpu_type: str
    failures: int
    last_at: datetime


class FleetStore:
    """Uses one Database, whose session holds the fleet's lock. Raises what Database raises."""

    def __init__(self, database: Database) -> None:
        self.database = database

    async def take_turn(self) -> tuple[bool, datetime]:
        row = (await self._run("take_fleet_turn"))[0]
        return row["ours"], row["now"]

    async def end_turn(self) -> None:
        await self._run("end_fleet_turn")

    async def waiting_jobs(self, user_cap: int | None) -> list[WaitingJob]:
        rows = await self._run("read_waiting_jobs", most=MOST_JOBS, user_cap=user_cap)
        return [WaitingJob(**row) for row in rows]

    async def workers(self, since: datetime, pods: Sequence[str]) -> list[WorkerSeen]:
        return [WorkerSeen(**row) for row in await self._run("read_fleet_workers", since=since, pods=list(pods))]

    async def unplaced_leases(self) -> int:
        """Counts live leases whose host has no row: it may be on any pod."""
        return int((await self._run("read_unplaced_leases"))[0]["leases"])

    async def pods(self, listed: Sequence[UUID]) -> list[PodRow]:
        return [PodRow(**row) for row in await self._run("read_fleet_pods", listed=list(listed))]

    async def failures(self, now: datetime) -> list[Failures]:
        rows = await self._run("read_fleet_failures", since=now - timedelta(days=1))
        return [Failures(**row) for row in rows]

    async def ask_for_pod(self, now: datetime, kind: GpuKind, max_pods: int, reason: str) -> UUID | None:
        """Returns the new row's id; None if every slot is taken, also by another loop."""
        rows = await self._run(
            "ask_for_pod", now=now, gpu_type=kind.id, gpu_count=kind.count, max_pods=max_pods, reason=reason
        )
        return rows[0]["id"] if rows else None

    async def record_pod(self, now: datetime, row_id: UUID, pod: Pod, decision: str, reason: str) -> bool:
        price = pod.cost_per_hour
        values = {"id": row_id, "pod": pod.id, "price_per_hour": price, "decision": decision, "reason": reason}
        return bool(await self._run("record_pod", now=now, **values))

    async def record_report(self, now: datetime, row_id: UUID, reason: str) -> bool:
        return bool(await self._run("record_pod_report", now=now, id=row_id, reason=reason))

    async def record_idle(self, row_id: UUID, since: datetime | None) -> None:
        await self._run("record_pod_idle", id=row_id, since=since)

    async def doom_pod(self, now: datetime, row_id: UUID, doom: str, reason: str) -> bool:
        return bool(await self._run("doom_pod", now=now, id=row_id, doom=doom, reason=reason))

    async def end_pod(self, now: datetime, row_id: UUID, ending: str, reason: str) -> bool:
        values = {"id": row_id, "ending": ending, "reason": clean_text(reason, 1_000)}
        return bool(await self._run("end_pod", now=now, **values))

    async def record_decision(
        self,
        now: datetime,
        decision: str,
        reason: str,
        *,
        pod_row: UUID | None = None,
        pod: str | None = None,
        gpu_type: str | None = None,
    ) -> None:
        values = {"pod_row": pod_row, "pod": pod, "gpu_type": gpu_type, "reason": clean_text(reason, 1_000)}
        await self._run("record_fleet_decision", now=now, decision=decision, **values)

    async def _run(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        return await self.database.fetch(statement(name), parameters)
