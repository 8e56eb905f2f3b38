"""From a commit to the page: a real Chromium, two hundred jobs listed and ten running, and what watching costs.

Ten training jobs are updated once a second each, as daemons do it, at random moments; now and then a job is inserted
at the head of the queue. A MutationObserver in the page records when the new text is in the document (one machine, one
clock). The other browsers are streams that are read to their end. Of the database it measures connections by name,
transactions a second without those of this script, and the processor time of the reader's connections.

    python benchmarks/dashboard.py [--seconds 60] [--browsers 1 20 100] [--waiting 90 50000]

Needs Debian's chromium and chromium-driver, as the system tests do (`.ci/system-packages`).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import psycopg  # noqa: E402

from tests.daemon_process import eventually  # noqa: E402
from tests.gateway.conftest import KEY, Gateway  # noqa: E402
from tests.gateway.dashboard.browser import Browser, open_browser  # noqa: E402
from tests.gateway.dashboard.seeded_world import seed  # noqa: E402
from tests.gateway.watching import Watcher  # noqa: E402
from tests.lifecycle.queue import Queue  # noqa: E402
from tests.postgres import Server, migrated, open_server  # noqa: E402

RUNNING = 10
LISTED = 200
INSERT_EVERY_SECONDS = 3.0
# A change that has not arrived by then never will.
PATIENCE_SECONDS = 15.0
READERS = ("brightrun-trainer dashboard", "brightrun-trainer listener")

# The text of a job's row and of each row of the queue, with the time at which it appeared.
OBSERVE = """
window.seen = [];
new MutationObserver(() => {
  const at = Date.now() / 1000;
  for (const row of document.querySelectorAll('.running [data-job]'))
    window.seen.push([row.dataset.job, row.querySelector('.way span').textContent, at]);
  for (const row of document.querySelectorAll('.waiting [data-job]')) window.seen.push([row.dataset.job, 'waits', at]);
  const known = new Set();
  window.seen = window.seen.filter(([job, words]) => !known.has(job + words) && known.add(job + words));
}).observe(document.getElementById('view'), {subtree: true, childList: true, characterData: true});
"""


@dataclass
class Turn:
    """Seconds from commit to page, and the database's work meanwhile."""

    progress: list[float] = field(default_factory=list)
    inserts: list[float] = field(default_factory=list)
    streams: list[float] = field(default_factory=list)
    lost: int = 0
    connections: int = 0
    transactions_a_second: float = 0.0
    reader_cpu: float = 0.0


class Writer:
    """Writes what ten daemons and an app would write, and records the time after each commit."""

    def __init__(self, dsn: str, running: Sequence[UUID]) -> None:
        self._connection = psycopg.connect(dsn, autocommit=True)
        # When a daemon writes progress, no trigger fires; this connection is a superuser's.
        self._connection.execute("SET session_replication_role = replica")
        self._apps = psycopg.connect(dsn, autocommit=True)
        self._running = running
        self._step = 10_000
        self.committed: dict[tuple[str, str], float] = {}
        self.transactions = 0

    def write(self, seconds: float) -> None:
        """One write per second and job, at times independent of the readers' polls."""
        end, insert_at = time.monotonic() + seconds, time.monotonic()
        while time.monotonic() < end:
            job = random.choice(self._running)
            self._step += 1
            self._connection.execute(
                "UPDATE training_jobs SET current_step = %s, current_stage = 'training', last_progress_at = now(), "
                "current_metrics = current_metrics || jsonb_build_object('training_loss', %s::float8) WHERE id = %s",
                (self._step, random.uniform(0.5, 1.5), job),
            )
            self.committed[str(job), f"{self._step:,}"] = time.time()
            self.transactions += 1
            if time.monotonic() >= insert_at:
                insert_at += INSERT_EVERY_SECONDS
                self._insert()
            time.sleep(random.uniform(0, 2 / RUNNING))

    def _insert(self) -> None:
        job = uuid4()
        self._apps.execute(
            "INSERT INTO training_jobs (id, user_id, dataset_id, hyperparameters, gpu_config, priority) "
            "SELECT %s, user_id, dataset_id, '{}', '{}', 1000 + %s FROM training_jobs WHERE id = %s",
            (job, self.transactions, self._running[0]),
        )
        self.committed[str(job), "waits"] = time.time()
        self.transactions += 1

    def close(self) -> None:
        self._connection.close()
        self._apps.close()


