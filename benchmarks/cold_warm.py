"""Compares cold and warm trainers: from the claim to the spec on the trainer's stdin, to the first optimizer step, and
jobs an hour.

The real daemon, a real Postgres, a stream of small jobs on one base model, one after another in one slot: `off` starts
a process for each job, `libraries` has them imported, `model` also has the base model in memory. Every job has the same
data and the same seed; their adapters must be equal, bit for bit, in all three modes.

    python benchmarks/cold_warm.py [--jobs 20] [--model tiny | smollm2] [--minutes 6]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from uuid import UUID

sys.path.insert(0, str(Path(__file__).parents[1]))

from daemon.database.embedded_server import EmbeddedPostgres
from daemon.demo.model import MODEL_NAME, find_gguf
from daemon.schema.migrations import migrate
from tests.daemon_process import REAL, DaemonProcess, eventually
from tests.lifecycle.queue import FINAL, Queue
from tests.paths import ROOT

MODES = ("off", "libraries", "model")
# Small on purpose: everything except the training is measured.
HYPERPARAMETERS = {"num_epochs": 1, "lora_rank": 4, "batch_size": 8, "seed": 1}
CONVERSATIONS = 16


@dataclass(frozen=True)
class Stream:
    """One mode's stream of jobs, in seconds; `told` and `first_step` are counted from the claim, one value per job."""

    mode: str
    jobs: int
    seconds: float
    told: tuple[float, ...]
    first_step: tuple[float, ...]
    adapters: frozenset[str]

    @property
    def an_hour(self) -> float:
        return self.jobs / self.seconds * 3600


def run_stream(mode: str, dsn: str, models: Path, base_model: str, jobs: int, deadline: float) -> Stream:
    """The clock runs from the stream's first claim until its last job has finished."""
    with tempfile.TemporaryDirectory(prefix=f"cold-warm-{mode}-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        queue = Queue(dsn, folder)
        lines = (models / "data.jsonl").read_text().splitlines()
        chosen = {"base_model": base_model, **HYPERPARAMETERS}
        settings = {"models_dir": models, "warm": mode, "lease_seconds": 60, "poll_seconds": 1}
        with queue.daemon(folder, name=mode, command=REAL, **settings) as daemon:
            daemon.wait_for_log("daemon_started", seconds=60)
            if mode != "off":
                # A host is warm in the middle of its day.
                _wait(queue, [queue.insert(lines=lines, hyperparameters=chosen)], deadline)
            ids = [queue.insert(lines=lines, hyperparameters=chosen) for _ in range(jobs)]
            _wait(queue, ids, deadline)
            claimed, told = (_moments(daemon, event) for event in ("job_claimed", "trainer_told"))
        events = {job: {event["kind"]: event["at"] for event in queue.events(job)} for job in ids}
        begun = min(times["claimed"] for times in events.values())
        ended = max(times["completed"] for times in events.values())
        return Stream(
            mode,
            jobs,
            (ended - begun).total_seconds(),
            tuple(told[str(job)] - claimed[str(job)] for job in ids),
            tuple((times["started"] - times["claimed"]).total_seconds() for times in events.values()),
            frozenset(_adapter(folder / "storage", queue, job) for job in ids),
        )


def _moments(daemon: DaemonProcess, event: str) -> dict[str, float]:
    return {line["job_id"]: datetime.fromisoformat(line["timestamp"]).timestamp() for line in daemon.logged(event)}


def _wait(queue: Queue, ids: list[UUID], deadline: float) -> None:
    def ended() -> bool:
        rows = queue.select("SELECT id, status, error_message FROM training_jobs WHERE id = ANY(%s)", ids)
        bad = [row for row in rows if row["status"] in FINAL and row["status"] != "completed"]
        if bad:
            raise SystemExit(f"a job failed: {bad[0]}")
        return all(row["status"] == "completed" for row in rows)

    eventually(ended, seconds=max(1.0, deadline - time.monotonic()), why=lambda: "the time is over: use fewer --jobs")


def _adapter(storage: Path, queue: Queue, job: UUID) -> str:
    with tarfile.open(storage / queue.row(job)["adapter_path"]) as archive:
        member = next(name for name in archive.getnames() if name.endswith("adapter_model.safetensors"))
        file = archive.extractfile(member)
        assert file is not None
        return hashlib.sha256(file.read()).hexdigest()


def make_model(models: Path, which: str) -> str:
    """Puts the base model under `models` in a separate process, so that this one stays light. Returns its name."""
    name = "tiny" if which == "tiny" else MODEL_NAME
    if which == "tiny":
        program = f"make_model(Path({str(models / name)!r}), 'qwen3')"
    else:
        program = f"import_gguf(Path({str(find_gguf())!r}), Path({str(models / name)!r}))"
    imports = "from pathlib import Path; from tests.tiny_models import make_model, write_conversations; "
    imports += "from training.base.gguf_import import import_gguf; "
    data = f"; write_conversations(Path({str(models / 'data.jsonl')!r}), {CONVERSATIONS})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", imports + program + data], env=environment, check=True, stderr=subprocess.PIPE
    )
    return name


def show(streams: list[Stream], base_model: str) -> None:
    print(f"base model {base_model}, {os.cpu_count()} cores, torch {version('torch')}, load {os.getloadavg()[0]:.1f}\n")
    print("| trainer | jobs | claim to told, median | to first step | slowest | stream | jobs an hour | against off |")
    print("|---|---|---|---|---|---|---|---|")
    for stream in streams:
        print(
            f"| {stream.mode} | {stream.jobs} | {statistics.median(stream.told) * 1000:.0f} ms "
            f"| {statistics.median(stream.first_step):.2f} s "
            f"| {max(stream.first_step):.2f} s | {stream.seconds:.1f} s | {stream.an_hour:.0f} "
            f"| {stream.an_hour / streams[0].an_hour:.1f}× |"
        )
    different = frozenset().union(*(stream.adapters for stream in streams))
    print(f"\nadapters: {len(different)} different, sha256 {', '.join(sorted(digest[:16] for digest in different))}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--minutes", type=float, default=6.0, help="give up after so long")
    chosen = parser.parse_args()
    deadline = time.monotonic() + chosen.minutes * 60
    with tempfile.TemporaryDirectory(prefix="cold-warm-models-") as temporary, EmbeddedPostgres() as server:
        models = Path(temporary)
        base_model = make_model(models, chosen.model)
        migrate(server.dsn(), local=True)
        streams = [run_stream(mode, server.dsn(), models, base_model, chosen.jobs, deadline) for mode in MODES]
    show(streams, base_model)
    return 0 if len(frozenset().union(*(stream.adapters for stream in streams))) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
