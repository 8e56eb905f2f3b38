"""What telling costs the training: one run with nobody listening, with the daemon, with its database slow or away.

The seconds are the trainer's own, from its first step to its last (`training_seconds` of its summary): loading, saving
and uploading are not in them. The order is drawn anew for each round; ratios to the bare trainer are taken within a
round. The model is tiny and a step takes tens of milliseconds, so that there is far more to tell in a second than any
real run has. The trainer computes with one thread: on a host with a card, too, the daemon has cores to itself.

    python benchmarks/progress_overhead.py [--rounds 5] [--epochs 12]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1]))

from daemon.embedded_postgres import EmbeddedPostgres
from daemon.migrate import migrate
from tests.daemon_process import REAL, ROOT, DaemonProcess
from tests.lifecycle.queue import Queue
from tests.lifecycle.tcp_proxy import TcpProxy
from tests.training.child import start
from training.spec import Hyperparameters, JobSpec

BARE = "no daemon, events read and dropped"
CONVERSATIONS = 64
SLOW_SECONDS = 0.4


def train_bare(folder: Path, models: Path, chosen: dict[str, int]) -> float:
    """The trainer alone. Returns its training seconds."""
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
    with start(spec) as child:
        return float(child.wait_for("adapter_saved", seconds=300).summary["training_seconds"])


def train_with_daemon(
    folder: Path,
    models: Path,
    chosen: dict[str, int],
    server: EmbeddedPostgres,
    trouble: Callable[[TcpProxy], AbstractContextManager[None]],
) -> float:
    """The whole service, its database behind a proxy that makes trouble from the first step on."""
    queue = Queue(server.dsn(), folder)
    lines = (models / "data.jsonl").read_text().splitlines()
    with TcpProxy(urlsplit(server.dsn()).port or 5432) as proxy:
        settings: dict[str, Any] = {"models_dir": models, "warm": "off", "lease_seconds": 60}
        daemon = DaemonProcess(proxy.dsn(server.dsn()), folder, command=REAL, **settings)
        daemon.environment["OMP_NUM_THREADS"] = "1"
        with daemon:
            job = queue.insert(lines=lines, hyperparameters={"base_model": "tiny", **chosen})
            queue.wait_for(job, "running", seconds=120)
            with trouble(proxy):
                daemon.wait_for_log("trainer_ended", seconds=300)
            queue.wait_for(job, "completed", seconds=120)
    rows = queue.select("SELECT training_summary FROM model_artifacts WHERE job_id = %s", job)
    return float(rows[0]["training_summary"]["training_seconds"])


@contextmanager
def slow(proxy: TcpProxy) -> Iterator[None]:
    """Nearly every answer takes most of half a second."""
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
    """Nothing comes through until training is over."""
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
    seconds: dict[str, list[float]] = {name: [] for name in (BARE, *TROUBLES)}
    with tempfile.TemporaryDirectory(prefix="progress-overhead-") as temporary, EmbeddedPostgres() as server:
        models = Path(temporary) / "models"
        models.mkdir()
        make_model(models)
        migrate(server.dsn(), local=True)
        for turn in range(given.rounds):
            for number, name in enumerate(order.sample(list(seconds), len(seconds))):
                folder = Path(temporary) / f"{turn}-{number}"
                folder.mkdir()
                if name == BARE:
                    taken = train_bare(folder, models, chosen)
                else:
                    taken = train_with_daemon(folder, models, chosen, server, TROUBLES[name])
                seconds[name].append(taken)
            print(f"round {turn + 1}: " + ", ".join(f"{taken[-1]:.2f} s" for taken in seconds.values()), flush=True)
    print(f"\n{os.cpu_count()} cores, torch {version('torch')}, load {os.getloadavg()[0]:.1f}\n")
    print("| who listens | training seconds, median | against the bare trainer (median of rounds) |")
    print("|---|---|---|")
    for name, taken in seconds.items():
        ratio = statistics.median(mine / bare for mine, bare in zip(taken, seconds[BARE], strict=True))
        print(f"| {name} | {statistics.median(taken):.2f} | {100 * (ratio - 1):+.1f} % |")


if __name__ == "__main__":
    main()
