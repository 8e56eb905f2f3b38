"""What a day of jobs costs one Postgres: bytes of WAL, statements and milliseconds of its CPU per job.

It runs the daemon's real statements through its real store, for each job's whole life (insert, claim, start, plan,
events, progress and a point a second, heartbeats, completion with its callback) without the waiting in between. A point
a second is what a job of up to a hundred seconds has; a longer one has a hundred in all. The server's CPU time is read
from /proc for the backend that served them. The cost of a day with any number of jobs is computed from the cost of one,
and printed as such. Then the two costs that grow with the number of hosts: a wake-up for nothing, and an insert whose
NOTIFY goes to many listeners.

    python benchmarks/scale_day.py [--jobs 50] [--seconds 86] [--listeners 0 10 100] [--inserts 300]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

sys.path.insert(0, str(Path(__file__).parents[1]))

import psycopg

from benchmarks.claim_scaling import App
from daemon.database.connection import Database
from daemon.database.embedded_server import EmbeddedPostgres
from daemon.queue.outcome import Completed
from daemon.queue.rows import Limits, MetricPoint
from daemon.queue.sql_job_store import SqlJobStore
from daemon.schema.migrations import migrate

T = TypeVar("T")

HEARTBEAT_SECONDS = 20
EVENTS = ("trainer_started", "stage", "stage", "stage", "sample", "sample", "evaluated", "evaluated", "adapter_saved")
METRICS = {"training_loss": 1.25, "learning_rate": 1e-4, "gradient_norm": 0.8, "throughput": 1800.0}
ADAPTER = Completed("lora-models/adapters/one.tar.gz", "0" * 64, 40_000_000, {"archive": "adapters/one.tar.gz"}, {})
DAY_SECONDS = 86_400
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Spent:
    """The cost of one kind of statement, over all jobs."""

    count: int = 0
    milliseconds: float = 0.0
    cpu_milliseconds: float = 0.0
    wal_bytes: int = 0


class CostMeter:
    """Measures each kind of statement: at the client, in the backend's CPU and in the WAL."""

    def __init__(self, operator: psycopg.Connection[Any], backends: list[int]) -> None:
        self._operator = operator
        self._backends = backends
        self.spent: dict[str, Spent] = defaultdict(Spent)

    async def take(self, kind: str, work: Awaitable[T], count: int = 1) -> T:
        wal, cpu, begun = self._wal(), self._cpu(), time.perf_counter()
        answer = await work
        spent = self.spent[kind]
        spent.count += count
        spent.milliseconds += (time.perf_counter() - begun) * 1000
        spent.cpu_milliseconds += self._cpu() - cpu
        spent.wal_bytes += self._wal() - wal
        return answer

    def _wal(self) -> int:
        row = self._operator.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint").fetchone()
        assert row is not None
        return int(row[0])

    def _cpu(self) -> float:
        """Milliseconds so far. A tick is ten of them: single readings are coarse, sums are not."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self._backends]
        return sum(int(field[11]) + int(field[12]) for field in fields) * 1000 / TICKS


async def one_life(app: App, store: SqlJobStore, seconds: int, meter: CostMeter) -> None:
    async def insert() -> None:
        app.connection.execute(
            "INSERT INTO training_jobs (user_id, dataset_id, hyperparameters, callback_url) "
            "VALUES (%s, %s, '{\"base_model\": \"tiny\"}', 'https://app.example.org/hook')",
            (app.user, app.user),
        )

    await meter.take("insert", insert())
    found = await meter.take("claim", store.claim_job(uuid4(), Limits(), lease_seconds=60))
    assert found.job is not None
    lease = found.job.lease

    async def story() -> None:
        for kind in EVENTS:
            await store.record_event(lease, kind, "A sentence of about the usual length.", {"step": 1})

    async def training() -> None:
        for second in range(1, seconds + 1):
            await store.record_progress(
                lease, stage="training", progress=5 + 90 * second / seconds, epoch=0, step=second, metrics=METRICS,
                current_cost=second / 3600, seconds_left=float(seconds - second),
            )  # fmt: skip

    async def points() -> None:
        for second in range(1, seconds + 1):
            point = MetricPoint(step=second, epoch=0, training_loss=1.25, learning_rate=1e-4, throughput=1800.0)
            await store.record_metrics(lease, [point])

    async def heartbeats() -> None:
        for _ in range(seconds // HEARTBEAT_SECONDS):
            await store.renew_lease(lease, 60.0)

    await meter.take(
        "plan", store.record_plan(lease, total_steps=seconds, total_epochs=1, estimated_total_cost=0.1, trained_with={})
    )
    await meter.take("start", store.start_job(lease))
    await meter.take("story", story(), len(EVENTS))
    await meter.take("progress", training(), seconds)
    await meter.take("points", points(), seconds)
    await meter.take("heartbeats", heartbeats(), seconds // HEARTBEAT_SECONDS)
    await meter.take("complete", store.complete_job(lease, ADAPTER, cost=0.1))


def backend_named(operator: psycopg.Connection[Any], name: str) -> int:
    row = operator.execute("SELECT pid FROM pg_stat_activity WHERE application_name = %s", (name,)).fetchone()
    assert row is not None, f"nobody is connected as {name}"
    return int(row[0])


async def lives(dsn: str, jobs: int, seconds: int) -> dict[str, Spent]:
    app = App(dsn)
    operator = psycopg.connect(dsn, autocommit=True)
    async with Database(dsn, application_name="scale_day") as database:
        store = SqlJobStore(database)
        await one_life(app, store, 2, CostMeter(operator, []))  # connects; fills plans and caches
        meter = CostMeter(operator, [backend_named(operator, "scale_day"), app.connection.info.backend_pid])
        for _ in range(jobs):
            await one_life(app, store, seconds, meter)
    operator.close()
    return meter.spent


async def fruitless_wakes(dsn: str, count: int) -> dict[str, tuple[float, float]]:
    """Milliseconds at the client, and of the server's CPU, of a wake-up after which another host claimed first."""
    operator = psycopg.connect(dsn, autocommit=True)
    async with Database(dsn, application_name="scale_day wakes") as database:
        store = SqlJobStore(database)

        async def busy() -> None:
            await store.promote_due_jobs()

        async def idle() -> None:
            await store.claim_job(uuid4(), Limits(), lease_seconds=60)
            await store.next_due_in()

        await busy()  # connects
        meter = CostMeter(operator, [backend_named(operator, "scale_day wakes")])
        for _ in range(count):
            await meter.take("with a free place", idle())
            await meter.take("without", busy())
    return {kind: (spent.milliseconds / count, spent.cpu_milliseconds / count) for kind, spent in meter.spent.items()}


