"""What is wrong with this host at the moment, for its operator: in the log at once, in its row of training_workers
(`data.troubles`) at the next heartbeat, and from there in doctor, the dashboard and `hosts`.

A trouble is a state, not an event: it has a name, begins, and ends when the same thing works again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from daemon.sentence import as_sentence

log = structlog.get_logger()

# A message may quote a database or a library at length; a row that is read every few seconds keeps only the beginning.
MESSAGE_CHARACTERS = 500


@dataclass(frozen=True)
class Trouble:
    """`name` is what does not work ("reaper", "work folder"), `message` what was seen and what the operator can do.
    `times` counts how often it was seen since it began."""

    name: str
    message: str
    since: datetime
    times: int = 1


class Troubles:
    """The troubles of one process. Any part of it may begin or end one."""

    def __init__(self) -> None:
        self._now: dict[str, Trouble] = {}
        # Set when one begins or ends, so that the worker's row need not wait for its next heartbeat.
        self.changed = asyncio.Event()

    def begin(self, name: str, message: str) -> None:
        """`name` does not work. Called again, it updates the message of the same trouble."""
        known = self._now.get(name)
        message = as_sentence(message)[:MESSAGE_CHARACTERS]
        if known is None:
            log.error("trouble_began", trouble=name, message=message)
            self._now[name] = Trouble(name, message, datetime.now(UTC))
            self.changed.set()
        else:
            self._now[name] = Trouble(name, message, known.since, known.times + 1)

    def end(self, name: str) -> None:
        """`name` works again."""
        known = self._now.pop(name, None)
        if known is not None:
            self.changed.set()
            seconds = (datetime.now(UTC) - known.since).total_seconds()
            log.info("trouble_ended", trouble=name, times=known.times, lasted_seconds=round(seconds, 1))

    def __iter__(self) -> Iterator[Trouble]:
        return iter(list(self._now.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._now

    def as_json(self) -> list[dict[str, Any]]:
        """As training_workers.data stores them."""
        return [
            {"name": each.name, "message": each.message, "since": each.since.isoformat(), "times": each.times}
            for each in self
        ]
