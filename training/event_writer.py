"""Writes one job's events to the daemon's pipe, one JSON line per event."""

from __future__ import annotations

import os
from typing import Any, Literal

from training.events import (
    AnyEvent,
    Notice,
    Preparing,
    Sample,
    Stage,
    StageEntered,
)


class EventWriter:
    """Writes the events of one job. The caller owns the descriptor and keeps it open for as long as the job runs."""

    def __init__(self, descriptor: int, job_id: str) -> None:
        self._descriptor = descriptor
        self.job_id = job_id

    def say(self, event: AnyEvent) -> None:
        """Writes one event as one line. Exits the process if the daemon is gone: the result would be lost."""
        line = event.model_dump_json().encode() + b"\n"
        try:
            # A pipe takes up to PIPE_BUF bytes atomically; a longer line may be split when the pipe is nearly full.
            while line:
                line = line[os.write(self._descriptor, line) :]
        except BrokenPipeError:
            os._exit(1)

    def stage(self, stage: Stage, detail: str | None = None) -> None:
        self.say(StageEntered(job_id=self.job_id, stage=stage, detail=detail))

    def preparing(self, done: int, total: int) -> None:
        self.say(Preparing(job_id=self.job_id, done=done, total=total))

    def notice(self, code: str, message: str, **data: Any) -> None:
        self.say(Notice(job_id=self.job_id, code=code, message=message, data=data))

    def sample(self, when: Literal["before", "after"], prompt: str, answer: str) -> None:
        self.say(Sample(job_id=self.job_id, when=when, prompt=prompt, answer=answer))


class NullWriter(EventWriter):
    """Discards all events. Used by every rank except the first, so that a job reports only once."""

    def __init__(self, job_id: str) -> None:
        super().__init__(-1, job_id)

    def say(self, event: AnyEvent) -> None:
        """Does nothing."""
