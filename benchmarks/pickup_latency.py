"""From the commit of the insert to the claim: this service, a bare LISTEN + claim loop as the floor, and the peers.

Every contestant runs in its own process and its own database on the same durable server (fsync and synchronous_commit
on), and only one runs at a time. The producer is the same for all: BEGIN, insert through the contestant's own API, note
the time, COMMIT. The clock stops at the first line of the job (wall clock, one machine). Turns are interleaved; ratios
to the floor are taken within a round, and their median is reported.

    python benchmarks/pickup_latency.py [--rounds 5] [--jobs 150] [--burst 100]

Peers (benchmarks/requirements.txt) that are not installed are skipped and named.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # type: ignore[import-untyped]  # noqa: E402
import psycopg  # noqa: E402

from daemon.database.embedded_server import EmbeddedPostgres  # noqa: E402
from daemon.schema.migrations import migrate  # noqa: E402

FLOOR = "bare psycopg loop"
OURS = "brightrun-trainer"
Insert = Callable[[psycopg.AsyncConnection[Any]], Awaitable[str]]


# -- the contestants' workers, each started by `--worker` in its own process --------------------------------------


def work_floor(dsn: str, told: Path) -> None:
    """The least possible work: LISTEN, and one statement with SKIP LOCKED until nothing is left."""
    claim = (
        "UPDATE floor SET status = 'taken' WHERE id = (SELECT id FROM floor WHERE status = 'waiting' ORDER BY id "
        "FOR UPDATE SKIP LOCKED LIMIT 1) RETURNING id"
    )
    with (
        told.open("a", buffering=1) as out,
        psycopg.connect(dsn, autocommit=True, prepare_threshold=1) as work,
        psycopg.connect(dsn, autocommit=True) as ears,
    ):
        ears.execute("LISTEN floor")
        while True:
            while (row := work.execute(claim).fetchone()) is not None:
                out.write(f"{row[0]} {time.time()}\n")
            for _ in ears.notifies(timeout=5, stop_after=1):
                pass


def work_procrastinate(dsn: str, told: Path) -> None:
    import procrastinate

    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn))
    out = told.open("a", buffering=1)

    @app.task(name="ping")
    async def ping(job: str) -> None:
        out.write(f"{job} {time.time()}\n")

    async def run() -> None:
        async with app.open_async():
            await app.run_worker_async(concurrency=1, wait=True, install_signal_handlers=False)

    asyncio.run(run())


def work_pgqueuer(dsn: str, told: Path, *, driver: str) -> None:
    from pgqueuer import AsyncpgDriver, Job, PgQueuer, PsycopgDriver

    out = told.open("a", buffering=1)

    async def run() -> None:
        if driver == "asyncpg":
            import asyncpg  # type: ignore[import-untyped]

            queue = PgQueuer(AsyncpgDriver(await asyncpg.connect(dsn)))
        else:
            queue = PgQueuer(PsycopgDriver(await psycopg.AsyncConnection.connect(dsn, autocommit=True)))

        @queue.entrypoint("ping")
        async def ping(job: Job) -> None:
            assert job.payload is not None
            out.write(f"{job.payload.decode()} {time.time()}\n")

        await queue.run(batch_size=1, dequeue_timeout=timedelta(seconds=30))

    asyncio.run(run())


WORKERS: dict[str, Callable[[str, Path], None]] = {
    "floor": work_floor,
    "procrastinate": work_procrastinate,
    "pgqueuer_asyncpg": lambda dsn, told: work_pgqueuer(dsn, told, driver="asyncpg"),
    "pgqueuer_psycopg": lambda dsn, told: work_pgqueuer(dsn, told, driver="psycopg"),
}


# -- the contestants as the producer sees them ---------------------------------------------------------------------


@dataclass
class Contestant:
    name: str
    dsn: str
    command: list[str]
    insert: Insert
    read: Callable[[Path], dict[str, float]]
    environment: dict[str, str] = field(default_factory=dict)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    burst_p50: list[float] = field(default_factory=list)
    burst_p99: list[float] = field(default_factory=list)
    drained: list[float] = field(default_factory=list)


def read_lines(told: Path) -> dict[str, float]:
    lines = told.read_text().splitlines() if told.exists() else []
    return {job: float(at) for job, at in (line.split() for line in lines)}


def read_daemon_log(told: Path) -> dict[str, float]:
    claimed = {}
    for line in told.read_text().splitlines() if told.exists() else []:
        if '"job_claimed"' in line:
            event = json.loads(line)
            claimed[event["job_id"]] = datetime.fromisoformat(event["timestamp"].replace("Z", "+00:00")).timestamp()
    return claimed


def worker_command(kind: str, dsn: str, told: Path) -> list[str]:
    return [sys.executable, __file__, "--worker", kind, dsn, str(told)]


def make_floor(dsn: str, told: Path) -> Contestant:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE floor (id bigserial PRIMARY KEY, status text NOT NULL DEFAULT 'waiting')")
        connection.execute("CREATE INDEX ON floor (id) WHERE status = 'waiting'")

    async def insert(connection: psycopg.AsyncConnection[Any]) -> str:
        cursor = await connection.execute("INSERT INTO floor DEFAULT VALUES RETURNING id")
        row = await cursor.fetchone()
        assert row is not None
        await connection.execute("NOTIFY floor")
        return str(row[0])

    return Contestant(FLOOR, dsn, worker_command("floor", dsn, told), insert, read_lines)


def make_ours(dsn: str, told: Path) -> Contestant:
    """The real daemon. Its job is refused at once (no trainer): only the claim is measured."""
    migrate(dsn, local=True)
    user, dataset = uuid4(), uuid4()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("INSERT INTO auth.users (id, email) VALUES (%s, 'bench@example.test')", (user,))
        connection.execute(
            "INSERT INTO datasets (id, user_id, name, storage_path, file_name, file_size) "
            "VALUES (%s, %s, '-', %s, '-', 1)",
            (dataset, user, f"{user}/data.jsonl"),
        )

    async def insert(connection: psycopg.AsyncConnection[Any]) -> str:
        cursor = await connection.execute(
            "INSERT INTO training_jobs (user_id, dataset_id, hyperparameters) "
            "VALUES (%s, %s, '{\"epochs\": -1}') RETURNING id",
            (user, dataset),
        )
        row = await cursor.fetchone()
        assert row is not None
        return str(row[0])

    home = told.parent
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), "DATABASE_URL": dsn,
        "TRAINER_DEVICE": "cpu", "TRAINER_STORAGE": "folder", "TRAINER_STORAGE_DIR": str(home / "storage"),
        "TRAINER_WORK_DIR": str(home / "jobs"), "TRAINER_MODELS_DIR": str(home / "models"),
        "TRAINER_MODEL_DOWNLOADS": "false", "TRAINER_LOG_FORMAT": "json",
    }  # fmt: skip
    return Contestant(OURS, dsn, [sys.executable, "-m", "daemon", "run"], insert, read_daemon_log, environment)


def make_procrastinate(dsn: str, told: Path) -> Contestant:
    import procrastinate

    with procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=dsn)).open() as app:
        app.schema_manager.apply_schema()

    async def insert(connection: psycopg.AsyncConnection[Any]) -> str:
        job = uuid4().hex
        await connection.execute(
            "SELECT unnest(procrastinate_defer_jobs_v1(ARRAY[ROW('default', 'ping', 0, NULL, NULL, "
            "jsonb_build_object('job', %s::text), NULL)::procrastinate_job_to_defer_v1]))",
            (job,),
        )
        return job

    name = f"procrastinate {version('procrastinate')}"
    return Contestant(name, dsn, worker_command("procrastinate", dsn, told), insert, read_lines)


def make_pgqueuer(dsn: str, told: Path, *, driver: str) -> Contestant:
    from pgqueuer import PsycopgDriver, Queries

    async def install() -> None:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            await Queries(PsycopgDriver(connection)).install()

    asyncio.run(install())

    async def insert(connection: psycopg.AsyncConnection[Any]) -> str:
        job = uuid4().hex
        await Queries(PsycopgDriver(connection)).enqueue("ping", job.encode())
        return job

    name = f"pgqueuer {version('pgqueuer')} ({driver})"
    return Contestant(name, dsn, worker_command(f"pgqueuer_{driver}", dsn, told), insert, read_lines)


@contextmanager
def running(contestant: Contestant, told: Path) -> Iterator[int]:
    log = told.open("ab") if contestant.environment else told.with_suffix(".err").open("ab")
    environment = contestant.environment or os.environ | {"PYTHONPATH": str(ROOT)}
    with log, subprocess.Popen(contestant.command, env=environment, cwd=told.parent, stdout=log, stderr=log) as process:
        try:
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


async def committed(connection: psycopg.AsyncConnection[Any], insert: Insert) -> tuple[str, float]:
    await connection.execute("BEGIN")
    job = await insert(connection)
    at = time.time()
    await connection.execute("COMMIT")
    return job, at


async def all_claimed(contestant: Contestant, told: Path, jobs: dict[str, float], seconds: float) -> list[float]:
    """Returns the milliseconds of each job, sorted, once all are claimed."""
    deadline = time.monotonic() + seconds
    while True:
        claimed = contestant.read(told)
        if jobs.keys() <= claimed.keys():
            return sorted((claimed[job] - at) * 1000 for job, at in jobs.items())
        if time.monotonic() > deadline:
            missing = len(jobs.keys() - claimed.keys())
            raise TimeoutError(
                f"{contestant.name}: {missing} of {len(jobs)} jobs not claimed in {seconds:.0f} s ({told})"
            )
        await asyncio.sleep(0.1)


async def at_rest(pid: int) -> None:
    """Waits until the worker and its children used less than a twentieth of a core for a second.

    Our daemon first imports torch for the first job, for some ten seconds; an idle daemon is measured."""
    worker = psutil.Process(pid)

    def used() -> float:
        return sum(sum(one.cpu_times()[:2]) for one in (worker, *worker.children(recursive=True)))

    before = used()
    for _ in range(120):
        await asyncio.sleep(1.0)
        now = used()
        if now - before < 0.05:
            return
        before = now
    raise TimeoutError(f"the worker {pid} does not come to rest")


async def one_turn(contestant: Contestant, told: Path, pid: int, jobs: int, burst: int, order: random.Random) -> None:
    async with await psycopg.AsyncConnection.connect(contestant.dsn, autocommit=True) as connection:
        # Warm-up: caches, prepared statements, and proof that it listens.
        for _ in range(5):
            await all_claimed(contestant, told, dict([await committed(connection, contestant.insert)]), 30)
        await at_rest(pid)
        single: dict[str, float] = {}
        for _ in range(jobs):
            job, at = await committed(connection, contestant.insert)
            single[job] = at
            # Long enough to be idle again: the last job is settled.
            await asyncio.sleep(order.uniform(0.1, 0.2))
        waits = await all_claimed(contestant, told, single, 60)
        contestant.p50.append(statistics.median(waits))
        contestant.p99.append(waits[round(0.99 * (len(waits) - 1))])
        together = dict([await committed(connection, contestant.insert) for _ in range(burst)])
        waits = await all_claimed(contestant, told, together, 240)
        claimed = contestant.read(told)
        contestant.burst_p50.append(statistics.median(waits))
        contestant.burst_p99.append(waits[round(0.99 * (len(waits) - 1))])
        contestant.drained.append(burst / (max(claimed[job] for job in together) - min(together.values())))


def contestants(server: EmbeddedPostgres, folder: Path) -> list[tuple[Contestant, Path]]:
    makers: dict[str, Callable[[str, Path], Contestant]] = {"floor": make_floor, "ours": make_ours}
    if importlib.util.find_spec("procrastinate"):
        makers["procrastinate"] = make_procrastinate
    if importlib.util.find_spec("pgqueuer"):
        if importlib.util.find_spec("asyncpg"):
            makers["pgqueuer_asyncpg"] = lambda dsn, told: make_pgqueuer(dsn, told, driver="asyncpg")
        makers["pgqueuer_psycopg"] = lambda dsn, told: make_pgqueuer(dsn, told, driver="psycopg")
    if len(makers) < 5:
        print("not installed and left out: some peers; `pip install -r benchmarks/requirements.txt`")
    found = []
    for name, make in makers.items():
        home = folder / name
        home.mkdir()
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name}".encode())
        found.append((make(server.dsn(dbname=name), home / "told"), home / "told"))
    return found


def show(all_of_them: list[Contestant], floor: Contestant) -> None:
    print(
        "\n| | p50 ms | p99 ms | ratio to the floor (median of rounds) | burst p50 ms | burst p99 ms | burst jobs/s |"
    )
    print("|---|---|---|---|---|---|---|")
    for one in all_of_them:
        ratio = statistics.median(mine / bare for mine, bare in zip(one.p50, floor.p50, strict=True))
        middle = [statistics.median(values) for values in (one.p50, one.p99, one.burst_p50, one.burst_p99, one.drained)]
        print(
            f"| {one.name} | {middle[0]:.2f} | {middle[1]:.2f} | {ratio:.2f} | {middle[2]:.1f} | {middle[3]:.1f} "
            f"| {middle[4]:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=150)
    parser.add_argument("--burst", type=int, default=100)
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--worker", nargs=3, metavar=("KIND", "DSN", "FILE"))
    given = parser.parse_args()
    if given.worker:
        kind, dsn, told = given.worker
        WORKERS[kind](dsn, Path(told))
        return
    order = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(durable=True) as server:
        fleet = contestants(server, Path(folder))
        for turn in range(given.rounds):
            for contestant, told in order.sample(fleet, len(fleet)):
                with running(contestant, told) as pid:
                    asyncio.run(one_turn(contestant, told, pid, given.jobs, given.burst, order))
                print(f"round {turn + 1}: {contestant.name}: p50 {contestant.p50[-1]:.2f} ms", flush=True)
        print(
            f"\n{server.describe()}, psycopg {version('psycopg')}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
        )
        show([contestant for contestant, _told in fleet], fleet[0][0])


if __name__ == "__main__":
    main()
