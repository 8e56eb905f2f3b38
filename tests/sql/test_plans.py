"""The plans of the frequent statements: they use our indexes, also when the statistics are stale.

EXPLAIN of the prepared statement under a generic plan, in a session as the daemon prepares it.
"""

from __future__ import annotations

import json
import re
from typing import Any
from uuid import UUID, uuid4

import pytest
from psycopg import sql

from daemon.database.connection import Database
from daemon.database.statements import statement
from daemon.queue.sql_job_store import SqlJobStore
from tests.daemon_process import eventually
from tests.postgres import AppDatabase
from tests.queue.claiming import claim

QUEUED = 5_000
CLAIM = {
    "worker_id": uuid4(),
    "free_gpus": 1,
    "gpu_memory_gb": 79.6,
    "gpu_type": None,
    "models": None,
    "user_cap": 2,
    "lease_seconds": 60.0,
    "warm_models": ["some/model"],
    "warm_first_seconds": 120.0,
    "skip": [],
    "window": 8,
}


def fill(database: AppDatabase, user: UUID, *, finished: int, queued: int, callbacks: int = 0) -> None:
    """Many rows at once, past the triggers."""
    dataset = database.insert_dataset(user)
    with database.connect() as connection, connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        # The statistics are what a test says, also where autovacuum's minute comes in the middle of it.
        for table in ("training_jobs", "training_callbacks"):
            connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
        # Flushed, so that VACUUM can mark the pages all-visible as it does in a durable server.
        connection.execute("SET LOCAL synchronous_commit = on")
        connection.execute(
            "INSERT INTO training_jobs (user_id, dataset_id, status, due, queued_at, base_model) "
            "SELECT %(user)s, %(dataset)s, CASE WHEN n <= %(finished)s THEN 'completed' ELSE 'queued' END, "
            "n > %(finished)s, now() - n * interval '1 s', 'a/b' FROM generate_series(1, %(all)s) AS n",
            {"user": user, "dataset": dataset, "finished": finished, "all": finished + queued},
        )
        connection.execute(
            "INSERT INTO training_callbacks (job_id, user_id, url, host, event, payload, state) "
            "SELECT id, user_id, 'https://x', 'h' || (row_number() OVER () %% 20), 'job.failed', '{}', "
            "CASE WHEN row_number() OVER () > %s THEN 'delivered' ELSE 'pending' END FROM training_jobs",
            (callbacks,),
        )


def vacuum(database: AppDatabase) -> None:
    """Until every page is known to be visible to all: a snapshot open beside it (autovacuum's) leaves some out."""

    def all_visible() -> bool:
        database.run("VACUUM ANALYZE training_jobs")
        row = database.one("SELECT relallvisible >= relpages AS all FROM pg_class WHERE relname = 'training_jobs'")
        return bool(row["all"])

    eventually(all_visible)


async def plan_of(database: AppDatabase, name: str, parameters: dict[str, Any]) -> str:
    """The whole generic plan as JSON text, with what it touched, without keeping what it did."""
    order: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match[1] not in order:
            order.append(match[1])
        return f"${order.index(match[1]) + 1}"

    text = re.sub(r"%\((\w+)\)s", number, statement(name)).replace("%%", "%")
    values = sql.SQL(", ").join(sql.Literal(parameters[word]) for word in order)
    call = sql.SQL("EXECUTE planned ({})").format(values) if order else sql.SQL("EXECUTE planned")
    async with Database(database.dsn, application_name="plans") as connection:
        await connection.fetch("BEGIN")
        await connection.fetch(f"PREPARE planned AS {text}")
        explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + call.as_string(None)
        rows = await connection.fetch(explain)
        await connection.fetch("ROLLBACK")
    return json.dumps(rows[0]["QUERY PLAN"][0]["Plan"])


def nodes(plan: str, relation: str) -> list[dict[str, Any]]:
    """The plan's scans of a relation."""
    found: list[dict[str, Any]] = []

    def walk(node: dict[str, Any]) -> None:
        if node.get("Relation Name") == relation and "Scan" in node["Node Type"]:
            found.append(node)
        for child in node.get("Plans", []):
            walk(child)

    walk(json.loads(plan))
    return found


