"""A trainer that waits between jobs may be killed at any moment: no job is harmed, no attempt is lost, none is left."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from tests.daemon_process import DaemonProcess, alive, eventually
from tests.lifecycle.queue import Queue, write_model_folder

LONG = [["steps", 2000, 0.02]]


@pytest.fixture
def daemon(queue: Queue, tmp_path: Path) -> DaemonProcess:
    return queue.daemon(tmp_path)


def only_trainer(daemon: DaemonProcess) -> int:
    """The one trainer that waits; its daemon keeps no more than one a place."""
    return eventually(lambda: len(found := daemon.children()) == 1 and found[0])


def test_two_jobs_are_done_by_one_trainer(queue: Queue, daemon: DaemonProcess) -> None:
    with daemon:
        waiting = only_trainer(daemon)
        for _ in range(2):
            queue.wait_for(queue.insert(), "completed")
        assert daemon.children() == [waiting]
        assert len(daemon.logged("trainer_started")) == 1


def test_a_waiting_trainer_that_is_killed_costs_the_next_job_nothing(queue: Queue, daemon: DaemonProcess) -> None:
    with daemon:
        queue.wait_for(queue.insert(), "completed")
        os.kill(only_trainer(daemon), signal.SIGKILL)
        row = queue.wait_for(queue.insert(), "completed")
        daemon.wait_for_log("attempt_settled", count=2)
    assert row["attempt"] == 1 and row["error_code"] is None


def test_a_trainer_that_is_killed_with_the_spec_in_its_hands_loses_no_attempt(
    queue: Queue, daemon: DaemonProcess
) -> None:
    with daemon:
        waiting = only_trainer(daemon)
        # Stopped before its exec it would stop the daemon, too, which waits for that.
        daemon.wait_for_log("trainer_started")
        # Stopped, it takes no spec; its job waits in the pipe.
        os.kill(waiting, signal.SIGSTOP)
        job = queue.insert()
        eventually(lambda: queue.row(job)["status"] == "initializing")
        daemon.wait_for_log("model_resolved")
        os.kill(waiting, signal.SIGKILL)
        row = queue.wait_for(job, "completed")
    assert row["attempt"] == 1 and "retrying" not in queue.story(job)


def test_a_trainer_whose_job_failed_or_was_cancelled_is_not_used_again(queue: Queue, daemon: DaemonProcess) -> None:
    with daemon:
        first = only_trainer(daemon)
        queue.wait_for(queue.insert(script=[["exit", 3]], max_attempts=1), "failed")
        assert not alive(first)
        second = only_trainer(daemon)
        job = queue.insert(script=LONG)
        queue.wait_for(job, "running")
        queue.cancel_as_owner(job)
        eventually(lambda: not alive(second))
        queue.wait_for(queue.insert(), "completed")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_no_waiting_trainer_outlives_its_daemon(queue: Queue, daemon: DaemonProcess, how: signal.Signals) -> None:
    with daemon:
        queue.wait_for(queue.insert(), "completed")
        daemon.wait_for_log("attempt_settled")
        waiting = only_trainer(daemon)
        daemon.signal(how)
        assert daemon.wait() == (-how if how is signal.SIGKILL else 0)
        eventually(lambda: not alive(waiting))


def test_an_unused_base_model_is_let_go_and_a_light_trainer_waits_in_its_place(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, warm_minutes=0.001) as daemon:
        queue.wait_for(queue.insert(), "completed")
        daemon.wait_for_log("warm_trainer_given_up", reason="idle", seconds=30)
        assert only_trainer(daemon)


def test_each_place_has_a_trainer_of_its_own(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, slots=2) as daemon:
        eventually(lambda: len(daemon.children()) == 2)
        for job in [queue.insert(), queue.insert()]:
            queue.wait_for(job, "completed")
        assert len(daemon.children()) == 2


def test_off_means_a_process_for_each_job_and_none_between(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, warm="off") as daemon:
        for count in (1, 2):
            queue.wait_for(queue.insert(), "completed")
            daemon.wait_for_log("trainer_ended", count=count)
            assert daemon.children() == []


def test_another_users_job_is_overtaken_by_those_whose_model_is_loaded_but_not_beyond_the_bound(
    queue: Queue, tmp_path: Path
) -> None:
    bound, other_user = timedelta(seconds=2), uuid4()
    queue.select("INSERT INTO auth.users (id, email) VALUES (%s, 'other@example.test')", other_user)
    write_model_folder(tmp_path / "models" / "other")
    with queue.daemon(tmp_path, warm_first_seconds=bound.total_seconds()):
        queue.wait_for(queue.insert(), "completed")
        stream = [queue.insert()]
        patient = queue.insert(user_id=other_user, hyperparameters={"base_model": "other"})
        deadline = time.monotonic() + 60
        # One user's stream never dries up, as long as the other one waits.
        while queue.row(patient)["status"] == "queued":
            assert time.monotonic() < deadline, "the stream holds the other user up for ever"
            if queue.row(stream[-1])["status"] != "queued":
                stream += [queue.insert() for _ in range(3)]
        queue.wait_for(patient, "completed")
    queued_at = {job: queue.row(job)["queued_at"] for job in (patient, *stream)}
    claimed_at = {
        job: next((event["at"] for event in queue.events(job) if event["kind"] == "claimed"), None)
        for job in (patient, *stream)
    }
    overtook = [
        at
        for job in stream
        if (at := claimed_at[job]) and at < claimed_at[patient] and queued_at[job] > queued_at[patient]
    ]
    assert overtook, "the loaded model counted for nothing"
    assert max(overtook) <= queued_at[patient] + bound


def test_what_one_job_prints_is_not_in_the_log_of_the_next(queue: Queue, daemon: DaemonProcess) -> None:
    secret = "marked-41d8cd98f00b204e"
    with daemon:
        queue.wait_for(queue.insert(script=[["print", secret * 2000], ["steps", 5, 0.0]]), "completed")
        row = queue.wait_for(queue.insert(script=[["steps", 5, 0.0], ["exit", 3]], max_attempts=1), "failed")
    assert secret not in (row["error_stack"] or "")
