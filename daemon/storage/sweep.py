"""Deletes the stored objects that no row names: after each attempt those of its job, and hourly those of all jobs."""

from __future__ import annotations

import asyncio
from uuid import UUID

import structlog

from daemon.chores import worked
from daemon.errors import DatabaseAway, HostUnfit, JobError, StatementRefused
from daemon.queue.row_visibility import RowVisibility
from daemon.storage.interface import Storage
from daemon.storage.upload_log import RecordedUpload, UploadLog

log = structlog.get_logger()

SWEEP_SECONDS = 3600.0
# A host that has lost its lease may still be uploading; it learns of it within a few heartbeats.
IDLE_SECONDS = 3600.0
NOTES_A_SWEEP = 100


async def sweep_job(uploads: UploadLog, storage: Storage, job_id: UUID, keep_days: float) -> None:
    """Delete what a settled job does not need. What cannot be deleted now stays noted for the next sweep."""
    await _sweep(uploads, storage, job_id=job_id, idle_seconds=0.0, keep_days=keep_days, orphans=True)


async def sweep_forever(uploads: UploadLog, visibility: RowVisibility, storage: Storage, keep_days: float) -> None:
    """Delete what dead hosts left and what has been kept long enough, until cancelled.

    A job without a row counts as deleted only in a table that was the same at the sweep before: into one that was made
    anew the rows may still be on their way, from a backup say."""
    tables: str | None = None
    while True:
        before, tables = tables, await _tables(visibility)
        if before is not None:
            same = tables == before
            await _sweep(uploads, storage, job_id=None, idle_seconds=IDLE_SECONDS, keep_days=keep_days, orphans=same)
        worked()
        await asyncio.sleep(SWEEP_SECONDS)


async def _tables(visibility: RowVisibility) -> str | None:
    try:
        return (await visibility.read_row_visibility()).tables
    except (DatabaseAway, HostUnfit) as error:
        log.warning("leftovers_kept", error=str(error))
        return None


async def _sweep(
    uploads: UploadLog, storage: Storage, *, job_id: UUID | None, idle_seconds: float, keep_days: float, orphans: bool
) -> None:
    try:
        leftovers = await uploads.leftovers(
            storage.location,
            job_id=job_id,
            idle_seconds=idle_seconds,
            keep_seconds=keep_days * 86_400.0,
            orphans=orphans,
            limit=NOTES_A_SWEEP,
        )
    except DatabaseAway as error:
        log.warning("leftovers_kept", error=str(error))
        return
    for upload in leftovers:
        try:
            await withdraw(uploads, storage, upload)
        except DatabaseAway as error:
            log.warning("leftovers_kept", error=str(error))
            return
        except (JobError, StatementRefused) as error:
            # One that cannot be deleted keeps no other.
            log.warning("leftovers_kept", job_id=str(upload.job_id), error=str(error))


async def withdraw(uploads: UploadLog, storage: Storage, upload: RecordedUpload) -> None:
    """Delete the objects, unless the job's row names them, then the note. Raises DatabaseAway and JobError."""
    if not upload.named:
        # The manifest is the last of a checkpoint's: without it nobody takes what is left for whole.
        for name in reversed(upload.objects):
            await storage.delete(name)
        log.info("stored_objects_deleted", job_id=str(upload.job_id), kind=upload.kind, lease_epoch=upload.epoch)
    await uploads.forget_upload(upload)
