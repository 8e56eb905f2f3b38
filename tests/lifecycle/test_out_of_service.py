"""A host that cannot work, whatever the job: jobs go back uncounted, the host claims nothing, and heals by itself."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.daemon_process import eventually
from tests.doubles.storage_keys import ANON_KEY, make_key
from tests.lifecycle.project import Project
from tests.lifecycle.queue import Queue
from tests.paths import SCRIPTED_TRAINER

LONG = [["steps", 2000, 0.02]]


def worker_rows(queue: Queue) -> list[dict[str, Any]]:
    return queue.select("SELECT * FROM training_workers ORDER BY started_at")


def returned(queue: Queue, job: UUID) -> list[dict[str, Any]]:
    return [event for event in queue.events(job) if event["kind"] == "returned"]


def queued(queue: Queue, job: UUID) -> dict[str, Any] | None:
    row = queue.row(job)
    return row if row["status"] == "queued" else None


def out_of_service(queue: Queue, part: str) -> Callable[[], dict[str, Any] | None]:
    def look() -> dict[str, Any] | None:
        for row in worker_rows(queue):
            troubles = {each["name"]: each for each in row["data"].get("troubles", [])}
            if row["state"] == "out_of_service" and part in troubles:
                return troubles[part]
        return None

    return look


def break_work_folder(folder: Path) -> None:
    """A file in its place: for root as well, nothing can be made below it."""
    jobs = folder / "jobs"
    shutil.rmtree(jobs, ignore_errors=True)
    jobs.write_text("not a folder")


def test_a_host_whose_work_folder_is_no_folder_takes_no_job_says_why_and_works_once_it_is_mended(
    queue: Queue, tmp_path: Path
) -> None:
    break_work_folder(tmp_path)
    job = queue.insert()
    with queue.daemon(tmp_path) as daemon:
        trouble = eventually(out_of_service(queue, "work folder"))
        # The operator reads which folder and what to set; the job's owner reads neither here nor in the job.
        assert str(tmp_path / "jobs") in trouble["message"] and "TRAINER_WORK_DIR" in trouble["message"]
        row = queue.row(job)
        assert row["status"] == "queued" and row["attempt"] == 0 and row["lease_epoch"] == 0
        (waiting,) = queue.select("SELECT waiting_reason FROM training_queue WHERE job_id = %s", job)
        assert waiting["waiting_reason"] == "every worker is out of service"

        (tmp_path / "jobs").unlink()
        row = queue.wait_for(job, "completed")
        daemon.wait_for_log("trouble_ended", trouble="work folder")
        eventually(lambda: all(not row["data"]["troubles"] for row in worker_rows(queue)))
    assert row["attempt"] == 1


def test_a_broken_host_burns_no_attempt_of_eight_jobs_while_a_healthy_one_is_busy(queue: Queue, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "models").symlink_to(tmp_path / "models")
    (broken / "storage").symlink_to(tmp_path / "storage")
    (tmp_path / "storage").mkdir(exist_ok=True)
    with queue.daemon(tmp_path, name="healthy") as healthy:
        busy = queue.insert(script=[["steps", 3000, 0.02]])
        queue.wait_for(busy, "running")
        with queue.daemon(broken, name="broken", storage_dir=tmp_path / "storage"):
            # It is well at first, and takes the first of the eight.
            queue.wait_for(queue.insert(), "completed")
            break_work_folder(broken)
            jobs = [queue.insert() for _ in range(8)]
            eventually(out_of_service(queue, "work folder"))
            queue.cancel_as_owner(busy)
            rows = [queue.wait_for(job, "completed", seconds=60) for job in jobs]
    assert [row["attempt"] for row in rows] == [1] * 8
    told = [event for job in jobs for event in returned(queue, job)]
    assert len(told) == 1
    # The job's owner reads what it was, and nothing of the host's folders.
    assert "work folder" in told[0]["message"] and str(tmp_path) not in json.dumps(told[0]["data"]) + told[0]["message"]
    assert healthy.logged("job_claimed")


def test_a_trainer_that_cannot_be_started_is_the_hosts_fault(queue: Queue, tmp_path: Path) -> None:
    program = tmp_path / "trainer"
    daemon = queue.daemon(tmp_path, warm="off")
    daemon.environment["SCRIPTED_TRAINER"] = str(program)
    with daemon:
        job = queue.insert()
        trouble = eventually(out_of_service(queue, "trainer"))
        assert "cannot be started" in trouble["message"] and "constraints.txt" in trouble["message"]
        eventually(lambda: queue.row(job)["status"] == "queued")
        assert queue.row(job)["attempt"] == 0 and len(returned(queue, job)) == 1
        write_trainer(program)
        assert queue.wait_for(job, "completed")["attempt"] == 1


def test_a_trainer_whose_libraries_do_not_load_is_the_hosts_fault(queue: Queue, tmp_path: Path) -> None:
    program = tmp_path / "trainer"
    program.write_text(f"#!{sys.executable}\nimport a_library_that_is_not_there\n")
    program.chmod(0o755)
    daemon = queue.daemon(tmp_path, warm="off")
    daemon.environment["SCRIPTED_TRAINER"] = str(program)
    with daemon:
        job = queue.insert()
        eventually(out_of_service(queue, "trainer"))
        eventually(lambda: queue.row(job)["status"] == "queued")
        assert queue.row(job)["attempt"] == 0
        write_trainer(program)
        assert queue.wait_for(job, "completed")["attempt"] == 1


def test_what_only_looks_like_the_hosts_fault_stays_the_jobs(queue: Queue, tmp_path: Path) -> None:
    """A model that wants a package of its own: the trainer as such works, and the next job is taken at once."""
    words = {
        "code": "internal",
        "message": "the trainer failed (ImportError: timm)",
        "transient": True,
        "host": "trainer",
    }
    with queue.daemon(tmp_path, warm="off"):
        job = queue.insert(script=[["say", "failed", words], ["exit", 1]], max_attempts=2)
        row = queue.wait_for(job, "failed")
        queue.wait_for(queue.insert(), "completed")
    assert row["attempt"] == 2 and row["error_code"] == "internal" and returned(queue, job) == []


def test_a_disk_that_is_full_in_mid_training_costs_no_attempt_and_the_job_resumes(queue: Queue, tmp_path: Path) -> None:
    words = {"code": "disk_full", "message": "the disk is full", "host": "work folder"}
    script = [["steps", 10, 0.0], ["say_once", "failed", words], ["steps", 20, 0.0]]
    with queue.daemon(tmp_path):
        job = queue.insert(script=script)
        row = queue.wait_for(job, "completed")
    assert row["attempt"] == 1 and len(returned(queue, job)) == 1
    assert "resumed" in queue.story(job)


@pytest.mark.parametrize("signal_words", ["training_live_workers", "training_worker_status"])
def test_an_unfit_host_is_no_living_worker_and_its_state_is_shown(
    queue: Queue, tmp_path: Path, signal_words: str
) -> None:
    break_work_folder(tmp_path)
    with queue.daemon(tmp_path):
        eventually(out_of_service(queue, "work folder"))
        rows = queue.select(f"SELECT state FROM {signal_words}")
    assert [row["state"] for row in rows] == ([] if signal_words == "training_live_workers" else ["out_of_service"])


def write_trainer(program: Path) -> None:
    """The scripted trainer under another name, put in place whole."""
    real = SCRIPTED_TRAINER
    hidden = program.with_suffix(".new")
    hidden.write_text(f"#!{sys.executable}\n{real.read_text()}")
    hidden.chmod(0o755)
    hidden.replace(program)


def test_a_models_volume_that_is_not_mounted_fails_no_job_for_good(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path, models_dir=tmp_path / "volume" / "models"):
        job = queue.insert()
        trouble = eventually(out_of_service(queue, "models folder"))
        assert "TRAINER_MODELS_DIR" in trouble["message"]
        shutil.copytree(tmp_path / "models", tmp_path / "volume" / "models")
        assert queue.wait_for(job, "completed")["attempt"] == 1


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (ANON_KEY, "is the anon key"),
        pytest.param(make_key("somebody"), "new row violates row-level security policy", marks=pytest.mark.double),
    ],
    ids=["anon", "a role without rights"],
)
async def test_a_storage_key_that_may_not_work_fails_no_job_and_takes_none(
    project: Project, key: str, said: str
) -> None:
    """Storage answers it "not found": each job would fail for good, as if its user had not uploaded the dataset."""
    right, project.storage.key = project.storage.key, key
    jobs = [project.insert() for _ in range(3)]
    with project.daemon("wrong") as daemon:
        trouble = await asyncio.to_thread(eventually, out_of_service(project.queue, "storage"))
        assert said in trouble["message"] and "SUPABASE_SERVICE_ROLE_KEY" in trouble["message"], trouble
        assert not daemon.logged("job_claimed")
        assert key not in daemon.log_path.read_text()
    assert {(row["status"], row["attempt"]) for row in map(project.queue.row, jobs)} == {("queued", 0)}
    project.storage.key = right
    with project.daemon("right"):
        assert (await project.wait_for(jobs[0], "completed"))["attempt"] == 1


@pytest.mark.double
async def test_a_storage_key_that_is_withdrawn_sends_jobs_back_uncounted_until_it_is_accepted(project: Project) -> None:
    secret = project.storage.gate.secret
    with project.daemon() as daemon:
        await asyncio.to_thread(daemon.wait_for_log, "bucket_created")
        project.storage.gate.secret = b"another, as after a rotation of the project's keys"
        job = project.insert()
        trouble = await asyncio.to_thread(eventually, out_of_service(project.queue, "storage"))
        assert "signature verification failed" in trouble["message"]
        row = await asyncio.to_thread(eventually, lambda: queued(project.queue, job))
        assert row["attempt"] == 0
        # None if the host's own probe was refused before it took the job, as on a busy machine.
        for told in returned(project.queue, job):
            assert "refuses the key of this host" in told["message"]
        project.storage.gate.secret = secret
        assert (await project.wait_for(job, "completed", seconds=70))["attempt"] == 1
        daemon.wait_for_log("trouble_ended", trouble="storage")
