"""Whether a storage works at all: a small object is stored, read back and deleted.

A project's storage may list its buckets while what keeps the objects behind it is away. A host that believed the list
would take one job after another and return each.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from uuid import UUID, uuid4

import structlog

from daemon.errors import JobFailed, StorageAway
from daemon.storage.interface import Storage

log = structlog.get_logger()


async def try_out(storage: Storage, worker_id: UUID) -> None:
    """Raises StorageAway or HostFault if the storage does not work. Each host writes to a name of its own."""
    await storage.prove()
    name, content = f"probes/{worker_id}.json", f'"{uuid4()}"'.encode()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.json"
        file.write_bytes(content)
        try:
            await storage.upload(file, name, sha256=hashlib.sha256(content).hexdigest(), resume_dir=file.parent)
        except JobFailed as error:
            # A limit of the bucket: the check before each training says it to whom it concerns.
            log.info("storage_probe_refused", error=error.message)
            return
    try:
        await storage.delete(name)
    except StorageAway as error:
        log.warning("storage_probe_left", object=name, error=error.message)
