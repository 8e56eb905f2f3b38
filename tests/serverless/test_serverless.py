"""The serverless worker under RunPod's own loop: with rows and without, its progress, its stops, its deaths."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.daemon_process import DaemonProcess, alive, eventually
from tests.doubles.file_server import FileServer, script_file
from tests.doubles.runpod_api import RunPodDouble as PodsApi
from tests.doubles.runpod_serverless import RunPodDouble
from tests.lifecycle.queue import Queue, write_model_folder
from tests.paths import DOUBLES, ROOT

COMMAND = (sys.executable, str(ROOT / "tests" / "serverless" / "scripted_serverless.py"))
RESULT = {"status", "progress", "current_epoch", "current_step", "metrics", "adapter_path", "job_id"}
LONG = ["steps", 2000, 0.02]


class ServerlessWorker(DaemonProcess):
    def __init__(
        self,
        dsn: str | None,
        folder: Path,
        runpod: RunPodDouble | None,
        files: FileServer,
        *arguments: str,
        name: str = "serverless",
        **settings: object,
    ) -> None:
        given = {"default_model": "tiny", "allowed_hosts": files.host} | settings
        super().__init__(dsn or "", folder, name=name, command=(*COMMAND, *arguments), **given)
        if dsn is None:
            del self.environment["DATABASE_URL"]
        self.environment["RUNPOD_SKIP_AUTO_SYSTEM_CHECKS"] = "true"
        self.environment["RUNPOD_SKIP_GPU_CHECK"] = "true"
        if runpod is not None:
            self.environment |= runpod.environment


@pytest.fixture
def runpod() -> Iterator[RunPodDouble]:
    with RunPodDouble() as double:
        yield double


def test_a_job_with_a_row_of_its_own_is_run_and_both_sides_are_told(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble, files: FileServer
) -> None:
    # Long enough for several updates, one a second, on a busy machine too.
    url = files.put("data.jsonl", script_file(["steps", 120, 0.05]))
    with ServerlessWorker(queue.dsn, tmp_path, runpod, files, service_user_id=queue.user_id) as worker:
        runpod.run("run-1", job_id="test-123", dataset_url=url, hyperparameters={"epochs": 1}, gpu_config={"count": 1})
        result = runpod.wait_for_result("run-1")
        assert "error" not in result, result
        row = queue.row(result["output"]["job_id"])
        assert worker.logged("job_claimed")
        # Delivered again with other values: the row is what ran, and the result says so.
        runpod.run("run-2", job_id="test-123", dataset_url=url, hyperparameters={"epochs": 4})
        again = runpod.wait_for_result("run-2")["output"]
        assert again["job_id"] == str(row["id"]) and "num_epochs is 1 there, not 4" in again["notice"]
        assert "submit_differs" in queue.story(row["id"])
    assert set(result["output"]) == RESULT and result["output"]["status"] == "completed"
    assert row["status"] == "completed" and row["client_job_id"] == "test-123"
    assert result["output"]["adapter_path"] == row["adapter_path"] and result["output"]["progress"] == 100
    updates = runpod.updates("run-1")
    progress = [update["progress"] for update in updates]
    assert len(progress) >= 3 and progress == sorted(progress)
    assert runpod.told[-1].get("status") != "IN_PROGRESS"


@pytest.mark.parametrize(("key", "cost"), [("good-key", 10.0), ("wrong-key", 0.5)])
def test_the_row_costs_what_runpod_charges_else_what_the_operator_set_never_the_tenants_word(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble, files: FileServer, key: str, cost: float
) -> None:
    """Dollars a second: RunPod's own, and the setting's where its API will not tell."""
    job = queue.insert(script=[["steps", 60, 0.05]], gpu_config=json.dumps({"cost_per_gpu_hour": 1e-6}))
    with PodsApi() as api:
        api.add("me", cost=36_000.0)
        given = {"cost_per_gpu_hour": 1_800.0, "runpod_api": api.url}
        worker = ServerlessWorker(queue.dsn, tmp_path, runpod, files, **given)
        worker.environment |= {"RUNPOD_POD_ID": "me", "TRAINER_RUNPOD_API_KEY": key}
        with worker:
            runpod.run("run-1", job_id=str(job))
            assert runpod.wait_for_result("run-1")["output"]["status"] == "completed"
        unknown = worker.logged("pod_price_unknown")
        assert len(unknown) == (0 if key == "good-key" else 1) and key not in worker.log_path.read_text()
    row = queue.row(job)
    seconds = (row["completed_at"] - row["started_at"]).total_seconds()
    assert 0.5 * cost < float(row["final_cost"]) / seconds < 2 * cost


def test_no_daemon_takes_the_row_that_a_serverless_worker_makes(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble, files: FileServer
) -> None:
    url = files.put("data.jsonl", script_file(["steps", 10, 0.02]))
    (tmp_path / "daemon").mkdir()
    with (
        queue.daemon(tmp_path, default_model="tiny", allowed_hosts=files.host) as daemon,
        ServerlessWorker(queue.dsn, tmp_path, runpod, files, service_user_id=queue.user_id) as worker,
    ):
        daemon.wait_for_log("listener_hears")
        for number in range(3):
            runpod.run(f"run-{number}", dataset_url=url)
        results = [runpod.wait_for_result(f"run-{number}") for number in range(3)]
        assert len(worker.logged("job_claimed")) == 3 and daemon.logged("job_claimed") == []
    assert [result["output"]["status"] for result in results] == ["completed"] * 3


def test_a_row_of_the_app_is_claimed_by_its_id_and_not_twice(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble, files: FileServer
) -> None:
    job = queue.insert(script=[["steps", 20, 0.02]])
    with ServerlessWorker(queue.dsn, tmp_path, runpod, files) as worker:
        runpod.run("first", job_id=str(job))
        first = runpod.wait_for_result("first")
        runpod.run("again", job_id=str(job))  # RunPod delivers a job again when a result was lost
        again = runpod.wait_for_result("again")
        assert len(worker.logged("job_claimed")) == 1
    assert first["output"] == again["output"] and queue.row(job)["attempt"] == 1


def test_a_job_that_a_daemon_runs_is_left_to_it(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble, files: FileServer
) -> None:
    job = queue.insert(script=[LONG])
    with queue.daemon(tmp_path), ServerlessWorker(queue.dsn, tmp_path, runpod, files, lease_seconds=3):
        queue.wait_for(job, "running")
        runpod.run("late", job_id=str(job))
        result = runpod.wait_for_result("late")
        assert "running on another host" in result["error"] and queue.row(job)["status"] == "running"


def test_runpods_cancel_ends_the_child_and_the_row(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble, files: FileServer
) -> None:
    job = queue.insert(script=[LONG])
    with ServerlessWorker(queue.dsn, tmp_path, runpod, files) as worker:
        runpod.run("run-1", job_id=str(job))
        queue.wait_for(job, "running")
        child = worker.wait_for_log("trainer_started")["pid"]
        runpod.cancel("run-1")
        worker.wait_for_log("attempt_settled", outcome="cancelled")
        assert not alive(child)
        # The worker lives on and takes the next.
        following = queue.insert(script=[["steps", 5, 0.01]])
        runpod.run("run-2", job_id=str(following))
        assert runpod.wait_for_result("run-2")["output"]["status"] == "completed"
    assert queue.row(job)["status"] == "cancelled" and runpod.result("run-1") is None


def test_the_apps_own_cancel_reaches_the_worker_and_runpod_hears_of_it(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble, files: FileServer
) -> None:
    job = queue.insert(script=[LONG])
    with ServerlessWorker(queue.dsn, tmp_path, runpod, files, lease_seconds=30):
        runpod.run("run-1", job_id=str(job))
        queue.wait_for(job, "running")
        queue.cancel_as_owner(job)
        result = runpod.wait_for_result("run-1", seconds=8)  # by NOTIFY: a heartbeat would take ten
    assert result["error"].startswith("Cancelled by") and queue.row(job)["status"] == "cancelled"


def test_term_releases_the_job_with_its_checkpoint_and_gives_runpod_no_result(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble, files: FileServer
) -> None:
    gate = tmp_path / "gate"
    job = queue.insert(script=[["steps", 100, 0.03, str(gate)]])
    with ServerlessWorker(queue.dsn, tmp_path, runpod, files) as worker:
        runpod.run("run-1", job_id=str(job))
        eventually(lambda: (queue.row(job)["current_step"] or 0) >= 10)
        worker.signal(signal.SIGTERM)
        row = queue.wait_for(job, "queued")
        assert worker.wait() == 0
    assert row["attempt"] == 0 and runpod.result("run-1") is None
    gate.touch()
    with ServerlessWorker(queue.dsn, tmp_path, runpod, files, name="next"):
        runpod.run("run-1", job_id=str(job))
        assert runpod.wait_for_result("run-1")["output"]["status"] == "completed"
    assert "resumed" in queue.story(job) and queue.leases() == []


def test_a_killed_workers_job_is_taken_over_by_the_next_once_its_lease_is_over(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble, files: FileServer
) -> None:
    gate = tmp_path / "gate"
    job = queue.insert(script=[["steps", 60, 0.03, str(gate)]])
    with ServerlessWorker(queue.dsn, tmp_path, runpod, files, lease_seconds=2) as worker:
        runpod.run("run-1", job_id=str(job))
        eventually(lambda: (queue.row(job)["current_step"] or 0) >= 10)
        worker.kill()
    gate.touch()
    with ServerlessWorker(queue.dsn, tmp_path, runpod, files, name="next", lease_seconds=2):
        runpod.run("run-1", job_id=str(job))
        assert runpod.wait_for_result("run-1")["output"]["status"] == "completed"
    assert queue.row(job)["attempt"] == 2 and "resumed" in queue.story(job)


def test_a_transient_failure_is_tried_again_here(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble, files: FileServer
) -> None:
    job = queue.insert(script=[["steps", 10, 0.01], ["kill_self_once", 9], ["steps", 20, 0.01]])
    with ServerlessWorker(queue.dsn, tmp_path, runpod, files):
        runpod.run("run-1", job_id=str(job))
        assert runpod.wait_for_result("run-1")["output"]["status"] == "completed"
    assert queue.row(job)["attempt"] == 2


def test_without_a_database_the_same_job_ends_in_the_same_result(
    tmp_path: Path, runpod: RunPodDouble, files: FileServer
) -> None:
    write_model_folder(tmp_path / "models" / "tiny")
    url = files.put("data.jsonl", script_file(["steps", 60, 0.05]))
    with ServerlessWorker(None, tmp_path, runpod, files) as worker:
        given = {"dataset_url": url, "callback_url": f"http://{files.host}/hook"}
        runpod.run("run-1", job_id="test-123", hyperparameters={"epochs": 1, "rank": 8}, **given)
        result = runpod.wait_for_result("run-1")
        runpod.run("run-2", job_id="test-123", hyperparameters={"epochs": 1, "rank": 4}, **given)
        assert "lora_rank is 8 there, not 4" in runpod.wait_for_result("run-2")["output"]["notice"]
        assert worker.logged("serverless_started", rows=False)
        endings = [body["event"] for _headers, body in files.posted if body["event"] != "job.progress"]
        assert endings == ["job.initializing", "job.started", "job.completed"]
    assert "error" not in result and set(result["output"]) == RESULT and result["output"]["status"] == "completed"
    adapter = result["output"]["adapter_path"]
    assert adapter.startswith("lora-models/adapters/") and (tmp_path / "storage" / adapter).exists()
    progress = [update["progress"] for update in runpod.updates("run-1")]
    assert len(progress) >= 3 and progress == sorted(progress)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "dataset"),
        ({"dataset_url": "ftp://x.example/d"}, "dataset_url"),
        ({"dataset_url": "https://x.example/d", "hyperparameters": {"lora_rank": 0}}, "lora_rank"),
        ({"dataset_url": "http://10.0.0.1/d"}, "10.0.0.1"),
    ],
)  # fmt: skip
def test_without_a_database_a_bad_job_is_an_error_that_says_what_to_do(
    tmp_path: Path, runpod: RunPodDouble, files: FileServer, given: dict[str, Any], words: str
) -> None:
    write_model_folder(tmp_path / "models" / "tiny")
    with ServerlessWorker(None, tmp_path, runpod, files, allowed_hosts=""):
        runpod.run("run-1", **given)
        assert words in runpod.wait_for_result("run-1")["error"]


def test_without_a_database_a_job_for_a_larger_host_is_refused_before_anything_is_fetched(
    tmp_path: Path, runpod: RunPodDouble, files: FileServer
) -> None:
    write_model_folder(tmp_path / "models" / "tiny")
    url = files.put("data.jsonl", script_file(["steps", 5, 0.01]))
    worker = ServerlessWorker(None, tmp_path, runpod, files, device="cuda", warm="off")
    double = str(DOUBLES / "nvml")
    worker.environment["PYTHONPATH"] = f"{double}{os.pathsep}{worker.environment['PYTHONPATH']}"
    with worker:
        runpod.run("run-1", dataset_url=url, gpu_config={"count": 8, "type": "B200"})
        error = runpod.wait_for_result("run-1")["error"]
        assert worker.logged("job_claimed") == []
    assert "8 GPUs, and this host has 4; for a GPU of the type B200, and this host has NVIDIA H100" in error
    assert "ask for less in gpu_config" in error and files.fetched == []


def test_without_a_database_cancel_and_retry_work_as_well(
    tmp_path: Path, runpod: RunPodDouble, files: FileServer
) -> None:
    write_model_folder(tmp_path / "models" / "tiny")
    dies_once = [["steps", 10, 0.01], ["kill_self_once", 9], ["steps", 20, 0.01]]
    retried = files.put("retried.jsonl", script_file(*dies_once))
    long = files.put("long.jsonl", script_file(LONG))
    with ServerlessWorker(None, tmp_path, runpod, files) as worker:
        runpod.run("run-1", dataset_url=retried)
        assert runpod.wait_for_result("run-1")["output"]["status"] == "completed"
        assert len(worker.logged("job_claimed")) == 2
        child = worker.wait_for_log("trainer_waits")["pid"]
        runpod.run("run-2", dataset_url=long)
        # The one that waited since the retry takes it; the next may have been started by now. A cancel that came before
        # it was given the job would leave it waiting.
        eventually(lambda: any(update["current_step"] for update in runpod.updates("run-2")), seconds=40)
        runpod.cancel("run-2")
        worker.wait_for_log("attempt_settled", outcome="cancelled")
        eventually(lambda: not alive(child))


def test_runpods_own_test_server_runs_the_handler(queue: Queue, tmp_path: Path, files: FileServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = queue.insert(script=[["steps", 10, 0.02]])
    serve = ("--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port))
    with ServerlessWorker(queue.dsn, tmp_path, None, files, *serve) as worker:
        address = ("127.0.0.1", port)
        eventually(lambda: socket.socket().connect_ex(address) == 0, seconds=40, why=worker.tail)
        answer = httpx.post(f"http://127.0.0.1:{port}/runsync", json={"input": {"job_id": str(job)}}, timeout=60).json()
    assert answer["status"] == "COMPLETED" and set(answer["output"]) == RESULT
    assert json.dumps(answer) and queue.row(job)["status"] == "completed"
