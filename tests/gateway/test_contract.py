"""The recorded requests and answers of the older contracts, replayed against the gateway over a real queue."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from urllib.parse import quote

import httpx
import psycopg
import pytest

from tests.daemon_process import eventually
from tests.doubles.file_server import FileServer, script_file
from tests.gateway.conftest import Gateway
from tests.lifecycle.queue import Queue

METRICS = {
    "training_loss", "validation_loss", "learning_rate", "throughput", "gpu_utilization", "gradient_norm",
}  # fmt: skip
STATUS = {"status", "progress", "current_epoch", "current_step", "stage", "metrics", "error_message"}
OUTPUT = {"status", "progress", "current_epoch", "current_step", "metrics", "adapter_path"}
LONG = ["steps", 400, 0.02]

# As the old edge function wrote it, in the two spellings of the app.
SHORT_SPELLING = {
    "hyperparameters": {
        "learning_rate": 0.0002,
        "batch_size": 4,
        "epochs": 3,
        "rank": 16,
        "alpha": 32,
        "dropout": 0.05,
    },
    "gpu_config": {"type": "NVIDIA H100", "count": 1},
}
LONG_SPELLING = {
    "hyperparameters": {
        "base_model": "tiny", "learning_rate": 0.0002, "batch_size": 4, "num_epochs": 3,
        "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.05,
    },
    "gpu_config": {"gpu_type": "H100", "num_gpus": 1, "gpu_memory_gb": 80, "cost_per_gpu_hour": 3.5},
}  # fmt: skip


def test_a_submit_without_a_row_makes_one_and_repeated_it_is_the_same_job(client: httpx.Client, queue: Queue) -> None:
    body = {"job_id": "test-123", "dataset_url": "https://files.example.com/d.jsonl?token=t", **SHORT_SPELLING}
    answer = client.post("/training/submit", json=body)
    assert answer.status_code == 200 and set(answer.json()) == {"external_job_id"}
    job = uuid.UUID(answer.json()["external_job_id"])
    row = queue.row(job)
    assert row["user_id"] == queue.user_id and row["client_job_id"] == "test-123" and row["status"] == "queued"
    assert row["hyperparameters"] == SHORT_SPELLING["hyperparameters"] and row["external_job_id"] is None
    assert client.post("/training/submit", json=body).json() == answer.json()


def test_a_submit_of_a_row_that_exists_inserts_nothing_and_keeps_the_row(client: httpx.Client, queue: Queue) -> None:
    job = queue.insert(hyperparameters={"base_model": "tiny", "num_epochs": 2})
    before = queue.row(job)
    body = {
        "job_id": str(job),
        "dataset_url": "https://elsewhere.example.com/other.jsonl",
        "callback_url": "https://app.example.com/hook",
        **LONG_SPELLING,
    }
    answer = client.post("/training/submit", json=body).json()
    assert answer["external_job_id"] == str(job)
    after = queue.row(job)
    assert after["callback_url"] == "https://app.example.com/hook"
    unchanged = set(before) - {"callback_url", "updated_at"}
    assert {key: before[key] for key in unchanged} == {key: after[key] for key in unchanged}
    with queue.connect() as connection:
        count = connection.execute("SELECT count(*) AS jobs FROM training_jobs").fetchone()
    assert count == {"jobs": 1}


@pytest.mark.parametrize("spelling", [SHORT_SPELLING, LONG_SPELLING], ids=["short", "long"])
def test_a_waiting_job_reads_as_recorded_in_both_contracts(client: httpx.Client, spelling: dict[str, object]) -> None:
    body = {"dataset_url": "https://files.example.com/d.jsonl", **spelling}
    job = client.post("/training/submit", json=body).json()["external_job_id"]
    status = client.get(f"/training/status/{job}").json()
    assert set(status) == STATUS and set(status["metrics"]) == METRICS
    assert status["status"] == "running" and status["stage"] == "queued" and status["error_message"] is None
    run = client.get(f"/status/{job}").json()
    assert set(run) == {"id", "status", "output"} and run["id"] == job and run["status"] == "IN_QUEUE"
    assert set(run["output"]) == OUTPUT and run["output"]["adapter_path"] is None


def test_a_submit_that_differs_from_its_row_says_so_in_the_answer_and_in_the_story_once(
    client: httpx.Client, queue: Queue
) -> None:
    row = {"base_model": "tiny", "epochs": 2, "rank": 16, "learning_rate": 0.0002}
    job = queue.insert(hyperparameters=row, gpu_config=json.dumps({"type": "H100", "count": 1}))
    body = {
        "job_id": str(job),
        "dataset_url": "https://elsewhere.example.com/other.jsonl?token=secret",
        "hyperparameters": {"num_epochs": 5, "lora_rank": 16, "alpha": 32, "learning_rate": 2e-4},
        "gpu_config": {"gpu_type": "h100", "num_gpus": 2},
    }
    answers = [client.post("/training/submit", json=body).json() for _ in range(2)]
    answers.append(client.post("/run", json={"input": body}).json())
    notices = {answer["notice"] for answer in answers}
    assert notices == {
        "The job's row differs from what was submitted, and the row is what runs: num_epochs is 2 there, not 5, "
        "num_gpus is 1 there, not 2, dataset_url is another file. "
        "Change the row while it is queued, or submit without this job_id for another job."
    }
    told = [event["message"] for event in queue.events(job) if event["kind"] == "submit_differs"]
    assert told == [*notices] and queue.row(job)["hyperparameters"] == row


def test_a_submit_that_says_what_its_row_says_is_answered_without_a_notice(client: httpx.Client, queue: Queue) -> None:
    """As the older edge function does: it inserts the row, signs the row's own dataset, and submits both."""
    asked: dict[str, object] = LONG_SPELLING["hyperparameters"]
    job = queue.insert(hyperparameters=asked, gpu_config=json.dumps(LONG_SPELLING["gpu_config"]))
    (dataset,) = queue.select(
        "SELECT storage_bucket || '/' || storage_path AS place FROM datasets JOIN training_jobs AS job "
        "ON job.dataset_id = datasets.id WHERE job.id = %s", job
    )  # fmt: skip
    signed = f"https://abc.supabase.co/storage/v1/object/sign/{dataset['place']}?token=t"
    body = {"job_id": str(job), "dataset_url": signed, "callback_url": "https://app.example.com/hook", **LONG_SPELLING}
    body["hyperparameters"] = {"learning_rate": 2e-4, "batch_size": 4, "epochs": 3, "rank": 16, "alpha": 32}
    body["gpu_config"] = {"type": "H100", "count": 1}
    for _ in range(2):
        assert client.post("/training/submit", json=body).json() == {"external_job_id": str(job)}
    assert "submit_differs" not in queue.story(job)


