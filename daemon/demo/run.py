"""Runs the demo: it needs only a database, a daemon and a row, and leaves nothing running when it ends.

model -> Postgres -> migrations -> daemon -> INSERT -> watch -> the row, the answers, the adapter
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import dict_row
from rich.console import Console

from daemon.demo.app_rows import INSERT_JOB, SELECT_ROW, insert_dataset, insert_job, insert_user, read_row
from daemon.demo.errors import DemoFailed
from daemon.demo.json_screen import JsonScreen
from daemon.demo.local_service import daemon_settings, open_postgres, prepare_model, start
from daemon.demo.model import MODEL_NAME, cache_folder, find_gguf
from daemon.demo.own_process import OwnProcess
from daemon.demo.screen import Screen
from daemon.demo.signals import EndedBySignal, Interruption
from daemon.job_view.reads import Connection, JobRow
from daemon.job_view.watched_jobs import WatchedJob, WatchedJobs
from daemon.schema.migrations import migrate
from daemon.sentence import without_advice
from daemon.storage.archive import unpack_adapter

VOICE = Path(__file__).with_name("lighthouse.jsonl")
UNSEEN_QUESTION = "What should I do on a rainy Sunday?"

# Found by trial on two cores: one pass over the data is enough for the model to learn its style, and takes about a
# minute and a half. The learning rate is ten times what a large model would tolerate.
HYPERPARAMETERS: dict[str, Any] = {
    "base_model": MODEL_NAME,
    "num_epochs": 1,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "lora_rank": 16,
}
# Conversations that a run should see in total: a user's short file is read several times.
_WANTED_CONVERSATIONS = 90
_MAX_EPOCHS = 10
_READ_SECONDS = 0.25
_DATASET_BUCKET = "lora-datasets"


def run_demo(data: Path | None, *, as_json: bool = False, screen: Screen | None = None) -> int:
    """Runs the demo with the shipped conversations or with `data`. Exit status 0 means that a model was trained."""
    screen = screen or (JsonScreen() if as_json else Screen(Console()))
    with Interruption() as interruption:
        try:
            _play(data, screen, interruption)
        except EndedBySignal as ended:
            screen.say("\nStopped. The daemon, its trainer and Postgres have ended; nothing is left behind.")
            return ended.exit_status
        except DemoFailed as failed:
            screen.failure(failed)
            return 1
    return 0


def _play(data: Path | None, screen: Screen, interruption: Interruption) -> None:
    begun = time.monotonic()
    dataset = _readable(data) if data is not None else VOICE
    find_gguf()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="brightrun-demo-")))
        prepare_model(screen, interruption, folder)
        postgres = stack.enter_context(open_postgres(screen))
        dsn = postgres.dsn()
        screen.step(f"migrations: {len(migrate(dsn, local=True))} applied")
        interruption.check()

        daemon = stack.enter_context(start("run", daemon_settings(dsn, folder), folder))
        screen.step(f"the daemon runs as process {daemon.pid} and listens; now an app inserts a row:")
        connection = stack.enter_context(psycopg.connect(dsn, autocommit=True, row_factory=dict_row))
        job_id = _insert_row(connection, dataset, folder, screen)
        watched = _watch(connection, job_id, daemon, screen, interruption)

        screen.sql(SELECT_ROW.format(job_id=job_id))
        screen.row(read_row(connection, job_id))
        screen.blank()
        if watched.row.state != "completed":
            raise _job_failed(watched.row, folder / "jobs" / str(job_id))
        adapter = _keep_adapter(folder / "storage", watched.row, dataset)
    _show_result(watched, adapter, time.monotonic() - begun, screen)


def _readable(data: Path) -> Path:
    if not data.is_file():
        raise DemoFailed(f"there is no file {data}. Give a JSONL file of conversations: `make demo DATA=my.jsonl`")
    return data.resolve()


def _insert_row(connection: Connection, dataset: Path, folder: Path, screen: Screen) -> UUID:
    user_id = insert_user(connection)
    storage_path = f"{user_id}/{_plain_name(dataset)}"
    stored = folder / "storage" / _DATASET_BUCKET / storage_path
    stored.parent.mkdir(parents=True)
    shutil.copyfile(dataset, stored)
    dataset_id = insert_dataset(connection, user_id, storage_path, dataset.name, stored.stat().st_size)
    wishes = HYPERPARAMETERS | {"num_epochs": _epochs(stored)}
    if dataset == VOICE:
        wishes["sample_prompts"] = [UNSEEN_QUESTION]
    shown = {"user_id": f"'{user_id}'", "dataset_id": f"'{dataset_id}'", "hyperparameters": _quoted(wishes)}
    screen.sql(INSERT_JOB % shown + ";")
    return insert_job(connection, user_id, dataset_id, wishes)


def _watch(
    connection: Connection, job_id: UUID, daemon: OwnProcess, screen: Screen, interruption: Interruption
) -> WatchedJob:
    """Reads the job four times a second until it is final. Raises DemoFailed if the daemon has ended."""
    jobs = WatchedJobs([job_id])
    with screen.view() as view:
        while True:
            # Checked before the row is read: a daemon that wrote the outcome and then ended has done its work.
            exit_status = daemon.exit_status
            news = jobs.read(connection)
            view.show(jobs.all, news, None)
            (watched,) = jobs.all
            if jobs.over:
                return watched
            if exit_status is not None:
                how = f"by signal {-exit_status}" if exit_status < 0 else f"with exit status {exit_status}"
                raise DemoFailed(
                    f"the daemon ended {how} while the job was {watched.row.state}. On a real host supervisord "
                    "starts it again, and another daemon may take the job once the lease has run out.",
                    daemon.log_tail(),
                )
            interruption.sleep(_READ_SECONDS)


def _job_failed(row: JobRow, job_folder: Path) -> DemoFailed:
    words = f"the job {row.state}: {without_advice(row.error_message or 'no message', row.error_hint)}"
    if row.error_hint:
        words += f"\n  → {row.error_hint}"
    return DemoFailed(words, "" if row.error_code != "internal" else _end_of_logs(job_folder))


def _end_of_logs(job_folder: Path) -> str:
    logs = sorted(job_folder.rglob("*.log")) if job_folder.is_dir() else []
    return "\n".join(line for log in logs for line in log.read_text(errors="replace").splitlines()[-15:])


def _keep_adapter(storage: Path, row: JobRow, dataset: Path) -> Path:
    """Unpacks the adapter to a folder that the demo keeps, replacing an earlier one from the same file."""
    assert row.adapter_path is not None, "a completed job has an adapter"
    target = cache_folder() / "adapters" / dataset.stem
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    unpack_adapter(storage / row.adapter_path, target)
    return target


def _show_result(watched: WatchedJob, adapter: Path, seconds: float, screen: Screen) -> None:
    samples = {event.data.get("when"): event.data for event in reversed(watched.story) if event.kind == "sample"}
    if "before" in samples and "after" in samples:
        before, after = samples["before"], samples["after"]
        screen.answers(str(before["prompt"]), str(before["answer"]), str(after["answer"]))
        screen.blank()
    first, *later = watched.validation_losses or [0.0]
    if later:
        fall = 100 * (1 - min(later) / first)
        screen.result(f"loss on held-out conversations {first:.3f} → {min(later):.3f} (−{fall:.0f} %)")
    screen.result(f"adapter: {adapter}")
    screen.result(f"{seconds:.0f} s in all; daemon, trainer and Postgres have ended")
    ask = "make ask" if Path("Makefile").is_file() else f"{sys.executable} -m training.adapter.ask"
    argument = 'Q="Why do cats purr?"' if ask == "make ask" else '"Why do cats purr?"'
    screen.say(f"\nTalk to it:  {ask} {argument}")


def _plain_name(file: Path) -> str:
    """The file's name in a form that the storage accepts: ASCII, no '#'."""
    return "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "_" for letter in file.name
    )


def _epochs(dataset: Path) -> int:
    with dataset.open("rb") as file:
        lines = sum(1 for line in file if line.strip())
    return min(max(round(_WANTED_CONVERSATIONS / max(lines, 1)), 1), _MAX_EPOCHS)


def _quoted(value: dict[str, Any]) -> str:
    return "'" + json.dumps(value).replace("'", "''") + "'"
