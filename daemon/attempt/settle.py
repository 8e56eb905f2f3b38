"""Writes an attempt's outcome to the database, retrying for as long as the database is unavailable."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import assert_never

import structlog

from daemon.database.connection import REFUSALS
from daemon.database.retry import AWAY_SECONDS
from daemon.errors import DatabaseAway, LeaseLost
from daemon.queue.job import ClaimedJob, Returned
from daemon.queue.job_store import JobStore
from daemon.queue.outcome import Cancelled, Completed, Failed, Outcome, Released, Superseded
from daemon.queue.rows import Ending
from daemon.redaction import Redaction
from daemon.report.reporter import Reporter
from daemon.settings import Settings
from daemon.stop_request import Stop
from training.events import ErrorCode

log = structlog.get_logger()
Written = Completed | Failed | Released | Returned | Cancelled

MAX_BACKOFF_SECONDS = 3600.0
LAST_WORDS_TRIES = 3
# Once the outcome is written, the heartbeat finds no lease: allow time for the answer to be read.
ANSWER_SECONDS = 2.0


async def settle(
    job: ClaimedJob, outcome: Outcome, reporter: Reporter, *, stop: Stop, store: JobStore, settings: Settings
) -> Ending | None:
    """Writes the outcome. Returns None when the job is not ours any more: after a lost lease nothing is written.

    The row gets what the job's owner may read, the log everything.

    With TRAINER_ON_PARTITION=stop it also stops waiting once the lease has run out: by then another host may work in
    the same folder, if they share a volume, and this attempt may have failed because of that."""
    if isinstance(outcome, Superseded):
        log.warning("attempt_superseded")
        return None
    if isinstance(outcome, Failed | Returned):
        log.warning(
            "attempt_failed", code=outcome.code, message=outcome.message, hint=outcome.hint, stack=outcome.stack
        )
    outcome = for_the_owner(outcome, reporter.redaction)
    if not isinstance(outcome, Released | Returned):
        reporter.end_curve()
    writing = asyncio.create_task(_write(job, outcome, reporter, stop=stop, store=store, settings=settings))
    if isinstance(outcome, Completed):
        return await writing  # verified and stored: it counts if no other host took the job
    lost = asyncio.create_task(stop.wait_for_lost_lease())
    try:
        await asyncio.wait({writing, lost}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({writing}, timeout=ANSWER_SECONDS)
        if writing.done():
            return writing.result()
        log.warning("attempt_superseded", outcome=type(outcome).__name__.lower())
        return None
    finally:
        lost.cancel()
        writing.cancel()
        await asyncio.gather(writing, lost, return_exceptions=True)


def for_the_owner(outcome: Written, redaction: Redaction) -> Written:
    """Returns the outcome without what the job's owner must not read."""
    if isinstance(outcome, Failed | Returned):
        hint, stack = outcome.hint, outcome.stack
        return replace(
            outcome,
            message=redaction.text(outcome.message),
            hint=None if hint is None else redaction.text(hint),
            stack=None if stack is None else redaction.stack(stack),
        )
    if isinstance(outcome, Completed):
        return replace(outcome, summary=redaction.value(outcome.summary))
    return outcome


async def _write(
    job: ClaimedJob,
    outcome: Written,
    reporter: Reporter,
    *,
    stop: Stop,
    store: JobStore,
    settings: Settings,
) -> Ending | None:
    """Retries until the outcome is written or refused, however long the database is away."""
    give_up_at = asyncio.get_running_loop().time() + settings.drain_seconds
    unheard = 0
    while True:
        try:
            try:
                await _last_words(reporter)
            except DatabaseAway:
                unheard += 1
                # If the database is away, neither can be written. If only the charts' table is locked, the outcome can.
                if unheard < LAST_WORDS_TRIES:
                    raise
            ending = await _move(job, outcome, reporter, store, settings)
        except LeaseLost:
            log.warning("ending_refused", outcome=type(outcome).__name__.lower())
            return None
        except DatabaseAway as error:
            log.warning("ending_delayed", error=str(error))
            # An outcome is worth any wait; a release only does sooner what the reaper does anyway.
            if isinstance(outcome, Released) and (stop.hurried or asyncio.get_running_loop().time() > give_up_at):
                log.warning("release_left_to_reaper")
                return None
            await asyncio.sleep(AWAY_SECONDS)
        except REFUSALS as error:
            if isinstance(outcome, Failed):
                raise
            # A trigger of the app may fail, for instance: the row shows that instead of a lost host.
            log.error("ending_impossible", outcome=type(outcome).__name__.lower(), error=str(error))
            outcome = _refused(error)
        else:
            log.info("job_moved", state=ending.state, moved=ending.moved)
            return ending


async def _last_words(reporter: Reporter) -> None:
    try:
        await reporter.flush()
    except LeaseLost:
        # Cancelled meanwhile, or lost: the move itself finds out which, by the lease.
        return
    except REFUSALS as error:
        log.error("report_refused", error=str(error))


def _refused(error: Exception) -> Failed:
    return Failed(
        ErrorCode.INTERNAL,
        "The database refused to record how this job ended.",
        hint="This is a fault of the service, not of your job. The job is tried again.",
        stack=str(error),
        transient=True,
    )


async def _move(
    job: ClaimedJob,
    outcome: Written,
    reporter: Reporter,
    store: JobStore,
    settings: Settings,
) -> Ending:
    cost = reporter.cost
    match outcome:
        case Completed():
            return await store.complete_job(job.lease, outcome, cost=cost)
        case Failed(transient=True):
            delay = retry_delay_seconds(job.attempt, settings.retry_backoff_seconds)
            return await store.retry_job(job.lease, outcome, delay_seconds=delay, cost=cost)
        case Failed():
            return await store.fail_job(job.lease, outcome, cost=cost)
        case Released():
            return await store.release_job(job.lease, outcome.reason, cost=cost)
        case Returned():
            return await store.return_job(job.lease, outcome, cost=cost)
        case Cancelled():
            return await store.end_cancelled_job(job.lease, cost=cost, data=reporter.saved)
        case _:
            assert_never(outcome)


def retry_delay_seconds(attempt: int, first_seconds: float) -> float:
    """Doubles with each attempt, up to an hour; jitter keeps jobs that failed together from returning together."""
    spread = random.uniform(0.75, 1.25)  # noqa: S311 - no secret depends on it
    return min(first_seconds * 2.0 ** (attempt - 1), MAX_BACKOFF_SECONDS) * spread
