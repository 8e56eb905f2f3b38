"""This host's row in training_workers, kept current so that a waiting job can say what it waits for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from daemon.chores import worked
from daemon.errors import DatabaseAway, StatementRefused
from daemon.host.inspect import Host, installed_versions
from daemon.queue.rows import WorkerRow, WorkerState
from daemon.queue.store import SqlJobStore
from daemon.settings import Settings
from daemon.tasks import wait_at_most
from daemon.troubles import Troubles

log = structlog.get_logger()

TOUCH_SECONDS = 10.0


@dataclass(frozen=True)
class Load:
    """What the host is doing at this moment."""

    state: WorkerState
    busy: int


async def stay_present(
    store: SqlJobStore,
    host: Host,
    settings: Settings,
    troubles: Troubles,
    *,
    load: Callable[[], Load],
    on_drain: Callable[[], None],
) -> None:
    """Register, then touch the row until cancelled. `on_drain` is called when an operator asked for it there."""
    row = _worker_row(host, settings)
    registered = False
    while True:
        now = load()
        try:
            data = {"troubles": troubles.as_json()}
            wish = None
            if registered:
                wish = await store.touch_worker(host.worker_id, state=now.state, busy=now.busy, data=data)
            if wish is None:
                # The first time, or the table was made anew: jobs that wait say at once again that there is a host.
                await store.register_worker(row)
                wish = await store.touch_worker(host.worker_id, state=now.state, busy=now.busy, data=data)
            registered = wish is not None
            if wish == "drain" and now.state != "draining":
                on_drain()
            worked()
        except DatabaseAway as error:
            log.debug("worker_row_delayed", error=str(error))
        if await wait_at_most(troubles.changed, TOUCH_SECONDS):
            troubles.changed.clear()


async def say_goodbye(store: SqlJobStore, host: Host) -> None:
    """The host left in good order; if the database is away, its row grows old by itself."""
    try:
        await store.end_worker(host.worker_id)
    except (DatabaseAway, StatementRefused) as error:
        log.warning("worker_row_left", error=str(error))


def _worker_row(host: Host, settings: Settings) -> WorkerRow:
    return WorkerRow(
        id=host.worker_id,
        host=host.hostname,
        pod=host.pod_id,
        device=host.device,
        gpus=[{"index": gpu.index, "name": gpu.name, "memory_gb": gpu.memory_gb} for gpu in host.gpus],
        gpu_count=len(host.gpus),
        gpu_memory_gb=host.gpu_memory_gb,
        gpu_type=host.gpu_type,
        models=list(settings.allowed_models) or None,
        slots=settings.slots or max(len(host.gpus), 1),
        user_cap=settings.user_cap,
        versions=installed_versions(),
    )
