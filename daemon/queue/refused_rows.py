"""Rows that the database refuses to let us write: left alone for a while, so that they hold up no other."""

from __future__ import annotations

import time
from uuid import UUID

import structlog

from daemon.errors import StatementRefused
from daemon.troubles import Troubles

log = structlog.get_logger()

# Who mends the app's trigger sees the row move within this time.
LEFT_ALONE_SECONDS = 600.0


class RefusedRows:
    """Of one kind ("claim", "callback"): its name is the trouble's."""

    def __init__(self, kind: str, troubles: Troubles) -> None:
        self._kind = kind
        self._troubles = troubles
        self._until: dict[UUID, float] = {}

    def note(self, row_id: UUID, error: StatementRefused) -> None:
        """The database refuses this one: it is not asked for again until a while from now."""
        log.error("row_refused", kind=self._kind, id=str(row_id), error=str(error))
        self._until[row_id] = time.monotonic() + LEFT_ALONE_SECONDS
        self._troubles.begin(
            self._kind,
            f"the database refuses the {self._kind} of {row_id}, which is left alone for "
            f"{LEFT_ALONE_SECONDS / 60:.0f} minutes: {error}",
        )

    @property
    def skip(self) -> list[UUID]:
        """Those that are left alone now."""
        if self._until:
            now = time.monotonic()
            self._until = {row_id: until for row_id, until in self._until.items() if until > now}
            if not self._until:
                self._troubles.end(self._kind)
        return list(self._until)
