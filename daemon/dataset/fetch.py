"""Fetches a job's dataset, from Storage or from its URL, after its owner's right to it is checked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import assert_never
from uuid import UUID

from daemon.dataset.transfer import COPY_BYTES, FetchedDataset, _forbidden, _judge_head, _too_large, _Transfer, download
from daemon.errors import JobFailed, disk_fault
from daemon.network.address_rules import AddressRules, redact, rules_from
from daemon.queue.job import JobDataset
from daemon.settings import Settings
from daemon.storage.interface import LocalFile, SignedUrl, Storage, safe_object_path
from training.events import ErrorCode

# In this bucket of the app's, a path may also begin with the id of a training file that the owner has made; in all
# others it begins with the owner's id. The guard of `datasets` keeps the same rule (tests/dataset/paths.py).
IMPORTED_BUCKET = "training-files"

# Asks the database whether a path in that bucket is a training file of this user.
OwnsFile = Callable[[UUID, str], Awaitable[bool]]


async def fetch_dataset(
    dataset: JobDataset,
    settings: Settings,
    storage: Storage,
    to: Path,
    *,
    known: FetchedDataset | None = None,
    rules: AddressRules | None = None,
    owns_file: OwnsFile | None = None,
) -> FetchedDataset:
    """Fetches a job's dataset to `to`, whole or not at all.

    `known` is an earlier copy of the same stored object, with a validator, which the caller can spare: it becomes
    `to` if Storage says that nothing has changed. Without `owns_file` no training file counts as the owner's.

    Raises JobFailed: dataset_forbidden (another owner's, or a bucket or address that is not allowed),
    dataset_invalid (too large, empty, not a dataset at all), dataset_unreachable (not in storage, or the server of a
    given URL refused); and JobDelayed: dataset_unreachable (no answer for now). StorageAway, whatever the project's
    storage does with a dataset that is there. HostFault where the file cannot be written.
    """
    rules = rules or rules_from(settings)
    if dataset.dataset_user_id is not None and dataset.dataset_user_id != dataset.user_id:
        raise _forbidden(
            f"the dataset {dataset.dataset_id} does not belong to the owner of job {dataset.job_id}",
            "use your own dataset",
        )
    if dataset.dataset_url:
        url = dataset.dataset_url

        async def given() -> str:
            return url

        limit = settings.max_dataset_bytes
        return await download(given, to, rules=rules, max_bytes=limit, source=redact(url))
    bucket, path = await _own_path(dataset, settings, owns_file)
    source = f"{bucket}/{path}"
    match await storage.open_dataset(bucket, path):
        case LocalFile(file):
            return await asyncio.to_thread(_copy_local, file, to, settings.max_dataset_bytes, source)
        case SignedUrl():

            async def signed() -> str:
                opened = await storage.open_dataset(bucket, path)
                assert isinstance(opened, SignedUrl)
                return opened.url

            limit = settings.max_dataset_bytes
            return await download(signed, to, rules=rules, max_bytes=limit, source=source, is_stored=True, known=known)
        case unexpected:
            assert_never(unexpected)


async def _own_path(dataset: JobDataset, settings: Settings, owns_file: OwnsFile | None) -> tuple[str, str]:
    """Returns bucket and path of the job's dataset row, if this owner may read them."""
    if not dataset.storage_bucket or not dataset.storage_path:
        raise JobFailed(
            ErrorCode.DATASET_UNREACHABLE,
            f"job {dataset.job_id} names no dataset: "
            "neither dataset_url nor a dataset with storage_bucket and storage_path",
            "set dataset_url, or dataset_id of a dataset that has been uploaded",
        )
    if dataset.dataset_user_id != dataset.user_id:
        raise _forbidden(
            f"the dataset {dataset.dataset_id} does not belong to the owner of job {dataset.job_id}",
            "use your own dataset",
        )
    bucket, path = dataset.storage_bucket, safe_object_path(dataset.storage_path)
    if bucket not in settings.dataset_buckets:
        allowed = ", ".join(settings.dataset_buckets)
        raise _forbidden(
            f"datasets are not read from bucket {bucket!r}, only from {allowed}",
            "move the dataset, or ask the operator to add the bucket to TRAINER_DATASET_BUCKETS",
        )
    if path.startswith(f"{dataset.user_id}/"):
        return bucket, path
    if bucket != IMPORTED_BUCKET:
        raise _forbidden(
            f"the dataset {bucket}/{path} is not under its owner's prefix {dataset.user_id}/",
            "upload the dataset under your own user id and correct storage_path",
        )
    if owns_file is None or not await owns_file(dataset.user_id, path):
        raise _forbidden(
            f"the dataset {bucket}/{path} is no training file of the owner of job {dataset.job_id}",
            "import one of your own training files, or upload the dataset under your own user id",
        )
    return bucket, path


def _copy_local(file: Path, to: Path, max_bytes: int, source: str) -> FetchedDataset:
    part = to.with_name(to.name + ".part")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as reading, part.open("wb") as writing:
            transfer = _Transfer(writing, max_bytes, source)
            while piece := reading.read(COPY_BYTES):
                if transfer.received + len(piece) > max_bytes:
                    raise _too_large(transfer, f"{file.stat().st_size:,} bytes")
                transfer.write(piece)
        _judge_head(part, source)
        part.replace(to)
    except OSError as error:
        raise disk_fault("work folder", to.parent, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return FetchedDataset(to, transfer.received, transfer.digest.hexdigest(), source)
