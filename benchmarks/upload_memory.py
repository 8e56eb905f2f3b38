"""What uploading an adapter costs in memory, while the connection is cut again and again.

    python -m benchmarks.upload_memory [MEGABYTES] [CUTS]

Uploads to the double of Supabase Storage, which runs as a process of its own, and prints a table: the
uploader's memory before and at its peak, the time, and whether what arrived is what was sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from daemon.supabase_storage import SupabaseStorage
from daemon.tus import CHUNK_BYTES
from tests.storage_double import SERVICE_KEY

MIB = 1024 * 1024


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


def measure(megabytes: int, cuts: int) -> Measured:
    """One upload in this process, its peak read from the kernel."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local = folder / "adapter.tar.gz"
        sha256 = _write_random(local, megabytes)
        command = [sys.executable, "-m", "tests.storage_double", str(folder / "double"), str(cuts)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as double:
            assert double.stdin is not None
            assert double.stdout is not None
            url = double.stdout.readline().strip()
            # The first, small upload loads what is loaded once.
            small = folder / "small.tar.gz"
            small_sha256 = _write_random(small, 7)
            asyncio.run(_upload(url, small, "adapters/small.tar.gz", small_sha256, folder))
            _reset_peak()
            before, begun = _memory_mib("VmRSS"), time.monotonic()
            asyncio.run(_upload(url, local, "adapters/large.tar.gz", sha256, folder))
            seconds, peak = time.monotonic() - begun, _memory_mib("VmHWM")
            stored = folder / "double" / "objects" / "lora-models" / "adapters" / "large.tar.gz"
            whole = _hash(stored) == sha256
            double.stdin.close()
            cuts_made = int(double.stdout.readline())
            double.wait(10)
    return Measured(cuts_made, before, peak, seconds, whole)


async def _upload(url: str, local: Path, name: str, sha256: str, resume_dir: Path) -> None:
    storage = SupabaseStorage(url, SERVICE_KEY, first_wait_seconds=0.01)
    await storage.check(local.stat().st_size)
    await storage.upload(local, name, sha256=sha256, resume_dir=resume_dir)
    await storage.close()


def _write_random(file: Path, megabytes: int) -> str:
    digest, source = hashlib.sha256(), random.Random(megabytes)
    with file.open("wb") as stream:
        for _ in range(megabytes):
            piece = source.randbytes(1_000_000)
            stream.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(MIB):
            digest.update(piece)
    return digest.hexdigest()


def _reset_peak() -> None:
    # Linux: VmHWM starts again from what is in use now.
    Path("/proc/self/clear_refs").write_text("5")


def _memory_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    every = [int(sys.argv[2])] if len(sys.argv) > 2 else [0, 3, megabytes * 1_000_000 // CHUNK_BYTES]
    print(f"upload of {megabytes} MB in chunks of {CHUNK_BYTES // MIB} MiB")
    print(f"{'cuts':>5} {'before MiB':>11} {'peak MiB':>9} {'extra MiB':>10} {'seconds':>8}  whole")
    for cuts in every:
        row = measure(megabytes, cuts)
        print(
            f"{row.cuts:>5} {row.before_mib:>11.1f} {row.peak_mib:>9.1f} {row.extra_mib:>10.1f} {row.seconds:>8.1f}  "
            f"{'yes' if row.whole else 'NO'}"
        )


if __name__ == "__main__":
    main()
