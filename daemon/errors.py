"""What can go wrong, sorted by what to do next.

    TrainerError
    ├── JobError           this job's attempt ends here
    │   ├── JobFailed      for good: the user must change something
    │   └── JobDelayed     transient: another attempt may succeed
    │       └── HostFault  this host's, not the job's: give it back uncounted, claim nothing until the host is mended
    ├── LeaseLost          somebody else owns the job now: stop, write nothing
    ├── DatabaseAway       Postgres does not answer: training goes on, try again
    │   ├── DatabaseUnprepared   a table or a right that was there is missing for now: as good as away
    │   └── RowsHidden           the row is there and this role does not see it: as good as away
    ├── StatementRefused   Postgres answers and will not: a constraint, an app's trigger: leave the row, go on
    ├── PointsRefused      the app's metrics_points takes no points: training goes on without them
    └── HostUnfit          this host cannot work as configured: exit 78, do not restart

Cancelling and shutting down are outcomes, not errors (see daemon.queue.job).
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from training.events import ErrorCode, HostPart

# EX_CONFIG of sysexits.h: supervisord is told not to restart a daemon that exits with it.
EXIT_UNFIT = 78


class TrainerError(Exception):
    """Root of everything this package raises on purpose."""


class JobError(TrainerError):
    """An attempt cannot go on. `message` and `hint` are written for the user's eyes; they carry no secret."""

    def __init__(self, code: ErrorCode, message: str, hint: str | None = None, stack: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.stack = stack


class JobFailed(JobError):
    """For good: trying again unchanged would fail again."""


class JobDelayed(JobError):
    """Transient: the next attempt, here or elsewhere, may succeed."""


class HostFault(JobDelayed):
    """A part of this host does not work, whatever the job. `message` and `hint` name no path of this host: the job's
    owner reads them. What the operator needs to know is `detail`."""

    def __init__(self, part: HostPart, code: ErrorCode, message: str, *, detail: str, stack: str | None = None) -> None:
        super().__init__(code, message, "Nothing is wrong with the job: it runs as soon as a host can take it.", stack)
        self.part: HostPart = part
        self.detail = detail


def disk_fault(part: HostPart, folder: Path, error: OSError) -> HostFault:
    """What the operating system said of this host's disk, for the job's owner without its paths."""
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
    """A fenced write found no row: the lease passed to somebody else, or the job is final."""


class DatabaseAway(TrainerError):
    """Postgres cannot be reached, or the connection broke in the middle of a statement."""


class DatabaseUnprepared(DatabaseAway):
    """A table, a column, a function or a right is missing in a database that had served us: a reset, say, or a REVOKE.

    Before it ever served us the same is HostUnfit: then nobody would mend it by waiting."""


class RowsHidden(DatabaseAway):
    """A row that is there, or may be there, and that row security keeps from the daemon's role. No row was deleted."""


class StatementRefused(TrainerError):
    """Postgres took our statement and refused what it does: a constraint, a trigger, a policy of the app's own.

    `who` names the one that objected, as far as Postgres says. Waiting does not help and another row may pass."""

    def __init__(self, message: str, *, who: str | None = None, sqlstate: str | None = None) -> None:
        super().__init__(f"{message} ({who})" if who else message)
        self.who = who
        self.sqlstate = sqlstate


class PointsRefused(TrainerError):
    """The table of the charts is the app's own, and it refuses: a column that we do not know, a trigger, a grant."""


class HostUnfit(TrainerError):
    """Settings, database role or hardware make work on this host impossible; says what to change."""
