"""What a daemon cannot see for a while is not gone: tables, rights and rows that vanish and come back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemon.migrate import migrate
from tests.daemon_process import alive, eventually
from tests.lifecycle.queue import Queue

LONG = [["steps", 100_000, 0.02]]


def reset(queue: Queue) -> None:
    """What `supabase db reset` does to a database in use: everything of the app's and ours is dropped."""
    with queue.connect() as admin:
        admin.execute("DROP SCHEMA public CASCADE")
        admin.execute("DROP SCHEMA supabase_migrations CASCADE")


def migrate_anew(queue: Queue) -> None:
    with queue.connect() as admin:
        admin.execute("CREATE SCHEMA public")
    migrate(queue.dsn, local=True)


@contextmanager
def without_rights(queue: Queue) -> Iterator[None]:
    """No right on anything of ours, for the length of the block."""
    with queue.connect() as admin:
        admin.execute("REVOKE USAGE ON SCHEMA public FROM training_daemon, PUBLIC")
        try:
            yield
        finally:
            admin.execute("GRANT USAGE ON SCHEMA public TO training_daemon, PUBLIC")


# -- tables and rights that are missing for a while --------------------------------------------------------------


def test_an_idle_daemon_outlives_a_reset_and_takes_the_first_job_after_it(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, poll_seconds=1) as daemon:
        queue.wait_for(queue.insert(), "completed")
        reset(queue)
        daemon.wait_for_log("claim_failed")
        migrate_anew(queue)
        queue.wait_for(queue.insert(), "completed")
        assert alive(daemon.pid)
        eventually(lambda: queue.select("SELECT id FROM training_workers WHERE state <> 'gone'"))


def test_a_reset_while_training_ends_the_attempt_and_not_the_daemon(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, poll_seconds=1) as daemon:
        queue.wait_for(queue.insert(script=LONG), "running")
        reset(queue)
        daemon.wait_for_log("lease_not_renewed")
        assert daemon.logged("attempt_settled") == [], "while nothing can be asked the training goes on"
        migrate_anew(queue)
        daemon.wait_for_log("attempt_superseded")
        queue.wait_for(queue.insert(), "completed")
        assert alive(daemon.pid)


def test_rights_that_are_gone_for_a_while_cost_an_idle_daemon_nothing(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, poll_seconds=1) as daemon:
        queue.wait_for(queue.insert(), "completed")
        with without_rights(queue):
            daemon.wait_for_log("claim_failed", count=2)
        assert queue.wait_for(queue.insert(), "completed")["attempt"] == 1
        assert alive(daemon.pid)


def test_rights_that_are_gone_longer_than_a_lease_cost_a_training_nothing(queue: Queue, tmp_path: Path) -> None:
    lease_seconds = 2
    settings = {"lease_seconds": lease_seconds, "poll_seconds": 1}
    with queue.daemon(tmp_path, name="one", **settings) as one, queue.daemon(tmp_path, name="two", **settings) as two:
        job = queue.insert(script=[["steps", 300, 0.02]])
        queue.wait_for(job, "running")
        with without_rights(queue):
            time.sleep(2 * lease_seconds)  # the outage itself
        row = queue.wait_for(job, "completed")
        assert row["attempt"] == 1 and "reaped" not in queue.story(job)
        assert alive(one.pid) and alive(two.pid)


def test_a_training_that_ends_while_the_rights_are_gone_is_completed_when_they_are_back(
    queue: Queue, tmp_path: Path
) -> None:
    with queue.daemon(tmp_path, poll_seconds=1) as daemon:
        job = queue.insert(script=[["steps", 40, 0.05]])
        queue.wait_for(job, "running")
        with without_rights(queue):
            daemon.wait_for_log("upload_delayed")
        assert queue.wait_for(job, "completed")["attempt"] == 1


@pytest.mark.parametrize("table", ["training_jobs", "training_leases"])
def test_a_right_on_one_table_that_is_gone_as_a_training_ends_is_waited_for(
    queue: Queue, tmp_path: Path, table: str
) -> None:
    with queue.daemon(tmp_path, poll_seconds=1) as daemon:
        job = queue.insert(script=[["steps", 40, 0.05]])
        queue.wait_for(job, "running")
        granted = queue.select(
            "SELECT string_agg(column_name, ', ') AS columns FROM information_schema.column_privileges "
            "WHERE table_name = %s AND grantee = 'training_daemon' AND privilege_type = 'UPDATE'",
            table,
        )[0]["columns"]
        queue.select(f"REVOKE UPDATE ON {table} FROM training_daemon")
        eventually(lambda: daemon.logged("ending_delayed") or daemon.logged("lease_not_renewed"))
        queue.select(f"GRANT UPDATE ({granted}) ON {table} TO training_daemon")
        assert queue.wait_for(job, "completed")["attempt"] == 1


def test_a_daemon_that_nothing_ever_worked_for_says_so_and_ends(queue: Queue, tmp_path: Path) -> None:
    with without_rights(queue), queue.daemon(tmp_path) as daemon:
        assert daemon.wait() == 78
        assert "brightrun-trainer migrate" in daemon.tail()
