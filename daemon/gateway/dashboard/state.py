"""The dashboard's current state, and what has changed since browsers last received it.

It uses plain values, no clock and no database: the feed passes in what it read, the board returns what is new.
It keeps a curve for each running job. Live points come from the job's row (step and loss change in the same
write), so that a growing curve needs no extra read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

Row = dict[str, Any]

UNDER_WAY = frozenset({"initializing", "running", "lost"})
MOST_ENDED = 200
# Beyond this, every other point of a live curve is dropped: a screen has fewer pixels.
MOST_POINTS = 600
MOST_EVENT_BYTES = 16_000


@dataclass
class Curve:
    """The losses of one attempt: (step, loss) in the order of steps, and (step, validation loss)."""

    attempt: int
    # The row's step when it was last read.
    row_step: int = 0
    points: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)

    def as_json(self) -> Row:
        return {"points": self.points, "validation": self.validation}


@dataclass
class _News:
    """Changes that were not sent yet."""

    jobs: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    parts: set[str] = field(default_factory=set)
    curves: set[str] = field(default_factory=set)
    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    validation: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    story: list[Row] = field(default_factory=list)


class Board:
    def __init__(self) -> None:
        self.jobs: dict[str, Row] = {}
        self.queue: Row = {"waiting": 0, "order": []}
        self.workers: list[Row] = []
        self.day: Row = {}
        self.curves: dict[str, Curve] = {}
        self._told: set[int] = set()
        self._news = _News()

    # -- updates from reads ------------------------------------------------------------------------------------

    def take_jobs(self, rows: Iterable[Row], *, whole: bool) -> None:
        """Takes jobs that were read. With `whole` these are all jobs to show, and others are removed."""
        seen = set()
        for row in rows:
            job_id = row["job_id"]
            seen.add(job_id)
            if self.jobs.get(job_id) != row:
                self.jobs[job_id] = row
                self._news.jobs.add(job_id)
                self._news.gone.discard(job_id)
            self._follow_curve(job_id, row)
        if whole:
            self._forget(set(self.jobs) - seen)
        self._forget_old_endings()

    def take_story(self, events: Iterable[Row], settled: int) -> set[str]:
        """Takes new events, some of which may be known already. Returns the states that jobs moved to."""
        moved = set()
        for event in events:
            if event["id"] in self._told:
                continue
            self._told.add(event["id"])
            self._news.story.append(_bounded(event))
            if "to" in event["data"]:
                moved.add(str(event["data"]["to"]))
            if event["kind"] == "evaluated":
                self._take_validation(event["job_id"], event["data"])
            elif event["kind"] == "resumed":
                # The points after the checkpoint were deleted from the database.
                self.curves.pop(event["job_id"], None)
        # Events up to `settled` are not read again.
        self._told = {number for number in self._told if number > settled}
        return moved

    def take_queue(self, rows: list[Row]) -> None:
        """Takes the head of the queue in its order. Jobs that wait beyond it are not shown."""
        waiting: int = rows[0]["waiting"] if rows else 0
        queue: Row = {
            "waiting": waiting,
            "order": [[row["job_id"], row["waiting_reason"]] for row in rows],
        }
        if queue != self.queue:
            self.queue = queue
            self._news.parts.add("queue")
        if waiting > len(rows):
            shown = {row["job_id"] for row in rows}
            self._forget({key for key, row in self.jobs.items() if row["state"] == "queued" and key not in shown})

    def take_workers(self, rows: Iterable[Mapping[str, Any]]) -> None:
        workers = [{key: plain(value) for key, value in row.items() if key not in _AGES} for row in rows]
        if workers != self.workers:
            self.workers = workers
            self._news.parts.add("workers")

    def take_day(self, day: Row) -> None:
        if day != self.day:
            self.day = day
            self._news.parts.add("day")

    def take_curves(self, job_ids: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes whole curves of these jobs; a job without rows gets an empty one."""
        for job_id in job_ids:
            if job_id in self.jobs:
                row = self.jobs[job_id]
                self.curves[job_id] = Curve(row["attempt"], row["step"])
                self._news.curves.add(job_id)
                self._news.points.pop(job_id, None)
                self._news.validation.pop(job_id, None)
        for point in rows:
            curve = self.curves.get(point["job_id"])
            if curve is None:
                continue
            loss, held_out = point["loss"], point["validation_loss"]
            if math.isfinite(loss):
                curve.points.append((point["step"], loss))
            if held_out is not None and math.isfinite(held_out):
                curve.validation.append((point["step"], held_out))

    # -- answers -----------------------------------------------------------------------------------------------

    def missing_jobs(self) -> list[str]:
        """Jobs of the queue whose rows were not read yet."""
        return [job_id for job_id, _ in self.queue["order"] if job_id not in self.jobs]

    def missing_curves(self) -> list[str]:
        return [key for key, row in self.jobs.items() if row["state"] in UNDER_WAY and key not in self.curves]

    def snapshot(self) -> Row:
        """Everything, for a browser that connects."""
        return {
            "jobs": list(self.jobs.values()),
            "queue": self.queue,
            "workers": self.workers,
            "day": self.day,
            "curves": {job_id: curve.as_json() for job_id, curve in self.curves.items()},
        }

    def changes(self) -> Row:
        """What is new since the last call; empty if nothing is."""
        news, self._news = self._news, _News()
        told: Row = {
            "jobs": [self.jobs[job_id] for job_id in news.jobs if job_id in self.jobs],
            "gone": sorted(news.gone),
            "curves": {key: self.curves[key].as_json() for key in news.curves if key in self.curves},
            "points": news.points,
            "validation": news.validation,
            "story": news.story,
        }
        told = {name: value for name, value in told.items() if value}
        return told | {part: getattr(self, part) for part in sorted(news.parts)}

    # -- inside ------------------------------------------------------------------------------------------------

    def _follow_curve(self, job_id: str, row: Row) -> None:
        curve = self.curves.get(job_id)
        if curve is None:
            return
        # Another attempt, or steps that are trained again: read the curve again.
        if row["state"] not in UNDER_WAY or row["attempt"] != curve.attempt or row["step"] < curve.row_step:
            del self.curves[job_id]
            return
        curve.row_step = row["step"]
        last_step = curve.points[-1][0] if curve.points else -1
        loss = row["metrics"].get("training_loss")
        if row["step"] > last_step and _is_number(loss):
            curve.points.append((row["step"], loss))
            self._news.points.setdefault(job_id, []).append((row["step"], loss))
            if len(curve.points) > MOST_POINTS:
                curve.points = curve.points[:-1:2] + curve.points[-1:]

    def _take_validation(self, job_id: str, data: Row) -> None:
        curve = self.curves.get(job_id)
        step, loss = data.get("step"), data.get("validation_loss")
        if curve is None or not isinstance(step, int) or not _is_number(loss):
            return
        if not curve.validation or step > curve.validation[-1][0]:
            curve.validation.append((step, loss))
            self._news.validation.setdefault(job_id, []).append((step, loss))

    def _forget_old_endings(self) -> None:
        ended = sorted((key for key in self.jobs if self._ended_at(key)), key=self._ended_at, reverse=True)
        self._forget(set(ended[MOST_ENDED:]))

    def _ended_at(self, job_id: str) -> str:
        # All come from one database in one time zone, so the texts sort by time, to the second.
        return self.jobs[job_id]["completed_at"] or ""

    def _forget(self, job_ids: set[str]) -> None:
        for job_id in job_ids:
            self.jobs.pop(job_id, None)
            self.curves.pop(job_id, None)
            self._news.jobs.discard(job_id)
        self._news.gone |= job_ids


# They change with each look, and a browser can compute them from the times beside them.
_AGES = frozenset({"up_seconds", "silent_seconds"})


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Converts a value for JSON: times and ids become text, NaN and infinity become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _bounded(event: Row) -> Row:
    """Shortens an event for all browsers; the rest is read when a job is opened."""
    if len(json.dumps(event["data"])) > MOST_EVENT_BYTES:
        event = event | {"data": {}, "cut": True}
    return event | {"message": event["message"][:2000]}
