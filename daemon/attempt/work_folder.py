"""One job's folder on the volume: what each attempt writes and the next one finds.

<work_dir>/<job_id>/checkpoints/e<epoch>-<token>/   any host that sees the volume can resume from these
                    attempts/e<epoch>-<token>/      dataset, logs, adapter and its record, upload state
<work_dir>/.early/                                  datasets prefetched for jobs expected here, for minutes
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import structlog

from daemon.chores import worked
from daemon.dataset.prefetch_folder import TIDY_SECONDS, remove_early_datasets
from daemon.errors import disk_fault
from daemon.host.inspect import Host
from daemon.queue.job import Lease

log = structlog.get_logger()

ADAPTER = "adapter"
# Written once the training has ended well: what the adapter was trained from, and its files' hashes.
FINISHED = "finished.json"

# Folders of older versions have no token.
_LEASE_FOLDER = re.compile(r"e(\d+)(-[0-9a-f]{8})?")
_JOB_FOLDER = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class WorkFolder:
    """Paths of one attempt. Each contains the lease's epoch and token, so that a stale host overwrites nothing."""

    work_dir: Path
    lease: Lease

    @classmethod
    def open(cls, work_dir: Path, lease: Lease) -> WorkFolder:
        """Creates this attempt's folders and takes over the newest checkpoints of an earlier one."""
        workspace = cls(work_dir, lease)
        try:
            for folder in (workspace.attempt_dir, workspace.checkpoint_dir.parent):
                folder.mkdir(parents=True, exist_ok=True)
            # Other tenants' processes on this host must not read it.
            workspace.job_dir.chmod(0o700)
            workspace._adopt_checkpoints()
            workspace.checkpoint_dir.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_fault("work folder", work_dir, error) from error
        return workspace

    @property
    def job_dir(self) -> Path:
        return self.work_dir / str(self.lease.job_id)

    @property
    def attempt_dir(self) -> Path:
        return self.job_dir / "attempts" / lease_folder(self.lease)

    @property
    def checkpoint_dir(self) -> Path:
        return self.job_dir / "checkpoints" / lease_folder(self.lease)

    @property
    def dataset_path(self) -> Path:
        return self.attempt_dir / "dataset"

    @property
    def adapter_dir(self) -> Path:
        return self.attempt_dir / ADAPTER

    @property
    def finished_path(self) -> Path:
        return self.attempt_dir / FINISHED

    @property
    def upload_dir(self) -> Path:
        return self.attempt_dir / "upload"

    @property
    def log_path(self) -> Path:
        return self.attempt_dir / "trainer.log"

    def _adopt_checkpoints(self) -> None:
        # After the rename a stale host cannot reach them: what it still writes goes to the old name.
        if self.checkpoint_dir.exists():
            return
        for epoch, folder in self._earlier(self.checkpoint_dir):
            # Its host may still be writing or deleting there: if the folder disappears, go on without it.
            with contextlib.suppress(FileNotFoundError):
                if any(folder.iterdir()):
                    folder.rename(self.checkpoint_dir)
                    log.info("checkpoints_adopted", from_epoch=epoch)
                    return

    def earlier_attempts(self) -> list[Path]:
        """Lists the folders of this job's earlier attempts on this volume, the latest first."""
        return [folder for _, folder in self._earlier(self.attempt_dir)]

    def _earlier(self, own: Path) -> list[tuple[int, Path]]:
        # Includes our own epoch: after a restore from a backup it may be used twice. A later epoch is our successor's.
        earlier = [
            (int(match[1]), folder)
            for folder in (own.parent.iterdir() if own.parent.is_dir() else ())
            if (match := _LEASE_FOLDER.fullmatch(folder.name)) and int(match[1]) <= self.lease.epoch and folder != own
        ]
        return sorted(earlier, reverse=True)

    def forget_attempt(self) -> None:
        """Deletes what only this attempt needed; keeps the checkpoints, and a finished adapter, for the next one."""
        if not self.finished_path.exists():
            shutil.rmtree(self.attempt_dir, ignore_errors=True)
            return
        for path in self.attempt_dir.iterdir():
            if path.name in (ADAPTER, FINISHED):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes the whole job folder: the job is final."""
        shutil.rmtree(self.job_dir, ignore_errors=True)


def lease_folder(lease: Lease) -> str:
    """Returns the name of a lease's own folder on the volume."""
    return f"e{lease.epoch}-{lease.token.hex[:8]}"


async def clean_up_forever(
    work_dir: Path,
    keep_days: float,
    host: Host,
    *,
    running: Callable[[], set[str]],
    may_come_back: Callable[[UUID], Awaitable[bool]],
    end_uploads: Callable[[Path], Awaitable[None]],
) -> None:
    """Deletes old job folders on the volume that are no longer needed, until cancelled."""
    while True:
        for folder in await asyncio.to_thread(old_jobs, work_dir, keep_days, running()):
            # A job that waits longer than keep_days, for its time or for the database, keeps its checkpoints.
            if not await may_come_back(UUID(folder.name)):
                await end_uploads(folder)
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                log.info("job_folder_removed", job_id=folder.name)
        await asyncio.to_thread(remove_early_datasets, work_dir, host)
        worked()
        await asyncio.sleep(TIDY_SECONDS)


def old_jobs(work_dir: Path, keep_days: float, running: set[str]) -> list[Path]:
    """Lists the folders of jobs that were not written to for `keep_days` and do not run here.

    Another host on the same volume writes to its job's folder at least at every checkpoint.
    """
    oldest = time.time() - keep_days * 86400.0
    found = []
    for folder in work_dir.iterdir() if work_dir.is_dir() else ():
        if not _JOB_FOLDER.fullmatch(folder.name) or folder.name in running:
            continue
        try:
            touched_at = max(path.stat().st_mtime for path in (folder, *folder.glob("*/*")))
        except OSError:
            continue  # another host is deleting it
        if touched_at < oldest:
            found.append(folder)
    return found