def test_a_callers_own_id_names_his_job_to_status_and_cancel_and_nobody_elses(
    client: httpx.Client, queue: Queue
) -> None:
    other = uuid.uuid4()
    queue.select("INSERT INTO auth.users (id, email) VALUES (%s, 'other@example.test')", other)
    strangers = queue.insert(user_id=other, client_job_id="run/7 of Ann?")
    body = {"job_id": "run/8 of Ann?", "dataset_url": "https://files.example.com/d.jsonl", **SHORT_SPELLING}
    job = client.post("/training/submit", json=body).json()["external_job_id"]
    named, unknown = quote("run/8 of Ann?", safe=""), quote("run/7 of Ann?", safe="")
    assert client.get(f"/training/status/{named}").json() == client.get(f"/training/status/{job}").json()
    assert client.get(f"/status/{named}").json()["id"] == job
    for method, path in (
        ("GET", "status"),
        ("GET", "training/status"),
        ("POST", "cancel"),
        ("POST", "training/cancel"),
    ):
        for nobodys in (unknown, "x%00y", "y" * 300):
            refused = client.request(method, f"/{path}/{nobodys}")
            assert refused.status_code == 404 and refused.json()["error"] == "There is no such job.", refused.text
    assert queue.row(strangers)["status"] == "queued"
    assert client.post(f"/cancel/{named}").json() == {"id": job, "status": "CANCELLED"}
    assert client.post(f"/training/cancel/{named}").json() == {"external_job_id": job, "status": "cancelled"}
    differing = client.post("/training/submit", json=body | {"hyperparameters": {"epochs": 9}}).json()
    assert differing["external_job_id"] == job and "num_epochs is 3 there, not 9" in differing["notice"]


def test_run_answers_in_queue_and_takes_the_same_input(client: httpx.Client, queue: Queue) -> None:
    body = {"input": {"job_id": "test-9", "dataset_url": "https://files.example.com/d.jsonl", **SHORT_SPELLING}}
    answer = client.post("/run", json=body | {"policy": {"executionTimeout": 1}}).json()
    assert answer == {"id": answer["id"], "status": "IN_QUEUE"}
    assert queue.row(uuid.UUID(answer["id"]))["client_job_id"] == "test-9"


