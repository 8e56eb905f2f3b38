"""A backup takes the rows back in time while hosts live: nobody writes under an epoch that was given twice."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import psycopg
from psycopg import sql

from tests.lifecycle.queue import Queue
from tests.postgres import Server


def restore(server: Server, name: str, backup: str) -> None:
    """The backup takes the place of the database: whoever is connected is thrown out, and finds it when he returns."""
    with psycopg.connect(server.url, autocommit=True) as admin:
        live, aside, copy = sql.Identifier(name), sql.Identifier(f"{name}_lost"), sql.Identifier(backup)
        admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(live))
        admin.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", (name,))
        for old, new in ((live, aside), (copy, live), (aside, copy)):
            admin.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(old, new))


def test_a_host_from_before_the_restore_is_refused_by_the_epoch_that_it_shares_with_another(
    queue: Queue, postgres: Server, tmp_path: Path
) -> None:
    name = queue.dsn.rpartition("/")[2]
    gate = tmp_path / "gate"
    job = queue.insert(script=[["steps", 160, 0.05, str(gate)]])
    queue.close()  # a database that somebody is connected to is not copied
    with postgres.database(template=name) as backup:
        older = queue.daemon(tmp_path, name="older")
        younger = queue.daemon(tmp_path, name="younger")
        with older:
            queue.wait_for(job, "running")
            lost = queue.row(job)
            # It sleeps through the restore, its trainer does not: both hosts see one volume and one storage.
            older.signal(signal.SIGSTOP)
            restore(postgres, name, backup)
            assert queue.row(job)["status"] == "queued"
            with younger:
                queue.wait_for(job, "running")
                now = queue.row(job)
                assert now["lease_epoch"] == lost["lease_epoch"] == 1
                assert now["lease_token"] != lost["lease_token"]
                older.signal(signal.SIGCONT)
                # Superseded, or failed as its folder's checkpoints were adopted: whatever it says is refused.
                older.wait_for_log("attempt_settled", seconds=30)
                gate.touch()
                row = queue.wait_for(job, "completed", seconds=60)
                older.wait_for_log("trainer_ended")
            assert not younger.logged("lease_lost"), younger.tail()
    assert (row["lease_epoch"], row["attempt"], row["lease_token"]) == (1, 1, now["lease_token"])
    content = (tmp_path / "storage" / row["adapter_path"]).read_bytes()
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (row["adapter_sha256"], row["adapter_bytes"])
    steps = [point["step"] for point in queue.points(job)]
    assert steps == sorted(set(steps)) and queue.story(job).count("completed") == 1
