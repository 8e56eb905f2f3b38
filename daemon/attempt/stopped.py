"""How an attempt ends that was asked to stop, and what a retry of its job goes on from."""

from __future__ import annotations

from typing import assert_never

from daemon.queue.outcome import Cancelled, Failed, Outcome, Released, Superseded
from daemon.report.reporter import Reporter
from daemon.stop_request import StopReason
from training.events import ErrorCode


def outcome_of_stop(reason: StopReason, reporter: Reporter, *, is_trained: bool) -> Outcome:
    """`is_trained`: the adapter is finished and only had to be stored."""
    match reason:
        case StopReason.LEASE_LOST:
            return Superseded()
        case StopReason.CANCELLED:
            return Cancelled()
        case StopReason.SHUTDOWN:
            return Released("the host is shutting down")
        case StopReason.BUDGET:
            return Failed(
                ErrorCode.BUDGET_EXCEEDED,
                f"The job reached its max_cost (spent {reporter.cost or 0:.2f} US dollars).",
                hint=f"Raise max_cost and retry the job. {_what_a_retry_does(reporter, is_trained)}",
            )
        case StopReason.DEADLINE:
            return Failed(
                ErrorCode.DEADLINE_EXCEEDED,
                "The job did not finish before its deadline_at.",
                hint=f"Set a later deadline_at and retry the job. {_what_a_retry_does(reporter, is_trained)}",
            )
        case _:
            assert_never(reason)


def _what_a_retry_does(reporter: Reporter, is_trained: bool) -> str:
    if is_trained:
        return "Its adapter is finished: it is only stored then, not trained again."
    step = reporter.saved["checkpoint_step"]
    if step is not None:
        return f"It resumes from its checkpoint of step {step}."
    # An attempt that has not come to its first step may have had a predecessor that did.
    return "It starts from the beginning, or from the last checkpoint of an earlier attempt if there is one."
