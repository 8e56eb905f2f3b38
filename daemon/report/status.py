"""Computes what the job's row and its curve should show, from the trainer's events, without a database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from daemon.queue.rows import MetricPoint
from daemon.report.curve import Curve
from training import events
from training.events import Stage

# What the app's page reads of current_metrics. A reader finds every key from the first step on; null: not known.
_ALWAYS_THERE = dict.fromkeys(
    ("training_loss", "validation_loss", "learning_rate", "throughput", "gpu_utilization", "gradient_norm")
)
# Before training 0-5, by optimizer step 5-95, saving and uploading 95-100.
STAGE_PROGRESS = {
    Stage.SETUP: 0.5,
    Stage.DOWNLOADING: 1.0,
    Stage.LOADING: 3.0,
    Stage.TRAINING: 5.0,
    Stage.SAVING: 95.0,
    Stage.UPLOADING: 97.0,
}


class JobStatus:
    """The stage, the progress and the metrics of one attempt. `clock`: seconds, monotonic.

    `changed`: since the row was last written."""

    def __init__(self, clock: Callable[[], float], most_points: int) -> None:
        self._clock = clock
        self.curve = Curve(most_points)
        self.stage = Stage.SETUP
        self.progress = 0.0
        self.epoch = 0
        self.step = 0
        self.total_steps: int | None = None
        self.metrics: dict[str, Any] = {}
        self.seconds_left: float | None = None
        self.changed = False
        self._first_step: tuple[int, float] | None = None

    def enter(self, stage: Stage) -> None:
        self.stage = stage
        self._raise_progress(STAGE_PROGRESS.get(stage, self.progress))

    def take_download(self, done_bytes: int, total_bytes: int) -> None:
        self.metrics |= {"downloaded_bytes": done_bytes, "download_total_bytes": total_bytes}
        begin, end = STAGE_PROGRESS[Stage.DOWNLOADING], STAGE_PROGRESS[Stage.LOADING]
        self._raise_progress(begin + (end - begin) * done_bytes / max(total_bytes, 1))

    def take_preparing(self, done: int, total: int) -> None:
        """Counts the conversations that are encoded."""
        self.metrics |= {"prepared_conversations": done, "total_conversations": total}
        self.changed = True

    def take_step(self, event: events.Progress) -> None:
        if self._first_step is None:
            self._first_step = (event.step, self._clock())
        self.stage = Stage.TRAINING
        self.step, self.total_steps, self.epoch = event.step, event.total_steps, int(event.epoch)
        self._raise_progress(5.0 + 90.0 * event.step / max(event.total_steps, 1))
        self.metrics = (
            _ALWAYS_THERE
            | self.metrics
            | {
                "training_loss": event.loss,
                "learning_rate": event.learning_rate,
                "gradient_norm": event.grad_norm,
                "throughput": event.tokens_per_second,
                "gpu_memory_gib": event.gpu_memory_gib,
            }
        )
        self.seconds_left = self._seconds_left(event)
        self.curve.take_step(
            MetricPoint(
                epoch=int(event.epoch),
                step=event.step,
                training_loss=event.loss,
                validation_loss=None,
                learning_rate=event.learning_rate,
                gradient_norm=event.grad_norm,
                throughput=event.tokens_per_second,
                gpu_utilization=self.metrics.get("gpu_utilization"),
            ),
            event.total_steps,
        )

    def take_evaluation(self, event: events.Evaluated) -> None:
        self.metrics["validation_loss"] = event.validation_loss
        self.changed = True
        self.curve.take_evaluation(event.step, event.epoch, event.validation_loss)

    def columns(self) -> dict[str, Any]:
        """The values as the row stores them."""
        return {
            "stage": self.stage.value,
            "progress": round(self.progress, 2),
            "epoch": self.epoch,
            "step": self.step,
            "metrics": self.metrics,
        }

    def _raise_progress(self, percent: float) -> None:
        self.progress = max(self.progress, min(percent, 99.9))
        self.changed = True

    def _seconds_left(self, event: events.Progress) -> float | None:
        """Seconds of training left, at the pace so far; None before there is one."""
        assert self._first_step is not None
        first_step, first_at = self._first_step
        done = event.step - first_step
        if done <= 0:
            return None
        return (self._clock() - first_at) / done * (event.total_steps - event.step)
