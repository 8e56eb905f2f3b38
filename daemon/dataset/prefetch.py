"""Prefetches and validates the next job's dataset while a running job comes to its end.

It is only a guess. The claim chooses as always; the attempt uses the file only if the rows are the same and
Storage says that the object is unchanged. Whatever fails here is done again there, and reported there.

What it saves is the download between two jobs of a host: at 35 MB/s a GPU idles 3 s for 100 MB and a minute for 2 GiB.

Only for datasets in Storage: a dataset_url is a third party's server, which may count, charge for, or limit reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import structlog

from daemon.dataset.fetch import OwnsFile, fetch_dataset
from daemon.dataset.prefetch_folder import early_dataset_name, open_early_folder
from daemon.dataset.transfer import FetchedDataset
from daemon.errors import DatabaseAway, JobDelayed, JobFailed
from daemon.host.inspect import Host
from daemon.queue.job import JobDataset
from daemon.settings import Settings
from daemon.storage.interface import Storage
from daemon.trainer.environment import child_environment
from training.events import ErrorCode
from training.files.durable_files import sha256_of

log = structlog.get_logger()
T = TypeVar("T")

# 2 GiB at 35 MB/s. Any earlier, most guesses would be wrong on many hosts: other jobs move to the front of the queue.
NEAR_END_SECONDS = 60.0
# Times the largest allowed dataset: as much again stays free for the checkpoints of running jobs.
ROOM = 2
# Reading larger ones takes gigabytes of memory during training.
MAX_READ_BYTES = 256 * 2**20
_SHOWN_CHARACTERS = 500


class EarlyDataset:
    """One dataset, on its way or complete. Its holder discards it in the end."""

    def __init__(
        self,
        dataset: JobDataset,
        fetching: asyncio.Task[FetchedDataset | None],
        reading: asyncio.Task[None],
    ) -> None:
        self.dataset = dataset
        self._fetching = fetching
        self._reading = reading

    async def take(self, to: Path) -> FetchedDataset | None:
        """Waits for the download and moves it beside `to`: a copy whose validator must still be confirmed.

        None when it did not arrive whole, or has no validator to tell it from another version."""
        self._reading.cancel()
        await asyncio.wait({self._fetching})
        fetched = _result(self._fetching)
        if fetched is None or fetched.validator is None:
            return None
        return await asyncio.to_thread(_move_intact, fetched, to.with_name(f"{to.name}.early"))

    def discard(self) -> None:
        """Stops at once and leaves nothing behind; what was taken belongs to its taker."""
        self._reading.cancel()
        self._fetching.cancel()
        self._fetching.add_done_callback(_remove)


class Prefetch:
    """Guesses once after each claim: on many hosts most guesses are wrong, and each is a download."""

    def __init__(self, settings: Settings, host: Host, storage: Storage, owns_file: OwnsFile | None = None) -> None:
        self._settings = settings
        self._owns_file = owns_file
        self._host = host
        self._storage = storage
        # A file in a local folder needs no prefetch.
        self._off = settings.effective_storage == "folder"
        self._guessed = False
        self._early: EarlyDataset | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def wants_a_job(self) -> bool:
        return not self._off and not self._guessed

    def guess(self, dataset: JobDataset) -> None:
        """Begins to fetch this dataset: its job will likely be claimed next."""
        if not self.wants_a_job:
            return
        self._guessed = True
        if dataset.dataset_url is not None:
            return
        fetching = self._start(self._fetch(dataset), f"early dataset of {dataset.job_id}")
        reading = self._start(_read_through(dataset.job_id, fetching), f"reading of {dataset.job_id}")
        self._early = EarlyDataset(dataset, fetching, reading)

    def hand_over(self, dataset: JobDataset) -> EarlyDataset | None:
        """Returns the prefetched dataset of a job that was claimed; a wrong guess is discarded."""
        early, self._early = self._early, None
        self._guessed = False
        if early is None or early.dataset == dataset:
            return early
        early.discard()
        return None

    def forget(self, job_id: object) -> None:
        """Drops the guess if it is this job's: the job will not run."""
        if self._early is not None and self._early.dataset.job_id == job_id:
            self.drop()

    def drop(self) -> None:
        """Discards a wrong guess, so that another one can be made."""
        if self._early is not None:
            self._early.discard()
        self._early, self._guessed = None, False

    def stop(self) -> None:
        """Discards the guess and makes no more."""
        self._off = True
        self.drop()

    async def ended(self) -> None:
        """Returns when nothing that was started here still runs."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)

        def ended(done: asyncio.Task[T]) -> None:
            self._tasks.discard(done)
            if not done.cancelled() and (error := done.exception()) is not None:
                log.error("lookahead_crashed", task=name, exc_info=error)

        task.add_done_callback(ended)
        return task

    async def _fetch(self, dataset: JobDataset) -> FetchedDataset | None:
        settings, job_id = self._settings, str(dataset.job_id)
        began = time.monotonic()
        try:
            folder = await asyncio.to_thread(open_early_folder, settings.work_dir)
            free = (await asyncio.to_thread(shutil.disk_usage, folder)).free
            if free < ROOM * settings.max_dataset_bytes:
                log.info("next_dataset_without_room", job_id=job_id, free_bytes=free)
                return None
            path = folder / early_dataset_name(self._host, dataset.job_id)
            fetched = await fetch_dataset(dataset, settings, self._storage, path, owns_file=self._owns_file)
        except JobFailed as error:
            log.warning("next_dataset_refused", job_id=job_id, code=error.code, error=error.message)
            return None
        except (JobDelayed, DatabaseAway, OSError) as error:
            log.info("next_dataset_not_fetched", job_id=job_id, error=str(error))
            return None
        log.info(
            "next_dataset_fetched",
            job_id=job_id,
            bytes=fetched.bytes,
            seconds=round(time.monotonic() - began, 3),
        )
        return fetched


async def _read_through(job_id: UUID, fetching: asyncio.Task[FetchedDataset | None]) -> None:
    """Validates it as its job will: its pages are in memory afterwards, and its faults are logged."""
    await asyncio.wait({fetching})
    fetched = _result(fetching)
    if fetched is None or fetched.bytes > MAX_READ_BYTES:
        return
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "training.data.validate", str(fetched.path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=child_environment(os.environ, ()),
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    said = json.loads(output) if process.returncode == 0 else {}
    if said.get("code") == ErrorCode.DATASET_INVALID:
        log.warning("next_dataset_faulty", job_id=str(job_id), error=said["message"][:_SHOWN_CHARACTERS])


def _result(fetching: asyncio.Task[FetchedDataset | None]) -> FetchedDataset | None:
    """Returns the result of a finished task; None if it was cancelled or failed."""
    return None if fetching.cancelled() or fetching.exception() is not None else fetching.result()


def _remove(fetching: asyncio.Task[FetchedDataset | None]) -> None:
    if (fetched := _result(fetching)) is not None:
        with contextlib.suppress(OSError):
            fetched.path.unlink()


def _move_intact(fetched: FetchedDataset, to: Path) -> FetchedDataset | None:
    """Moves it out of reach of clean-ups and checks its hash again: the volume may be shared."""
    try:
        fetched.path.replace(to)
        if sha256_of(to) == fetched.sha256:
            return replace(fetched, path=to)
        to.unlink()
    except OSError as error:
        log.info("early_dataset_lost", error=str(error))
    return None
