"""From events to rows: one ordered fan-out that never blocks a training step and never drops an ending.

`report` only remembers; `run` writes about once a second. While the database is away everything
is kept, within a bound, and written when it is back: the trainer trains on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, assert_never

import structlog

from daemon.chores import worked
from daemon.database.connection import REFUSALS
from daemon.errors import DatabaseAway, LeaseLost, PointsRefused, StatementRefused
from daemon.host.gpu_load import GpuLoad
from daemon.queue.job import Lease
from daemon.queue.rows import MetricPoint
from daemon.queue.store import SqlJobStore
from daemon.report.cost import Meter
from training import events
from training.events import Event, Stage

log = structlog.get_logger()

# One write a second a job is what Realtime's single thread bears (Supabase's Postgres Changes guide).
WRITE_SECONDS = 1.0
AWAY_SECONDS = 2.0
# A day of one step a second fits; beyond it every other waiting point is dropped, the ends of the curve never.
MAX_WAITING_POINTS = 100_000
POINTS_A_WRITE = 500
MAX_STORY = 2_000

# Before training 0-5, by optimizer step 5-95, saving and uploading 95-100.
STAGE_PROGRESS = {
    Stage.SETUP: 0.5,
    Stage.DOWNLOADING: 1.0,
    Stage.LOADING: 3.0,
    Stage.TRAINING: 5.0,
    Stage.SAVING: 95.0,
    Stage.UPLOADING: 97.0,
}


@dataclass
class _Standing:
    """What the row should say now."""

    stage: Stage = Stage.SETUP
    progress: float = 0.0
    epoch: int = 0
    step: int = 0
    total_steps: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds_left: float | None = None


@dataclass(frozen=True)
class _StoryLine:
    kind: str
    message: str
    data: dict[str, Any]


class Reporter:
    """Writes one attempt's progress under its lease.

    `on_refused` is called when a fenced write found no row: the job was cancelled or the lease is
    lost, and the heartbeat finds out which. `on_moved`: the job's state has changed, and the outbox tells of it.
    `on_written` gets the status as the row now says it, unless the outbox tells of the same moment.
    """

    def __init__(
        self,
        store: SqlJobStore,
        lease: Lease,
        *,
        meter: Meter,
        on_refused: Callable[[], None],
        read_load: Callable[[], GpuLoad | None] = lambda: None,
        on_moved: Callable[[], None] = lambda: None,
        on_written: Callable[[dict[str, Any]], None] = lambda _status: None,
        started_before: bool = False,
    ) -> None:
        self._store = store
        self._lease = lease
        self._on_refused = on_refused
        self._meter = meter
        self._read_load = read_load
        self._on_moved = on_moved
        self._on_written = on_written
        # The claim was told by the outbox. Progress that overtook it would make receivers drop it as late.
        self._told_by_outbox = True
        self._clock = asyncio.get_running_loop().time
        self._begun_at = self._clock()
        self._standing = _Standing()
        self._dirty = asyncio.Event()
        self._standing_is_new = False
        self._must_start = False
        self._started = started_before
        self._plan: events.Planned | None = None
        self._plan_to_write: events.Planned | None = None
        self._estimated = False
        self._resumed_at: int | None = None
        self._checkpoint_step: int | None = None
        self._first_step: tuple[int, float] | None = None
        self._story: deque[_StoryLine] = deque(maxlen=MAX_STORY)
        self._points: dict[int, MetricPoint] = {}
        self._last_point: MetricPoint | None = None
        self._points_refused = False

    # -- what is said ------------------------------------------------------------------------------------------

    def report(self, event: Event) -> None:
        """Remember one event. Called in the order of the child's words; never waits."""
        match event:
            case events.Started():
                self.tell("trainer_started", "The trainer started.", {"versions": event.versions})
            case events.StageEntered():
                self.enter(event.stage, event.detail)
            case events.Planned():
                self._plan = self._plan_to_write = event
                self._standing.total_steps = event.total_steps
                self.tell("planned", _plan_in_words(event), event.model_dump(exclude={"job_id", "kind"}))
            case events.Progress():
                self._take_step(event)
            case events.Evaluated():
                self._take_evaluation(event)
            case events.CheckpointSaved():
                self._checkpoint_step = event.step
                self.tell(
                    "checkpoint_saved",
                    f"Checkpoint at step {event.step}.",
                    {"step": event.step, "bytes": event.bytes},
                )
            case events.Sample():
                self.tell(
                    "sample",
                    f"Answer {event.when} training.",
                    {"when": event.when, "prompt": event.prompt, "answer": event.answer},
                )
            case events.Notice():
                if event.code == "resumed" and isinstance(step := event.data.get("step"), int):
                    self._resumed_at = self._checkpoint_step = step
                self.tell(event.code, event.message, event.data)
            case events.AdapterSaved():
                self.tell("adapter_saved", "The adapter is saved on the host.", event.summary)
            case events.Failed():
                # The ending itself writes code and message into the row and the story.
                log.info("trainer_failed", code=event.code, message=event.message)
            case _:
                assert_never(event)
        self._dirty.set()

    def tell(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        """Add a line to the job's story."""
        self._story.append(_StoryLine(kind, message, data or {}))
        self._dirty.set()

    def enter(self, stage: Stage, detail: str | None = None) -> None:
        """The attempt entered a stage, of the trainer's or of the daemon's own."""
        self._standing.stage = stage
        self._raise_progress(STAGE_PROGRESS.get(stage, self._standing.progress))
        self.tell("stage", f"Stage {stage}: {detail}." if detail else f"Stage {stage}.", {"stage": stage.value})

    def note_download(self, done_bytes: int, total_bytes: int) -> None:
        """How far the base model's download is."""
        self._standing.metrics |= {"downloaded_bytes": done_bytes, "download_total_bytes": total_bytes}
        begin, end = STAGE_PROGRESS[Stage.DOWNLOADING], STAGE_PROGRESS[Stage.LOADING]
        self._raise_progress(begin + (end - begin) * done_bytes / max(total_bytes, 1))
        self._dirty.set()

    def _take_step(self, event: events.Progress) -> None:
        standing = self._standing
        if self._first_step is None:
            self._first_step = (event.step, self._clock())
        self._must_start = self._must_start or not self._started
        standing.stage = Stage.TRAINING
        standing.step, standing.total_steps, standing.epoch = event.step, event.total_steps, int(event.epoch)
        self._raise_progress(5.0 + 90.0 * event.step / max(event.total_steps, 1))
        standing.metrics |= {
            "training_loss": event.loss,
            "learning_rate": event.learning_rate,
            "gradient_norm": event.grad_norm,
            "throughput": event.tokens_per_second,
            "gpu_memory_gib": event.gpu_memory_gib,
        }
        standing.seconds_left = self._seconds_left(event)
        if standing.seconds_left is not None and not self._estimated:
            # The speed is known now: the row's estimate of the cost is corrected, once.
            self._estimated, self._plan_to_write = True, self._plan
        self._add_point(
            MetricPoint(
                epoch=int(event.epoch),
                step=event.step,
                training_loss=event.loss,
                validation_loss=None,
                learning_rate=event.learning_rate,
                gradient_norm=event.grad_norm,
                throughput=event.tokens_per_second,
                gpu_utilization=standing.metrics.get("gpu_utilization"),
            )
        )
        self._standing_is_new = True

    def _take_evaluation(self, event: events.Evaluated) -> None:
        self._standing.metrics["validation_loss"] = event.validation_loss
        self._standing_is_new = True
        if self._last_point is not None:
            self._add_point(
                MetricPoint(
                    epoch=int(event.epoch),
                    step=event.step,
                    training_loss=self._last_point.training_loss,
                    validation_loss=event.validation_loss,
                    learning_rate=self._last_point.learning_rate,
                    gradient_norm=self._last_point.gradient_norm,
                    throughput=self._last_point.throughput,
                    gpu_utilization=self._last_point.gpu_utilization,
                )
            )
        self.tell(
            "evaluated",
            f"Validation loss {event.validation_loss:.4f} at step {event.step}.",
            {"step": event.step, "epoch": event.epoch, "validation_loss": event.validation_loss},
        )

    def _add_point(self, point: MetricPoint) -> None:
        self._last_point = point
        self._points[point.step] = point
        if len(self._points) > MAX_WAITING_POINTS:
            kept = list(self._points)[::2]
            self._points = {step: self._points[step] for step in kept}

    def _raise_progress(self, percent: float) -> None:
        self._standing.progress = max(self._standing.progress, min(percent, 99.9))
        self._standing_is_new = True

    def _seconds_left(self, event: events.Progress) -> float | None:
        assert self._first_step is not None
        first_step, first_at = self._first_step
        done = event.step - first_step
        if done <= 0:
            return None
        return (self._clock() - first_at) / done * (event.total_steps - event.step)

    # -- what is written ---------------------------------------------------------------------------------------

    @property
    def attempt_seconds(self) -> float:
        return self._clock() - self._begun_at

    @property
    def cost(self) -> float | None:
        return self._meter.cost(self.attempt_seconds)

    @property
    def saved(self) -> dict[str, int | None]:
        """What an attempt that ends now leaves: the step it came to, and its newest checkpoint's."""
        return {"step": self._standing.step, "checkpoint_step": self._checkpoint_step}

    @property
    def seconds_left(self) -> float | None:
        """Of the training, by the pace so far; None before there is one."""
        return self._standing.seconds_left

    @property
    def _estimated_total_cost(self) -> float | None:
        if self._standing.seconds_left is None:
            return None
        return self._meter.cost(self.attempt_seconds + self._standing.seconds_left)

    async def run(self) -> None:
        """Write until cancelled, at most once a second; catch up after the database was away."""
        while True:
            await self._dirty.wait()
            try:
                await self.flush()
                worked()
            except DatabaseAway as error:
                log.warning("report_delayed", waiting_points=len(self._points), error=str(error))
                await asyncio.sleep(AWAY_SECONDS)
                continue
            except LeaseLost:
                self._on_refused()
            except REFUSALS as error:
                # Training goes on, and so do the attempts to tell of it.
                log.error("report_refused", error=str(error))
                self._dirty.set()
                await asyncio.sleep(AWAY_SECONDS)
            await asyncio.sleep(WRITE_SECONDS)

    async def flush(self) -> None:
        """Write all that was said, in order: plan, story, points, then the row. Raises DatabaseAway, LeaseLost.

        What was not written when it raises is kept and written next time.
        """
        self._dirty.clear()
        try:
            refused = None
            # The second story: what the points' table had to say.
            for write in (
                *(self._write_plan, self._write_story, self._write_points),
                *(self._write_story, self._write_standing),
            ):
                try:
                    await write()
                except StatementRefused as error:
                    # One row that the database refuses keeps no other.
                    refused = error
            if refused is not None:
                raise refused
        except LeaseLost:
            raise
        except Exception:
            self._dirty.set()
            raise

    async def _write_plan(self) -> None:
        if (plan := self._plan_to_write) is not None:
            await self._store.record_plan(
                self._lease,
                total_steps=plan.total_steps,
                total_epochs=plan.total_epochs,
                estimated_total_cost=self._estimated_total_cost,
            )
            if self._plan_to_write is plan:
                self._plan_to_write = None
        if (step := self._resumed_at) is not None:
            # Steps after the checkpoint are trained again: their old points would show twice.
            try:
                await self._store.forget_metrics(self._lease, step)
            except PointsRefused as error:
                self._tell_of_refused_points(error)
            self._resumed_at = None

    async def _write_story(self) -> None:
        while self._story:
            line = self._story[0]
            try:
                await self._store.record_event(self._lease, line.kind, line.message, line.data)
            except StatementRefused as error:
                # The lines after it are told all the same.
                log.error("story_line_refused", kind=line.kind, error=str(error))
            if self._story and self._story[0] is line:  # a full story may have dropped it meanwhile
                self._story.popleft()

    async def _write_points(self) -> None:
        while self._points:
            batch = dict(list(self._points.items())[:POINTS_A_WRITE])
            try:
                await self._store.record_metrics(self._lease, list(batch.values()))
            except PointsRefused as error:
                # The next ones are tried all the same: who mends the table sees the curve go on.
                self._tell_of_refused_points(error)
            for step, point in batch.items():
                if self._points.get(step) is point:
                    del self._points[step]

    def _tell_of_refused_points(self, error: PointsRefused) -> None:
        if not self._points_refused:
            words = f"The table metrics_points takes no points; training goes on: {error}"
            self.tell("points_refused", words, {"reason": str(error)})
        self._points_refused = True

    async def _write_standing(self) -> None:
        if self._must_start:
            await self._store.start_job(self._lease)
            self._must_start, self._started, self._told_by_outbox = False, True, True
            self._on_moved()
        if not self._standing_is_new:
            return
        standing = self._standing
        load = self._read_load()
        if load is not None:
            standing.metrics |= {
                "gpu_utilization": load.utilization_percent,
                "gpu_memory_used_gib": load.memory_used_gib,
                "gpu_temperature_celsius": load.temperature_celsius,
                "gpu_power_watts": load.power_watts,
            }
        self._standing_is_new = False
        try:
            sequence = await self._store.record_progress(
                self._lease,
                stage=standing.stage.value,
                progress=round(standing.progress, 2),
                epoch=standing.epoch,
                step=standing.step,
                metrics=standing.metrics,
                current_cost=self.cost,
                seconds_left=standing.seconds_left,
            )
        except DatabaseAway:
            self._standing_is_new = True
            raise
        if self._told_by_outbox:
            self._told_by_outbox = False
            return
        self._on_written(
            {
                "sequence": sequence,
                "status": "running",
                "progress": round(standing.progress, 2),
                "current_epoch": standing.epoch,
                "current_step": standing.step,
                "stage": standing.stage.value,
                "metrics": dict(standing.metrics),
                "error_message": None,
            }
        )


def _plan_in_words(plan: events.Planned) -> str:
    return (
        f"{plan.train_examples} conversations to train on, {plan.validation_examples} held out, "
        f"{plan.train_tokens} tokens an epoch, {plan.total_steps} steps in {plan.total_epochs} epochs"
        + (f", computed in {plan.compute_type}." if plan.compute_type else ".")
    )
