"""What a step works with: the host's settings and storage, and the job's adapter and base model, ready for use."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from daemon.base_model.candidates import ResolvedModel
from daemon.base_model.resolve import resolve_model
from daemon.database.connection import Database
from daemon.database.retry import retry_until_database_is_back
from daemon.delivery.delivery import Delivery
from daemon.delivery.store import SqlDeliveries
from daemon.errors import JobFailed, disk_fault
from daemon.host.inspect import Host
from daemon.redaction import Redaction
from daemon.settings import Settings
from daemon.storage.archive import ArchiveInvalid, unpack_adapter
from daemon.storage.interface import Storage
from training.events import ErrorCode

log = structlog.get_logger()


@dataclass(frozen=True)
class Tools:
    """What all deliveries of this host share."""

    settings: Settings
    host: Host
    storage: Storage
    database: Database
    deliveries: SqlDeliveries
    redaction: Redaction


class DeliveryContext:
    """One delivery's surroundings.

    `folder` is its own on this host's disk. It is kept when the delivery is given back, so that the next try goes on
    with what is there, and deleted when the delivery is over. A step is cancelled when this host leaves or loses the
    delivery: it must end its processes in a `finally`."""

    def __init__(self, tools: Tools, delivery: Delivery) -> None:
        self._tools = tools
        self.delivery = delivery
        self.settings = tools.settings
        self.host = tools.host
        self.storage = tools.storage
        self.database = tools.database
        self.redaction = tools.redaction
        self.folder = folder_of(tools.settings, delivery)

    async def adapter_folder(self) -> Path:
        """Returns a folder with the adapter's files, fetched from storage and compared with the job's row.

        Raises JobFailed if it is not there any more, else what the storage raises."""
        folder, archive, delivery = self.folder / "adapter", self.folder / "adapter.tar.gz", self.delivery
        if folder.is_dir():
            return folder
        bucket, _, path = (delivery.adapter_path or "").partition("/")
        if bucket != self.storage.bucket or not path:
            raise JobFailed(
                ErrorCode.UPLOAD_FAILED,
                f"The adapter {delivery.adapter_path} is not in the bucket {self.storage.bucket} of this service.",
                "Ask for the delivery again on a host that uses the bucket in which the adapter was stored.",
            )
        await self._prepare()
        try:
            stored = await self.storage.download(path, archive)
            if stored.sha256 != delivery.adapter_sha256:
                raise _altered(delivery)
            await asyncio.to_thread(unpack_adapter, archive, folder)
        except ArchiveInvalid as error:
            raise _altered(delivery, str(error)) from error
        finally:
            archive.unlink(missing_ok=True)
        return folder

    async def base_model(self, on_progress: Callable[[int, int], None] = lambda _done, _total: None) -> ResolvedModel:
        """Returns the base model on this host's disk, in the revision that the adapter was trained on."""
        name, revision = self.delivery.model_name, self.delivery.model_revision
        if name is None:
            raise JobFailed(
                ErrorCode.MODEL_NOT_FOUND,
                "The job's row does not say which base model its adapter was trained on.",
                "Train the job again; its adapter itself is complete and can be downloaded.",
            )
        model = await resolve_model(name, self.settings, on_progress)
        if revision is not None and model.revision is not None and model.revision != revision:
            raise JobFailed(
                ErrorCode.MODEL_NOT_FOUND,
                f"The adapter was trained on {name} in revision {revision}; this host has revision {model.revision}.",
                "Put that revision into the models folder, or train the job again, and ask for the delivery again.",
            )
        return model

    async def record_objects(self, objects: Sequence[str]) -> None:
        """Records what will be stored, however long the database is away. Raises LockLost."""
        await retry_until_database_is_back(
            lambda: self._tools.deliveries.record_export(self.delivery, self.storage.location, objects),
            "delivery_delayed",
        )

    async def _prepare(self) -> None:
        try:
            await asyncio.to_thread(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            # Other tenants' processes on this host must not read it.
            self.folder.chmod(0o700)
        except OSError as error:
            raise disk_fault("work folder", self.folder.parent, error) from error


def deliveries_folder(settings: Settings) -> Path:
    return settings.work_dir / ".deliveries"


def folder_of(settings: Settings, delivery: Delivery) -> Path:
    """Returns the folder of one claim: a stale host on the same volume writes into another one."""
    return deliveries_folder(settings) / f"{delivery.id}-{delivery.claims}"


def adopt_folder(settings: Settings, delivery: Delivery) -> None:
    """Takes over what a claim that was lost has made on this volume: an export of hours is gone on with.

    After the rename a stale host cannot reach it: what it still writes goes to the old name."""
    own = folder_of(settings, delivery)
    if own.exists():
        return
    for claims in range(delivery.claims - 1, 0, -1):
        earlier = own.with_name(f"{delivery.id}-{claims}")
        # Its host may be deleting it.
        with contextlib.suppress(OSError):
            earlier.rename(own)
            log.info("delivery_folder_adopted", from_claims=claims)
            return


def forget_folder(settings: Settings, delivery: Delivery) -> None:
    """Deletes what this claim of the delivery, and lost ones before it, have left on disk."""
    for folder in deliveries_folder(settings).glob(f"{delivery.id}-*"):
        if folder.name.rpartition("-")[2].isdigit() and int(folder.name.rpartition("-")[2]) <= delivery.claims:
            shutil.rmtree(folder, ignore_errors=True)


def _altered(delivery: Delivery, why: str | None = None) -> JobFailed:
    return JobFailed(
        ErrorCode.UPLOAD_FAILED,
        f"The stored adapter {delivery.adapter_path} is not the one that was trained: its bytes have another hash.",
        "Restore the object from a backup, or train the job again.",
        detail=why,
    )