def scans(plan: str, relation: str) -> set[str]:
    """How a relation was read: node type and index."""
    return {f"{node['Node Type']} {node.get('Index Name', '')}".strip() for node in nodes(plan, relation)}


def pages(plan: str, relation: str) -> int:
    """Pages that all scans of a relation touched. (The statement's sum has the catalogue's in it.)"""
    return sum(node["Shared Hit Blocks"] + node["Shared Read Blocks"] for node in nodes(plan, relation))


@pytest.mark.parametrize(
    ("name", "statistics"),
    [
        ("claim_job", "fresh"),
        ("claim_job", "of an empty queue"),
        ("claim_job", "none"),
        ("peek_next_job", "of an empty queue"),
    ],
)
async def test_the_claim_and_the_look_ahead_walk_their_own_index_and_stay_flat(
    database: AppDatabase, user: UUID, name: str, statistics: str
) -> None:
    if statistics == "of an empty queue":
        fill(database, user, finished=QUEUED, queued=0)
        database.run("ANALYZE training_jobs")
    fill(database, user, finished=QUEUED, queued=QUEUED)
    if statistics == "fresh":
        vacuum(database)
    plan = await plan_of(database, name, CLAIM)
    assert "Index Only Scan training_jobs_due" in scans(plan, "training_jobs"), plan
    assert not any("Seq Scan" in scan or "status" in scan for scan in scans(plan, "training_jobs")), plan
    # The eight candidates are sorted, for the warm ones go first; the queue is not.
    assert not re.search(r'"Sort Key": \[[^]]*job\.queued_at', plan), "the queue is read in the index's order"
    assert pages(plan, "training_jobs") < 40, plan


async def test_a_capped_users_waiting_rows_are_passed_over_inside_the_index(database: AppDatabase, user: UUID) -> None:
    fill(database, user, finished=0, queued=QUEUED)
    vacuum(database)
    async with Database(database.dsn, application_name="plans") as connection:
        store = SqlJobStore(connection)
        for _ in range(2):
            assert (await claim(store, user_cap=2)).job is not None
        other = database.insert_job(database.insert_user())
        plan = await plan_of(database, "claim_job", CLAIM)
        job = (await claim(store, user_cap=2)).job
    assert job is not None and job.id == other
    assert "Index Only Scan training_jobs_due" in scans(plan, "training_jobs")
    # 5,000 rows passed over are some 60 pages of the index; as rows of the table they would be 5,000 look-ups.
    assert pages(plan, "training_jobs") < 200, plan


@pytest.mark.parametrize("analyzed", [True, False])
async def test_the_outbox_is_walked_host_by_host_along_its_index(
    database: AppDatabase, user: UUID, analyzed: bool
) -> None:
    fill(database, user, finished=2 * QUEUED, queued=0, callbacks=QUEUED)
    if analyzed:
        database.run("ANALYZE training_callbacks")
    plan = await plan_of(database, "claim_callbacks", {"limit": 50, "lock_seconds": 30.0, "skip": [], "only": None})
    used = scans(plan, "training_callbacks")
    assert any(re.fullmatch(r"Index (Only )?Scan training_callbacks_pending", scan) for scan in used), plan
    assert not any("Seq Scan" in scan for scan in used), plan
    assert pages(plan, "training_callbacks") < 600, plan


@pytest.mark.parametrize("name", ["promote_due_jobs", "next_due_job", "read_ripe_jobs"])
async def test_scheduled_jobs_are_found_by_their_own_index(database: AppDatabase, user: UUID, name: str) -> None:
    fill(database, user, finished=QUEUED, queued=QUEUED)
    plan = await plan_of(database, name, {"skip": [], "only": None})
    assert not any("Seq Scan" in scan for scan in scans(plan, "training_jobs")), plan
    assert pages(plan, "training_jobs") < 20, plan


