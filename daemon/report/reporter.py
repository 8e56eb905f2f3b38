"""Writes a trainer's events to rows, in order. Never blocks a training step, never drops the final state.

`report` only remembers; `run` writes about once a second. While the database is away everything
is kept, up to a limit, and written when it is back: training goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

import structlog

from daemon.chores import worked
from daemon.database.connection import REFUSALS
from daemon.database.retry import AWAY_SECONDS
from daemon.errors import DatabaseAway, LeaseLost, PointsRefused, StatementRefused
from daemon.host.gpu_load import GpuLoad
from daemon.queue.job import Lease
from daemon.queue.job_store import JobStore
from daemon.redaction import Redaction
from daemon.report.cost import CostMeter
from daemon.report.status import JobStatus
from daemon.report.trained_with import adapter_in_words, adapter_settings, plan_in_words
from training import events
from training.events import Event, Stage

log = structlog.get_logger()

# One write per second and job: Supabase's Realtime runs on a single thread (its Postgres Changes guide).
WRITE_SECONDS = 1.0
POINTS_A_WRITE = 500
MAX_STORY = 2_000


@dataclass(frozen=True)
class _StoryLine:
    kind: str
    message: str
    data: dict[str, Any]


class Reporter:
    """Writes one attempt's progress under its lease.

    `on_refused` is called when a fenced write found no row: the job was cancelled or the lease is
    lost, and the heartbeat finds out which. `on_moved`: the job's state has changed, and an outbox row reports it.
    `on_written` gets the status as the row now has it, unless an outbox row reports the same moment.
    `redaction` is what the job's owner must not read: this is where events, and `settle` where an outcome, become rows.
    """

    def __init__(
        self,
        store: JobStore,
        lease: Lease,
        *,
        meter: CostMeter,
        on_refused: Callable[[], None],
        read_load: Callable[[], GpuLoad | None] = lambda: None,
        on_moved: Callable[[], None] = lambda: None,
        on_written: Callable[[dict[str, Any]], None] = lambda _status: None,
        redaction: Redaction = Redaction(),  # noqa: B008 - it holds no state
        started_before: bool = False,
        most_points: int = 0,
    ) -> None:
        self._store = store
        self._lease = lease
        self._on_refused = on_refused
        self._meter = meter
        self._read_load = read_load
        self._on_moved = on_moved
        self._on_written = on_written
        self.redaction = redaction
        # The outbox reports the claim. Progress sent before it would make receivers drop it as late.
        self._told_by_outbox = True
        self._clock = asyncio.get_running_loop().time
        self._begun_at = self._clock()
        self._status = JobStatus(self._clock, most_points)
        self._dirty = asyncio.Event()
        self._must_start = False
        self._started = started_before
        self._plan: events.Planned | None = None
        self.trained_with: dict[str, Any] = {}
        self._plan_changes = self._plan_writes = 0
        self._estimated = False
        # An earlier attempt may have left points: those after the first step of this one are forgotten.
        self._may_have_points = lease.epoch > 1
        self._forget_after: int | None = None
        self._points_written = 0
        self._checkpoint_step: int | None = None
        self._story: deque[_StoryLine] = deque(maxlen=MAX_STORY)
        self._points_refused = False

    # -- what is reported --------------------------------------------------------------------------------------

    def report(self, event: Event) -> None:
        """Remembers one event. Called in the order of the child's events; never waits."""
        match event:
            case events.Started():
                self.tell("trainer_started", "The trainer started.", {"versions": event.versions})
            case events.StageEntered():
                self.enter(event.stage, event.detail)
            case events.Preparing():
                self._status.take_preparing(event.done, event.total)
            case events.Planned() | events.AdapterAttached():
                self._take_settings(event)
            case events.Progress():
                self._take_step(event)
            case events.Evaluated():
                self._take_evaluation(event)
            case events.CheckpointSaved():
                self._checkpoint_step = event.step
                self.tell(
                    "checkpoint_saved",
                    f"A checkpoint was saved at step {event.step}.",
                    {"step": event.step, "bytes": event.bytes},
                )
            case events.Sample():
                self.tell(
                    "sample",
                    f"The model answered a sample prompt {event.when} training.",
                    {"when": event.when, "prompt": event.prompt, "answer": event.answer},
                    # The owner's words and his model's: whatever path they name is none of this host.
                    as_is=True,
                )
            case events.Notice():
                self._take_notice(event)
            case events.AdapterSaved():
                self.tell("adapter_saved", "The adapter is saved on the host.", event.summary)
            case events.RunFailed():
                # The move to failed itself writes code and message into the row and the event history.
                log.info("trainer_failed", code=event.code, message=event.message)
            case _:
                assert_never(event)
        self._dirty.set()

    def tell(self, kind: str, message: str, data: dict[str, Any] | None = None, *, as_is: bool = False) -> None:
        """Adds an event to the job's history, without what its owner must not read: that is in the log."""
        line = told = _StoryLine(kind, message, data or {})
        if not as_is:
            told = _StoryLine(kind, self.redaction.text(message), self.redaction.value(line.data))
        if told != line:
            log.info("story_redacted", kind=kind, message=message, data=line.data)
        self._story.append(told)
        self._dirty.set()

    def enter(self, stage: Stage, detail: str | None = None) -> None:
        """Enters a stage, of the trainer or of the daemon."""
        self._status.enter(stage)
        self.tell("stage", f"Stage {stage}: {detail}." if detail else f"Stage {stage}.", {"stage": stage.value})

    def train_with(self, settings: Mapping[str, Any]) -> None:
        """Adds settings that the run is trained with, as they become known. The row has them all."""
        self.trained_with |= settings
        self._plan_changes += 1
        self._dirty.set()

    def end_curve(self) -> None:
        """Makes the newest step a point of the chart: the run ends here."""
        self._status.curve.keep_last()

    def note_download(self, done_bytes: int, total_bytes: int) -> None:
        """Progress of the base model's download."""
        self._status.take_download(done_bytes, total_bytes)
        self._dirty.set()

    def _take_notice(self, event: events.Notice) -> None:
        if event.code == "resumed" and isinstance(step := event.data.get("step"), int):
            self._forget_after = self._checkpoint_step = step
            self._may_have_points = False
        self.tell(event.code, event.message, event.data)

    def _take_settings(self, event: events.Planned | events.AdapterAttached) -> None:
        data = event.model_dump(mode="json", exclude={"job_id", "kind"})
        if isinstance(event, events.AdapterAttached):
            self.train_with(adapter_settings(event, self.trained_with))
            self.tell("adapter_attached", adapter_in_words(event), data)
            return
        self._plan = event
        self._status.total_steps = event.total_steps
        self._status.curve.expect_evaluations(event.total_epochs if event.validation_examples else 0)
        self.train_with(event.trained_with)
        self.tell("planned", plan_in_words(event), data)

    def _take_step(self, event: events.Progress) -> None:
        self._must_start = self._must_start or not self._started
        if self._may_have_points:
            self._may_have_points, self._forget_after = False, event.step - 1
        self._status.take_step(event)
        if self._status.seconds_left is not None and not self._estimated:
            # The speed is known now: correct the row's cost estimate, once.
            self._estimated = True
            self._plan_changes += 1

    def _take_evaluation(self, event: events.Evaluated) -> None:
        self._status.take_evaluation(event)
        self.tell(
            "evaluated",
            f"The validation loss is {event.validation_loss:.4f} at step {event.step}.",
            {"step": event.step, "epoch": event.epoch, "validation_loss": event.validation_loss},
        )

    # -- what is written ---------------------------------------------------------------------------------------

    @property
    def attempt_seconds(self) -> float:
        return self._clock() - self._begun_at

    @property
    def cost(self) -> float | None:
        return self._meter.cost(self.attempt_seconds)

    @property
    def saved(self) -> dict[str, int | None]:
        """The step this attempt has reached, and its newest checkpoint's step."""
        return {"step": self._status.step, "checkpoint_step": self._checkpoint_step}

    @property
    def seconds_left(self) -> float | None:
        """Seconds of training left, at the pace so far; None before there is one."""
        return self._status.seconds_left

    @property
    def _estimated_total_cost(self) -> float | None:
        if self._status.seconds_left is None:
            return None
        return self._meter.cost(self.attempt_seconds + self._status.seconds_left)

    async def run(self) -> None:
        """Writes until cancelled, at most once a second; catches up after the database was away."""
        while True:
            await self._dirty.wait()
            try:
                await self.flush()
                worked()
            except DatabaseAway as error:
                log.warning("report_delayed", waiting_points=len(self._status.curve.points), error=str(error))
                await asyncio.sleep(AWAY_SECONDS)
                continue
            except LeaseLost:
                self._on_refused()
            except REFUSALS as error:
                # Training goes on, and so does reporting.
                log.error("report_refused", error=str(error))
                self._dirty.set()
                await asyncio.sleep(AWAY_SECONDS)
            await asyncio.sleep(WRITE_SECONDS)

    async def flush(self) -> None:
        """Writes all that was reported, in order: plan, events, points, then the row. Raises DatabaseAway, LeaseLost.

        What was not written when it raises is kept and written next time.
        """
        self._dirty.clear()
        try:
            refused = None
            # Events are written twice: writing the points may have added one.
            for write in (
                *(self._write_plan, self._write_story, self._write_points),
                *(self._write_story, self._write_status),
            ):
                try:
                    await write()
                except StatementRefused as error:
                    # A row that the database refuses must not hold up the others.
                    refused = error
            if refused is not None:
                raise refused
        except LeaseLost:
            raise
        except Exception:
            self._dirty.set()
            raise

    async def _write_plan(self) -> None:
        changes, plan = self._plan_changes, self._plan
        if self._plan_writes < changes:
            try:
                await self._store.record_plan(
                    self._lease,
                    total_steps=plan.total_steps if plan else None,
                    total_epochs=plan.total_epochs if plan else None,
                    estimated_total_cost=self._estimated_total_cost,
                    trained_with=self.trained_with,
                )
            except LeaseLost:
                # Of a cancelled job the story is still taken: what its row refuses must not be tried again before it.
                self._plan_writes = changes
                raise
            self._plan_writes = changes
        if (step := self._forget_after) is not None:
            # Steps after the checkpoint are trained again: their old points would appear twice.
            await self._forget_points(step)
            self._forget_after = None

    async def _write_story(self) -> None:
        while self._story:
            line = self._story[0]
            try:
                await self._store.record_event(self._lease, line.kind, line.message, line.data)
            except StatementRefused as error:
                # The events after it are still written.
                log.error("story_line_refused", kind=line.kind, error=str(error))
            if self._story and self._story[0] is line:  # a full queue may have dropped it meanwhile
                self._story.popleft()

    async def _write_points(self) -> None:
        curve = self._status.curve
        while curve.points:
            batch = list(curve.points.items())[:POINTS_A_WRITE]
            try:
                await self._store.record_metrics(self._lease, [point for _, point in batch])
            except PointsRefused as error:
                # The next points are still tried: once the table is fixed, the curve goes on.
                self._tell_of_refused_points(error)
            curve.written(batch)
            self._points_written += len(batch)
        if curve.most and self._points_written > curve.most:
            before = self._points_written
            await self._forget_points(None)
            if self._points_written < before:
                curve.coarsen()

    async def _forget_points(self, after_step: int | None) -> None:
        """Deletes the points after a step, and thins the others if there are too many."""
        try:
            self._points_written = await self._store.forget_metrics(
                self._lease, after_step, most=self._status.curve.most
            )
        except PointsRefused as error:
            self._tell_of_refused_points(error)
            self._points_written = 0

    def _tell_of_refused_points(self, error: PointsRefused) -> None:
        if not self._points_refused:
            words = f"The table metrics_points refuses the metrics; training continues. The error: {error}"
            self.tell("points_refused", words, {"reason": str(error)})
        self._points_refused = True

    async def _write_status(self) -> None:
        if self._must_start:
            # From its first step on a job keeps to the model that its row names: by now it may have become known. A
            # refusal is told by the next flush.
            with contextlib.suppress(StatementRefused):
                await self._write_plan()
            await self._store.start_job(self._lease)
            self._must_start, self._started, self._told_by_outbox = False, True, True
            self._on_moved()
        status = self._status
        if not status.changed:
            return
        load = self._read_load()
        if load is not None:
            status.metrics |= {
                "gpu_utilization": load.utilization_percent,
                "gpu_memory_used_gib": load.memory_used_gib,
                "gpu_temperature_celsius": load.temperature_celsius,
                "gpu_power_watts": load.power_watts,
            }
        status.changed = False
        columns = status.columns()
        try:
            sequence = await self._store.record_progress(
                self._lease, **columns, current_cost=self.cost, seconds_left=status.seconds_left
            )
        except DatabaseAway:
            status.changed = True
            raise
        if self._told_by_outbox:
            self._told_by_outbox = False
            return
        self._on_written(
            {
                "sequence": sequence,
                "status": "running",
                "progress": columns["progress"],
                "current_epoch": columns["epoch"],
                "current_step": columns["step"],
                "stage": columns["stage"],
                "metrics": dict(columns["metrics"]),
                "error_message": None,
            }
        )