def measure(server: Server, waiting: int, browsers: int, seconds: float) -> Turn:
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scratch.chmod(0o755)
        name = stack.enter_context(server.database())
        migrated(server, name)
        dsn = server.dsn(name)
        named = seed(dsn, jobs=LISTED)
        lengthen(dsn, waiting)
        gateway = stack.enter_context(Gateway(Queue(dsn, scratch), scratch, gateway_requests_per_second=1000))
        page = stack.enter_context(open_browser())
        page.resize(1440, 900)
        page.sign_in(gateway.url, KEY)
        page.wait_for(".running .row")
        watchers = [stack.enter_context(Watcher(gateway.url)) for _ in range(browsers - 1)]
        for watcher in watchers:
            watcher.snapshot()
        page.driver.execute_script(OBSERVE)
        writer = Writer(dsn, [named[f"running{place}"] for place in range(RUNNING)])
        stack.callback(writer.close)
        before, cpu, begun = transactions(dsn), reader_cpu(dsn), time.monotonic()
        writer.write(seconds)
        took = time.monotonic() - begun
        turn = Turn(
            connections=len(readers(dsn)),
            transactions_a_second=(transactions(dsn) - before - writer.transactions) / took,
            reader_cpu=(reader_cpu(dsn) - cpu) / took,
        )
        judge(turn, page, watchers, writer)
        return turn


def judge(turn: Turn, page: Browser, watchers: list[Watcher], writer: Writer) -> None:
    """When each commit was seen. A job that was written twice between two polls shows only the later step: that counts
    for the earlier one, too."""
    last = max(writer.committed, key=lambda key: writer.committed[key])

    def arrived() -> dict[str, list[tuple[str, float]]] | None:
        found: dict[str, list[tuple[str, float]]] = {}
        for job, words, at in page.driver.execute_script("return window.seen"):
            found.setdefault(job, []).append((words, at))
        return found if any(last[1] in words for words, _ in found.get(last[0], ())) else None

    seen = eventually(arrived, seconds=PATIENCE_SECONDS, why=lambda: f"{last} never came")
    for (job, words), committed in writer.committed.items():
        goal = turn.inserts if words == "waits" else turn.progress
        moments = [at for shown, at in seen.get(job, ()) if _reached(shown, words)]
        if moments:
            goal.append(min(moments) - committed)
        else:
            turn.lost += 1
    # The streams use the monotonic clock.
    offset = time.time() - time.monotonic()
    for watcher in watchers:
        for told in list(watcher.told):
            for line in told.data.get("jobs", ()):
                if (committed := writer.committed.get((line["job_id"], f"{line['step']:,}"))) is not None:
                    turn.streams.append(told.at + offset - committed)


def _reached(shown: str, words: str) -> bool:
    if words == "waits" or "step" not in shown:
        return shown == words
    step = shown.split("step ", 1)[1].split(" ", 1)[0]
    return int(step.replace(",", "")) >= int(words.replace(",", ""))


def lengthen(dsn: str, waiting: int) -> None:
    """Makes this many jobs wait in all: the seeded ninety, and more behind them."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "INSERT INTO training_jobs (user_id, dataset_id, hyperparameters, gpu_config, status, due, queued_at, "
            "base_model, total_epochs) SELECT user_id, dataset_id, hyperparameters, gpu_config, 'queued', true, "
            "now() - n * interval '1 s', base_model, 3 FROM training_jobs, generate_series(1, %s) AS n "
            "WHERE id = (SELECT id FROM training_jobs WHERE status = 'running' LIMIT 1)",
            (max(waiting - 90, 0),),
        )
        connection.execute("VACUUM ANALYZE training_jobs")


def readers(dsn: str) -> list[dict[str, Any]]:
    with psycopg.connect(dsn, row_factory=psycopg.rows.dict_row) as connection:
        return connection.execute(
            "SELECT pid, application_name FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = ANY (%s)",
            (list(READERS),),
        ).fetchall()


def reader_cpu(dsn: str) -> float:
    """Returns the CPU seconds of the connections opened for watching."""
    ticks = 0
    for reader in readers(dsn):
        fields = Path(f"/proc/{reader['pid']}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def transactions(dsn: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(
            "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone()
    assert row is not None
    return int(row[0])


def milliseconds(values: list[float]) -> str:
    if not values:
        return "– | – | –"
    ordered = sorted(values)
    chosen = (statistics.median(ordered), ordered[int(len(ordered) * 0.95)], ordered[-1])
    return " | ".join(f"{1000 * value:.0f}" for value in chosen)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--seconds", type=float, default=60.0)
    words.add_argument("--browsers", type=int, nargs="+", default=[1, 20, 100])
    words.add_argument("--waiting", type=int, nargs="+", default=[90, 50_000])
    given = words.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}\n")
    print(
        "| waiting | browsers | progress on the page, ms: p50 | p95 | slowest | a new job on the page, ms: p50 | p95 "
        "| slowest | in the streams, ms: p50 | p95 | slowest | connections | transactions a second | reader's core |"
    )
    print("|" + "---|" * 14)
    with open_server() as server:
        for waiting in given.waiting:
            for browsers in given.browsers:
                turn = measure(server, waiting, browsers, given.seconds)
                print(
                    f"| {waiting:,} | {browsers} | {milliseconds(turn.progress)} | {milliseconds(turn.inserts)} | "
                    f"{milliseconds(turn.streams)} | {turn.connections} | {turn.transactions_a_second:.1f} | "
                    f"{100 * turn.reader_cpu:.1f} % |" + (f" {turn.lost} never came" if turn.lost else ""),
                    flush=True,
                )


if __name__ == "__main__":
    main()
