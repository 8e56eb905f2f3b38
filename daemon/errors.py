"""What can go wrong, sorted by what to do next.

    TrainerError
    ├── JobError           this job's attempt ends here
    │   ├── JobFailed      permanent: the user must change something
    │   └── JobDelayed     transient: another attempt may succeed
    │       ├── HostFault  the host's fault, not the job's: return it uncounted, claim nothing until the host works
    │       └── StorageAway  nor is this the job's fault: return it uncounted, claim nothing while the storage is away
    ├── LeaseLost          another host may own the job now: stop, write nothing
    ├── DatabaseAway       Postgres does not answer: training goes on, try again
    │   ├── DatabaseUnprepared   a table or grant that was there is missing for now: treated as away
    │   └── RowsHidden           the row exists but this role cannot see it: treated as away
    ├── StatementRefused   Postgres answers but refuses: a constraint, a trigger of the app: skip the row, go on
    ├── PointsRefused      the app's metrics_points accepts no points: training goes on without them
    └── HostUnfit          this host cannot work as configured: exit 78, do not restart

Cancelling and shutting down are outcomes, not errors (see daemon.queue.job).
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from training.events import ErrorCode, HostPart

# EX_CONFIG of sysexits.h: supervisord does not restart a daemon that exits with it.
EXIT_UNFIT = 78


class TrainerError(Exception):
    """Root of everything this package raises on purpose."""


class JobError(TrainerError):
    """An attempt cannot go on. `message` and `hint` are shown to the job's owner: they contain no secret, and no folder
    of this host. `detail` is for the operator."""

    def __init__(self, code: ErrorCode, message: str, hint: str | None = None, *, detail: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.detail = detail

    @property
    def for_the_operator(self) -> str:
        """What happened, with the folders of this host."""
        return f"{self.message} ({self.detail})" if self.detail else self.message


class JobFailed(JobError):
    """Permanent: trying again unchanged would fail again."""


class JobDelayed(JobError):
    """Transient: the next attempt, here or elsewhere, may succeed."""


class HostFault(JobDelayed):
    """A part of this host does not work, whatever the job."""

    def __init__(self, part: HostPart, code: ErrorCode, message: str, *, detail: str) -> None:
        unharmed = "Nothing is wrong with the job: it runs as soon as a host can take it."
        super().__init__(code, message, unharmed, detail=detail)
        self.part: HostPart = part

    @property
    def for_the_operator(self) -> str:
        return self.detail or self.message


class StorageAway(JobDelayed):
    """The storage does not answer, or not as it should, whatever the job; it may work for other hosts."""


def disk_fault(part: HostPart, folder: Path, error: OSError) -> HostFault:
    """Returns the fault for an operating system error on this host's disk. Its message contains no path."""
    words = error.strerror or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = f"{shutil.disk_usage(folder).free / 1024**3:.1f} GiB are free" if folder.exists() else "it is not there"
        return HostFault(
            part, ErrorCode.DISK_FULL, f"The {part} of the host is full: {words}.", detail=f"{folder}: {words}; {free}"
        )
    return HostFault(
        part, ErrorCode.INTERNAL, f"The {part} of the host cannot be written: {words}.", detail=f"{folder}: {words}"
    )


class LeaseLost(TrainerError):
    """A fenced write found no row: the lease has passed to another host, or the job is final."""


class DatabaseAway(TrainerError):
    """Postgres cannot be reached, or the connection broke in the middle of a statement."""


class DatabaseUnprepared(DatabaseAway):
    """A table, column, function or grant is missing in a database that worked before: after a reset, say, or a REVOKE.

    In a database that never worked, the same is HostUnfit: there waiting does not help."""


class RowsHidden(DatabaseAway):
    """Row security hides a row that exists, or may exist, from the daemon's role. No row was deleted."""


class StatementRefused(TrainerError):
    """Postgres received our statement and refused it: because of a constraint, a trigger, a policy of the app.

    `who` names what refused it, as far as Postgres reports. Waiting does not help, but another row may be accepted."""

    def __init__(self, message: str, *, who: str | None = None, sqlstate: str | None = None) -> None:
        super().__init__(f"{message} ({who})" if who else message)
        self.who = who
        self.sqlstate = sqlstate


class PointsRefused(TrainerError):
    """The app's table of chart points refuses ours: it has an unknown column, a trigger, or lacks a grant."""


class HostUnfit(TrainerError):
    """Settings, database role or hardware make work on this host impossible. The message says what to change."""