async def test_whether_a_capped_user_has_a_waiting_job_is_one_look_into_an_index(
    database: AppDatabase, user: UUID
) -> None:
    """Asked by the trigger training_leases_wake at each ending: of a user with a long history and nothing waiting."""
    fill(database, user, finished=QUEUED, queued=0)
    fill(database, database.insert_user(), finished=0, queued=QUEUED)
    source = database.one("SELECT prosrc FROM pg_proc WHERE proname = 'training_leases_wake'")["prosrc"]
    asked = re.search(r"SELECT FROM public\.training_jobs AS waiting WHERE [^)]*", source)
    assert asked is not None
    async with Database(database.dsn, application_name="plans") as connection:
        question = asked[0].replace("OLD.user_id", "%(user)s")
        rows = await connection.fetch(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {question} LIMIT 1", {"user": user})
    plan = json.dumps(rows[0]["QUERY PLAN"][0]["Plan"])
    assert "training_jobs_due_of_user" in plan and pages(plan, "training_jobs") < 5, plan


async def test_a_claim_calls_no_trigger_that_has_nothing_to_do(database: AppDatabase, user: UUID) -> None:
    database.insert_job(user)
    async with Database(database.dsn, application_name="plans") as connection:
        await connection.fetch("BEGIN")
        text = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement('claim_job')}"
        rows = await connection.fetch(text, CLAIM)
        await connection.fetch("ROLLBACK")
    called = {trigger["Trigger Name"] for trigger in rows[0]["QUERY PLAN"][0]["Triggers"] if trigger["Calls"]}
    own = {name for name in called if not name.startswith("RI_")}
    assert own == {"training_jobs_guard_update", "training_jobs_announce_update", "training_jobs_updated_at"}


async def test_heartbeats_and_progress_stay_hot(store: SqlJobStore, database: AppDatabase, user: UUID) -> None:
    """No index holds a moving column, and every page has room: the next version stays on its page."""
    database.insert_job(user)
    job = (await claim(store)).job
    assert job is not None
    await store.start_job(job.lease)
    before = hot_updates(database)
    for step in range(200):
        await store.renew_lease(job.lease, 60)
        await store.record_progress(
            job.lease, stage="training", progress=step / 2, epoch=0, step=step,
            metrics={"training_loss": 1.0, "learning_rate": 1e-4}, current_cost=0.1, seconds_left=5,
        )  # fmt: skip
    await store.database.close()
    for table, (updates, hot) in hot_updates(database, at_least=before["training_jobs"][0] + 200).items():
        done, stayed = updates - before[table][0], hot - before[table][1]
        assert done >= 200 and stayed / done > 0.9, f"{table}: {stayed} of {done} HOT"


def hot_updates(database: AppDatabase, at_least: int = 0) -> dict[str, tuple[int, int]]:
    """Updates and HOT updates so far, once the sessions have handed their counts in."""
    for _ in range(100):
        rows = database.run(
            "SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables "
            "WHERE relname IN ('training_jobs', 'training_leases')"
        )
        found = {row["relname"]: (row["n_tup_upd"], row["n_tup_hot_upd"]) for row in rows}
        if min(updates for updates, _ in found.values()) >= at_least - 2:
            break
        database.run("SELECT pg_sleep(0.05)")
    return found


async def test_a_job_with_many_siblings_is_claimed_within_milliseconds(database: AppDatabase, user: UUID) -> None:
    """Not a benchmark: the server's own time for one claim, far above what was measured and far below a scan."""
    fill(database, user, finished=QUEUED, queued=QUEUED)
    vacuum(database)
    async with Database(database.dsn, application_name="plans") as connection:
        await connection.fetch("BEGIN")
        text = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement('claim_job')}"
        times = [
            (await connection.fetch(text, CLAIM | {"user_cap": None}))[0]["QUERY PLAN"][0]["Execution Time"]
            for _ in range(9)
        ]
        await connection.fetch("ROLLBACK")
    assert sorted(times)[4] < 20, times
