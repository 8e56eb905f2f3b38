"""A host dies, another that shares no disk with it goes on from the checkpoint in Storage, to the same adapter.

Real daemons, the real trainer on a tiny model, a double of Supabase Storage.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.daemon_process import REAL, DaemonProcess, alive, eventually
from tests.doubles.storage import StorageDouble
from tests.lifecycle.queue import Queue
from tests.tiny_models import conversation, make_model

BUCKET = "lora-models"


class Sites:
    """Datacenters with nothing in common but the database and the project's Storage."""

    def __init__(self, queue: Queue, storage: StorageDouble, folder: Path) -> None:
        self.queue = queue
        self.storage = storage
        self.folder = folder
        make_model(folder / "models" / "acme" / "tiny", "qwen3")

    def daemon(self, name: str, **settings: Any) -> DaemonProcess:
        site = self.folder / name
        site.mkdir()
        daemon = self.queue.daemon(
            site,
            name=name,
            command=REAL,
            storage="supabase",
            checkpoints_in_storage="true",
            checkpoint_seconds=1,
            lease_seconds=2,
            models_dir=self.folder / "models",
            **settings,
        )
        daemon.environment |= {
            "SUPABASE_URL": self.storage.url,
            "SUPABASE_SERVICE_ROLE_KEY": self.storage.key,
            "OMP_NUM_THREADS": "1",
        }
        return daemon

    def insert(self, epochs: int = 30, conversations: int = 16) -> UUID:
        """Long enough that a checkpoint is stored, and seen to be, before the training is over."""
        path = f"{self.queue.user_id}/{uuid4()}.jsonl"
        lines = [json.dumps(conversation(number)) for number in range(conversations)]
        self.storage.put("lora-datasets", path, "\n".join(lines).encode())
        dataset = uuid4()
        self.queue.select(
            "INSERT INTO datasets (id, user_id, name, storage_path, file_name, file_size) "
            "VALUES (%s, %s, 'A dataset', %s, 'data.jsonl', 1)",
            dataset, self.queue.user_id, path,
        )  # fmt: skip
        (row,) = self.queue.select(
            "INSERT INTO training_jobs (user_id, dataset_id, hyperparameters) VALUES (%s, %s, %s) RETURNING id",
            self.queue.user_id, dataset,
            json.dumps({"base_model": "acme/tiny", "epochs": epochs, "rank": 4, "batch_size": 4, "dropout": 0.1}),
        )  # fmt: skip
        return UUID(str(row["id"]))

    async def wait_for(self, job: UUID, status: str) -> dict[str, Any]:
        return await asyncio.to_thread(self.queue.wait_for, job, status, seconds=300)

    async def wait_for_event(self, job: UUID, kind: str) -> dict[str, Any]:
        async with asyncio.timeout(300):
            while True:
                if found := [event for event in self.queue.events(job) if event["kind"] == kind]:
                    return found[-1]
                assert self.queue.row(job)["status"] not in ("completed", "failed"), self.queue.row(job)
                await asyncio.sleep(0.05)

    def told(self, job: UUID, kind: str) -> list[dict[str, Any]]:
        return [event["data"] for event in self.queue.events(job) if event["kind"] == kind]

    def objects(self) -> set[str]:
        root = self.storage.path_of(BUCKET, "")
        return {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}

    def adapter(self, job: UUID) -> str:
        """The sha256 of the weights that the row promises."""
        path = self.queue.row(job)["adapter_path"].removeprefix(f"{BUCKET}/")
        with tarfile.open(self.storage.path_of(BUCKET, path)) as archive:
            weights = archive.extractfile("adapter_model.safetensors")
            assert weights is not None
            return hashlib.sha256(weights.read()).hexdigest()

    async def tidied(self) -> None:
        """Wait until no note is left: daemons tidy up in the background, after the row has said that a job is done."""
        await asyncio.to_thread(eventually, lambda: not self.notes(), seconds=60, why=lambda: f"noted: {self.notes()}")

    def notes(self) -> list[dict[str, Any]]:
        return self.queue.select("SELECT * FROM training_uploads")


@pytest.fixture
async def sites(queue: Queue, tmp_path: Path) -> AsyncIterator[Sites]:
    async with StorageDouble(tmp_path / "double") as storage:
        yield Sites(queue, storage, tmp_path)


def kill(daemon: DaemonProcess) -> None:
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.wait()
    assert not alive(daemon.pid)


@pytest.mark.system
async def test_a_host_elsewhere_resumes_from_storage_and_ends_with_the_same_adapter(sites: Sites) -> None:
    with sites.daemon("first") as first:
        job = sites.insert()
        stored = await sites.wait_for_event(job, "checkpoint_stored")
        kill(first)
    with sites.daemon("second"):
        await sites.wait_for(job, "completed")
        undisturbed = sites.insert()
        await sites.wait_for(undisturbed, "completed")
        await sites.tidied()
    (fetched,) = sites.told(job, "checkpoint_fetched")
    (resumed,) = sites.told(job, "resumed")
    assert resumed["step"] == fetched["step"] >= stored["data"]["step"] > 0
    assert sites.told(undisturbed, "resumed") == []
    assert sites.adapter(job) == sites.adapter(undisturbed)
    # Nothing but what the rows name: the checkpoints are gone, as the notes of them are.
    assert not [name for name in sites.objects() if name.startswith("checkpoints/")]


@pytest.mark.system
async def test_a_damaged_checkpoint_in_storage_is_passed_over_and_a_shutdown_leaves_a_whole_one(sites: Sites) -> None:
    with sites.daemon("first") as first:
        job = sites.insert()
        await sites.wait_for_event(job, "checkpoint_stored")
        first.signal(signal.SIGTERM)
        await asyncio.to_thread(first.wait, 60)
    assert sites.queue.row(job)["status"] == "queued"
    saved, stored = sites.told(job, "checkpoint_saved"), sites.told(job, "checkpoint_stored")
    assert stored[-1]["step"] == saved[-1]["step"]  # the one that the shutdown made
    (note,) = sites.notes()
    assert {name for name in sites.objects() if name.startswith("checkpoints/")} == set(note["objects"])
    damaged = sites.storage.path_of(BUCKET, next(name for name in note["objects"] if name.endswith("safetensors")))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with sites.daemon("second"):
        await sites.wait_for(job, "completed")
        await sites.tidied()
    (ignored,) = sites.told(job, "stored_checkpoint_ignored")
    assert "a different hash" in ignored["reason"]
    assert sites.told(job, "resumed") == []
