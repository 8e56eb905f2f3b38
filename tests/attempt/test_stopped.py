"""What a job that reached its limit is told of a retry: what is true of it, and no more."""

from __future__ import annotations

from typing import Any, cast
from uuid import uuid4

import pytest

from daemon.attempt.stopped import outcome_of_stop
from daemon.queue.job import Lease
from daemon.queue.outcome import Failed
from daemon.report.cost import CostMeter
from daemon.report.reporter import Reporter
from daemon.stop_request import StopReason
from training import events

SAVED = events.CheckpointSaved(job_id="job", step=40, path="checkpoint-40", bytes=1)
RESUMED = events.Notice(job_id="job", code="resumed", message="resumed", data={"step": 30})


@pytest.mark.parametrize("reason", [StopReason.BUDGET, StopReason.DEADLINE])
@pytest.mark.parametrize(
    ("told", "is_trained", "hint"),
    [
        ([], False, "It starts from the beginning, or from the last checkpoint of an earlier attempt if there is one."),
        ([RESUMED], False, "It resumes from its checkpoint of step 30."),
        ([RESUMED, SAVED], False, "It resumes from its checkpoint of step 40."),
        ([SAVED], True, "Its adapter is finished: it is only stored then, not trained again."),
    ],
)
async def test_the_hint_at_a_limit_says_what_a_retry_will_do(
    reason: StopReason, told: list[events.Event], is_trained: bool, hint: str
) -> None:
    meter = CostMeter(price=None, num_gpus=1, already_spent=0.0)
    reporter = Reporter(cast(Any, None), Lease(uuid4(), 1, uuid4()), meter=meter, on_refused=lambda: None)
    for event in told:
        reporter.report(event)
    ended = outcome_of_stop(reason, reporter, is_trained=is_trained)
    assert isinstance(ended, Failed) and ended.hint is not None
    assert ended.hint.endswith(f"and retry the job. {hint}")
