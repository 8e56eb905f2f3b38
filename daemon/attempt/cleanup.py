"""Cleans up after a finished attempt, on disk and in storage, once its slot has been released.

What is left over here is found later: objects by their records in the database (any daemon's hourly sweep), folders
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

# A platform gives a stopping container about half a minute; what is left after that is found later.
FINISH_SECONDS = 10.0


@dataclass(frozen=True)
class FinishedAttempt:
    """A settled attempt. `ending` None: another host has its job now. `stored`: it had begun to store its adapter.
    `filled`: it failed on a full disk."""

    job: ClaimedJob
    ending: Ending | None
    stored: bool
    filled: bool = False


class Cleanup:
    """Cleans up after attempts, each in the background."""

    def __init__(self, store: JobStore, uploads: UploadLog, storage: Storage, settings: Settings) -> None:
        self._store = store
        self._uploads = uploads
        self._storage = storage
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, remains: FinishedAttempt) -> None:
        """Cleans up after this attempt; never waits."""
        task = asyncio.create_task(self._tidy(remains), name=f"tidying {remains.job.id}")
        self._tasks.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if not done.cancelled() and (error := done.exception()) is not None:
                log.error("tidying_crashed", job_id=str(remains.job.id), exc_info=error)

        task.add_done_callback(ended)

    async def finish(self) -> None:
        """Waits for running clean-ups, at most FINISH_SECONDS."""
        tasks = set(self._tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=FINISH_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _tidy(self, remains: FinishedAttempt) -> None:
        job, ending = remains.job, remains.ending
        workspace = WorkFolder(self._settings.work_dir, job.lease)
        # Names carry the attempt's epoch: no later attempt goes on with these uploads.
        for folder in (workspace.attempt_dir, *await asyncio.to_thread(workspace.earlier_attempts)):
            if folder.is_dir():
                await self._storage.end_unfinished_uploads(folder)
        deleted = ending is None and await self._is_deleted(job)
        # The job failed permanently and fills the disk: its folder would leave no space for other jobs.
        hopeless = ending is not None and ending.state is State.FAILED and remains.filled
        if deleted or hopeless or (ending is not None and ending.state is State.COMPLETED):
            await asyncio.to_thread(workspace.remove)
        else:
            # Keep the checkpoints for the next attempt; old ones are deleted by age.
            await asyncio.to_thread(workspace.forget_attempt)
        if deleted or (ending is not None and ending.noted):
            # The row shows now which objects count; without a row none does.
            await sweep_job(self._uploads, self._storage, job.id, self._settings.keep_days)
        if ending is None and remains.stored and await self._names_are_ours(job):
            # The next owner's sweep may have run before our last upload finished.
            try:
                await withdraw_adapter(self._storage, job.id, job.lease_epoch)
            except JobError as error:
                log.warning("leftovers_kept", error=str(error))

    async def _names_are_ours(self, job: ClaimedJob) -> bool:
        """Whether only this attempt uses its object names. False if that is unknown now."""
        try:
            return await self._uploads.names_are_ours(job.lease)
        except (DatabaseAway, *REFUSALS):
            return False

    async def _is_deleted(self, job: ClaimedJob) -> bool:
        """Whether the job's row was deleted, so that none of its files are needed. False if that is not certain.

        A hidden row is not deleted; nor is one that is missing from a recreated table: it may not be restored yet."""
        try:
            found = await self._store.find_job(job.id)
        except (DatabaseAway, *REFUSALS):
            return False
        return found.is_deleted and found.tables == job.tables
