"""Skips for a while the rows that the database refuses to let us write, so that they hold up no others."""

from __future__ import annotations

import time
from uuid import UUID

import structlog

from daemon.errors import StatementRefused
from daemon.troubles import Troubles

log = structlog.get_logger()

# Once the app's trigger is fixed, the row moves within this time.
LEFT_ALONE_SECONDS = 600.0


class RefusedRows:
    """Refused rows of one kind ("claim", "callback"), which is also the trouble's name."""

    def __init__(self, kind: str, troubles: Troubles) -> None:
        self._kind = kind
        self._troubles = troubles
        self._until: dict[UUID, float] = {}

    def note(self, row_id: UUID, error: StatementRefused) -> None:
        """Skips a row for LEFT_ALONE_SECONDS because the database refused it."""
        log.error("row_refused", kind=self._kind, id=str(row_id), error=str(error))
        self._until[row_id] = time.monotonic() + LEFT_ALONE_SECONDS
        self._troubles.begin(
            self._kind,
            f"the database refuses the {self._kind} of {row_id}, which is not tried again for "
            f"{LEFT_ALONE_SECONDS / 60:.0f} minutes: {error}",
        )

    @property
    def skip(self) -> list[UUID]:
        """Lists the rows that are skipped now."""
        if self._until:
            now = time.monotonic()
            self._until = {row_id: until for row_id, until in self._until.items() if until > now}
            if not self._until:
                self._troubles.end(self._kind)
        return list(self._until)
