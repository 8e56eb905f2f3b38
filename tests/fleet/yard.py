"""A fleet on a real Postgres and a RunPod on loopback, with a clock of its own: time passes when the test says so."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from daemon.database.connection import Database
from daemon.fleet.loop import Fleet
from daemon.fleet.pod_plan import read_plan
from daemon.fleet.store import FleetStore
from daemon.pod.runpod_api import Key, RunPod
from daemon.queue.row_visibility import RowVisibility
from daemon.queue.sql_job_store import SqlJobStore
from daemon.read_settings import load_settings
from daemon.settings import Settings
from tests.doubles.runpod_api import PodRow, RunPodDouble
from tests.postgres import AppDatabase

H100, A40 = "NVIDIA H100 80GB HBM3", "NVIDIA A40"
PLAN: dict[str, Any] = {
    "pod": {"image": "brightrun-trainer", "env": {"TRAINER_IDLE_MINUTES": "10", "DATABASE_URL": "postgresql://secret"}},
    "gpus": [{"id": H100, "memory_gb": 80}, {"id": A40, "memory_gb": 48, "max_pods": 1}],
}


class Yard:
    """The app, the daemons on the pods and the clock, as the test moves them."""

    def __init__(self, database: AppDatabase, runpod: RunPodDouble, **settings: Any) -> None:
        self.database = database
        self.runpod = runpod
        self.user = database.insert_user()
        self.dataset = database.insert_dataset(self.user)
        # An hour that has passed: what the database stamps by its own clock is never before it.
        self.now = datetime.now(UTC) + timedelta(minutes=1)
        given: dict[str, Any] = {"fleet_pod": json.dumps(PLAN), "runpod_api_key": "good-key", "storage": "folder"}
        self.settings: Settings = load_settings(
            database_url=database.dsn, runpod_api=runpod.url, **(given | {"fleet_max_pods": 3} | settings)
        )

    @asynccontextmanager
    async def fleet(self, settle_seconds: float = 0.0) -> AsyncIterator[Fleet]:
        async with (
            Database(self.database.dsn, application_name="fleet") as deciding,
            Database(self.database.dsn, application_name="fleet helping") as helping,
            RunPod([Key("TRAINER_RUNPOD_API_KEY", "good-key")], api=self.runpod.url) as api,
        ):
            yield Fleet(
                self.settings,
                read_plan(self.settings.fleet_pod),
                FleetStore(deciding),
                SqlJobStore(helping),
                api,
                visibility=RowVisibility(helping),
                clock=lambda: self.now,
                settle_seconds=settle_seconds,
            )

    def after(self, **how_long: float) -> None:
        self.now += timedelta(**how_long)

    def job(self, user: UUID | None = None, **columns: Any) -> UUID:
        return self.database.insert_job(user or self.user, None if user else self.dataset, **columns)

    def boot(self, pod: PodRow, *, busy: int = 0, **columns: Any) -> UUID:
        """The pod's container is up and its daemon has registered."""
        pod.status = "RUNNING"
        worker = uuid4()
        gpu = pod.body.get("gpu") or {"id": H100, "count": 1}
        memory = next((kind.get("memory_gb") for kind in PLAN["gpus"] if kind["id"] == gpu["id"]), 80)
        given = {
            "id": worker, "host": pod.id, "pod": pod.id, "device": "cuda", "gpu_count": gpu["count"],
            "gpu_memory_gb": memory, "gpu_type": gpu["id"], "slots": gpu["count"],
            "last_seen_at": self.now, "started_at": self.now,
        }  # fmt: skip
        self.database._insert("training_workers", given | columns)
        self.touch(worker, busy=busy)
        return worker

    def touch(self, worker: UUID, *, busy: int = 0, state: str | None = None) -> None:
        self.database.run(
            "UPDATE training_workers SET last_seen_at = %s, busy = %s, state = %s WHERE id = %s",
            (self.now, busy, state or ("busy" if busy else "idle"), worker),
        )

    def wants_drain(self, worker: UUID) -> bool:
        return bool(self.database.one("SELECT drain FROM training_workers WHERE id = %s", (worker,))["drain"])

    @property
    def pods(self) -> list[PodRow]:
        """What is paid for."""
        return self.runpod.billing

    @property
    def asked(self) -> int:
        return len([call for call in self.runpod.calls if call[:2] == ("POST", "/v2/pods")])

    def decisions(self) -> list[str]:
        rows = self.database.run("SELECT decision FROM training_fleet_decisions ORDER BY id")
        return [row["decision"] for row in rows]

    def story(self) -> list[dict[str, Any]]:
        return self.database.run("SELECT * FROM training_fleet_decisions ORDER BY id")

    def rows(self) -> list[dict[str, Any]]:
        return self.database.run("SELECT * FROM training_pods ORDER BY asked_at, id")

    def row_of(self, pod: str) -> dict[str, Any]:
        return self.database.one("SELECT * FROM training_pods WHERE pod = %s", (pod,))
