"""The interface of the store that keeps a job, as its attempt uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from uuid import UUID

from daemon.queue.job import ClaimedJob, JobDataset, Lease, Returned
from daemon.queue.outcome import Completed, Failed
from daemon.queue.rows import Ending, FoundJob, Limits, MetricPoint
from daemon.queue.states import State


class JobStore(Protocol):
    """Jobs that are claimed by their id, written to under a lease, and ended.

    Two implementations keep these promises, and one suite checks both (tests/queue/test_job_store.py): SqlJobStore, for
    any number of hosts, and MemoryJobStore, for one serverless process without a database. In memory

    - no lease expires, since there is no other host to take the job;
    - metrics, events and the plan are not kept, since there is no reader;
    - the cost is kept when the attempt ends;
    - a claim does not look at the limits: `submit` has refused what this host cannot serve;
    - a returned job fails. In Postgres it goes back to the queue, where another host takes it;
    - nothing is refused, hidden or away: only SqlJobStore raises StatementRefused, PointsRefused, RowsHidden or
      DatabaseAway."""

    async def claim_job_by_id(
        self, worker_id: UUID, job_id: UUID, limits: Limits, *, lease_seconds: float
    ) -> ClaimedJob | None:
        """Claims this one job if it waits, has no lease and this host can serve it; None otherwise.

        A retry cannot be claimed before it is due. The lease has a higher epoch than any before, and a new token."""

    async def find_job(self, job_id: UUID) -> FoundJob:
        """Returns what exists of a job, even if row security hides it from us."""

    async def read_limits(self, job_id: UUID) -> tuple[float | None, float | None] | None:
        """Returns the job's cost limit and the seconds it may still take; None when the job was deleted."""

    async def read_dataset(self, dataset: JobDataset) -> JobDataset | None:
        """Returns the dataset as its row describes it now; None if that row is hidden."""

    async def owns_training_file(self, user_id: UUID, path: str) -> bool:
        """True if a path in the bucket training-files begins with the id of a training file that this user has made."""

    # Writes under a lease. Each raises LeaseLost, and writes nothing, when the job no longer has this lease.

    async def renew_lease(self, lease: Lease, lease_seconds: float) -> State:
        """Extends the lease from now. Returns the job's state: a cancelled job keeps its lease until it is ended."""

    async def start_job(self, lease: Lease) -> None:
        """Marks the job as running. A second call changes nothing. A cancelled job raises LeaseLost."""

    async def record_plan(
        self,
        lease: Lease,
        *,
        total_steps: int | None,
        total_epochs: int | None,
        estimated_total_cost: float | None,
        trained_with: Mapping[str, Any],
    ) -> None:
        """Records the run's real size and its settings, as far as they are known. A cancelled job raises LeaseLost."""

    async def record_progress(
        self,
        lease: Lease,
        *,
        stage: str,
        progress: float,
        epoch: int,
        step: int,
        metrics: Mapping[str, Any],
        current_cost: float | None,
        seconds_left: float | None,
    ) -> int | None:
        """Records where the attempt is. Progress (percent) never falls within one. A cancelled job raises LeaseLost.

        Returns the number of the progress callback that follows; None when the job has no callback."""

    async def record_metrics(self, lease: Lease, points: Sequence[MetricPoint]) -> None:
        """Adds points to the charts; also after a cancel, until the lease ends."""

    async def forget_metrics(self, lease: Lease, after_step: int | None, *, most: int = 0) -> int:
        """Deletes the points after a resumed checkpoint's step; also after a cancel, until the lease ends.

        Of more than `most` others (0: no limit) half are deleted, evenly. Returns how many remain."""

    async def record_event(self, lease: Lease, kind: str, message: str, data: Mapping[str, Any]) -> None:
        """Adds an event to the job's history; also after a cancel, until the lease ends."""

    # Endings. Each ends the lease. Called again after a lost answer, each returns what it did the first time. If the
    # job was cancelled meanwhile, each records the cost and returns `moved` False, `state` cancelled.

    async def complete_job(self, lease: Lease, outcome: Completed, *, cost: float | None) -> Ending:
        """Completes the job: the stored adapter was verified."""

    async def fail_job(self, lease: Lease, failed: Failed, *, cost: float | None) -> Ending:
        """Fails the job permanently."""

    async def retry_job(self, lease: Lease, failed: Failed, *, delay_seconds: float, cost: float | None) -> Ending:
        """Requeues the job for later; `state` is failed when that was the last attempt."""

    async def release_job(self, lease: Lease, reason: str, *, cost: float | None) -> Ending:
        """Requeues the job at once, without counting the attempt."""

    async def return_job(self, lease: Lease, returned: Returned, *, cost: float | None) -> Ending:
        """Gives back a job that this host cannot do. `state` says whether it waits for another host or has failed."""

    async def end_cancelled_job(self, lease: Lease, *, cost: float | None, data: Mapping[str, Any]) -> Ending:
        """Ends a cancelled job whose child is gone. `state` queued: it was not cancelled after all, and is requeued."""
