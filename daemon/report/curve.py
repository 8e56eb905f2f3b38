"""Chooses the points of the app's chart: few enough for a reader that takes the first hundred, spread over the run.

A point is the mean of the steps since the point before it, so that few points show the trend and not
one batch's chance. With as many points as steps, each is its step's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from daemon.queue.rows import MetricPoint

# One day of one step a second. Beyond that every other waiting point is dropped, but never the first and last.
MAX_WAITING_POINTS = 100_000
# Room for the first and the last point, and for attempts that ended between two points.
_SPARE = 4


class Curve:
    """Keeps the first step, every n-th, those with a validation loss and the last, at most `most` in all; 0 keeps all.

    `points`: those that are not written yet, by step."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.points: dict[int, MetricPoint] = {}
        self._every = self._every_evaluation = 1
        self._planned: tuple[int, int] | None = None
        self._evaluations = 0
        self._since: list[MetricPoint] = []
        self._last: MetricPoint | None = None

    def expect_evaluations(self, count: int) -> None:
        self._evaluations = count

    def take_step(self, point: MetricPoint, total_steps: int) -> None:
        """Takes one step of a run of so many."""
        self._plan(total_steps)
        self._since.append(point)
        if point.step in (1, total_steps) or point.step % self._every == 0:
            self.keep_last()

    def take_evaluation(self, step: int, epoch: float, validation_loss: float) -> None:
        """Adds the validation loss to the point of the step before it. Nothing without a step."""
        is_last = self._planned is not None and step == self._planned[0]
        if round(epoch) % self._every_evaluation != 0 and not is_last:
            return
        self.keep_last()
        if self._last is not None:
            self._add(replace(self._last, step=step, epoch=int(epoch), validation_loss=validation_loss))

    def keep_last(self) -> None:
        """Makes a point of the steps since the last one: of the newest step too, where a run ends."""
        if self._since:
            self._add(_mean(self._since))
            self._since.clear()

    def coarsen(self) -> None:
        """Keeps every second point from now on: the run is longer than planned, or was begun anew too often."""
        self._every *= 2
        self._every_evaluation *= 2

    def written(self, batch: Iterable[tuple[int, MetricPoint]]) -> None:
        """Forgets points that were written, unless they have changed since."""
        for step, point in batch:
            if self.points.get(step) is point:
                del self.points[step]

    def _plan(self, total_steps: int) -> None:
        if not self.most or self._planned == (total_steps, self._evaluations):
            return
        self._planned = (total_steps, self._evaluations)
        self._every_evaluation = max(1, math.ceil(self._evaluations / (self.most / 2)))
        evaluated = math.ceil(self._evaluations / self._every_evaluation)
        self._every = max(1, math.ceil(total_steps / max(self.most - evaluated - _SPARE, 1)))

    def _add(self, point: MetricPoint) -> None:
        self._last = point
        self.points[point.step] = point
        if len(self.points) > MAX_WAITING_POINTS:
            kept = list(self.points)[::2]
            self.points = {step: self.points[step] for step in kept}


def _mean(steps: Sequence[MetricPoint]) -> MetricPoint:
    """The newest step, with the mean of what differs by chance from step to step."""
    last = steps[-1]
    loss = _mean_of([step.training_loss for step in steps])
    return replace(
        last,
        training_loss=last.training_loss if loss is None else loss,
        gradient_norm=_mean_of([step.gradient_norm for step in steps]),
        throughput=_mean_of([step.throughput for step in steps]),
    )


def _mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of the finite ones; without any, the last value as it is."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else values[-1]
