"""Keeps this host's row in training_workers current, so that a waiting job can say what it waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID

import structlog
from psycopg.types.json import Jsonb

from daemon.chores import worked
from daemon.database.column_types import clean_json, clean_text
from daemon.database.connection import Database
from daemon.database.statements import statement
from daemon.errors import DatabaseAway, StatementRefused
from daemon.host.inspect import Host, installed_versions
from daemon.settings import Settings
from daemon.tasks import wait_at_most
from daemon.troubles import Troubles

log = structlog.get_logger()

TOUCH_SECONDS = 10.0


WorkerState = Literal["idle", "busy", "draining", "out_of_service"]


Wish = Literal["serve", "drain"]


@dataclass(frozen=True)
class WorkerRow:
    """One start of a daemon and what its host can do. `models` None: every model. Memory is of one GPU."""

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


class WorkerRegistry:
    """The statements of training_workers over one Database. Raises what Database raises."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def register_worker(self, worker: WorkerRow) -> None:
        """Adds the row of a daemon that has started, or is back after an outage."""
        values = {
            "id": worker.id,
            "host": clean_text(worker.host, 300),
            "pod": worker.pod,
            "device": worker.device,
            "gpus": Jsonb(clean_json(worker.gpus)),
            "gpu_count": worker.gpu_count,
            "gpu_memory_gb": worker.gpu_memory_gb,
            "gpu_type": worker.gpu_type,
            "models": None if worker.models is None else list(worker.models),
            "slots": worker.slots,
            "user_cap": worker.user_cap,
            "versions": Jsonb(clean_json(worker.versions)),
        }
        await self._database.fetch(statement("register_worker"), values)

    async def touch_worker(
        self, worker_id: UUID, *, state: WorkerState, busy: int, data: Mapping[str, Any]
    ) -> Wish | None:
        """Updates the row; the answer is what the operator asked for. None: the row is gone, register again."""
        values = {"id": worker_id, "state": state, "busy": busy, "data": Jsonb(clean_json(data))}
        rows = await self._database.fetch(statement("touch_worker"), values)
        if not rows:
            return None
        return "drain" if rows[0]["drain"] else "serve"

    async def end_worker(self, worker_id: UUID) -> None:
        """Marks the daemon as cleanly shut down."""
        await self._database.fetch(statement("end_worker"), {"id": worker_id})


@dataclass(frozen=True)
class Load:
    """What the host is doing now."""

    state: WorkerState
    busy: int


async def keep_registered(
    registry: WorkerRegistry,
    host: Host,
    settings: Settings,
    troubles: Troubles,
    *,
    load: Callable[[], Load],
    on_drain: Callable[[], None],
) -> None:
    """Registers the host, then updates its row until cancelled. Calls `on_drain` if an operator asked for it there."""
    row = _worker_row(host, settings)
    registered = False
    while True:
        now = load()
        try:
            data = {"troubles": troubles.as_json()}
            wish = None
            if registered:
                wish = await registry.touch_worker(host.worker_id, state=now.state, busy=now.busy, data=data)
            if wish is None:
                # The first time, or the table was recreated: waiting jobs see at once that a host is there.
                await registry.register_worker(row)
                wish = await registry.touch_worker(host.worker_id, state=now.state, busy=now.busy, data=data)
            registered = wish is not None
            if wish == "drain" and now.state != "draining":
                on_drain()
            worked()
        except DatabaseAway as error:
            log.debug("worker_row_delayed", error=str(error))
        if await wait_at_most(troubles.changed, TOUCH_SECONDS):
            troubles.changed.clear()


async def unregister(registry: WorkerRegistry, host: Host) -> None:
    """Marks the host as cleanly shut down. If the database is away, its row simply becomes stale."""
    try:
        await registry.end_worker(host.worker_id)
    except (DatabaseAway, StatementRefused) as error:
        log.warning("worker_row_left", error=str(error))


def _worker_row(host: Host, settings: Settings) -> WorkerRow:
    return WorkerRow(
        id=host.worker_id,
        host=host.hostname,
        pod=host.pod_id,
        device=host.device,
        gpus=[{"index": gpu.index, "name": gpu.name, "memory_gb": gpu.memory_gb} for gpu in host.gpus],
        gpu_count=host.gpus_per_job,
        gpu_memory_gb=host.gpu_memory_gb,
        gpu_type=host.gpu_type,
        models=list(settings.allowed_models) or None,
        slots=settings.slots or max(len(host.gpus), 1),
        user_cap=settings.user_cap,
        versions=installed_versions(),
    )
