"""From a row to its ending: a real Postgres, the real daemon as its own process, a scripted trainer.

Each test says what a user or an operator may rely on.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from uuid import uuid4

import pytest

from tests.daemon_process import DaemonProcess, alive, eventually
from tests.lifecycle.queue import Queue, write_model_folder

LONG = [["steps", 2000, 0.02]]


@pytest.fixture
def daemon(queue: Queue, tmp_path: Path) -> DaemonProcess:
    return queue.daemon(tmp_path)


def test_an_inserted_row_becomes_an_adapter(queue: Queue, daemon: DaemonProcess, tmp_path: Path) -> None:
    with daemon:
        daemon.wait_for_log("listener_hears")
        job = queue.insert()
        row = queue.wait_for(job, "completed")
        daemon.wait_for_log("attempt_settled")
        eventually(lambda: not (tmp_path / "jobs" / str(job)).exists())
    assert row["progress"] == 100 and row["attempt"] == 1 and row["retry_count"] == 0
    assert row["adapter_path"] == f"lora-models/adapters/{job}.tar.gz"
    stored = tmp_path / "storage" / row["adapter_path"]
    assert stored.stat().st_size == row["adapter_bytes"]
    assert [point["step"] for point in queue.points(job)] == list(range(1, 21))
    story = queue.story(job)
    assert story.index("queued") < story.index("claimed") < story.index("started") < story.index("completed")
    assert queue.leases() == []


def test_every_fault_of_a_malformed_row_is_listed_and_the_next_job_is_taken(
    queue: Queue, daemon: DaemonProcess
) -> None:
    with daemon:
        bad = queue.insert(hyperparameters={"base_model": "tiny", "learning_rate": "fast", "epochs": -1, "rank": 0})
        row = queue.wait_for(bad, "failed", seconds=10)
        assert row["error_code"] == "invalid_spec" and row["error_hint"]
        for field in ("learning_rate", "epochs", "rank"):
            assert f"hyperparameters.{field}" in row["error_message"]
        queue.wait_for(queue.insert(), "completed")


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ({"hyperparameters": {"base_model": "nobody/nothing"}}, "model_not_found", "nobody/nothing"),
        ({"hyperparameters": {"base_model": "../../etc"}}, "invalid_spec", "base_model"),
        ({"storage_path": "gone.jsonl"}, "dataset_unreachable", "gone.jsonl"),
        ({"dataset_url": "http://169.254.169.254/latest/meta-data"}, "dataset_forbidden", "169.254.169.254"),
    ],
)
def test_what_cannot_succeed_fails_within_seconds_and_says_why(
    queue: Queue, daemon: DaemonProcess, what: dict[str, object], code: str, words: str
) -> None:
    with daemon:
        row = queue.wait_for(queue.insert(**what), "failed", seconds=15)
    assert row["error_code"] == code and words in row["error_message"] and row["error_hint"]


def test_a_child_that_dies_is_tried_again_and_goes_on_from_its_checkpoint(queue: Queue, daemon: DaemonProcess) -> None:
    with daemon:
        job = queue.insert(script=[["steps", 10, 0.0], ["kill_self_once"], ["steps", 20, 0.0]])
        row = queue.wait_for(job, "completed")
    assert row["attempt"] == 2 and row["retry_count"] == 1
    assert row["adapter_path"].endswith(f"{job}-e2.tar.gz")
    story = queue.story(job)
    assert "retrying" in story and "resumed" in story


def test_every_attempt_is_told_the_date_of_the_first(queue: Queue, daemon: DaemonProcess) -> None:
    """Templates write it into the text: with another date, other tokens, and a checkpoint that does not fit them."""
    job = queue.insert(script=[["tell_date"]])
    with queue.connect() as connection:
        connection.execute("SET session_replication_role = replica")  # past the guard
        connection.execute("UPDATE training_jobs SET started_at = '2026-01-05 23:59+00' WHERE id = %s", (job,))
    with daemon:
        queue.wait_for(job, "completed")
    told = [event["message"] for event in queue.events(job) if event["kind"] == "told_date"]
    assert told and "2026-01-05" in told[0]


def test_a_child_that_always_dies_ends_as_failed_when_its_attempts_are_spent(
    queue: Queue, daemon: DaemonProcess
) -> None:
    with daemon:
        row = queue.wait_for(queue.insert(script=[["kill_self", 9]], max_attempts=2), "failed")
    assert row["attempt"] == 2 and row["error_code"] == "internal" and "SIGKILL" in row["error_message"]


def test_a_running_job_cancelled_by_the_apps_update_frees_the_host_within_seconds(
    queue: Queue, daemon: DaemonProcess
) -> None:
    with daemon:
        job = queue.insert(script=[["ignore_term"], *LONG])
        queue.wait_for(job, "running")
        children = daemon.children()
        queue.cancel_as_owner(job)
        eventually(lambda: not any(alive(pid) for pid in children), seconds=8)
        eventually(lambda: queue.leases() == [])
        row = queue.row(job)
        assert row["status"] == "cancelled" and row["final_cost"] is not None
        queue.wait_for(queue.insert(), "completed")
    assert queue.row(job)["status"] == "cancelled"


@pytest.mark.parametrize(
    ("deleted", "script"),
    # One that writes its progress finds no row to write to; one that is silent must not wait for its next heartbeat.
    [("job", LONG), ("owner", [["steps", 10, 0.0], ["sleep", 600]])],
    ids=["job", "silent_job_with_its_owner"],
)
def test_a_running_jobs_row_that_is_deleted_frees_the_host_within_seconds_and_leaves_nothing(
    queue: Queue, tmp_path: Path, deleted: str, script: list[list[object]]
) -> None:
    owner = uuid4()
    queue.select("INSERT INTO auth.users (id, email) VALUES (%s, %s)", owner, f"{owner}@example.test")
    with queue.daemon(tmp_path, lease_seconds=60) as daemon:
        job = queue.insert(script=script, user_id=owner)
        queue.wait_for(job, "running")
        waiting = queue.insert()
        child = daemon.wait_for_log("trainer_started")["pid"]
        folder = tmp_path / "jobs" / str(job)
        assert alive(child) and any((folder / "checkpoints").rglob("step"))
        if deleted == "job":
            queue.select("DELETE FROM training_jobs WHERE id = %s", job)
        else:
            queue.select("DELETE FROM auth.users WHERE id = %s", owner)
        eventually(lambda: not alive(child), seconds=12)
        queue.wait_for(waiting, "completed")
        eventually(lambda: not folder.exists(), why=lambda: str(list(folder.rglob("*"))))
        assert queue.leases() == []
        left = queue.select("SELECT job_id FROM training_events UNION SELECT job_id FROM metrics_points")
        assert [row["job_id"] for row in left] == [waiting]


def test_a_queued_job_is_cancelled_at_once_and_never_claimed(queue: Queue, daemon: DaemonProcess) -> None:
    job = queue.insert()
    queue.cancel_as_owner(job)
    with daemon:
        queue.wait_for(queue.insert(), "completed")
    assert queue.row(job)["attempt"] == 0


def test_json_that_python_cannot_read_fails_its_job_and_ends_no_daemon(queue: Queue, daemon: DaemonProcess) -> None:
    unreadable = ['{"learning_rate": 1e5000}', '{"a": ' + "[" * 3000 + "]" * 3000 + "}"]
    jobs = [queue.insert() for _ in unreadable]
    for job, written in zip(jobs, unreadable, strict=True):
        queue.select("UPDATE training_jobs SET hyperparameters = %s::jsonb WHERE id = %s", written, job)
    with daemon:
        queue.wait_for(queue.insert(), "completed")
    ended = queue.select("SELECT error_code FROM training_jobs WHERE id = ANY (%s)", jobs)
    assert [row["error_code"] for row in ended] == ["invalid_spec"] * 2


def test_term_releases_the_job_with_a_checkpoint_and_does_not_count_the_attempt(
    queue: Queue, daemon: DaemonProcess, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with daemon:
        job = queue.insert(script=[["steps", 90, 0.05, str(gate)]])
        eventually(lambda: (queue.row(job)["current_step"] or 0) >= 3)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
    row = queue.row(job)
    assert row["status"] == "queued" and row["attempt"] == 0 and row["due"]
    gate.touch()
    with queue.daemon(tmp_path, name="second"):
        row = queue.wait_for(job, "completed")
    assert row["attempt"] == 1 and row["retry_count"] == 0
    resumed = [event["data"]["step"] for event in queue.events(job) if event["kind"] == "resumed"]
    assert resumed and resumed[0] >= 3
    steps = [point["step"] for point in queue.points(job)]
    assert steps == sorted(set(steps)) == list(range(1, 91))


def test_a_second_term_does_not_wait_for_a_checkpoint(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, drain_seconds=60) as daemon:
        job = queue.insert(script=[["ignore_term"], *LONG])
        queue.wait_for(job, "running")
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_log("trainer_stopping")
        begun = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0 and time.monotonic() - begun < 10
    assert queue.row(job)["status"] == "queued"


def test_a_job_that_is_being_claimed_when_term_comes_is_given_back(queue: Queue, daemon: DaemonProcess) -> None:
    waiting = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'training_leases'::regclass"
    with daemon:
        daemon.wait_for_log("listener_hears")
        with queue.connect() as app, app.transaction():
            app.execute("LOCK TABLE training_leases IN SHARE MODE")
            job = queue.insert(script=LONG)
            eventually(lambda: queue.select(waiting))
            daemon.signal(signal.SIGTERM)
            daemon.wait_for_log("signal_received")
        assert daemon.wait() == 0
    row = queue.row(job)
    assert (row["status"], row["attempt"]) == ("queued", 0)


def test_usr1_finishes_the_job_at_hand_and_claims_no_other(queue: Queue, daemon: DaemonProcess, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with daemon:
        job = queue.insert(script=[["steps", 150, 0.02, str(gate)]])
        queue.wait_for(job, "running")
        daemon.signal(signal.SIGUSR1)
        daemon.wait_for_log("worker_draining")
        waiting = queue.insert()
        gate.touch()
        assert daemon.wait() == 0
    assert queue.row(job)["status"] == "completed"
    assert queue.row(waiting)["status"] == "queued"


def test_term_during_a_drain_gives_the_job_at_hand_back_with_a_checkpoint(
    queue: Queue, daemon: DaemonProcess, tmp_path: Path
) -> None:
    def reached(step: int) -> bool:
        return (queue.row(job)["current_step"] or 0) >= step

    gate = tmp_path / "gate"
    with daemon:
        job = queue.insert(script=[["steps", 200, 0.1, str(gate)]])
        eventually(lambda: reached(3))
        daemon.signal(signal.SIGUSR1)
        daemon.wait_for_log("worker_draining")
        drained_at = queue.row(job)["current_step"]
        eventually(lambda: reached(drained_at + 1))
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
    left = queue.row(job)
    assert (left["status"], left["attempt"], left["due"]) == ("queued", 0, True) and queue.leases() == []
    assert "released" in queue.story(job)
    gate.touch()
    with queue.daemon(tmp_path, name="second"):
        row = queue.wait_for(job, "completed")
    assert row["attempt"] == 1 and row["retry_count"] == 0
    (resumed,) = [event["data"]["step"] for event in queue.events(job) if event["kind"] == "resumed"]
    # The checkpoint is the one that TERM asked for: no step that the row told of is done again.
    assert resumed >= left["current_step"] > drained_at
    # Every third step and both ends, through the resume as well.
    assert [point["step"] for point in queue.points(job)] == [1, *range(3, 200, 3), 200]


def test_a_job_whose_host_lost_its_power_is_reaped_and_resumed_elsewhere(queue: Queue, tmp_path: Path) -> None:
    first = queue.daemon(tmp_path, name="first", lease_seconds=1.5)
    second = queue.daemon(tmp_path, name="second", lease_seconds=1.5)
    gate = tmp_path / "gate"
    with first:
        job = queue.insert(script=[["steps", 80, 0.03, str(gate)]])
        eventually(lambda: (queue.row(job)["current_step"] or 0) >= 10)
        with second:
            children = first.children()
            first.kill()
            eventually(lambda: not any(alive(pid) for pid in children), seconds=5)
            gate.touch()
            row = queue.wait_for(job, "completed", seconds=20)
    assert row["attempt"] == 2 and "reaped" in queue.story(job)
    assert [kind for kind in queue.story(job) if kind == "completed"] == ["completed"]


def test_a_job_that_names_no_model_goes_on_with_the_one_it_was_begun_with(queue: Queue, tmp_path: Path) -> None:
    write_model_folder(tmp_path / "models" / "another")
    gate = tmp_path / "gate"
    job = queue.insert(script=[["steps", 300, 0.02, str(gate)]], hyperparameters={"learning_rate": 1e-4})
    with queue.daemon(tmp_path, name="first", default_model="tiny") as first:
        queue.wait_for(job, "running")
        assert queue.row(job)["base_model"] == "tiny"
        first.signal(signal.SIGTERM)
        assert first.wait() == 0
    gate.touch()
    with queue.daemon(tmp_path, name="second", default_model="another"):
        row = queue.wait_for(job, "completed")
        other = queue.wait_for(queue.insert(hyperparameters={"learning_rate": 1e-4}), "completed")
    assert (row["base_model"], other["base_model"]) == ("tiny", "another")
    told = [event["message"] for event in queue.events(job) if event["kind"] == "base_model"]
    assert told == [
        "The base model is tiny, the service's default (the job names none).",
        "The base model is tiny, as in the earlier attempt (the job names none).",
    ]
    manifest = json.loads((tmp_path / "storage" / "lora-models" / row["result"]["artifacts"]["manifest"]).read_text())
    assert manifest["trained_with"]["base_model"] == manifest["base_model"] == "tiny"
    assert manifest["serving"] == {"base_model": "tiny", "lora_rank": 8}


def test_a_job_that_takes_each_of_its_hosts_down_ends_as_failed_and_says_so(queue: Queue, tmp_path: Path) -> None:
    attempts = 3
    job = queue.insert(script=LONG, max_attempts=attempts)
    for attempt in range(1, attempts + 1):
        # Each reaps the one before it.
        with queue.daemon(tmp_path, name=f"victim {attempt}", lease_seconds=1) as victim:
            if attempt == attempts:
                # Twice may be bad luck of the host; from then on the job waits, and here its owner will not.
                eventually(lambda: queue.row(job)["run_after"] is not None)
                queue.select("UPDATE training_jobs SET run_after = NULL WHERE id = %s", job)
            victim.wait_for_log("job_claimed", job_id=str(job))
            victim.kill()
    with queue.daemon(tmp_path, name="survivor", lease_seconds=1) as survivor:
        neighbour = queue.wait_for(queue.insert(), "completed")
        row = queue.wait_for(job, "failed")
        after = queue.wait_for(queue.insert(), "completed")
        assert {line["job_id"] for line in survivor.logged("job_claimed")} == {str(neighbour["id"]), str(after["id"])}
    assert row["error_code"] == "worker_lost" and row["attempt"] == attempts and not row["due"]
    assert row["error_message"] == f"The host that ran this job stopped answering (attempt 3 of 3). {row['error_hint']}"
    assert "reduce batch_size" in row["error_hint"] and row["final_cost"] is not None and row["completed_at"]
    story = queue.story(job)
    assert story.count("claimed") == attempts and story[-1] == "failed" and queue.leases() == []


def test_a_host_that_slept_past_its_lease_ends_its_child_and_writes_nothing(queue: Queue, tmp_path: Path) -> None:
    sleeper = queue.daemon(tmp_path, name="sleeper", lease_seconds=1.5)
    heir = queue.daemon(tmp_path, name="heir", lease_seconds=1.5)
    gate = tmp_path / "gate"
    with sleeper:
        job = queue.insert(script=[["steps", 240, 0.05, str(gate)]])
        eventually(lambda: (queue.row(job)["current_step"] or 0) >= 5)
        child = sleeper.children()
        sleeper.signal(signal.SIGSTOP)
        with heir:
            eventually(lambda: queue.row(job)["lease_epoch"] == 2, seconds=15)
            sleeper.signal(signal.SIGCONT)
            sleeper.wait_for_log("lease_lost")
            eventually(lambda: not any(alive(pid) for pid in child))
            gate.touch()
            row = queue.wait_for(job, "completed", seconds=60)
    assert row["lease_epoch"] == 2 and row["adapter_path"].endswith("-e2.tar.gz")


def test_a_scheduled_job_wakes_the_sleeping_daemon_when_it_is_due(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, poll_seconds=60) as daemon:
        daemon.wait_for_log("listener_hears")
        job = queue.insert(run_after_seconds=1.5)
        due_at = queue.row(job)["run_after"]
        queue.wait_for(job, "completed", seconds=15)
    claimed_at = next(event["at"] for event in queue.events(job) if event["kind"] == "claimed")
    assert 0 <= (claimed_at - due_at).total_seconds() < 1.0


def test_higher_priority_goes_first_then_the_older(queue: Queue, daemon: DaemonProcess) -> None:
    jobs = [queue.insert(priority=priority) for priority in (0, 0, 5, 1)]
    with daemon:
        rows = [queue.wait_for(job, "completed") for job in jobs]
    order = sorted(range(4), key=lambda index: rows[index]["started_at"])
    assert order == [2, 3, 0, 1]


def test_a_silent_trainer_is_ended_as_stalled(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, stall_seconds=1):
        row = queue.wait_for(queue.insert(script=[["sleep", 60]], max_attempts=1), "failed")
    assert row["error_code"] == "stalled"


def test_a_job_that_reaches_its_max_cost_ends_with_a_checkpoint(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, cost_per_gpu_hour=3600) as daemon:
        job = queue.insert(script=LONG, max_cost=1)
        row = queue.wait_for(job, "failed", seconds=15)
        assert row["error_code"] == "budget_exceeded" and row["final_cost"] >= 1
        assert any((tmp_path / "jobs" / str(job) / "checkpoints").rglob("step"))
        daemon.wait_for_log("attempt_settled")


def test_a_job_that_passes_its_deadline_ends(queue: Queue, daemon: DaemonProcess) -> None:
    with daemon:
        row = queue.wait_for(queue.insert(script=LONG, deadline_seconds=2), "failed", seconds=15)
    assert row["error_code"] == "deadline_exceeded"


def test_a_broken_configuration_lists_every_fault_and_exits_78(queue: Queue, tmp_path: Path) -> None:
    daemon = queue.daemon(tmp_path, lease_seconds="soon", device="tpu")
    daemon.environment["DATABASE_URL"] = "mysql://elsewhere"
    with daemon:
        assert daemon.wait() == 78
    for name in ("TRAINER_LEASE_SECONDS", "TRAINER_DEVICE", "DATABASE_URL"):
        assert name in daemon.tail()
    assert "mysql" not in daemon.tail()


def test_the_daemon_starts_quickly_and_stays_small(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, forked=False) as daemon:
        daemon.wait_for_log("daemon_started")
        # Of a core, not of the wall clock: nearly all of a start is imports, and these machines are noisy.
        ticks = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        started_seconds = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        queue.wait_for(queue.insert(), "completed")
        resident = int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[1]) * 4096 / 2**20
    assert started_seconds < 3
    assert resident < 120