def test_a_job_runs_to_its_end_through_http_alone(queue: Queue, tmp_path: Path, files: FileServer) -> None:
    """Submit, watch, fetch the adapter's path: in the first contract's words and in RunPod's."""
    url = files.put("data.jsonl", script_file(["steps", 40, 0.03]))
    with (
        Gateway(queue, tmp_path, allowed_hosts=files.host) as gateway,
        queue.daemon(tmp_path, default_model="tiny", allowed_hosts=files.host) as daemon,
        gateway.client() as client,
    ):
        daemon.wait_for_log("listener_hears")
        body = {"job_id": "test-123", "dataset_url": url, "hyperparameters": {"epochs": 1, "rank": 8}, "gpu_config": {}}
        job = client.post("/training/submit", json=body).json()["external_job_id"]
        seen = []

        def completed() -> bool:
            seen.append(client.get(f"/training/status/{job}").json())
            assert seen[-1]["status"] != "failed", seen[-1]
            return seen[-1]["status"] == "completed"

        eventually(completed)
        run = client.get(f"/status/{job}").json()
    training = [status for status in seen if status["stage"] == "training"]
    assert training and training[-1]["metrics"]["training_loss"] > 0 and training[-1]["metrics"]["throughput"] > 0
    assert [status["progress"] for status in seen] == sorted(status["progress"] for status in seen)
    assert all(set(status) == STATUS for status in seen) and seen[-1]["progress"] == 100
    assert run["status"] == "COMPLETED" and run["output"]["status"] == "completed" and "error" not in run
    assert run["output"]["adapter_path"].startswith(f"lora-models/adapters/{job}")


def test_runsync_waits_for_the_end(queue: Queue, tmp_path: Path, files: FileServer) -> None:
    url = files.put("data.jsonl", script_file(["steps", 10, 0.01]))
    with (
        Gateway(queue, tmp_path) as gateway,
        queue.daemon(tmp_path, default_model="tiny", allowed_hosts=files.host),
        gateway.client() as client,
    ):
        answer = client.post("/runsync", json={"input": {"dataset_url": url}}).json()
    assert answer["status"] == "COMPLETED" and answer["output"]["progress"] == 100


def test_runsync_gives_up_waiting_and_says_where_the_job_is(queue: Queue, tmp_path: Path) -> None:
    body = {"input": {"dataset_url": "https://files.example.com/d.jsonl"}}
    with Gateway(queue, tmp_path, gateway_wait_seconds=1) as gateway, gateway.client() as client:
        answer = client.post("/runsync", json=body)
        assert answer.status_code == 200 and answer.json()["status"] == "IN_QUEUE"
        assert client.post("/runsync?wait=0", json=body).elapsed.total_seconds() < 0.8


def test_the_old_edge_functions_order_of_writes_ends_well(queue: Queue, tmp_path: Path) -> None:
    """initializing, submit, running with external_job_id: each write and its refusal is ignored, the job completes."""
    job = queue.insert(script=[["steps", 120, 0.03]])

    def write(statement: str) -> str:
        try:
            with queue.connect() as connection, connection.transaction():
                connection.execute("SELECT set_config('role', 'service_role', true)")
                connection.execute(statement.encode(), {"job": job})
        except psycopg.Error as refusal:
            return str(refusal.sqlstate)
        return "written"

    begin = "UPDATE training_jobs SET status = 'initializing', current_stage = 'initializing' WHERE id = %(job)s"
    assert write(begin) == "PT409"
    with Gateway(queue, tmp_path) as gateway, gateway.client() as client:
        body = {"job_id": str(job), "dataset_url": "https://files.example.com/signed?token=t", **LONG_SPELLING}
        external = client.post("/training/submit", json=body).json()["external_job_id"]
        go_on = (
            f"UPDATE training_jobs SET status = 'running', external_job_id = '{external}', "
            "started_at = now() WHERE id = %(job)s"
        )
        assert write(go_on) == "PT409"
        with queue.daemon(tmp_path):
            queue.wait_for(job, "running")
            assert write(go_on) == "PT409"
            row = queue.wait_for(job, "completed")
        assert row["external_job_id"] is None
        assert client.get(f"/training/status/{external}").json()["status"] == "completed"


