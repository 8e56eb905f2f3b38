"""The folder of datasets fetched before their jobs are claimed; what an earlier process left there is removed."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from uuid import UUID

from daemon.host.inspect import Host

TIDY_SECONDS = 3600.0


_EARLY = ".early"


def open_early_folder(work_dir: Path) -> Path:
    """Where datasets lie before their jobs are claimed. Raises OSError."""
    folder = work_dir / _EARLY
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def early_dataset_name(host: Host, job_id: UUID) -> str:
    return f"{_of_this_boot(host)}{job_id}"


def remove_early_datasets(work_dir: Path, host: Host) -> None:
    """Remove what this host's earlier daemons left, and what other hosts on the volume have left for an hour.

    Should one of them live, it fetches again what it wanted."""
    folder = work_dir / _EARLY
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.name.startswith(_of_this_boot(host)):
            continue
        with contextlib.suppress(OSError):  # another host is removing it
            if file.name.startswith(f"{host.hostname}.") or file.stat().st_mtime < time.time() - TIDY_SECONDS:
                file.unlink()


def _of_this_boot(host: Host) -> str:
    return f"{host.hostname}.{host.worker_id}."
