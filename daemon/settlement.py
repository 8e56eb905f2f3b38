"""The ending of an attempt: one outcome, one move, written however long the database is away."""

from __future__ import annotations

import asyncio
import random
from typing import assert_never

import structlog

from daemon.errors import DatabaseAway, LeaseLost
from daemon.job import Cancelled, ClaimedJob, Completed, Failed, Outcome, Released, State, Superseded
from daemon.reporter import Reporter
from daemon.settings import Settings
from daemon.storage import Storage
from daemon.store import Ending, Store
from daemon.uploads import sweep_job
from daemon.workspace import Workspace

log = structlog.get_logger()

AWAY_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 3600.0


async def settle(
    job: ClaimedJob, outcome: Outcome, reporter: Reporter, *, store: Store, storage: Storage, settings: Settings
) -> None:
    """Write the ending and tidy up after it. Whoever lost the lease writes nothing and removes only its own files."""
    workspace = Workspace(settings.work_dir / str(job.id), job.lease_epoch)
    ending = await _write(job, outcome, reporter, store, settings)
    if ending is not None:
        # The row says now which objects count. Without an ending it may be another host's: the hourly sweep finds out.
        await sweep_job(store, storage, job.id, settings.keep_days)
    if ending is None or ending.state is not State.COMPLETED:
        # Whoever retries goes on from the checkpoints; what nobody retries is tidied away.
        workspace.forget_attempt()
        return
    workspace.remove()


async def _write(
    job: ClaimedJob, outcome: Outcome, reporter: Reporter, store: Store, settings: Settings
) -> Ending | None:
    """Move the job, after the last of its progress. None when it is not ours any more."""
    if isinstance(outcome, Superseded):
        log.warning("attempt_superseded")
        return None
    give_up_at = asyncio.get_running_loop().time() + settings.drain_seconds
    while True:
        try:
            await _last_words(reporter)
            ending = await _move(job, outcome, reporter.cost, store, settings)
        except LeaseLost:
            log.warning("ending_refused", outcome=type(outcome).__name__.lower())
            return None
        except DatabaseAway as error:
            log.warning("ending_delayed", error=str(error))
            # An ending is worth any wait; a release only says sooner what the reaper finds by itself.
            if isinstance(outcome, Released) and asyncio.get_running_loop().time() > give_up_at:
                log.warning("release_left_to_reaper")
                return None
            await asyncio.sleep(AWAY_SECONDS)
        else:
            log.info("job_moved", state=ending.state, moved=ending.moved)
            return ending


async def _last_words(reporter: Reporter) -> None:
    try:
        await reporter.flush()
    except LeaseLost:
        # Cancelled meanwhile, or lost: the move itself finds out which, by the lease and not by the row.
        return


async def _move(
    job: ClaimedJob,
    outcome: Completed | Failed | Released | Cancelled,
    cost: float | None,
    store: Store,
    settings: Settings,
) -> Ending:
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
        case Cancelled():
            return await store.end_cancelled_job(job.lease, cost=cost, data={})
        case _:
            assert_never(outcome)


def retry_delay_seconds(attempt: int, first_seconds: float) -> float:
    """Doubles with each attempt, up to an hour; jitter, so that jobs which failed together do not return together."""
    spread = random.uniform(0.75, 1.25)  # noqa: S311 - no secret depends on it
    return min(first_seconds * 2.0 ** (attempt - 1), MAX_BACKOFF_SECONDS) * spread
