"""A tracker's key reaches the one process that needs it; a wish that cannot be granted is refused before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.attempt.choose_trackers import choose_trackers
from daemon.errors import HostUnfit, JobFailed
from daemon.read_settings import load_settings
from tests.daemon_process import eventually
from tests.lifecycle.queue import Queue
from tests.postgres import AppDatabase
from training.spec import Hyperparameters

KEY = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = {"database_url": "postgresql://nobody@127.0.0.1:1/none"}
LONG = [["steps", 200, 0.05]]


def holds_key(pid: int) -> bool:
    try:
        return KEY.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def test_only_the_trainer_of_the_job_that_asks_holds_the_key(database: AppDatabase, tmp_path: Path) -> None:
    queue = Queue(database.dsn, tmp_path)
    daemon = queue.daemon(tmp_path, slots=2)
    daemon.environment["WANDB_API_KEY"] = KEY
    with daemon:
        plain = queue.insert(script=LONG)
        tracked = queue.insert(script=LONG, hyperparameters={"base_model": "tiny", "trackers": ["wandb"]})
        running = "SELECT count(*) AS running FROM training_jobs WHERE status = 'running'"
        eventually(lambda: queue.select(running)[0]["running"] == 2, seconds=60, why=daemon.tail)
        children = daemon.children()
        assert len(children) >= 2 and len([pid for pid in children if holds_key(pid)]) == 1, daemon.tail()
        for job_id in (plain, tracked):
            queue.select("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", job_id)
        daemon.wait_for_log("attempt_settled", count=2, seconds=60)
        told = queue.select("SELECT string_agg(j::text, '') || (SELECT string_agg(e::text, '') FROM training_events e) "
                            "AS everything FROM training_jobs j")  # fmt: skip
        assert KEY not in told[0]["everything"]
        assert KEY not in daemon.log_path.read_text()
        assert not [path for path in (tmp_path / "jobs").rglob("*") if path.is_file() and KEY in path.read_text()]


def test_a_job_that_asks_for_what_the_host_does_not_offer_fails_before_training() -> None:
    asked = Hyperparameters.model_validate({"trackers": ["wandb"]})
    with pytest.raises(JobFailed, match="does not offer") as failed:
        choose_trackers(asked, load_settings(**NOWHERE))
    assert failed.value.hint is not None and "WANDB_API_KEY" in failed.value.hint


def test_the_job_counts_before_the_host() -> None:
    settings = load_settings(**NOWHERE, trackers=("tensorboard", "wandb"), wandb_api_key=KEY, wandb_entity="we")
    silent = choose_trackers(Hyperparameters(trackers=()), settings)
    assert (silent.trackers, silent.environment) == ((), {})
    by_default = choose_trackers(Hyperparameters(), settings)
    assert by_default.trackers == ("tensorboard", "wandb")
    assert by_default.environment == {
        "WANDB_API_KEY": KEY,
        "WANDB_PROJECT": "brightrun-trainer",
        "WANDB_ENTITY": "we",
    }
    assert KEY not in repr(by_default)


def test_a_host_that_promises_wandb_without_a_key_does_not_start() -> None:
    with pytest.raises(HostUnfit, match="TRAINER_TRACKERS=wandb needs WANDB_API_KEY"):
        load_settings(**NOWHERE, trackers=("wandb",))
