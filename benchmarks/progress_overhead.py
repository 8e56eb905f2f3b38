"""What reporting costs the training: one run without a reader, with the daemon, with its database slow or away.

The seconds are the trainer's own, from its first step to its last (`training_seconds` of its summary), without loading,
saving and uploading. Each round has a new random order; ratios to the bare trainer are taken within a round. The model
is tiny and a step takes tens of milliseconds, so that it reports far more per second than any real run. The trainer
computes on one thread; the daemon has the other cores, as on a host with a GPU.

Two equal runs differ by more than reporting can cost, so the last column isolates it: the seconds that the trainer
spent writing its steps' events, waiting for a reader included, and their share of its training time.

    python benchmarks/progress_overhead.py [--rounds 5] [--epochs 12]
"""

from __future__ import annotations

import argparse
import os
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1]))

from daemon.database.embedded_server import EmbeddedPostgres
from daemon.schema.migrations import migrate
from daemon.service import run_service
from tests.daemon_process import DaemonProcess
from tests.doubles.tcp_proxy import TcpProxy
from tests.lifecycle.queue import Queue
from tests.paths import ROOT
from tests.training.process.child import start
from training.event_writer import AnyEvent, EventWriter
from training.events import AdapterSaved, Progress
from training.spec import Hyperparameters, JobSpec

BARE = "no daemon, events read and dropped"
TRAINER = (sys.executable, __file__, "--trainer")
DAEMON = (sys.executable, __file__, "--daemon")
CONVERSATIONS = 64
SLOW_SECONDS = 0.4


@dataclass(frozen=True)
class Took:
    """Seconds from the first step to the last, and how many of them went into reporting the steps."""

    training: float
    telling: float

    @classmethod
    def of(cls, summary: dict[str, Any]) -> Took:
        return cls(float(summary["training_seconds"]), float(summary["telling_seconds"]))


def train_and_time_the_telling() -> None:
    """The real trainer, except that its summary has the time spent on writing the events of its steps."""
    say = EventWriter.say
    seconds = 0.0

    def timed(self: EventWriter, event: AnyEvent) -> None:
        nonlocal seconds
        if isinstance(event, AdapterSaved):
            event = event.model_copy(update={"summary": event.summary | {"telling_seconds": seconds}})
        began = time.perf_counter()
        say(self, event)
        if isinstance(event, Progress):
            seconds += time.perf_counter() - began

    EventWriter.say = timed  # type: ignore[method-assign]
    runpy.run_module("training", run_name="__main__")


def train_bare(folder: Path, models: Path, chosen: dict[str, int]) -> Took:
    """Runs only the trainer."""
    spec = JobSpec(
        job_id="bare",
        base_model="tiny",
        model_path=models / "tiny",
        dataset_path=models / "data.jsonl",
        work_dir=folder / "work",
        checkpoint_dir=folder / "checkpoints",
        output_dir=folder / "adapter",
        quantized_dir=folder / "quantized",
        hyperparameters=Hyperparameters.model_validate(chosen),
    )
    (folder / "work").mkdir(parents=True)
    with start(spec, command=TRAINER) as child:
        return Took.of(child.wait_for("adapter_saved", seconds=300).summary)


def train_with_daemon(
    folder: Path,
    models: Path,
    chosen: dict[str, int],
    server: EmbeddedPostgres,
    trouble: Callable[[TcpProxy], AbstractContextManager[None]],
) -> Took:
    """The whole service, with a proxy in front of its database that makes trouble from the first step on."""
    queue = Queue(server.dsn(), folder)
    lines = (models / "data.jsonl").read_text().splitlines()
    with TcpProxy(urlsplit(server.dsn()).port or 5432) as proxy:
        settings: dict[str, Any] = {"models_dir": models, "warm": "off", "lease_seconds": 60}
        daemon = DaemonProcess(proxy.dsn(server.dsn()), folder, command=DAEMON, **settings)
        daemon.environment["OMP_NUM_THREADS"] = "1"
        with daemon:
            job = queue.insert(lines=lines, hyperparameters={"base_model": "tiny", **chosen})
            queue.wait_for(job, "running", seconds=120)
            with trouble(proxy):
                daemon.wait_for_log("trainer_ended", seconds=300)
            queue.wait_for(job, "completed", seconds=120)
    rows = queue.select("SELECT training_summary FROM model_artifacts WHERE job_id = %s", job)
    return Took.of(rows[0]["training_summary"])


@contextmanager
def slow(proxy: TcpProxy) -> Iterator[None]:
    """Delays nearly every answer by most of half a second."""
    over = threading.Event()

    def hold() -> None:
        while not over.is_set():
            proxy.hold_back()
            over.wait(SLOW_SECONDS)
            proxy.let_go()
            over.wait(0.02)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def away(proxy: TcpProxy) -> Iterator[None]:
    """Lets nothing through until training is over."""
    proxy.partition()
    try:
        yield
    finally:
        proxy.heal()


TROUBLES: dict[str, Callable[[TcpProxy], AbstractContextManager[None]]] = {
    "daemon, rows and metrics": lambda _proxy: nullcontext(),
    f"the same, each answer up to {SLOW_SECONDS:.1f} s late": slow,
    "the same, the database away": away,
}


def make_model(models: Path) -> None:
    program = (
        "from pathlib import Path; from tests.tiny_models import make_model, write_conversations; "
        f"make_model(Path({str(models / 'tiny')!r}), 'qwen3'); "
        f"write_conversations(Path({str(models / 'data.jsonl')!r}), {CONVERSATIONS})"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, stderr=subprocess.PIPE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    order = random.Random(1)
    chosen = {"num_epochs": given.epochs, "lora_rank": 4, "batch_size": 4, "seed": 1}
    took: dict[str, list[Took]] = {name: [] for name in (BARE, *TROUBLES)}
    with tempfile.TemporaryDirectory(prefix="progress-overhead-") as temporary, EmbeddedPostgres() as server:
        models = Path(temporary) / "models"
        models.mkdir()
        make_model(models)
        migrate(server.dsn(), local=True)
        for turn in range(given.rounds):
            for number, name in enumerate(order.sample(list(took), len(took))):
                folder = Path(temporary) / f"{turn}-{number}"
                folder.mkdir()
                if name == BARE:
                    run = train_bare(folder, models, chosen)
                else:
                    run = train_with_daemon(folder, models, chosen, server, TROUBLES[name])
                took[name].append(run)
            print(f"round {turn + 1}: " + ", ".join(f"{runs[-1].training:.2f} s" for runs in took.values()), flush=True)
    print(f"\n{os.cpu_count()} cores, torch {version('torch')}, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| who listens | training seconds, median | against the bare trainer (median of rounds) | telling, ms | share |"
    )
    print("|---|---|---|---|---|")
    for name, runs in took.items():
        ratio = statistics.median(mine.training / bare.training for mine, bare in zip(runs, took[BARE], strict=True))
        telling = statistics.median(run.telling for run in runs)
        share = statistics.median(run.telling / run.training for run in runs)
        seconds = statistics.median(run.training for run in runs)
        print(f"| {name} | {seconds:.2f} | {100 * (ratio - 1):+.1f} % | {1000 * telling:.1f} | {100 * share:.2f} % |")


if __name__ == "__main__":
    if "--trainer" in sys.argv:
        sys.argv.remove("--trainer")
        train_and_time_the_telling()
    elif "--daemon" in sys.argv:
        run_service(TRAINER)
    else:
        main()
