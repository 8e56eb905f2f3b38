"""Which steps of a run become points of the chart."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from daemon.queue.rows import MetricPoint
from daemon.report.curve import Curve


def drawn(total: int, epochs: int, most: int) -> dict[int, MetricPoint]:
    """The points of a whole run with an evaluation after each epoch."""
    curve = Curve(most)
    curve.expect_evaluations(epochs)
    for step in range(1, total + 1):
        curve.take_step(MetricPoint(step, 0, float(step), 1e-4), total)
        epoch, rest = divmod(step * epochs, total)
        if rest < epochs:  # the last step of an epoch
            curve.take_evaluation(step, epoch, 1.0)
    return curve.points


@pytest.mark.parametrize("most", [100, 40, 10])
@pytest.mark.parametrize("epochs", [1, 3, 30, 100])
@pytest.mark.parametrize("total", [1, 7, 95, 101, 130, 997, 20_000])
def test_a_run_of_any_length_has_few_points_from_its_first_step_to_its_last(total: int, epochs: int, most: int) -> None:
    points = drawn(total, min(epochs, total), most)
    steps = list(points)
    assert len(steps) <= most or total <= 2, len(steps)
    assert steps[0] == 1 and steps[-1] == total and steps == sorted(steps)
    if min(epochs, total) <= most // 2:
        assert sum(point.validation_loss is not None for point in points.values()) == min(epochs, total)
    if total > 1:
        assert max(later - earlier for earlier, later in pairwise(steps)) <= math.ceil(total / (most / 4))
    # Each point stands for the steps since the one before it, and none is left out.
    weights = [1, *(later - earlier for earlier, later in pairwise(steps))]
    mean = sum(weight * point.training_loss for weight, point in zip(weights, points.values(), strict=True)) / total
    assert mean == pytest.approx((total + 1) / 2)


def test_without_a_limit_every_step_is_a_point_as_it_is() -> None:
    points = drawn(500, 3, 0)
    assert [(point.step, point.training_loss) for point in points.values()] == [(n, float(n)) for n in range(1, 501)]


def test_a_number_that_is_none_does_not_spoil_the_mean_of_the_others() -> None:
    curve = Curve(10)
    for step, loss, norm in ((1, 5.0, 1.0), (2, 1.0, None), (3, math.nan, math.inf), (4, 3.0, 3.0)):
        curve.take_step(MetricPoint(step, 0, loss, 1e-4, gradient_norm=norm), 1000)
    curve.keep_last()
    first, last = curve.points.values()
    assert (first.training_loss, last.step, last.training_loss, last.gradient_norm) == (5.0, 4, 2.0, 3.0)
