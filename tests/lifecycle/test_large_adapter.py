"""A job with a large adapter through all that happens to long uploads: nothing is lost, nothing is trained twice.

The hosts are real daemons, one after the other: the first is killed in mid-upload, the second loses its key, and the
third, with the new key, finds that the server has dropped the upload. Connections are cut all the while.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from tests.daemon_process import DaemonProcess, eventually
from tests.doubles.storage import Bucket
from tests.doubles.storage_keys import make_key
from tests.lifecycle.project import Project
from tests.lifecycle.queue import FINAL
from tests.lifecycle.test_finished_adapter import trainings
from tests.lifecycle.test_out_of_service import out_of_service, returned
from tests.storage.upload_ordeal import NEW_SECRET, Ordeal
from training.files.durable_files import sha256_of

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.system
@pytest.mark.double
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("megabytes", "cuts"), [(20, 2), (200, 10), (1000, 20)])
async def test_a_large_adapter_survives_cuts_a_kill_a_changed_key_and_an_expiry(
    project: Project, megabytes: int, cuts: int
) -> None:
    project.storage.buckets["lora-models"] = Bucket()
    ordeal = Ordeal(project.storage, cuts)
    marks = ["mark", str(project.folder / "trainings")]
    job = project.insert(script=[marks, ["weights", megabytes], ["steps", 5, 0.0]])

    with project.daemon("killed", forked=False) as daemon:
        await until(daemon, ordeal, lambda: daemon.process is not None and daemon.process.poll() is not None)
    (trained,) = (project.folder / "jobs" / str(job)).rglob(WEIGHTS)
    sha256 = await asyncio.to_thread(sha256_of, trained)

    with project.daemon("keyless", forked=False) as daemon:
        look = out_of_service(project.queue, "storage")
        await until(daemon, ordeal, lambda: look() is not None)
        # Both attempts of this host and the next are one: it is no fault of the job's.
        await asyncio.to_thread(eventually, lambda: returned(project.queue, job))
        daemon.signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.wait, 30) == 0

    project.storage.key = make_key("service_role", secret=NEW_SECRET)
    with project.daemon("last", forked=False) as daemon:
        await until(daemon, ordeal, lambda: project.queue.row(job)["status"] in FINAL)
        row = await project.wait_for(job, "completed")
        await project.tidied()

    assert (ordeal.acts_left, ordeal.cuts_made) == (0, cuts)
    assert trainings(project) == 1 and row["attempt"] == 2 and row["error_code"] is None
    assert await asyncio.to_thread(hashes, project, job) == {"in the archive": sha256, "beside it": sha256}
    archive = project.storage.path_of("lora-models", row["adapter_path"].removeprefix("lora-models/"))
    assert (archive.stat().st_size, sha256_of(archive)) == (row["adapter_bytes"], row["adapter_sha256"])
    # Of the attempts before nothing is left, neither objects nor uploads that are not whole.
    folder = row["adapter_path"].removeprefix("lora-models/").removesuffix(".tar.gz")
    assert all(name.startswith(folder) for name in project.objects())
    assert not (project.folder / "jobs" / str(job)).exists()
    assert 0 < ordeal.peak_mib < 100


async def until(daemon: DaemonProcess, ordeal: Ordeal, reached: Callable[[], bool]) -> None:
    """Until something is so; meanwhile the memory of the daemon is measured, and what is to happen to it happens."""
    ordeal.process = daemon.process
    async with asyncio.timeout(600):
        while not await asyncio.to_thread(reached):
            ordeal.measure()
            await asyncio.sleep(0.05)


def hashes(project: Project, job: UUID) -> dict[str, str]:
    path = project.queue.row(job)["adapter_path"].removeprefix("lora-models/")
    archive: Path = project.storage.path_of("lora-models", path)
    with tarfile.open(archive) as opened:
        member = opened.extractfile(WEIGHTS)
        assert member is not None
        inside = hashlib.file_digest(member, "sha256").hexdigest()
    beside = archive.with_name(archive.name.removesuffix(".tar.gz")) / WEIGHTS
    return {"in the archive": inside, "beside it": sha256_of(beside)}
