"""The trainer's voice: events of one job, written to the pipe that the daemon reads, each whole and at once."""

from __future__ import annotations

import os
from typing import Any, Literal

from training.events import (
    AdapterSaved,
    CheckpointSaved,
    Evaluated,
    Failed,
    Notice,
    Planned,
    Progress,
    Sample,
    Stage,
    StageEntered,
    Started,
)

AnyEvent = (
    Started | StageEntered | Planned | Progress | Evaluated | CheckpointSaved | Sample | Notice | AdapterSaved | Failed
)


class EventWriter:
    """Speaks for one job. Lives as long as the job; the descriptor belongs to the caller."""

    def __init__(self, descriptor: int, job_id: str) -> None:
        self._descriptor = descriptor
        self.job_id = job_id

    def say(self, event: AnyEvent) -> None:
        """Write one event as one line. Ends the process when nobody listens: a run without a daemon is lost money."""
        line = event.model_dump_json().encode() + b"\n"
        try:
            # A pipe takes up to PIPE_BUF bytes atomically; a longer line may go in parts when the pipe is nearly full.
            while line:
                line = line[os.write(self._descriptor, line) :]
        except BrokenPipeError:
            os._exit(1)

    def stage(self, stage: Stage, detail: str | None = None) -> None:
        self.say(StageEntered(job_id=self.job_id, stage=stage, detail=detail))

    def notice(self, code: str, message: str, **data: Any) -> None:
        self.say(Notice(job_id=self.job_id, code=code, message=message, data=data))

    def sample(self, when: Literal["before", "after"], prompt: str, answer: str) -> None:
        self.say(Sample(job_id=self.job_id, when=when, prompt=prompt, answer=answer))


class NullWriter(EventWriter):
    """The voice of every rank but the first: one job, one speaker."""

    def __init__(self, job_id: str) -> None:
        super().__init__(-1, job_id)

    def say(self, event: AnyEvent) -> None:
        """Nothing."""
