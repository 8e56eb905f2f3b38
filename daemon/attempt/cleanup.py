"""What a settled attempt leaves on this disk and in Storage, removed once its place is free and nobody waits for it.

What is not reached here is found again: objects by their notes in the database (any daemon's hourly sweep), folders
by their age.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from daemon.attempt.work_folder import WorkFolder
from daemon.database.connection import REFUSALS
from daemon.errors import DatabaseAway, JobError
from daemon.queue.job import ClaimedJob
from daemon.queue.job_store import JobStore
from daemon.queue.rows import Ending
from daemon.queue.states import State
from daemon.settings import Settings
from daemon.storage.interface import Storage
from daemon.storage.publish import withdraw_adapter
from daemon.storage.sweep import sweep_job
from daemon.storage.upload_log import UploadLog

log = structlog.get_logger()

# A platform gives a stopping container about half a minute; what is left then is found again.
FINISH_SECONDS = 10.0


@dataclass(frozen=True)
class FinishedAttempt:
    """A settled attempt. `ending` None: its job is somebody else's now. `stored`: it had begun to store its adapter.
    `filled`: the disk became full under it."""

    job: ClaimedJob
    ending: Ending | None
    stored: bool
    filled: bool = False


class Cleanup:
    """Tidies up after attempts, each in the background."""

    def __init__(self, store: JobStore, uploads: UploadLog, storage: Storage, settings: Settings) -> None:
        self._store = store
        self._uploads = uploads
        self._storage = storage
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, remains: FinishedAttempt) -> None:
        """Tidy up after this attempt; never waits."""
        task = asyncio.create_task(self._tidy(remains), name=f"tidying {remains.job.id}")
        self._tasks.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if not done.cancelled() and (error := done.exception()) is not None:
                log.error("tidying_crashed", job_id=str(remains.job.id), exc_info=error)

        task.add_done_callback(ended)

    async def finish(self) -> None:
        """Wait for what is under way, but not for long."""
        tasks = set(self._tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=FINISH_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _tidy(self, remains: FinishedAttempt) -> None:
        job, ending = remains.job, remains.ending
        workspace = WorkFolder(self._settings.work_dir, job.lease)
        deleted = ending is None and await self._is_deleted(job)
        # A job that ended for good because it fills the disk would keep every other job from it.
        hopeless = ending is not None and ending.state is State.FAILED and remains.filled
        if deleted or hopeless or (ending is not None and ending.state is State.COMPLETED):
            await asyncio.to_thread(workspace.remove)
        else:
            # Whoever retries goes on from the checkpoints; what nobody retries is removed by its age.
            await asyncio.to_thread(workspace.forget_attempt)
        if deleted or (ending is not None and ending.noted):
            # The row says now which objects count; without a row none does.
            await sweep_job(self._uploads, self._storage, job.id, self._settings.keep_days)
        if ending is None and remains.stored and await self._names_are_ours(job):
            # Our successor may have swept already, before our last bytes came.
            try:
                await withdraw_adapter(self._storage, job.id, job.lease_epoch)
            except JobError as error:
                log.warning("leftovers_kept", error=str(error))

    async def _names_are_ours(self, job: ClaimedJob) -> bool:
        """Nobody else's objects can lie under this attempt's names. False where that cannot be asked now."""
        try:
            return await self._uploads.names_are_ours(job.lease)
        except (DatabaseAway, *REFUSALS):
            return False

    async def _is_deleted(self, job: ClaimedJob) -> bool:
        """Its row was deleted: nobody comes back for anything of it. False where that is not certain.

        Not seen is not deleted; nor is what is missing from a table that was made anew: its rows may be yet to come."""
        try:
            found = await self._store.find_job(job.id)
        except (DatabaseAway, *REFUSALS):
            return False
        return found.is_deleted and found.tables == job.tables
