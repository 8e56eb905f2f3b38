"""Jobs in Postgres: one method per statement, with typed parameters and results.

Every write to a claimed job names its lease; a write that finds no row raises LeaseLost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

import structlog
from psycopg.types.json import Jsonb

from daemon.database.column_types import clean_json, clean_text, fit_integer, fit_numeric
from daemon.database.connection import Database
from daemon.database.statements import statement
from daemon.database.wire import Sent
from daemon.errors import DatabaseUnprepared, HostUnfit, PointsRefused, RowsHidden, StatementRefused
from daemon.queue.fenced_statements import FencedStatements
from daemon.queue.fitted_columns import MESSAGE_CHARACTERS, adapter_columns, error_columns, percent, point_row
from daemon.queue.job import ClaimedJob, JobDataset, Lease, Returned
from daemon.queue.outcome import Completed, Failed
from daemon.queue.refused_rows import RefusedRows
from daemon.queue.rows import Claim, Ending, FoundJob, Limits, MetricPoint, Reaped
from daemon.queue.states import State
from daemon.sentence import as_sentence
from daemon.troubles import Troubles

log = structlog.get_logger()

# How many of the first due jobs a claim looks at; more only when other hosts took all of these first.
_WINDOWS = (8, 64, 512)
# A job that was returned ten times, by one host or by several, may itself be the cause: it fills the disk, say.
MAX_RETURNS = 10
NO_LIMIT = 2**31 - 1


class SqlJobStore:
    """A JobStore over one Database, and the queue of waiting jobs. Raises what Database raises, and LeaseLost."""

    def __init__(self, database: Database, troubles: Troubles | None = None) -> None:
        self._database = database
        self._statements = FencedStatements(database)
        self.troubles = troubles or Troubles()
        # A row that the database refuses must not hold up the others.
        self.refused_claims = RefusedRows("claim", self.troubles)
        self._refused_promotions = RefusedRows("promotion", self.troubles)
        # Warn once per column and attempt: an overflowing gradient norm overflows at every step.
        self._noticed: set[tuple[UUID, int, str]] = set()

    @property
    def database(self) -> Database:
        return self._database

    # Taking work.

    def send_claim(self, worker_id: UUID, limits: Limits, *, lease_seconds: float) -> Sent | None:
        """Sends a claim at once; `claim_job` reads its answer. None if the connection is busy."""
        lease = {"worker_id": worker_id, "lease_seconds": lease_seconds}
        return self._database.send(statement("claim_job"), limits.parameters(_WINDOWS[0]) | lease)

    async def claim_job(
        self, worker_id: UUID, limits: Limits, *, lease_seconds: float, sent: Sent | None = None
    ) -> Claim:
        """Claims the first due job that this host can serve. `sent` comes from `send_claim` with the same limits."""
        lease = {"worker_id": worker_id, "lease_seconds": lease_seconds}
        for window in _WINDOWS:
            if sent is not None:
                rows, sent = await self._database.answer(sent), None
            else:
                rows = await self._statements.run("claim_job", limits.parameters(window) | lease)
            # The claim uses most tables and the guard's triggers: once it has run, the database is known to work.
            self._database.proven = True
            if rows:
                return Claim(ClaimedJob(**rows[0]))
            if await self._peek(limits, _WINDOWS[-1]) is None:
                return Claim(None)
        return Claim(None, contested=True)

    async def peek_next_job(self, limits: Limits) -> JobDataset | None:
        """Returns the dataset of the job that `claim_job` would take with the same limits, without claiming it."""
        return await self._peek(limits, _WINDOWS[0])

    async def _peek(self, limits: Limits, window: int) -> JobDataset | None:
        rows = await self._statements.run("peek_next_job", limits.parameters(window))
        return JobDataset(**rows[0]) if rows else None

    async def claim_job_by_id(
        self, worker_id: UUID, job_id: UUID, limits: Limits, *, lease_seconds: float
    ) -> ClaimedJob | None:
        """Claims this one job if it waits, has no lease and this host can serve it; None otherwise."""
        named = {"worker_id": worker_id, "job_id": job_id, "lease_seconds": lease_seconds}
        rows = await self._statements.run("claim_job_by_id", limits.parameters(1) | named)
        if not rows or rows[0]["id"] is None:
            return None
        return ClaimedJob(**{name: value for name, value in rows[0].items() if name != "lacking"})

    async def set_aside_job(self, job_id: UUID, error: StatementRefused) -> None:
        """Holds a job whose claim the database refuses, with the reason, until the operator releases it."""
        reason = clean_text(as_sentence(f"the database refuses the claim: {error}"), MESSAGE_CHARACTERS)
        try:
            await self._statements.run("set_aside_job", {"job_id": job_id, "reason": reason})
        except StatementRefused as again:
            # What refuses the claim refuses the hold as well: this daemon remembers the job, and reports it.
            self.refused_claims.note(job_id, again)
            await self._statements.run("tell_refused_claim", {"job_id": job_id, "reason": reason})

    async def return_unanswered_claims(self, worker_id: UUID, known: Sequence[UUID]) -> int:
        """Requeues the jobs that this worker holds beside `known`, after an answer was lost. Returns how many."""
        try:
            return len(
                await self._statements.run("return_unanswered_claims", {"worker_id": worker_id, "known": list(known)})
            )
        except StatementRefused:
            own = [row["job_id"] for row in await self._statements.run("read_own_leases", {"worker_id": worker_id})]
        returned = 0
        for job_id in [each for each in own if each not in known]:
            others = [*known, *(each for each in own if each != job_id)]
            try:
                returned += len(
                    await self._statements.run("return_unanswered_claims", {"worker_id": worker_id, "known": others})
                )
            except StatementRefused as error:
                # Its lease expires, and a reaper tries the same.
                log.error("claim_not_returned", job_id=str(job_id), error=str(error))
        return returned

    async def promote_due_jobs(self) -> int:
        """Makes scheduled jobs claimable once they are due. Returns how many (at most 100 per call)."""
        refused = self._refused_promotions
        try:
            return len(await self._statements.run("promote_due_jobs", {"skip": refused.skip, "only": None}))
        except StatementRefused:
            ripe = await self._statements.run("read_ripe_jobs", {"skip": refused.skip})
        promoted = 0
        for row in ripe:
            try:
                promoted += len(await self._statements.run("promote_due_jobs", {"skip": [], "only": row["id"]}))
            except StatementRefused as error:
                refused.note(row["id"], error)
        return promoted

    async def next_due_in(self) -> float | None:
        """Seconds until the next scheduled job is due, 0 when it is late; None when nothing is scheduled."""
        rows = await self._statements.run("next_due_job", {"skip": self._refused_promotions.skip})
        return max(0.0, rows[0]["seconds"]) if rows else None

    # While this host holds a job.

    async def read_limits(self, job_id: UUID) -> tuple[float | None, float | None] | None:
        """Returns the job's cost limit and its seconds left, as the row has them now; None when the row was deleted.

        Raises RowsHidden if row security only hides the row."""
        rows = await self._statements.run("read_limits", {"job_id": job_id})
        if rows:
            return rows[0]["max_cost"], rows[0]["seconds_left"]
        if not (await self._statements.find_job(job_id)).is_deleted:
            raise RowsHidden(f"the row of job {job_id} is hidden from the daemon by row security")
        return None

    async def read_dataset(self, dataset: JobDataset) -> JobDataset | None:
        """Returns the dataset as its row describes it now; None if that row is hidden from us."""
        rows = await self._statements.run("read_dataset", {"dataset_id": dataset.dataset_id})
        if rows:
            return replace(dataset, **rows[0])
        found = await self._statements.find_job(dataset.job_id)
        return dataset if found.can_tell and not found.dataset_exists else None

    async def owns_training_file(self, user_id: UUID, path: str) -> bool:
        """True if a path in the bucket training-files is a training file of this user."""
        rows = await self._statements.run("find_training_file", {"user_id": user_id, "path": path})
        return bool(rows[0]["is_own"])

    async def find_job(self, job_id: UUID) -> FoundJob:
        """Returns what exists of a job, even if row security hides it from us."""
        return await self._statements.find_job(job_id)

    async def start_job(self, lease: Lease) -> None:
        """Marks the job as running: the first optimizer step is done."""
        await self._statements.fenced("start_job", lease, {})

    async def record_plan(
        self,
        lease: Lease,
        *,
        total_steps: int | None,
        total_epochs: int | None,
        estimated_total_cost: float | None,
        trained_with: Mapping[str, Any],
    ) -> None:
        """Records the run's real size, in place of the row's estimates, and its settings."""
        values = {
            "total_steps": None if total_steps is None else fit_integer(total_steps),
            "total_epochs": None if total_epochs is None else fit_integer(total_epochs),
            "estimated_total_cost": fit_numeric(estimated_total_cost, 10, 2),
            "trained_with": Jsonb(clean_json(trained_with)) if trained_with else None,
        }
        await self._statements.fenced("record_plan", lease, values)

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
        """Records where the attempt is. Progress (percent) never falls within an attempt, whatever is passed.

        Returns the number of the progress callback that follows; None when the job has no callback."""
        # Cap at about 100 years; anything larger is not a useful estimate.
        left = fit_numeric(seconds_left, 11, 1)
        values = {
            "stage": clean_text(stage, 50),
            "progress": percent(progress),
            "current_epoch": fit_integer(epoch),
            "current_step": fit_integer(step),
            "metrics": Jsonb(clean_json(metrics)),
            "current_cost": fit_numeric(current_cost, 10, 2),
            "seconds_left": None if left is None or left > 3.2e9 else max(left, 0.0),
        }
        sequence: int | None = (await self._statements.fenced("record_progress", lease, values))[0]["sequence"]
        return sequence

    async def record_metrics(self, lease: Lease, points: Sequence[MetricPoint]) -> None:
        """Adds points to the charts, fitted to their columns. What did not fit is reported once as an event of the job.

        Raises PointsRefused if the table accepts none of them."""
        # The last point of a step wins: one statement cannot write the same point twice.
        rows: dict[int, dict[str, Any]] = {}
        misfits: dict[str, str] = {}
        for point in points:
            row = point_row(point, misfits)
            if row is not None:
                rows[row["step"]] = row
        await self._chart("record_metrics", lease, {"points": Jsonb(list(rows.values()))})
        news = {
            name: shown for name, shown in misfits.items() if (lease.job_id, lease.epoch, name) not in self._noticed
        }
        if news:
            self._noticed.update((lease.job_id, lease.epoch, name) for name in news)
            listed = ", ".join(f"{name} = {shown}" for name, shown in news.items())
            await self.record_event(
                lease, "notice", f"some metrics do not fit their columns and were left out or capped: {listed}", news
            )

    async def forget_metrics(self, lease: Lease, after_step: int | None, *, most: int = 0) -> int:
        """Deletes the points after a resumed checkpoint's step; of more than `most` others (0: no limit) half, evenly.

        Returns how many remain. Raises PointsRefused."""
        values = {"after_step": None if after_step is None else fit_integer(after_step), "most": most or NO_LIMIT}
        remaining: int = (await self._chart("forget_metrics", lease, values))["remaining"]
        return remaining

    async def record_event(self, lease: Lease, kind: str, message: str, data: Mapping[str, Any]) -> None:
        """Adds an event to the job's history; also after a cancel, until the lease ends."""
        values = {
            "kind": clean_text(kind, 100),
            "message": clean_text(as_sentence(message), MESSAGE_CHARACTERS),
            "data": Jsonb(clean_json(data)),
        }
        await self._statements.fenced("record_event", lease, values)

    async def renew_lease(self, lease: Lease, lease_seconds: float) -> State:
        """Extends the lease. Returns the job's state: stop the child unless it is initializing or running."""
        rows = await self._statements.fenced("renew_lease", lease, {"lease_seconds": lease_seconds})
        # The lease exists but its job's row is hidden. If the state is unknown, there is no order to stop.
        state = rows[0]["state"] or (await self._statements.find_job(lease.job_id)).state
        return State(state or State.RUNNING)

    # Endings. Each ends the lease; called again after a lost answer, each returns what it did the first time.

    async def complete_job(self, lease: Lease, outcome: Completed, *, cost: float | None) -> Ending:
        """Completes the job: the stored adapter was verified."""
        values = adapter_columns(outcome) | {
            "result": Jsonb(clean_json({"artifacts": outcome.artifacts, "summary": outcome.summary})),
            "deliveries": Jsonb([{"kind": wanted.kind, "target": wanted.target} for wanted in outcome.deliveries]),
        }
        return await self._end("complete_job", lease, values, cost, {State.COMPLETED})

    async def fail_job(self, lease: Lease, failed: Failed, *, cost: float | None) -> Ending:
        """Fails the job permanently."""
        return await self._end("fail_job", lease, error_columns(failed), cost, {State.FAILED})

    async def retry_job(self, lease: Lease, failed: Failed, *, delay_seconds: float, cost: float | None) -> Ending:
        """Requeues the job for later; `state` is failed when that was the last attempt."""
        values = error_columns(failed) | {"delay_seconds": max(delay_seconds, 0.0)}
        return await self._end("retry_job", lease, values, cost, {State.QUEUED, State.FAILED})

    async def release_job(self, lease: Lease, reason: str, *, cost: float | None) -> Ending:
        """Requeues the job at once, without counting the attempt."""
        values = {"reason": clean_text(as_sentence(reason), MESSAGE_CHARACTERS)}
        return await self._end("release_job", lease, values, cost, {State.QUEUED})

    async def return_job(self, lease: Lease, returned: Returned, *, cost: float | None) -> Ending:
        """Requeues the job because this host cannot work. The attempt counts only after hosts have returned the job
        `MAX_RETURNS` times: then `state` is failed if it was the last attempt."""
        failed = Failed(returned.code, returned.message, returned.hint, returned.stack)
        values = error_columns(failed) | {"part": returned.part, "most": MAX_RETURNS}
        return await self._end("return_job", lease, values, cost, {State.QUEUED, State.FAILED})

    async def end_cancelled_job(self, lease: Lease, *, cost: float | None, data: Mapping[str, Any]) -> Ending:
        """Ends a cancelled job whose child is gone. `moved` False: it was submitted again, and can be claimed."""
        values = {"data": Jsonb(clean_json(data))}
        return await self._end("end_cancelled_job", lease, values, cost, {State.CANCELLED})

    async def reap_expired_leases(self) -> list[Reaped]:
        """Ends the leases of hosts that went silent."""
        rows = await self._statements.run("reap_expired_leases", {})
        return [Reaped(row["job_id"], State(row["state"])) for row in rows]

    async def _chart(self, name: str, lease: Lease, values: Mapping[str, Any]) -> dict[str, Any]:
        try:
            answer = await self._statements.run(name, {**lease.parameters(), **values})
        except DatabaseUnprepared as error:
            # If only that table is missing, the points are refused; if everything is, this raises and the points wait.
            await self._database.fetch("SELECT FROM training_leases LIMIT 0")
            raise _points_refused(error) from error
        except (StatementRefused, HostUnfit) as error:
            raise _points_refused(error) from error
        if not answer[0]["held"]:
            raise await self._statements.why_no_row(name, lease)
        return answer[0]

    async def _end(
        self, name: str, lease: Lease, values: Mapping[str, Any], cost: float | None, wanted: set[State]
    ) -> Ending:
        named = lease.parameters() | {"cost": fit_numeric(cost, 10, 2)}
        row = (await self._statements.run(name, {**named, **values}))[0]
        noted = row["noted"]
        if row["state"] is not None:
            return Ending(True, State(row["state"]), noted)
        if row["ended"] and name != "end_cancelled_job":
            settled = await self._statements.run("settle_cancelled_job", named)
            if settled:
                return Ending(False, State.CANCELLED, noted)
        found = await self._statements.run("read_job_state", lease.parameters())
        state = State(found[0]["state"]) if found else await self._hidden_state(lease)
        if row["ended"]:
            return Ending(False, state, noted)
        # No lease, but our epoch and the state that we asked for: the move succeeded and its answer was lost.
        if state in wanted:
            return Ending(True, state, noted)
        raise await self._statements.why_no_row(name, lease)

    async def _hidden_state(self, lease: Lease) -> State | None:
        """Returns the state of a job whose row is hidden; None if another epoch holds it, or the state is unknown."""
        if await self._statements.run("read_last_claim", {"job_id": lease.job_id}):
            return None  # visible, but another host's: its epoch or token differs
        found = await self._statements.find_job(lease.job_id)
        return State(found.state) if found.can_tell and found.epoch == lease.epoch and found.state else None


def _points_refused(error: Exception) -> PointsRefused:
    return PointsRefused(str(error).strip().split("\n", 1)[0])
