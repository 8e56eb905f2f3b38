"""A job in a serverless worker's memory: what its row would hold, and its uploads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from daemon.gateway.schemas import Submission
from daemon.queue.job import Lease
from daemon.queue.states import FINAL, State
from daemon.storage.interface import Location
from daemon.storage.upload_log import RecordedUpload, UploadKind


@dataclass
class MemoryJob:
    id: UUID
    submission: Submission
    need_gpus: int
    queued_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    state: State = State.QUEUED
    attempt: int = 0
    epoch: int = 0
    due_at: float = 0.0
    spent: float = 0.0
    columns: dict[str, Any] = field(default_factory=dict)
    uploads: dict[tuple[int, UploadKind, int], RecordedUpload] = field(default_factory=dict)
    # The lease of the last claim, and whether it is still held.
    lease: Lease | None = None
    is_leased: bool = False

    def is_held_by(self, lease: Lease) -> bool:
        return self.is_leased and self.lease == lease

    def leftovers(self, location: Location) -> list[RecordedUpload]:
        """Records of stored objects that are not needed, and the record of those that the result names."""
        if self.is_leased:
            return []
        path = self.columns.get("adapter_path") if self.state is State.COMPLETED else None
        return [
            replace(upload, named=path == f"{location.bucket}/{upload.objects[0]}")
            for upload in self.uploads.values()
            if upload.kind == "adapter" or self.state in FINAL
        ]
