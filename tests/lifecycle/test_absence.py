"""What a daemon cannot see for a while is not gone: tables, rights and rows that vanish and come back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psycopg
import pytest

from daemon.schema.migrations import migrate
from tests.daemon_process import alive, eventually
from tests.lifecycle.queue import Queue
from tests.paths import DOUBLES

LONG = [["steps", 100_000, 0.02]]


def reset(queue: Queue) -> None:
    """What `supabase db reset` does to a database in use: everything of the app's and ours is dropped."""
    for schema in ("public", "supabase_migrations"):
        # A daemon that is just asking for work may lock the same tables in another order: whoever resets tries again.
        eventually(partial(_drop, queue, schema))


def _drop(queue: Queue, schema: str) -> bool:
    try:
        with queue.connect() as admin:
            admin.execute(f"DROP SCHEMA {schema} CASCADE".encode())
    except psycopg.errors.DeadlockDetected:
        return False
    return True


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


@contextmanager
def hidden(queue: Queue, *tables: str, verb: str = "ALL") -> Iterator[None]:
    """A policy meant for the app's users, and made without TO: it binds the daemon's role as well."""
    with queue.connect() as admin:
        for table in tables:
            admin.execute(f"CREATE POLICY tenants ON {table} AS RESTRICTIVE FOR {verb} USING (false)".encode())
        try:
            yield
        finally:
            for table in tables:
                admin.execute(f"DROP POLICY tenants ON {table}".encode())


def troubles(queue: Queue) -> list[str]:
    rows = queue.select("SELECT data -> 'troubles' AS troubles FROM training_workers WHERE state <> 'gone'")
    return [trouble["message"] for row in rows for trouble in row["troubles"] or ()]


def doctor(queue: Queue, folder: Path) -> str:
    command = (sys.executable, "-m", "daemon", "doctor", "--json")
    settings = queue.daemon(folder, name="doctor").environment
    settings["PYTHONPATH"] = f"{DOUBLES / 'no_torch'}{os.pathsep}{settings['PYTHONPATH']}"
    return subprocess.run(command, env=settings, capture_output=True, text=True, cwd=folder, check=False).stdout


# -- rows that row security hides for a while --------------------------------------------------------------------


JOBS, LEASES = ("training_jobs",), ("training_leases",)
EVERYTHING = (*JOBS, *LEASES, "training_uploads")


@pytest.mark.parametrize(
    ("tables", "forced"),
    [
        pytest.param(JOBS, False, id="jobs"),
        pytest.param(LEASES, True, id="leases-force"),
        pytest.param(EVERYTHING, True, id="everything-force"),
        pytest.param(JOBS, True, id="jobs-force", marks=pytest.mark.system),
        pytest.param(LEASES, False, id="leases", marks=pytest.mark.system),
        pytest.param(EVERYTHING, False, id="everything", marks=pytest.mark.system),
    ],
)
def test_rows_that_are_hidden_while_training_cost_nothing(
    queue: Queue, tmp_path: Path, tables: tuple[str, ...], forced: bool
) -> None:
    if forced:
        own_by_an_ordinary_role(queue)
    settings = {"lease_seconds": 2, "poll_seconds": 1}
    with queue.daemon(tmp_path, name="one", **settings) as one, queue.daemon(tmp_path, name="two", **settings) as two:
        gate = tmp_path / "gate"
        job = queue.insert(script=[["steps", 300, 0.03, str(gate)]])
        queue.wait_for(job, "running")
        folder = tmp_path / "jobs" / str(job)
        eventually(lambda: list(folder.glob("checkpoints/*/step")))
        with hidden(queue, *tables):
            time.sleep(7)  # longer than the watch over the limits, and than three leases
            assert list(folder.glob("checkpoints/*/step"))
            assert not one.logged("attempt_superseded") and not two.logged("attempt_superseded")
            assert one.logged("trouble_began") or eventually(lambda: one.logged("trouble_began"))
        gate.touch()
        row = queue.wait_for(job, "completed", seconds=60)
        assert row["attempt"] == 1 and "reaped" not in queue.story(job)
        assert queue.leases() == []


def own_by_an_ordinary_role(queue: Queue) -> None:
    """The tables and functions of a login that row security binds, as soon as it is forced."""
    with queue.connect() as admin, admin.transaction():
        admin.execute(
            "DO $$ BEGIN CREATE ROLE plain_owner NOLOGIN; "
            "EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$"
        )
        admin.execute("GRANT CREATE, USAGE ON SCHEMA public TO plain_owner")
        for table in ("training_jobs", "training_leases", "training_uploads", "datasets", "training_workers"):
            admin.execute(f"ALTER TABLE {table} OWNER TO plain_owner".encode())
            admin.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY".encode())
        # Foreign keys are checked as the owner: he sees, and is bound by what binds everybody.
        for table in ("training_jobs", "training_leases", "training_uploads", "datasets", "training_workers"):
            admin.execute(f"CREATE POLICY owner_all ON {table} TO plain_owner USING (true) WITH CHECK (true)".encode())
        for function in (
            "training_real_job(uuid)",
            "training_sample_rows(integer)",
            "training_leases_end_with_a_move()",
        ):
            admin.execute(f"ALTER FUNCTION {function} OWNER TO plain_owner".encode())
        for table in ("training_callbacks", "training_pods"):
            admin.execute(f"GRANT SELECT ON {table} TO plain_owner".encode())


