"""One upload through everything that happens to long ones: cuts, a kill, a changed key, an expiry on the server.

    python -m tests.storage.upload_ordeal [MEGABYTES]

The uploaders are real processes, one after the other, as attempts of a job are: the first is killed, the second loses
its key, and the third, with the new key, finds that the server has dropped the upload.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from daemon.storage.tus import CHUNK_BYTES
from tests.doubles.loopback import Exchange
from tests.doubles.storage import Bucket, Fault, StorageDouble
from tests.doubles.storage_keys import SECRET, SERVICE_KEY, make_key
from tests.forked_process import ForkedProcess, forker
from tests.paths import ROOT
from training.files.durable_files import sha256_of

UPLOADING = ROOT / "tests" / "storage" / "uploading_process.py"
NAME = "adapters/large.tar.gz"
NEW_SECRET = SECRET[::-1]
KILLED, WAITS, DONE = -9, 3, 0


@dataclass(frozen=True)
class Survived:
    """`endings` are the uploaders' exit statuses; `sent_chunks` counts every PATCH, of `chunks` that the file has."""

    endings: tuple[int, ...]
    whole: bool
    begun: int
    chunks: int
    sent_chunks: int
    cuts: int
    peak_mib: float
    seconds: float
    left_behind: tuple[str, ...]


class Ordeal:
    """What happens at which part of an upload. It happens when the server reads the head of a PATCH."""

    def __init__(self, double: StorageDouble, cuts: int) -> None:
        self._double = double
        self._patches = 0
        self.process: ForkedProcess | subprocess.Popen[bytes] | None = None
        self.peak_mib = 0.0
        self._acts: list[tuple[float, Callable[[], None]]] = [
            (0.25, self._kill),
            (0.5, self._change_key),
            (0.7, lambda: double.forget_uploads(410)),
        ]
        source = random.Random(0)
        self._faults = [Fault(self._is_cut, cut_request_after=source.randrange(1, CHUNK_BYTES)) for _ in range(cuts)]
        double.faults += [Fault(self._acted), *self._faults]

    @property
    def cuts_made(self) -> int:
        return sum(1 - fault.times for fault in self._faults)

    @property
    def acts_left(self) -> int:
        return len(self._acts)

    def measure(self) -> None:
        """Reads the uploader's peak of memory from the kernel, while it runs."""
        assert self.process is not None
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                self.peak_mib = max(self.peak_mib, int(line.split()[1]) / 1024)

    def _acted(self, exchange: Exchange) -> bool:
        """Matches no request: it only looks at each."""
        if exchange.method == "PATCH":
            self._patches += 1
            newest = list(self._double.uploads.values())[-1]
            if self._acts and newest.gone_with is None and newest.offset >= self._acts[0][0] * newest.size:
                self._acts.pop(0)[1]()
        return False

    def _is_cut(self, exchange: Exchange) -> bool:
        return exchange.method == "PATCH" and self._patches % 3 == 0

    def _kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    def _change_key(self) -> None:
        self._double.gate.secret = NEW_SECRET


async def survive(folder: Path, megabytes: int, cuts: int) -> Survived:
    """Uploads a file of random bytes through all of it. `folder` needs twice that room."""
    local, begun_at = folder / "adapter.tar.gz", time.monotonic()
    sha256 = await asyncio.to_thread(write_random, local, megabytes)
    size = local.stat().st_size
    resume, log = folder / "resume", folder / "uploading.log"
    endings: list[int] = []
    async with StorageDouble(folder / "double") as double:
        double.buckets["lora-models"] = Bucket()
        ordeal = Ordeal(double, cuts)
        for key in (SERVICE_KEY, SERVICE_KEY, make_key("service_role", secret=NEW_SECRET)):
            arguments = (double.url, key, str(local), NAME, sha256, str(resume))
            ordeal.process = process = forker(str(UPLOADING)).start_quietly(os.environ, ROOT, log, *arguments)
            while (ending := process.poll()) is None:
                ordeal.measure()
                await asyncio.sleep(0.02)
            endings.append(ending)
        stored = double.path_of("lora-models", NAME)
        return Survived(
            endings=tuple(endings),
            whole=stored.is_file() and await asyncio.to_thread(sha256_of, stored) == sha256,
            begun=len(double.uploads),
            chunks=-(-size // CHUNK_BYTES),
            sent_chunks=double.count("PATCH"),
            cuts=ordeal.cuts_made,
            peak_mib=ordeal.peak_mib,
            seconds=time.monotonic() - begun_at,
            left_behind=tuple(path.name for path in resume.iterdir()),
        )


def write_random(file: Path, megabytes: int) -> str:
    """Writes a file that is the same for each size. Returns its SHA-256."""
    digest, source = hashlib.sha256(), random.Random(megabytes)
    with file.open("wb") as stream:
        for _ in range(megabytes):
            piece = source.randbytes(1_000_000)
            stream.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        print(asyncio.run(survive(Path(folder), megabytes, cuts=max(2, megabytes // 50))))


if __name__ == "__main__":
    main()
