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
from rich.console import Console

from daemon.demo.environment import daemon_settings, open_postgres, prepare_model, start
from daemon.demo.errors import DemoFailed
from daemon.demo.job import (
    INSERT_JOB,
    SELECT_ROW,
    Connection,
    JobView,
    insert_dataset,
    insert_job,
    insert_user,
    read_job,
    read_row,
)
from daemon.demo.model import MODEL_NAME, cache_folder, find_gguf
from daemon.demo.process import OwnProcess
from daemon.demo.screen.json_lines import JsonScreen
from daemon.demo.screen.live import Screen
from daemon.demo.signals import Interrupted, Interruption
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
        except Interrupted as interrupted:
            screen.say("\nStopped. The daemon, its trainer and Postgres have ended; nothing is left behind.")
            return interrupted.exit_status
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
        connection = stack.enter_context(psycopg.connect(dsn, autocommit=True))
        job_id = _insert_row(connection, dataset, folder, screen)
        view = _watch(connection, job_id, daemon, screen, interruption)

        screen.sql(SELECT_ROW.format(job_id=job_id))
        screen.row(read_row(connection, job_id))
        screen.blank()
        if view.standing.status != "completed":
            raise _job_failed(view, folder / "jobs" / str(job_id))
        adapter = _keep_adapter(folder / "storage", view, dataset)
    _show_result(view, adapter, time.monotonic() - begun, screen)


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
) -> JobView:
    """Reads the row four times a second until it is final. Raises DemoFailed if the daemon has ended."""
    with screen.picture() as picture:
        while True:
            # Checked before the row is read: a daemon that wrote the outcome and then ended has done its work.
            exit_status = daemon.exit_status
            view = read_job(connection, job_id)
            picture.show(view)
            if view.standing.is_final:
                return view
            if exit_status is not None:
                how = f"by signal {-exit_status}" if exit_status < 0 else f"with exit status {exit_status}"
                raise DemoFailed(
                    f"the daemon ended {how} while the job was {view.standing.status}. On a real host supervisord "
                    "starts it again, and another daemon may take the job once the lease has run out.",
                    daemon.log_tail(),
                )
            interruption.sleep(_READ_SECONDS)


def _job_failed(view: JobView, job_folder: Path) -> DemoFailed:
    standing = view.standing
    said = without_advice(standing.error_message or "no message", standing.error_hint)
    words = f"the job {standing.status}: {said}"
    if standing.error_hint:
        words += f"\n  → {standing.error_hint}"
    return DemoFailed(words, "" if standing.error_code != "internal" else _end_of_logs(job_folder))


def _end_of_logs(job_folder: Path) -> str:
    logs = sorted(job_folder.rglob("*.log")) if job_folder.is_dir() else []
    return "\n".join(line for log in logs for line in log.read_text(errors="replace").splitlines()[-15:])


def _keep_adapter(storage: Path, view: JobView, dataset: Path) -> Path:
    """Unpacks the adapter to a folder that the demo keeps, replacing an earlier one from the same file."""
    assert view.standing.adapter_path is not None, "a completed job has an adapter"
    target = cache_folder() / "adapters" / dataset.stem
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    unpack_adapter(storage / view.standing.adapter_path, target)
    return target


def _show_result(view: JobView, adapter: Path, seconds: float, screen: Screen) -> None:
    before, after = view.sample("before"), view.sample("after")
    if before is not None and after is not None:
        screen.answers(before[0], before[1], after[1])
        screen.blank()
    held_out = view.held_out_losses
    if len(held_out) > 1:
        first, best = held_out[0].loss, min(point.loss for point in held_out[1:])
        fall = 100 * (1 - best / first)
        screen.result(f"loss on held-out conversations {first:.3f} → {best:.3f} (−{fall:.0f} %)")
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
