"""Records every upload before it starts, so that orphaned objects can be found and deleted.

A host may die between any two steps of finishing a job. The record in the database survives it, and shows which objects
may exist: those that the job's row names are kept, the others are deleted (daemon.storage.sweep).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol
from uuid import UUID

from daemon.database.connection import Database
from daemon.database.retry import retry_until_database_is_back
from daemon.errors import RowsHidden
from daemon.queue.fenced_statements import FencedStatements
from daemon.queue.job import ClaimedJob, Lease
from daemon.storage.interface import Location
from daemon.storage.publish import object_names

UploadKind = Literal["adapter", "checkpoint"]


@dataclass(frozen=True)
class RecordedUpload:
    """Objects that one attempt may have stored: the archive comes first, or a checkpoint's manifest last.

    `manifest_sha256` is set once a checkpoint is whole; `named` is True if the job's own row names the objects."""

    job_id: UUID
    epoch: int
    kind: UploadKind
    step: int
    objects: list[str]
    manifest_sha256: str | None = None
    named: bool = False


class UploadLog(Protocol):
    """What the attempt and the sweeps need from it. SqlUploadLog and MemoryJobStore implement it."""

    async def record_upload(
        self, lease: Lease, kind: UploadKind, location: Location, objects: Sequence[str], *, step: int = 0
    ) -> None: ...

    async def finish_checkpoint_upload(self, lease: Lease, step: int, *, manifest_sha256: str, size: int) -> None: ...

    async def names_are_ours(self, lease: Lease) -> bool: ...

    async def stored_checkpoints(self, job_id: UUID, location: Location) -> list[RecordedUpload]: ...

    async def stored_adapters(self, job_id: UUID, location: Location) -> list[RecordedUpload]: ...

    async def leftovers(
        self,
        location: Location,
        *,
        job_id: UUID | None,
        idle_seconds: float,
        keep_seconds: float,
        orphans: bool,
        limit: int,
    ) -> list[RecordedUpload]: ...

    async def forget_upload(self, upload: RecordedUpload) -> None: ...


class SqlUploadLog:
    """The statements of training_uploads over one Database. Raises what Database raises, and LeaseLost."""

    def __init__(self, database: Database) -> None:
        self._statements = FencedStatements(database)

    async def record_upload(
        self, lease: Lease, kind: UploadKind, location: Location, objects: Sequence[str], *, step: int = 0
    ) -> None:
        """Records objects before their first byte is sent: from now on they may exist. `step` is a checkpoint's."""
        values = {"kind": kind, "step": step, "objects": [*objects]} | location.parameters()
        await self._statements.fenced("record_upload", lease, values)

    async def finish_checkpoint_upload(self, lease: Lease, step: int, *, manifest_sha256: str, size: int) -> None:
        """Marks a checkpoint as whole: it is stored and was read back, its manifest last. `size` in bytes."""
        values = {"step": step, "manifest_sha256": manifest_sha256, "bytes": size}
        await self._statements.fenced("finish_checkpoint_upload", lease, values)

    async def names_are_ours(self, lease: Lease) -> bool:
        """Whether the names with this lease's epoch belong to this lease alone.

        After a restore from a backup another host may have the same epoch, or get it."""
        rows = await self._statements.run("read_last_claim", {"job_id": lease.job_id})
        if not rows:
            return (await self._statements.find_job(lease.job_id)).is_deleted
        return bool(rows[0]["lease_epoch"] > lease.epoch or rows[0]["lease_token"] == lease.token)

    async def stored_checkpoints(self, job_id: UUID, location: Location) -> list[RecordedUpload]:
        """Lists checkpoints, the latest attempt's newest first; those without a `manifest_sha256` are not whole.

        Raises RowsHidden if some are hidden from us: otherwise hours of training would be repeated."""
        rows = await self._statements.run("read_stored_checkpoints", {"job_id": job_id} | location.parameters())
        if not rows and (found := await self._statements.find_job(job_id)).can_tell and found.checkpoints:
            seen = await self._statements.run("count_seen_checkpoints", {"job_id": job_id})
            if seen[0]["seen"] < found.checkpoints:
                raise RowsHidden(f"the stored checkpoints of job {job_id} are hidden from the daemon by row security")
        return [RecordedUpload(**row) for row in rows]

    async def stored_adapters(self, job_id: UUID, location: Location) -> list[RecordedUpload]:
        """Lists what attempts may have stored of an adapter, whole or not, the latest attempt's first."""
        rows = await self._statements.run("read_stored_adapters", {"job_id": job_id} | location.parameters())
        return [RecordedUpload(**row) for row in rows]

    async def leftovers(
        self,
        location: Location,
        *,
        job_id: UUID | None,
        idle_seconds: float,
        keep_seconds: float,
        orphans: bool,
        limit: int,
    ) -> list[RecordedUpload]:
        """Lists what is no longer needed, of one job or of all. `keep_seconds`: how long a checkpoint outlives its job.

        `orphans` includes the objects of jobs that no longer exist."""
        values = {
            "job_id": job_id,
            "idle_seconds": idle_seconds,
            "keep_seconds": keep_seconds,
            "orphans": orphans,
            "limit": limit,
        } | location.parameters()
        return [RecordedUpload(**row) for row in await self._statements.run("read_leftovers", values)]

    async def forget_upload(self, upload: RecordedUpload) -> None:
        """Deletes the record: its objects are gone, or the job's row names them."""
        values = {"job_id": upload.job_id, "noted_epoch": upload.epoch, "kind": upload.kind, "step": upload.step}
        await self._statements.run("forget_upload", values)


async def note_adapter(uploads: UploadLog, job: ClaimedJob, location: Location) -> None:
    """Records the objects of this attempt's adapter, however long the database is away. Raises LeaseLost."""
    objects = object_names(job.id, job.lease_epoch).all()
    await retry_until_database_is_back(
        lambda: uploads.record_upload(job.lease, "adapter", location, objects), "upload_delayed"
    )
