"""What uploading an adapter costs in memory while the connection is cut again and again.

    python benchmarks/upload_memory.py [MEGABYTES] [CUTS]

It uploads to the double of Supabase Storage, which runs in a separate process, and prints a table: the uploader's
memory before and at its peak, the time, and whether the stored bytes are those that were sent. The floor beside it is
plain httpx: the same bytes to the same server in one request that is never cut; then the same with the object read back
and hashed, as ours always does. Last, the same bytes through cuts, a kill, a changed key and an upload that expires on
the server, as tests.storage.upload_ordeal has it; with 1000 MEGABYTES that is two minutes and 3 GB of disk.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import structlog

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from daemon.storage.supabase import SupabaseStorage  # noqa: E402
from daemon.storage.tus import CHUNK_BYTES, PIECE_BYTES  # noqa: E402
from tests.doubles.storage import SERVICE_KEY  # noqa: E402
from tests.storage.upload_ordeal import survive, write_random  # noqa: E402
from training.files.durable_files import sha256_of  # noqa: E402

MIB = 1024 * 1024
KEY = {"apikey": SERVICE_KEY, "Authorization": f"Bearer {SERVICE_KEY}"}
BUCKET = "lora-models"

# (URL of the project, file, name in the bucket, sha256, folder for the state of an interrupted upload)
Upload = Callable[[str, Path, str, str, Path], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Measured:
    cuts: int
    before_mib: float
    peak_mib: float
    seconds: float
    whole: bool

    @property
    def extra_mib(self) -> float:
        return self.peak_mib - self.before_mib


async def ours(url: str, local: Path, name: str, sha256: str, resume_dir: Path) -> None:
    storage = SupabaseStorage(url, SERVICE_KEY, first_wait_seconds=0.01)
    await storage.check(local.stat().st_size)
    await storage.upload(local, name, sha256=sha256, resume_dir=resume_dir)
    await storage.close()


async def one_request(url: str, local: Path, name: str, _sha256: str, _resume_dir: Path) -> None:
    """The least possible work: the file in one stream, without verifying it."""

    async def pieces() -> AsyncIterator[bytes]:
        with local.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    facts = {"bucketName": BUCKET, "objectName": name, "contentType": "application/gzip"}
    encoded = ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in facts.items())
    size = str(local.stat().st_size)
    headers = KEY | {"Tus-Resumable": "1.0.0"}
    async with httpx.AsyncClient(timeout=60) as client:
        await client.post(f"{url}/storage/v1/bucket", headers=KEY, json={"id": BUCKET, "name": BUCKET})
        begun = await client.post(
            f"{url}/storage/v1/upload/resumable", headers=headers | {"Upload-Length": size, "Upload-Metadata": encoded}
        )
        sent = await client.patch(
            begun.headers["location"],
            headers=headers | {"Upload-Offset": "0", "Content-Length": size},
            content=pieces(),
        )
        sent.raise_for_status()


async def one_request_read_back(url: str, local: Path, name: str, sha256: str, resume_dir: Path) -> None:
    await one_request(url, local, name, sha256, resume_dir)
    digest = hashlib.sha256()
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream("GET", f"{url}/storage/v1/object/authenticated/{BUCKET}/{name}", headers=KEY) as response,
    ):
        async for piece in response.aiter_bytes(MIB):
            digest.update(piece)
    assert digest.hexdigest() == sha256


def measure(megabytes: int, cuts: int, upload: Upload = ours) -> Measured:
    """One upload in this process, with its peak read from the kernel."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local = folder / "adapter.tar.gz"
        sha256 = write_random(local, megabytes)
        command = [sys.executable, "-m", "tests.doubles.storage", str(folder / "double"), str(cuts)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as double:
            assert double.stdin is not None
            assert double.stdout is not None
            url = double.stdout.readline().strip()
            # A first, small upload loads everything that is loaded only once.
            small = folder / "small.tar.gz"
            small_sha256 = write_random(small, 7)
            asyncio.run(upload(url, small, "adapters/small.tar.gz", small_sha256, folder))
            _reset_peak()
            before, begun = _memory_mib("VmRSS"), time.monotonic()
            asyncio.run(upload(url, local, "adapters/large.tar.gz", sha256, folder))
            seconds, peak = time.monotonic() - begun, _memory_mib("VmHWM")
            stored = folder / "double" / "objects" / BUCKET / "adapters" / "large.tar.gz"
            whole = sha256_of(stored) == sha256
            double.stdin.close()
            cuts_made = int(double.stdout.readline())
            double.wait(10)
    return Measured(cuts_made, before, peak, seconds, whole)


def _reset_peak() -> None:
    # Linux: VmHWM restarts from what is in use now.
    Path("/proc/self/clear_refs").write_text("5")


def _memory_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    every = [int(sys.argv[2])] if len(sys.argv) > 2 else [0, 3, megabytes * 1_000_000 // CHUNK_BYTES]
    rows = [
        ("plain httpx, one request", measure(megabytes, 0, one_request)),
        ("the same, read back and hashed", measure(megabytes, 0, one_request_read_back)),
        *((f"ours, chunks of {CHUNK_BYTES // MIB} MiB", measure(megabytes, cuts)) for cuts in every),
    ]
    print(f"{megabytes} MB, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    print("| uploader | cuts | memory before, MiB | peak, MiB | extra, MiB | seconds | arrived whole |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows:
        print(
            f"| {name} | {row.cuts} | {row.before_mib:.1f} | {row.peak_mib:.1f} | {row.extra_mib:.1f} "
            f"| {row.seconds:.1f} | {'yes' if row.whole else 'NO'} |"
        )
    with tempfile.TemporaryDirectory() as name:
        survived = asyncio.run(survive(Path(name), megabytes, cuts=max(2, megabytes // 50)))
    print(
        f"\nThrough {survived.cuts} cuts, a kill, a changed key and an expiry: {survived.sent_chunks} chunks sent of "
        f"{survived.chunks}, begun {survived.begun} times, peak {survived.peak_mib:.1f} MiB, "
        f"{survived.seconds:.1f} seconds, arrived whole: {'yes' if survived.whole else 'NO'}"
    )


if __name__ == "__main__":
    main()
