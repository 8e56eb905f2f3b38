"""An app whose rules object to what a daemon does with some of its rows: the others are served, and it is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from tests.daemon_process import eventually
from tests.lifecycle.queue import Queue

LONG = [["steps", 100_000, 0.02]]


@contextmanager
def objecting(
    queue: Queue, table: str, moment: str, condition: str, body: str = "RAISE EXCEPTION 'not in this house'"
) -> Iterator[None]:
    """A trigger of the app's own."""
    with queue.connect() as admin:
        admin.execute(
            "CREATE FUNCTION app_objects() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN {body}; RETURN NEW; END $$".encode()
        )
        admin.execute(
            f"CREATE TRIGGER app_objects {moment} ON {table} FOR EACH ROW WHEN ({condition}) "
            "EXECUTE FUNCTION app_objects()".encode()
        )
        try:
            yield
        finally:
            admin.execute("DROP FUNCTION app_objects() CASCADE")


def troubles(queue: Queue) -> dict[str, str]:
    rows = queue.select("SELECT data -> 'troubles' AS troubles FROM training_workers WHERE state <> 'gone'")
    return {trouble["name"]: trouble["message"] for row in rows for trouble in row["troubles"] or ()}


def reason(queue: Queue, job: UUID) -> str | None:
    rows = queue.select("SELECT waiting_reason FROM training_queue WHERE job_id = %s", job)
    return str(rows[0]["waiting_reason"]) if rows else None


@pytest.mark.parametrize(
    "body",
    ["RAISE EXCEPTION 'not in this house'", "INSERT INTO audit_of_the_app VALUES (1)", "PERFORM 1 / 0"],
    ids=["it raises", "it lacks a right", "it divides by zero"],
)
async def test_a_job_whose_claim_is_refused_is_set_aside_and_the_next_is_taken(
    queue: Queue, tmp_path: Path, body: str
) -> None:
    with queue.daemon(tmp_path, slots=2) as daemon:
        running = queue.insert(script=LONG)
        queue.wait_for(running, "running")
        queue.select("CREATE TABLE audit_of_the_app (id integer)")
        bad = uuid4()
        refuses = f"NEW.id = '{bad}' AND NEW.status = 'initializing'"
        with objecting(queue, "training_jobs", "BEFORE UPDATE", refuses, body):
            queue.insert(id=bad)
            good = queue.insert()
            queue.wait_for(good, "completed")
            said = eventually(lambda: reason(queue, bad) if "held" in (reason(queue, bad) or "") else None)
            assert said.startswith("held: The database refuses the claim: ") and "app_objects" in said
            assert "migrate" not in said and queue.story(bad)[-1] == "set_aside"
            assert bad not in [lease["job_id"] for lease in queue.leases()]
            assert [line["job_id"] for line in daemon.logged("claim_refused")] == [str(bad)]
        # The operator mended it: one word, and it runs.
        assert queue.select("SELECT release_held_jobs() AS n") == [{"n": 1}]
        queue.wait_for(bad, "completed")
        assert queue.row(running)["status"] == "running" and queue.row(running)["attempt"] == 1
        assert daemon.process is not None and daemon.process.poll() is None


async def test_an_app_whose_statuses_lack_one_of_ours_costs_no_daemon_and_holds_no_whole_queue(
    queue: Queue, tmp_path: Path
) -> None:
    with queue.daemon(tmp_path, slots=2) as daemon:
        running = queue.insert(script=LONG)
        queue.wait_for(running, "running")
        with queue.connect() as admin:
            admin.execute(
                "ALTER TABLE training_jobs ADD CONSTRAINT app_statuses CHECK (status <> 'initializing') NOT VALID"
            )
            jobs = [queue.insert() for _ in range(12)]
            eventually(lambda: len(daemon.logged("claim_refused")) >= 8 or None, why=daemon.tail)
            held = [job for job in jobs if "constraint app_statuses" in (reason(queue, job) or "")]
            assert 8 <= len(held) < 12, "the rest of the queue is left as it is"
            assert daemon.process is not None and daemon.process.poll() is None
            admin.execute("ALTER TABLE training_jobs DROP CONSTRAINT app_statuses")
        queue.select("SELECT release_held_jobs()")
        for job in jobs:
            queue.wait_for(job, "completed", seconds=90)
        assert queue.row(running)["attempt"] == 1


async def test_a_job_that_may_not_even_be_held_is_passed_over(queue: Queue, tmp_path: Path) -> None:
    bad = uuid4()
    with objecting(queue, "training_jobs", "BEFORE UPDATE", f"OLD.id = '{bad}'"):
        queue.insert(id=bad)
        good = queue.insert()
        with queue.daemon(tmp_path):
            queue.wait_for(good, "completed")
            message = eventually(lambda: troubles(queue).get("claim"), seconds=40)
            assert str(bad) in message and "not in this house" in message
            assert "set_aside" in queue.story(bad) and queue.row(bad)["status"] == "queued"
            # Nobody spins meanwhile.
            assert queue.story(bad).count("set_aside") == 1


async def test_a_worker_row_that_was_refused_for_a_while_is_touched_again(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path) as daemon:
        job = queue.insert(script=LONG)
        queue.wait_for(job, "running")
        with objecting(queue, "training_workers", "BEFORE UPDATE", "true"):
            said = daemon.wait_for_log("chore_failed", chore="worker row", seconds=40)
            assert "not in this house" in json.dumps(said) and "exception" in said
        since = queue.select("SELECT clock_timestamp() AS now")[0]["now"]
        eventually(
            lambda: queue.select("SELECT 1 FROM training_workers WHERE last_seen_at > %s", since) or None, seconds=60
        )
        daemon.wait_for_log("chore_works_again", chore="worker row", seconds=40)
        assert queue.row(job)["attempt"] == 1


@pytest.mark.parametrize(
    "table",
    [
        "training_leases, training_jobs",
        *(pytest.param(table, marks=pytest.mark.system) for table in ("training_leases", "training_jobs")),
    ],
)
async def test_a_table_locked_for_longer_than_a_lease_costs_no_attempt(
    queue: Queue, tmp_path: Path, table: str
) -> None:
    """As VACUUM FULL and ALTER TABLE do: the heartbeats waited, and so did two reapers."""
    (tmp_path / "other").mkdir()
    shared = {"storage_dir": tmp_path / "storage", "models_dir": tmp_path / "models", "lease_seconds": 4}
    with queue.daemon(tmp_path, **shared) as daemon, queue.daemon(tmp_path / "other", **shared) as other:
        job = queue.insert(script=LONG)
        queue.wait_for(job, "running")
        for each in (daemon, other):
            each.wait_for_log("listener_hears")
        with queue.connect() as admin:
            # Each reaper has known its database for a lease: it would reap.
            admin.execute("SELECT pg_sleep(5)")
            with admin.transaction():
                admin.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
                admin.execute("SELECT pg_sleep(10)")
            # Longer than any reaper's rhythm.
            admin.execute("SELECT pg_sleep(6)")
        assert not daemon.logged("job_reaped") and not other.logged("job_reaped")
        row = queue.row(job)
        assert (row["status"], row["attempt"], row["error_code"]) == ("running", 1, None)
