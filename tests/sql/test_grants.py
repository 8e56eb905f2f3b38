"""Who sees and writes what: roles × tables × verbs, and the rows that row level security leaves."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb

from daemon.queue.outcome import Completed
from daemon.queue.rows import MetricPoint
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.worker_registry import WorkerRegistry, WorkerRow
from tests.postgres import AppDatabase
from tests.queue.claiming import claimed

# r select, i insert, u update, d delete; in parentheses: of some columns only.
MATRIX: dict[str, dict[str, str]] = {
    "training_jobs": {"authenticated": "ri(u)", "service_role": "riud", "training_daemon": "ri(u)"},
    "datasets": {"authenticated": "riud", "service_role": "riud", "training_daemon": "ri"},
    "metrics_points": {"authenticated": "r", "service_role": "riud", "training_daemon": "riud"},
    "model_artifacts": {"authenticated": "r(u)d", "service_role": "riud", "training_daemon": "ri(u)"},
    "cost_records": {"authenticated": "r", "service_role": "riud", "training_daemon": "ri(u)"},
    "notifications": {"authenticated": "ri(u)d", "service_role": "riud", "training_daemon": "ri"},
    "training_leases": {"authenticated": "(r)", "service_role": "r", "training_daemon": "riud"},
    "training_events": {"authenticated": "r", "service_role": "r", "training_daemon": "rid"},
    "training_workers": {"authenticated": "(r)", "service_role": "r", "training_daemon": "riu"},
    "training_callbacks": {"authenticated": "(r)", "service_role": "r", "training_daemon": "riud"},
    "training_deliveries": {"authenticated": "(r)", "service_role": "r", "training_daemon": "riu"},
    "training_served_names": {"service_role": "r", "training_daemon": "riu"},
    "training_uploads": {"service_role": "r", "training_daemon": "riud"},
}
VERBS = {"r": "SELECT", "i": "INSERT", "u": "UPDATE", "d": "DELETE"}


def test_every_role_has_exactly_its_grants(database: AppDatabase) -> None:
    for table, roles in MATRIX.items():
        for role in ("anon", "authenticated", "service_role", "training_daemon"):
            wanted = roles.get(role, "")
            found = ""
            for letter, verb in VERBS.items():
                row = database.one(
                    "SELECT has_table_privilege(%(r)s, %(t)s, %(v)s) AS whole, "
                    "%(v)s <> 'DELETE' AND has_any_column_privilege(%(r)s, %(t)s, "
                    "CASE %(v)s WHEN 'DELETE' THEN 'SELECT' ELSE %(v)s END) AS some",
                    {"r": role, "t": table, "v": verb},
                )
                found += letter if row["whole"] else f"({letter})" if row["some"] else ""
            assert found == wanted, f"{role} on {table}"
            row = database.one("SELECT has_table_privilege(%s, %s, 'TRUNCATE') AS may", (role, table))
            assert not row["may"] or role == "service_role", f"{role} may truncate {table}"


def test_row_level_security_is_on_wherever_a_user_can_reach(database: AppDatabase) -> None:
    rows = database.run("SELECT relname FROM pg_class WHERE relname = ANY (%s) AND relrowsecurity", (list(MATRIX),))
    assert {row["relname"] for row in rows} == set(MATRIX)


def test_the_daemon_role_is_nobodys_but_the_operators(database: AppDatabase) -> None:
    role = database.one("SELECT rolbypassrls, rolsuper FROM pg_roles WHERE rolname = 'training_daemon'")
    assert not role["rolbypassrls"] and not role["rolsuper"]
    for api_role in ("anon", "authenticated", "service_role", "authenticator"):
        row = database.one("SELECT pg_has_role(%s, 'training_daemon', 'MEMBER') AS member", (api_role,))
        assert not row["member"], api_role


# With their maker's rights. They tell what is there from what is only hidden from the daemon, or look into what is the
# app's or pg_cron's: with its own eyes it could not.
EVIDENCE = {
    "training_real_job", "training_sample_rows", "training_leases_end_with_a_move", "training_owns_file",
    "training_find_dispatchers",
}  # fmt: skip


def test_functions_with_others_rights_have_no_search_path_and_no_public_execute(database: AppDatabase) -> None:
    rows = database.run(
        "SELECT proname, prosecdef, proconfig, pg_get_userbyid(proowner) AS owner, "
        "has_function_privilege('anon', oid, 'EXECUTE') AS anon_may "
        "FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND proname <> 'update_updated_at_column'"
    )
    owner = database.one("SELECT tableowner FROM pg_tables WHERE tablename = 'training_leases'")["tableowner"]
    assert {row["proname"] for row in rows} > EVIDENCE
    for row in rows:
        assert not row["anon_may"], row["proname"]
        assert 'search_path=""' in (row["proconfig"] or []), row["proname"]
        if row["proname"] in EVIDENCE:
            assert row["prosecdef"] and row["owner"] == owner, row["proname"]
        elif row["prosecdef"]:
            assert row["owner"] == "training_daemon", row["proname"]


async def finished_job(store: SqlJobStore, database: AppDatabase, user: UUID) -> UUID:
    job_id = database.insert_job(user, callback_url="https://app.example.org/hook")
    job = await claimed(store)
    await store.start_job(job.lease)
    await store.record_metrics(job.lease, [MetricPoint(1, 0, 1.0, 1e-4)])
    await store.complete_job(job.lease, Completed("a", "b", 1), cost=1)
    return job_id


async def test_each_user_sees_his_own_rows_and_nobody_elses(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    other = database.insert_user()
    for owner in (user, other):
        database.run("SELECT redeliver(%s, 'gguf')", (await finished_job(store, database, owner),))
        database.insert_job(owner)
        await claimed(store)
    for table, roles in MATRIX.items():
        if table == "training_workers" or "authenticated" not in roles:
            continue
        for view in (table,):
            with database.acting("authenticated", user) as caller:
                mine = caller.execute(f"SELECT count(*) AS n FROM {view}".encode()).fetchone()
            everything = database.one(f"SELECT count(*) AS n FROM {view}")
            assert mine is not None and 0 < mine["n"] == everything["n"] / 2, table


@pytest.mark.parametrize("table", list(MATRIX))
def test_anon_sees_nothing(database: AppDatabase, table: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege), database.acting("anon") as caller:
        caller.execute(f"SELECT FROM {table}".encode())


async def test_a_stranger_changes_nothing(store: SqlJobStore, database: AppDatabase, user: UUID) -> None:
    job_id = await finished_job(store, database, user)
    stranger = database.insert_user()
    with database.acting("authenticated", stranger) as caller:
        for change in (
            "UPDATE training_jobs SET status = 'cancelled'",
            "UPDATE datasets SET name = 'mine'",
            "UPDATE notifications SET read = true",
            "DELETE FROM model_artifacts",
            "DELETE FROM datasets",
        ):
            assert caller.execute(change.encode()).rowcount == 0, change
    for call in ("cancel_training_job", "retry_training_job", "training_job_status"):
        with pytest.raises(psycopg.Error) as refusal, database.acting("authenticated", stranger) as caller:
            caller.execute(f"SELECT {call}(%s)".encode(), (job_id,))
        assert refusal.value.sqlstate == "PT404" and "no such job of yours" in str(refusal.value)


@pytest.mark.parametrize("role", ["authenticated", "service_role"])
@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO training_events (job_id, kind) SELECT id, 'x' FROM training_jobs",
        "UPDATE training_leases SET expires_at = now()",
        "DELETE FROM training_leases",
        "UPDATE training_callbacks SET url = 'https://elsewhere.example'",
        "UPDATE training_workers SET state = 'gone'",
        "SET ROLE training_daemon",
    ],
)
async def test_our_tables_are_written_by_the_daemon_alone(
    store: SqlJobStore, database: AppDatabase, user: UUID, role: str, statement: str
) -> None:
    await finished_job(store, database, user)
    with pytest.raises(psycopg.errors.InsufficientPrivilege), database.acting(role, user) as caller:
        if statement.startswith("SET ROLE"):
            caller.execute("SET SESSION AUTHORIZATION authenticator")
        caller.execute(statement.encode())


def test_operators_functions_are_not_for_users(database: AppDatabase, user: UUID) -> None:
    for call in ("release_held_jobs()", "reap_expired_leases()", "prune_training_history('1 day')"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), database.acting("authenticated", user) as caller:
            caller.execute(f"SELECT {call}".encode())
        with database.acting("service_role") as service:
            service.execute(f"SELECT {call}".encode())


async def test_the_apps_select_star_and_its_views_work_for_a_user(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    await WorkerRegistry(store.database).register_worker(WorkerRow(UUID(int=1), "host-1", "cpu", pod="pod-1"))
    job_id = await finished_job(store, database, user)
    database.insert_job(user)
    with database.acting("authenticated", user) as caller:
        assert len(caller.execute("SELECT * FROM training_jobs").fetchall()) == 2
        for view in ("training_job_status", "training_queue", "training_throughput", "training_orphans"):
            caller.execute(f"SELECT * FROM {view}".encode()).fetchall()
        row = caller.execute("SELECT training_job_status(%s) AS said", (job_id,)).fetchone()
        assert row is not None and row["said"]["status"] == "completed"
    for hidden in ("SELECT host FROM training_workers", "SELECT * FROM training_worker_status"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), database.acting("authenticated", user) as caller:
            caller.execute(hidden.encode())
    with database.acting("service_role") as service:
        assert len(service.execute("SELECT * FROM training_worker_status").fetchall()) == 1


def submit(database: AppDatabase, role: str, user: UUID | None, job: dict[str, Any]) -> dict[str, Any]:
    with database.acting(role, user) as caller:
        row = caller.execute("SELECT submit_training_job(%s) AS said", (Jsonb(job),)).fetchone()
    assert row is not None
    said: dict[str, Any] = row["said"]
    return said


def test_a_submit_by_function_is_a_row_and_a_repeated_one_the_same(database: AppDatabase, user: UUID) -> None:
    job = {
        "job_id": "run-7",
        "dataset_url": "https://files.example.org/chat.jsonl",
        "hyperparameters": {"epochs": 1, "rank": 8},
        "gpu_config": {"type": "H100", "count": 1},
        "callback_url": "https://app.example.org/hook",
    }
    first = submit(database, "authenticated", user, job)
    assert first == submit(database, "authenticated", user, job) and first["status"] == "running"
    row = database.one("SELECT * FROM training_jobs")
    assert str(row["id"]) == first["external_job_id"] and row["client_job_id"] == "run-7" and row["user_id"] == user
    other = database.insert_user()
    assert submit(database, "service_role", None, job | {"user_id": str(other)})["job_id"] != first["job_id"]
    with pytest.raises(psycopg.Error, match="a job needs an owner"):
        submit(database, "service_role", None, job)


def test_a_user_submits_for_himself_only(database: AppDatabase, user: UUID) -> None:
    other = database.insert_user()
    submit(database, "authenticated", user, {"user_id": str(other), "dataset_url": "https://x.example/a"})
    assert database.one("SELECT user_id FROM training_jobs")["user_id"] == user


def test_a_job_id_that_is_taken_by_somebody_else_is_refused(database: AppDatabase, user: UUID) -> None:
    job_id = str(database.insert_job(database.insert_user()))
    with pytest.raises(psycopg.Error) as refusal:
        submit(database, "authenticated", user, {"job_id": job_id, "dataset_url": "https://x.example/a"})
    assert refusal.value.sqlstate == "PT409"


@pytest.mark.parametrize("role", ["authenticated", "service_role", "postgres"])
async def test_a_failed_job_is_tried_again_from_zero_by_its_owner_or_the_operator(
    store: SqlJobStore, database: AppDatabase, user: UUID, role: str
) -> None:
    job_id = database.insert_job(user)
    with database.acting(role, user) as caller:
        caller.execute("SELECT cancel_training_job(%s)", (job_id,))
        caller.execute("SELECT cancel_training_job(%s)", (job_id,))
        caller.execute("SELECT retry_training_job(%s)", (job_id,))
    row = database.job(job_id)
    assert (row["status"], row["attempt"], row["due"], row["final_cost"]) == ("queued", 0, True, None)
    with pytest.raises(psycopg.Error) as refusal, database.acting(role, user) as caller:
        caller.execute("SELECT retry_training_job(%s)", (job_id,))
    assert refusal.value.sqlstate == "PT409"


async def test_pruning_takes_old_history_of_finished_jobs_in_batches(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    await finished_job(store, database, user)
    database.insert_job(user)
    job = await claimed(store)
    await store.record_metrics(job.lease, [MetricPoint(1, 0, 1.0, 1e-4)])
    database.run("UPDATE training_callbacks SET state = 'delivered'")
    with database.acting("service_role") as service:
        assert service.execute("SELECT * FROM prune_training_history('1 hour')").fetchone() == {
            "metrics_points": 0, "events": 0, "callbacks": 0
        }  # fmt: skip
        first = service.execute("SELECT * FROM prune_training_history('0 s', 2)").fetchone()
        second = service.execute("SELECT * FROM prune_training_history('0 s')").fetchone()
    assert first == {"metrics_points": 1, "events": 2, "callbacks": 2}
    assert second is not None and second["callbacks"] == 1 and second["events"] == 2
    assert {row["job_id"] for row in database.run("SELECT job_id FROM training_events")} == {job.id}
    assert len(database.run("SELECT FROM metrics_points")) == 1