def inserts_with_listeners(dsn: str, listeners: int, inserts: int) -> tuple[float, float]:
    """Returns the milliseconds of an insert (p50, p99) while this many sessions LISTEN to its trigger's channel."""
    app = App(dsn)
    sessions = [psycopg.connect(dsn, autocommit=True) for _ in range(listeners)]
    try:
        for session in sessions:
            session.execute("LISTEN training_jobs")
        taken = []
        for _ in range(inserts):
            begun = time.perf_counter()
            app.wait_in_line(1)
            taken.append((time.perf_counter() - begun) * 1000)
    finally:
        for session in sessions:
            session.close()
    return statistics.median(taken), sorted(taken)[round(0.99 * (len(taken) - 1))]


def print_lives(spent: dict[str, Spent], jobs: int, seconds: int) -> None:
    print(f"\n| of a job of {seconds} s | statements | ms at the client | ms of the server's CPU | WAL bytes |")
    print("|---|---|---|---|---|")
    total = Spent()
    for kind, one in spent.items():
        print(
            f"| {kind} | {one.count / jobs:.0f} | {one.milliseconds / jobs:.1f} | {one.cpu_milliseconds / jobs:.1f} "
            f"| {one.wal_bytes / jobs:,.0f} |"
        )
        total.count += one.count
        total.milliseconds += one.milliseconds
        total.cpu_milliseconds += one.cpu_milliseconds
        total.wal_bytes += one.wal_bytes
    statements, cpu, wal = total.count / jobs, total.cpu_milliseconds / jobs, total.wal_bytes / jobs
    print(f"| **all** | {statements:.0f} | {total.milliseconds / jobs:.1f} | {cpu:.1f} | {wal:,.0f} |")
    print(
        "\nComputed from the last line:\n\n| jobs a day | running at once | statements/s | WAL | cores of the server |"
    )
    print("|---|---|---|---|---|")
    for day in (1_000, 10_000, 100_000, 1_000_000):
        rate = day / DAY_SECONDS
        print(
            f"| {day:,} | {rate * seconds:,.0f} | {rate * statements:,.1f} | {wal * day / 1e9:,.1f} GB a day, "
            f"{wal * rate / 1e6:.2f} MB/s | {rate * cpu / 1000:.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=50)
    # A thousand hosts with a job each, a million jobs a day: 86 seconds a job.
    parser.add_argument("--seconds", type=int, default=86)
    parser.add_argument("--listeners", type=int, nargs="*", default=[0, 10, 100])
    parser.add_argument("--inserts", type=int, default=300)
    given = parser.parse_args()
    settings = {"full_page_writes": "on", "max_connections": str(max(given.listeners, default=0) + 40)}
    with EmbeddedPostgres(durable=True, settings=settings) as server:
        migrate(server.dsn(), local=True)
        print(f"{server.describe()}, psycopg {version('psycopg')}, {os.cpu_count()} CPUs; {given.jobs} jobs")
        print_lives(asyncio.run(lives(server.dsn(), given.jobs, given.seconds)), given.jobs, given.seconds)
        print("\n| a wake-up for nothing, of a host | ms at the client | ms of the server's CPU |\n|---|---|---|")
        for kind, (milliseconds, cpu) in asyncio.run(fruitless_wakes(server.dsn(), 500)).items():
            print(f"| {kind} | {milliseconds:.2f} | {cpu:.2f} |")
        print("\n| listeners | insert p50 ms | p99 ms |")
        print("|---|---|---|")
        for listeners in given.listeners:
            p50, p99 = inserts_with_listeners(server.dsn(), listeners, given.inserts)
            print(f"| {listeners} | {p50:.2f} | {p99:.2f} |", flush=True)


if __name__ == "__main__":
    main()
