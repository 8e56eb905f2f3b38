"""Measures the cost of a claim as history grows, with a capped user's rows at the head, idle daemons, an old snapshot.

It runs the real statement through the real store, one claim after the other, on a server without fsync, so that only
the work of the claim remains. Finished rows are written in bulk past the triggers; waiting rows go through the guard.

    python benchmarks/claim_scaling.py [--sizes 1000 100000 1000000] [--claims 300]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

sys.path.insert(0, str(Path(__file__).parents[1]))

import psycopg

from daemon.database.connection import Database
from daemon.database.embedded_server import EmbeddedPostgres
from daemon.database.statements import statement
from daemon.queue.outcome import Failed
from daemon.queue.rows import Claim, Limits
from daemon.queue.sql_job_store import SqlJobStore
from daemon.schema.migrations import migrate
from training.events import ErrorCode

OVER = Failed(ErrorCode.INTERNAL, "benchmark")
Table = list[tuple[str, float, float, float]]


class App:
    """The application that fills the table."""

    def __init__(self, dsn: str) -> None:
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.user = self.make_user()

    def make_user(self) -> UUID:
        user = uuid4()
        self.connection.execute("INSERT INTO auth.users (id, email) VALUES (%s, %s)", (user, f"{user}@example.test"))
        self.connection.execute(
            "INSERT INTO datasets (id, user_id, name, storage_path, file_name, file_size) "
            "VALUES (%s, %s, '-', %s, '-', 1)",
            (user, user, f"{user}/data.jsonl"),
        )
        return user

    def finish(self, count: int) -> None:
        """Adds history: completed rows, in bulk, past the triggers."""
        with self.connection.transaction():
            self.connection.execute("SET LOCAL session_replication_role = 'replica'")
            self.connection.execute(
                "INSERT INTO training_jobs (user_id, dataset_id, hyperparameters, status, progress, attempt, "
                "lease_epoch, queued_at, completed_at, due) "
                "SELECT %s, %s, '{\"base_model\": \"tiny\"}', 'completed', 100, 1, 1, "
                "now() - n * interval '1 second', now(), false FROM generate_series(1, %s) AS n",
                (self.user, self.user, count),
            )

    def wait_in_line(self, count: int, user: UUID | None = None, priority: int = 0) -> None:
        """Adds queued rows as the app inserts them."""
        self.connection.execute(
            "INSERT INTO training_jobs (user_id, dataset_id, hyperparameters, priority) "
            'SELECT %s, %s, \'{"base_model": "tiny"}\', %s FROM generate_series(1, %s)',
            (user or self.user, user or self.user, priority, count),
        )

    def settle_down(self) -> None:
        self.connection.execute("VACUUM (ANALYZE) training_jobs")


async def claim(store: SqlJobStore, *, user_cap: int | None = None) -> Claim:
    return await store.claim_job(uuid4(), Limits(user_cap=user_cap), lease_seconds=3600)


async def timed_claims(store: SqlJobStore, count: int, *, user_cap: int | None = None) -> list[float]:
    """Returns the milliseconds of each claim, in order. Each job is ended at once, outside the measured time."""
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        found = await claim(store, user_cap=user_cap)
        taken.append((time.perf_counter() - begun) * 1000)
        if found.job is None:
            raise RuntimeError("the queue ran empty: nothing was measured")
        await store.fail_job(found.job.lease, OVER, cost=0)
    return taken


def percentiles(taken: list[float]) -> tuple[float, float]:
    return statistics.median(taken), sorted(taken)[round(0.99 * (len(taken) - 1))]


async def by_history(apps: dict[int, App], stores: dict[int, SqlJobStore], claims: int) -> Table:
    """Alternates between the sizes, claim by claim, so that other load on the machine affects all of them alike."""
    taken: dict[int, list[float]] = {size: [] for size in stores}
    for size, app in apps.items():
        app.finish(size)
        app.wait_in_line(claims + 20)
        app.settle_down()
        await timed_claims(stores[size], 20)
        print(f"{size:,} rows are there", flush=True)
    for _ in range(claims):
        for size, store in stores.items():
            taken[size] += await timed_claims(store, 1)
    first = next(iter(taken.values()))
    return [
        (f"{size:,} finished rows", *percentiles(mine), statistics.median(mine) / statistics.median(first))
        for size, mine in taken.items()
    ]


async def behind_a_capped_user(app: App, store: SqlJobStore, claims: int, base: float) -> Table:
    greedy = app.make_user()
    app.wait_in_line(50_000, greedy, priority=100)
    app.wait_in_line(claims + 20)
    app.settle_down()
    held = await claim(store, user_cap=1)
    assert held.job is not None and held.job.user_id == greedy
    await timed_claims(store, 20, user_cap=1)
    p50, p99 = percentiles(await timed_claims(store, claims, user_cap=1))
    await store.fail_job(held.job.lease, OVER, cost=0)
    app.connection.execute("UPDATE training_jobs SET status = 'cancelled' WHERE user_id = %s AND due", (greedy,))
    return [("and 50,000 waiting rows of a capped user at the head", p50, p99, p50 / base)]


async def under_an_old_snapshot(app: App, store: SqlJobStore, dsn: str, claims: int, base: float) -> Table:
    app.wait_in_line(3 * claims + 1500)
    app.settle_down()
    with psycopg.connect(dsn) as analyst:
        analyst.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        analyst.execute("SELECT count(*) FROM training_leases")
        fresh = percentiles(await timed_claims(store, claims))
        await timed_claims(store, 1500)
        old = percentiles(await timed_claims(store, claims))
    app.settle_down()
    return [
        ("a snapshot held open: its first claims", *fresh, fresh[0] / base),
        ("the same, 1,500 ended jobs later", *old, old[0] / base),
    ]


async def among_idle_daemons(app: App, dsn: str, daemons: int, jobs: int) -> tuple[str, float, float, float]:
    """From the commit to the first claim, when all these daemons wake up and try."""
    # The insert blocks this loop: no claim can come before its future is stored.
    claimed: dict[UUID, asyncio.Future[float]] = {}

    async def daemon(store: SqlJobStore, ears: psycopg.AsyncConnection[Any]) -> None:
        async for _ in ears.notifies():
            found = await claim(store)
            if found.job is not None:
                claimed[found.job.id].set_result(time.perf_counter())
                await store.fail_job(found.job.lease, OVER, cost=0)

    waits = []
    async with AsyncExitStack() as stack:
        tasks = []
        for _ in range(daemons):
            database = await stack.enter_async_context(Database(dsn, application_name="idle daemon"))
            await database.fetch("SELECT 1")
            ears = await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn, autocommit=True))
            await ears.execute("LISTEN training_jobs")
            tasks.append(asyncio.create_task(daemon(SqlJobStore(database), ears)))
        for _ in range(jobs):
            begun = time.perf_counter()
            row = app.connection.execute(
                "INSERT INTO training_jobs (user_id, dataset_id, hyperparameters) VALUES (%s, %s, '{}') RETURNING id",
                (app.user, app.user),
            ).fetchone()
            assert row is not None
            claimed[row[0]] = asyncio.get_running_loop().create_future()
            waits.append((await asyncio.wait_for(claimed[row[0]], 30) - begun) * 1000)
            await asyncio.sleep(0.05 + 0.002 * daemons)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return (f"{daemons} idle daemons, all woken: insert to first claim", *percentiles(waits), 0.0)


def plan(app: App) -> str:
    """EXPLAIN ANALYZE of one claim, rolled back."""
    values = Limits().parameters(window=8) | {"worker_id": uuid4(), "lease_seconds": 60.0}
    with app.connection.transaction(force_rollback=True):
        app.connection.execute("SET LOCAL ROLE training_daemon")
        app.connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        explain = "EXPLAIN (ANALYZE, BUFFERS, COSTS OFF) " + statement("claim_job")
        rows = app.connection.execute(explain.encode(), values).fetchall()
    return "\n".join(row[0] for row in rows)


async def measure(server: EmbeddedPostgres, sizes: list[int], claims: int) -> None:
    dsns = {size: server.dsn(dbname=f"history_{size}") for size in sizes}
    for size, dsn in dsns.items():
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE history_{size}".encode())
        migrate(dsn, local=True)
    apps = {size: App(dsn) for size, dsn in dsns.items()}
    async with AsyncExitStack() as stack:
        stores = {
            size: SqlJobStore(await stack.enter_async_context(Database(dsn, application_name="claim_scaling")))
            for size, dsn in dsns.items()
        }
        table = await by_history(apps, stores, claims)
        base, largest = table[0][1], max(sizes)
        app, store, dsn = apps[largest], stores[largest], dsns[largest]
        app.wait_in_line(50)
        app.settle_down()
        shown = plan(app)
        table += await behind_a_capped_user(app, store, claims, base)
        table += await under_an_old_snapshot(app, store, dsn, claims, base)
        app.connection.execute("UPDATE training_jobs SET status = 'cancelled' WHERE due")
        app.settle_down()
        table += [await among_idle_daemons(app, dsn, daemons, 40) for daemons in (1, 10, 100)]
    print(f"\n{shown}\n\nFrom the second table row on, with {largest:,} finished rows.\n")
    print("| | p50 ms | p99 ms | ratio to the first |\n|---|---|---|---|")
    for words, p50, p99, ratio in table:
        print(f"| {words} | {p50:.2f} | {p99:.2f} | {f'{ratio:.2f}' if ratio else ''} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--claims", type=int, default=300)
    given = parser.parse_args()
    # Autovacuum off: the numbers belong to the state that each line names, not to a vacuum that happened to run.
    settings = {"autovacuum": "off", "shared_buffers": "256MB", "max_connections": "300", "max_wal_size": "2GB"}
    with EmbeddedPostgres(settings=settings) as server:
        print(
            f"{server.describe()}, psycopg {version('psycopg')}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
        )
        asyncio.run(measure(server, given.sizes, given.claims))


if __name__ == "__main__":
    main()
