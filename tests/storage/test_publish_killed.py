"""A daemon that is killed outright while it publishes: the next one goes on, and one whole adapter is stored."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from daemon.storage.archive import unpack_adapter
from daemon.storage.publish import object_names
from daemon.storage.tus import CHUNK_BYTES
from tests.doubles.storage import SERVICE_KEY, Bucket, StorageDouble
from tests.forked_process import ForkedProcess, forker
from tests.paths import ROOT
from tests.storage.publishing_process import JOB

PUBLISHING = ROOT / "tests" / "storage" / "publishing_process.py"

# The weights do not shrink: the archive has four chunks.
WEIGHTS = 3 * CHUNK_BYTES + 1000


def start(double: StorageDouble, folder: Path) -> ForkedProcess:
    arguments = (double.url, SERVICE_KEY, str(folder), str(WEIGHTS))
    return forker(str(PUBLISHING)).start_quietly(os.environ, ROOT, folder / "publishing.log", *arguments)


@pytest.mark.parametrize(
    ("method", "where", "nth"),
    [
        pytest.param("POST", "/upload/resumable", 1, marks=pytest.mark.system),
        ("PATCH", "/upload/resumable", 1),
        pytest.param("PATCH", "/upload/resumable", 3, marks=pytest.mark.system),
        ("PATCH", "/upload/resumable", 4),
        ("GET", "/object/authenticated", 1),
        pytest.param("POST", "/object/lora-models", 1, marks=pytest.mark.system),
    ],
)
async def test_a_daemon_killed_while_it_publishes_is_gone_on_from(
    tmp_path: Path, method: str, where: str, nth: int
) -> None:
    async with StorageDouble(tmp_path / "double") as double:
        double.buckets["lora-models"] = Bucket()
        process = start(double, tmp_path)
        async with asyncio.timeout(60):
            # The server counts a request when its head has arrived: the kill falls into its middle.
            while double.count(method, where) < nth:
                assert process.poll() is None, "it ended before it could be killed"
                await asyncio.sleep(0.001)
        process.kill()
        await asyncio.to_thread(process.wait, 60)
        process = start(double, tmp_path)
        assert await asyncio.to_thread(process.wait, 60) == 0, (tmp_path / "publishing.log").read_text()
        names = object_names(JOB, 1)
        stored = {path.relative_to(double.path_of("lora-models", "")).as_posix()
                  for path in double.path_of("lora-models", "").rglob("*") if path.is_file()}  # fmt: skip
        archive = double.path_of("lora-models", names.archive)
        not_made_here = ("training_log.jsonl", "metrics_chart.png", "training.tfevents")
        assert stored == {*names.all()} - {*map(names.beside, not_made_here)}
        manifest = unpack_adapter(archive, tmp_path / "out")
        weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
        assert manifest["files"]["adapter_model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
        # Archive and weights are one upload each; a second begin is allowed only where the first was never answered.
        begun = 3 if (method, nth) == ("POST", 1) and where.startswith("/upload") else 2
        assert double.count("POST", "/upload/resumable") <= begun
