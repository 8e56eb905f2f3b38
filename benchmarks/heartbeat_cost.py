"""What an hour of training costs the database: WAL, HOT share and bloat of heartbeats, progress and points.

It runs an hour's worth of the real statements (a heartbeat every 20 s, progress and a point every second, for each job)
without the waiting: once on a quiet server with autovacuum, once with an old snapshot held open.

    python benchmarks/heartbeat_cost.py [--jobs 4] [--seconds 3600]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

sys.path.insert(0, str(Path(__file__).parents[1]))

import psycopg

from benchmarks.claim_scaling import App
from daemon.database.connection import Database
from daemon.database.embedded_server import EmbeddedPostgres
from daemon.queue.job import Lease
from daemon.queue.rows import Limits, MetricPoint
from daemon.queue.sql_job_store import SqlJobStore
from daemon.schema.migrations import migrate

HEARTBEAT_SECONDS = 20
METRICS = {"training_loss": 1.25, "learning_rate": 1e-4, "gradient_norm": 0.8, "throughput": 1800.0}


class CostMeter:
    """WAL bytes and milliseconds by kind of write."""

    def __init__(self, operator: psycopg.Connection[Any]) -> None:
        self._operator = operator
        self.milliseconds: dict[str, list[float]] = {}
        self.wal_bytes: dict[str, list[int]] = {}

    def wal(self) -> int:
        row = self._operator.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint").fetchone()
        assert row is not None
        return int(row[0])

    async def write(self, kind: str, work: Any) -> None:
        wal, begun = self.wal(), time.perf_counter()
        await work
        self.milliseconds.setdefault(kind, []).append((time.perf_counter() - begun) * 1000)
        self.wal_bytes.setdefault(kind, []).append(self.wal() - wal)


async def one_hour(store: SqlJobStore, leases: list[Lease], seconds: int, meter: CostMeter) -> None:
    for second in range(1, seconds + 1):
        for lease in leases:
            if second % HEARTBEAT_SECONDS == 0:
                await meter.write("heartbeat", store.renew_lease(lease, 3600.0))
            await meter.write(
                "progress",
                store.record_progress(
                    lease, stage="training", progress=5 + 90 * second / seconds, epoch=0, step=second, metrics=METRICS,
                    current_cost=second / 3600, seconds_left=float(seconds - second),
                ),
            )  # fmt: skip
            point = MetricPoint(step=second, epoch=0, training_loss=1.25, learning_rate=1e-4, throughput=1800.0)
            await meter.write("point", store.record_metrics(lease, [point]))


def sizes(operator: psycopg.Connection[Any], table: str) -> int:
    row = operator.execute("SELECT pg_total_relation_size(%s::regclass)", (table,)).fetchone()
    assert row is not None
    return int(row[0])


def hot_share(operator: psycopg.Connection[Any], table: str) -> tuple[int, int]:
    row = operator.execute(
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = %s", (table,)
    ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])


async def measure(dsn: str, jobs: int, seconds: int, *, old_snapshot: bool) -> list[str]:
    app = App(dsn)
    app.wait_in_line(jobs)
    app.settle_down()
    app.connection.execute("SELECT pg_stat_reset()")
    meter = CostMeter(app.connection)
    analyst = psycopg.connect(dsn)
    if old_snapshot:
        analyst.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        analyst.execute("SELECT count(*) FROM training_leases")
    async with Database(dsn, application_name="heartbeat_cost") as database:
        store = SqlJobStore(database)
        found = [await store.claim_job(uuid4(), Limits(), lease_seconds=3600) for _ in range(jobs)]
        leases = [claim.job.lease for claim in found if claim.job is not None]
        for lease in leases:
            await store.start_job(lease)
        tables = {"heartbeat": "training_leases", "progress": "training_jobs", "point": "metrics_points"}
        before = {table: sizes(app.connection, table) for table in tables.values()}
        await one_hour(store, leases, seconds, meter)
    analyst.close()
    await asyncio.sleep(1.5)  # the server's own statistics are up to a second late
    lines = []
    for kind, table in tables.items():
        updated, hot = hot_share(app.connection, table)
        growth = (sizes(app.connection, table) - before[table]) / 1024
        share = f"{100 * hot / updated:.0f} %" if updated and kind != "point" else "append only"
        lines.append(
            f"| {kind}{', old snapshot' if old_snapshot else ''} | {len(meter.wal_bytes[kind])} "
            f"| {statistics.median(meter.milliseconds[kind]):.2f} | {statistics.median(meter.wal_bytes[kind]):.0f} "
            f"| {share} | {growth:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=3600)
    given = parser.parse_args()
    lines = []
    for old_snapshot in (False, True):
        # full_page_writes as in production: the first write to a page after a checkpoint logs the whole page.
        settings = {"full_page_writes": "on", "autovacuum_naptime": "5s"}
        with EmbeddedPostgres(settings=settings) as server:
            migrate(server.dsn(), local=True)
            described = server.describe()
            lines += asyncio.run(measure(server.dsn(), given.jobs, given.seconds, old_snapshot=old_snapshot))
    print(
        f"{described}, psycopg {version('psycopg')}, {os.cpu_count()} CPUs; {given.jobs} jobs, {given.seconds} s each"
    )
    print("\n| write | count | p50 ms | WAL bytes (median) | HOT | growth of the table with indexes, KiB |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