def test_a_training_that_ends_while_its_row_is_hidden_is_completed_when_it_is_seen(
    queue: Queue, tmp_path: Path
) -> None:
    with queue.daemon(tmp_path, poll_seconds=1) as daemon:
        gate = tmp_path / "gate"
        job = queue.insert(script=[["steps", 60, 0.05, str(gate)]])
        queue.wait_for(job, "running")
        with hidden(queue, "training_jobs"):
            gate.touch()
            daemon.wait_for_log("ending_delayed")
            assert queue.leases(), "a lease without its job's move would leave it running for ever"
        row = queue.wait_for(job, "completed")
        stored = tmp_path / "storage" / row["adapter_path"]
        assert row["attempt"] == 1 and stored.exists()


def test_an_idle_host_that_is_blind_says_so_and_takes_the_job_when_it_sees(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, poll_seconds=1) as daemon:
        daemon.wait_for_log("listener_hears")
        with hidden(queue, "training_jobs"):
            job = queue.insert()
            began = daemon.wait_for_log("trouble_began", trouble="hidden rows")
            assert 'ALTER POLICY "tenants" ON public.training_jobs TO authenticated' in began["message"]
            eventually(lambda: any("tenants" in message for message in troubles(queue)))
            assert queue.row(job)["status"] == "queued"
            line = next(line for line in doctor(queue, tmp_path).splitlines() if "row security" in line)
            assert "training_jobs" in line and "tenants" in line and "fault" in line
        assert queue.wait_for(job, "completed")["attempt"] == 1
        daemon.wait_for_log("trouble_ended", trouble="hidden rows")
        assert "hides nothing from the daemon" in doctor(queue, tmp_path)


def test_a_dataset_whose_row_is_hidden_fails_no_job(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, poll_seconds=1) as daemon:
        with hidden(queue, "datasets"):
            job = queue.insert()
            daemon.wait_for_log("dataset_hidden")
        assert queue.wait_for(job, "completed")["attempt"] == 1


def test_a_job_that_is_deleted_while_other_rows_are_hidden_is_stopped_and_leaves_nothing(
    queue: Queue, tmp_path: Path
) -> None:
    with queue.daemon(tmp_path, poll_seconds=1) as daemon:
        job = queue.insert(script=LONG)
        queue.wait_for(job, "running")
        with hidden(queue, "training_jobs", "training_leases"):
            queue.select("DELETE FROM training_jobs WHERE id = %s", job)
            daemon.wait_for_log("attempt_superseded")
            eventually(lambda: not (tmp_path / "jobs" / str(job)).exists())


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
        job = queue.insert(script=LONG)
        queue.wait_for(job, "running")
        eventually(lambda: list((tmp_path / "jobs" / str(job)).glob("checkpoints/*/step")))
        reset(queue)
        daemon.wait_for_log("lease_not_renewed")
        assert daemon.logged("attempt_settled") == [], "while nothing can be asked the training goes on"
        migrate_anew(queue)
        daemon.wait_for_log("attempt_superseded")
        assert list((tmp_path / "jobs" / str(job)).glob("checkpoints/*/step")), "its row may come from a backup yet"
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
        gate = tmp_path / "gate"
        job = queue.insert(script=[["steps", 300, 0.02, str(gate)]])
        queue.wait_for(job, "running")
        with without_rights(queue):
            time.sleep(2 * lease_seconds)  # the outage itself
        gate.touch()
        row = queue.wait_for(job, "completed")
        assert row["attempt"] == 1 and "reaped" not in queue.story(job)
        assert alive(one.pid) and alive(two.pid)


def test_a_training_that_ends_while_the_rights_are_gone_is_completed_when_they_are_back(
    queue: Queue, tmp_path: Path
) -> None:
    with queue.daemon(tmp_path, poll_seconds=1) as daemon:
        gate = tmp_path / "gate"
        job = queue.insert(script=[["steps", 40, 0.05, str(gate)]])
        queue.wait_for(job, "running")
        with without_rights(queue):
            gate.touch()
            daemon.wait_for_log("upload_delayed")
        assert queue.wait_for(job, "completed")["attempt"] == 1


@pytest.mark.parametrize("table", ["training_jobs", "training_leases"])
def test_a_right_on_one_table_that_is_gone_as_a_training_ends_is_waited_for(
    queue: Queue, tmp_path: Path, table: str
) -> None:
    with queue.daemon(tmp_path, poll_seconds=1) as daemon:
        gate = tmp_path / "gate"
        job = queue.insert(script=[["steps", 40, 0.05, str(gate)]])
        queue.wait_for(job, "running")
        granted = queue.select(
            "SELECT string_agg(column_name, ', ') AS columns FROM information_schema.column_privileges "
            "WHERE table_name = %s AND grantee = 'training_daemon' AND privilege_type = 'UPDATE'",
            table,
        )[0]["columns"]
        queue.select(f"REVOKE UPDATE ON {table} FROM training_daemon")
        gate.touch()
        eventually(lambda: daemon.logged("ending_delayed") or daemon.logged("lease_not_renewed"))
        queue.select(f"GRANT UPDATE ({granted}) ON {table} TO training_daemon")
        assert queue.wait_for(job, "completed")["attempt"] == 1


def test_a_daemon_that_nothing_ever_worked_for_says_so_and_ends(queue: Queue, tmp_path: Path) -> None:
    with without_rights(queue), queue.daemon(tmp_path) as daemon:
        assert daemon.wait() == 78
        assert "brightrun-trainer migrate" in daemon.tail()
