"""Finds a job's owner: a user given by id or e-mail address."""

from __future__ import annotations

from uuid import UUID

import psycopg

from daemon.cli.data.connection import Connection
from daemon.cli.errors import CommandFailed, Misused


def find_owner(connection: Connection, wanted: str) -> UUID:
    """Finds the user's id. Raises Misused if no user has that address, CommandFailed if this login may not look."""
    try:
        return UUID(wanted)
    except ValueError:
        if "@" not in wanted:
            raise Misused(f"{wanted[:80]!r} is neither a user's id nor an e-mail address") from None
    try:
        row = connection.execute("SELECT id FROM auth.users WHERE lower(email) = lower(%s)", (wanted,)).fetchone()
    except psycopg.errors.InsufficientPrivilege as error:
        raise CommandFailed("this login may not look users up by address", "give the user's id") from error
    if row is None:
        raise Misused(f"no user has the address {wanted}")
    owner: UUID = row["id"]
    return owner
