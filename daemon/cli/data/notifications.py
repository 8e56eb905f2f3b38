"""Waits for a change of a job: until a NOTIFY, or for a limited time.

Progress sends no NOTIFY (which takes a database-wide lock at commit), so a view of progress must poll as well.
"""

from __future__ import annotations

from daemon.cli.data.connection import Connection

CHANNEL = "training_jobs"


def listen(connection: Connection) -> None:
    """Listens for inserts, requeues and cancels. Behind a transaction pooler nothing arrives, and polling remains."""
    connection.execute(f"LISTEN {CHANNEL}".encode())


def wait_for_change(connection: Connection, seconds: float) -> None:
    """Returns at the first notification, or after `seconds`."""
    for _ in connection.notifies(timeout=seconds, stop_after=1):
        return
