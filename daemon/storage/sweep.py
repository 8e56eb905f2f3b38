"""Deletes stored objects that no row names: those of a job after each attempt, and those of all jobs every hour."""

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
# A host that has lost its lease may still be uploading; it stops within a few heartbeats.
IDLE_SECONDS = 3600.0
NOTES_A_SWEEP = 100


async def sweep_job(uploads: UploadLog, storage: Storage, job_id: UUID, keep_days: float) -> None:
    """Deletes what a settled job does not need. What cannot be deleted now stays recorded for the next sweep."""
    await _sweep(uploads, storage, job_id=job_id, idle_seconds=0.0, keep_days=keep_days, orphans=True)


async def sweep_forever(uploads: UploadLog, visibility: RowVisibility, storage: Storage, keep_days: float) -> None:
    """Deletes what dead hosts left and what has been kept long enough, until cancelled.

    A job without a row counts as deleted only if the table is the same as at the previous sweep: if it was recreated,
    its rows may not be restored yet, from a backup for instance."""
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
            # An object that cannot be deleted must not hold up the others.
            log.warning("leftovers_kept", job_id=str(upload.job_id), error=str(error))


async def withdraw(uploads: UploadLog, storage: Storage, upload: RecordedUpload) -> None:
    """Deletes the objects, unless the job's row names them, then their record. Raises DatabaseAway and JobError."""
    if not upload.named:
        # A checkpoint's manifest is last in the list and deleted first: without it, the rest never counts as whole.
        for name in reversed(upload.objects):
            await storage.delete(name)
        log.info("stored_objects_deleted", job_id=str(upload.job_id), kind=upload.kind, lease_epoch=upload.epoch)
    await uploads.forget_upload(upload)
