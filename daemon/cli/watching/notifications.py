"""Waiting for something to happen to a job: a NOTIFY ends the wait at once, the clock ends it anyway.

Progress is never announced (NOTIFY takes a database-wide lock at commit), so whoever shows it reads slowly as well.
"""

from __future__ import annotations

from daemon.cli.data.connection import Connection

CHANNEL = "training_jobs"


def listen(connection: Connection) -> None:
    """Hear of inserts, requeues and cancels. Behind a transaction pooler this hears nothing, and the clock decides."""
    connection.execute(f"LISTEN {CHANNEL}".encode())


def wait_for_change(connection: Connection, seconds: float) -> None:
    """Return at the first announcement, or after `seconds`."""
    for _ in connection.notifies(timeout=seconds, stop_after=1):
        return
