"""The folder of prefetched datasets. Files left by an earlier process are deleted."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from uuid import UUID

from daemon.host.inspect import Host

TIDY_SECONDS = 3600.0


_EARLY = ".early"


def open_early_folder(work_dir: Path) -> Path:
    """Creates the folder for prefetched datasets. Raises OSError."""
    folder = work_dir / _EARLY
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def early_dataset_name(host: Host, job_id: UUID) -> str:
    return f"{_of_this_boot(host)}{job_id}"


def remove_early_datasets(work_dir: Path, host: Host) -> None:
    """Deletes what this host's earlier daemons left, and what other hosts on the volume left over an hour ago.

    A host that is still running downloads such a file again."""
    folder = work_dir / _EARLY
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.name.startswith(_of_this_boot(host)):
            continue
        with contextlib.suppress(OSError):  # another host is deleting it
            if file.name.startswith(f"{host.hostname}.") or file.stat().st_mtime < time.time() - TIDY_SECONDS:
                file.unlink()


def _of_this_boot(host: Host) -> str:
    return f"{host.hostname}.{host.worker_id}."
