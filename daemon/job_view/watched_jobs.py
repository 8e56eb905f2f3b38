"""Reads watched jobs again and again: their rows, and only the new points and events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from daemon.job_view.reads import EVENTS_A_READ, Connection, Event, JobRow, Point, list_jobs, read_points, read_story

# More points than any terminal has columns; beyond this, neighbours are merged.
_MAX_POINTS = 4000
_KEPT_EVENTS = 100


@dataclass
class WatchedJob:
    """One job as it was last read. `points` are in the order of their steps."""

    row: JobRow
    points: list[Point] = field(default_factory=list)
    story: list[Event] = field(default_factory=list)

    @property
    def curve(self) -> list[Point]:
        """The points, and the step that the row has reached since: of a long run not every step is a point."""
        loss = self.row.metric("training_loss")
        if loss is None or self.row.step <= (self.points[-1].step if self.points else 0):
            return self.points
        return [*self.points, Point(self.row.step, loss, None)]

    @property
    def losses(self) -> list[float]:
        return [point.loss for point in self.curve]

    @property
    def validation_losses(self) -> list[float]:
        """Losses on held-out conversations, starting before training."""
        told = [event.data.get("validation_loss") for event in self.story if event.kind == "evaluated"]
        return [float(value) for value in told if isinstance(value, int | float)]


class WatchedJobs:
    """Several watched jobs. `read` brings them up to date and returns the new events."""

    def __init__(self, ids: Sequence[UUID]) -> None:
        self._ids = list(ids)
        self._after = 0
        self._jobs: dict[UUID, WatchedJob] = {}

    @property
    def all(self) -> list[WatchedJob]:
        """The jobs whose rows are there."""
        return list(self._jobs.values())

    @property
    def over(self) -> bool:
        """Whether every job has ended, or its row is gone."""
        return all(watched.row.is_final for watched in self._jobs.values())

    @property
    def succeeded(self) -> bool:
        return all(watched.row.state == "completed" for watched in self._jobs.values())

    def read(self, connection: Connection) -> list[Event]:
        """Reads rows first: if a row is final, the events read after it are complete."""
        rows = {row.job_id: row for row in list_jobs(connection, ids=self._ids, limit=len(self._ids))}
        for job_id in self._ids:
            if job_id not in rows:
                self._jobs.pop(job_id, None)
                continue
            watched = self._jobs.setdefault(job_id, WatchedJob(rows[job_id]))
            self._read_curve(connection, watched, rows[job_id])
        return self._read_story(connection)

    def _read_curve(self, connection: Connection, watched: WatchedJob, row: JobRow) -> None:
        before, watched.row = watched.row, row
        last_step = watched.points[-1].step if watched.points else -1
        # A new attempt, or a resume: steps are trained again, and their old points are gone.
        if row.attempt != before.attempt or row.step < last_step:
            watched.points.clear()
            last_step = -1
        if row.step > last_step:
            watched.points += read_points(connection, row.job_id, last_step)
            if len(watched.points) > _MAX_POINTS:
                watched.points = watched.points[:-1:2] + watched.points[-1:]

    def _read_story(self, connection: Connection) -> list[Event]:
        news: list[Event] = []
        while True:
            batch = read_story(connection, self._ids, self._after)
            news += batch
            if batch:
                self._after = batch[-1].id
            if len(batch) < EVENTS_A_READ:
                break
        for event in news:
            if (watched := self._jobs.get(event.job_id)) is not None:
                watched.story = [*watched.story[-_KEPT_EVENTS:], event]
        return news