def test_a_cancel_ends_the_running_job_and_reads_as_failed_and_as_cancelled(queue: Queue, tmp_path: Path) -> None:
    job = queue.insert(script=[LONG])
    with Gateway(queue, tmp_path) as gateway, queue.daemon(tmp_path) as daemon, gateway.client() as client:
        queue.wait_for(job, "running")
        answer = client.post(f"/training/cancel/{job}")
        assert answer.status_code == 200
        assert answer.json() == {"external_job_id": str(job), "status": "cancelled"}
        assert client.post(f"/cancel/{job}").json() == {"id": str(job), "status": "CANCELLED"}
        daemon.wait_for_log("attempt_settled", outcome="cancelled")
        status = client.get(f"/training/status/{job}").json()
        run = client.get(f"/status/{job}").json()
    assert status["status"] == "failed" and status["error_message"].startswith("Cancelled by")
    assert run["status"] == "CANCELLED" and run["error"].startswith("Cancelled by")
    assert queue.row(job)["status"] == "cancelled"


def test_a_failed_job_says_what_happened_and_what_to_do(queue: Queue, tmp_path: Path) -> None:
    failure = ["say", "failed", {"code": "out_of_memory", "message": "It did not fit.", "hint": "Reduce batch_size."}]
    job = queue.insert(script=[["steps", 3, 0.01], failure, ["exit", 1]])
    with Gateway(queue, tmp_path) as gateway, queue.daemon(tmp_path), gateway.client() as client:
        queue.wait_for(job, "failed")
        status = client.get(f"/training/status/{job}").json()
        run = client.get(f"/status/{job}").json()
        late = client.post(f"/cancel/{job}")
    assert status["status"] == "failed" and status["error_message"] == "It did not fit. Reduce batch_size."
    assert run["status"] == "FAILED" and run["error"] == status["error_message"]
    assert late.status_code == 409 and "already failed" in late.json()["error"]


def test_a_row_that_an_older_dispatcher_runs_is_not_taken_over(client: httpx.Client, queue: Queue) -> None:
    job = queue.insert()
    with queue.connect() as connection, connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")  # as it was before the guard was installed
        connection.execute("UPDATE training_jobs SET status = 'initializing', due = false WHERE id = %s", (job,))
    answer = client.post("/training/submit", json={"job_id": str(job), **SHORT_SPELLING})
    assert answer.status_code == 409 and "older dispatcher" in answer.json()["error"]


def test_a_dead_hosts_job_reads_as_lost_until_the_gateway_itself_reaps_it(queue: Queue, tmp_path: Path) -> None:
    # Ten seconds: the gateway reaps after a lease of its own at the earliest, well after this host's has run out.
    job = queue.insert(script=[LONG])
    with Gateway(queue, tmp_path, lease_seconds=10) as gateway, gateway.client() as client:
        with queue.daemon(tmp_path, lease_seconds=1) as daemon:
            queue.wait_for(job, "running")
            daemon.kill()
        eventually(lambda: client.get(f"/training/status/{job}").json()["stage"] == "lost", seconds=5)
        queue.wait_for(job, "queued", seconds=30)
        gateway.wait_for_log("job_reaped", job_id=str(job))
        assert client.get(f"/status/{job}").json()["status"] == "IN_QUEUE"


def test_a_gateway_with_the_secrets_delivers_signed_what_dead_hosts_left(
    queue: Queue, tmp_path: Path, files: FileServer
) -> None:
    job = queue.insert(callback_url=f"http://{files.host}/hook")
    queue.cancel_as_owner(job)
    with Gateway(queue, tmp_path, allowed_hosts=files.host, callback_secrets="whsec_" + "QUJD" * 8):
        eventually(lambda: files.posted)
    headers, body = files.posted[0]
    assert body["event"] == "job.cancelled" and body["job_id"] == str(job)
    assert {name.lower(): value for name, value in headers.items()}["webhook-signature"].startswith("v1,")


def test_the_openapi_page_describes_every_route(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url) as stranger:
        described = stranger.get("/openapi.json").json()
        assert stranger.get("/docs").status_code == 200
    assert set(described["paths"]) == {
        "/training/submit", "/training/status/{external_job_id}", "/training/cancel/{external_job_id}",
        "/run", "/runsync", "/status/{job_id}", "/cancel/{job_id}", "/health", "/healthz", "/readyz", "/metrics",
    }  # fmt: skip
