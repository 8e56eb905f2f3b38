"""What one look of the dashboard reads, over a long history: pages counted by Postgres itself, no clock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from daemon.database.statements import statement
from tests.gateway.dashboard.seeded_world import seed
from tests.postgres import AppDatabase

HISTORY = 20_000
WAITING = 20_000
PARAMETERS = {
    "after": "bigint", "whole": "boolean", "day": "boolean", "ids": "uuid[]", "most_news": "bigint",
    "most_ended": "bigint",
}  # fmt: skip


def prepared(name: str) -> str:
    text = statement(name, "reads")
    for place, parameter in enumerate(PARAMETERS, 1):
        text = text.replace(f"%({parameter})s", f"${place}")
    return f"PREPARE look ({', '.join(PARAMETERS.values())}) AS {text}"


@pytest.mark.parametrize(("whole", "most_pages"), [("false", 200), ("true", 4000)])
def test_a_look_reads_no_history(database: AppDatabase, whole: str, most_pages: int) -> None:
    """The plan is the generic one, as the feed's connection makes it: it knows nothing of how few jobs are wanted."""
    named = seed(database.dsn)
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "INSERT INTO training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, status, "
            "total_epochs, estimated_total_cost, queued_at, completed_at, final_cost, lease_epoch) "
            "SELECT user_id, dataset_id, 'old', '{}', '{}', 'completed', 1, 1, past.at, past.at, 1, 1 "
            "FROM training_jobs, generate_series(1, %s) AS place, "
            "LATERAL (SELECT now() - interval '2 days' - place * interval '1 second' AS at) AS past WHERE id = %s",
            (HISTORY, named["failed"]),
        )
        connection.execute("VACUUM ANALYZE training_jobs")
        for line in ("ROLE training_daemon", "plan_cache_mode = force_generic_plan", "jit = off"):
            connection.execute(f"SET {line}".encode())
        for line in ("enable_seqscan = off", "enable_sort = off"):
            connection.execute(f"SET {line}".encode())
        connection.execute(prepared("read_board").encode())
        told = connection.execute(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE look (NULL, {whole}, {whole}, '{{}}', 1000, 200)".encode()
        ).fetchone()
    assert told is not None
    plan = told[0][0]["Plan"] if not isinstance(told[0], str) else json.loads(told[0])[0]["Plan"]
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < most_pages


def walk(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from walk(child)


def test_a_long_queue_is_counted_and_never_sorted(database: AppDatabase) -> None:
    """Why one job waits is asked of its own row; the head of the queue is read from its index."""
    named = seed(database.dsn)
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "INSERT INTO training_jobs (user_id, dataset_id, hyperparameters, gpu_config, status, due, queued_at) "
            "SELECT user_id, dataset_id, '{}', '{}', 'queued', true, now() - place * interval '1 second' "
            "FROM training_jobs, generate_series(1, %s) AS place WHERE id = %s",
            (WAITING, named["queued"]),
        )
        connection.execute("VACUUM ANALYZE training_jobs")
        connection.execute("SET ROLE training_daemon")
        plans = {}
        for name, values in (("why_jobs_wait", {"ids": [named["queued"]]}), ("read_queue", {"most": 200})):
            told = connection.execute(
                f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement(name, 'reads')}".encode(), values
            ).fetchone()
            assert told is not None
            plans[name] = told[0][0]["Plan"]
    one, head = plans["why_jobs_wait"], plans["read_queue"]
    assert one["Shared Hit Blocks"] + one["Shared Read Blocks"] < 50, one
    sorted_rows = [node["Plans"][0]["Actual Rows"] for node in walk(head) if node["Node Type"] == "Sort"]
    assert max(sorted_rows) <= 200, head
    assert head["Actual Rows"] == 200
