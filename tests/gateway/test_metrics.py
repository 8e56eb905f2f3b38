"""What Prometheus scrapes, over a real queue with real endings, and what a scrape costs."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.daemon_process import eventually
from tests.gateway.conftest import Gateway
from tests.lifecycle.queue import Queue


def scrape(client: httpx.Client) -> dict[str, float]:
    """Every sample by name and labels."""
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f"|{value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_the_queue_its_jobs_and_their_endings_are_counted(queue: Queue, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    waiting = [queue.insert(script=[["steps", 120, 0.03, str(gate)]]) for _ in range(2)]
    broken = queue.insert(hyperparameters={"base_model": "tiny", "lora_rank": 0})
    queue.insert(run_after_seconds=3600)
    with Gateway(queue, tmp_path) as gateway, gateway.client() as client:
        before = scrape(client)
        assert before["trainer_jobs_due"] == 3 and before["trainer_jobs_scheduled"] == 1
        assert before["trainer_oldest_wait_seconds"] > 0 and before["trainer_database_up"] == 1
        with queue.daemon(tmp_path, slots=1):
            running = eventually(
                lambda: ((now := scrape(client))["trainer_jobs_running"] == 1 and now) or None,
                why=lambda: str((scrape(client), [queue.row(job)["status"] for job in waiting])),
            )
            assert 0 <= running["trainer_heartbeat_age_seconds"] < 3
            gate.touch()
            for job in waiting:
                queue.wait_for(job, "completed")
            eventually(lambda: queue.row(broken)["status"] == "failed")
            # What its row says last is what is counted after its end.
            eventually(lambda: queue.select("SELECT id FROM training_workers WHERE state = 'idle'"))
        told = eventually(
            lambda: (
                (
                    (now := scrape(client)).get("trainer_attempts_ended_total|failed") == 1
                    and now["trainer_pickup_seconds_count"] == 3
                    and now
                )
                or None
            )
        )
        health = client.get("/health").json()
    assert told["trainer_attempts_ended_total|completed"] == 2
    assert told["trainer_failures_total|invalid_spec"] == 1
    assert told["trainer_jobs_due"] == 0 and told["trainer_jobs_running"] == 0
    assert told["trainer_pickup_seconds_sum"] > 0
    assert health["jobs"] == {"completed": 2, "failed": 1, "inProgress": 0, "inQueue": 1, "retried": 0}
    assert health["workers"] == {"idle": 1, "running": 0}  # its daemon was killed a moment ago


def test_throughput_and_the_outbox_are_seen(queue: Queue, tmp_path: Path) -> None:
    job = queue.insert(script=[["steps", 2000, 0.02]], callback_url="http://127.0.0.1:9/nobody")
    with (
        Gateway(queue, tmp_path) as gateway,
        queue.daemon(tmp_path, allowed_hosts="127.0.0.1:9"),
        gateway.client() as client,
    ):
        queue.wait_for(job, "running")
        eventually(lambda: scrape(client)["trainer_tokens_per_second"] > 0)
        eventually(
            lambda: scrape(client)["trainer_callbacks_pending"] >= 1,
        )


def test_counters_begin_with_the_gateway_and_count_each_event_once(queue: Queue, tmp_path: Path) -> None:
    with queue.daemon(tmp_path):
        queue.wait_for(queue.insert(), "completed")
        with Gateway(queue, tmp_path) as gateway, gateway.client() as client:
            gateway.wait_for_log("gateway_started")
            queue.wait_for(queue.insert(), "completed")
            ended = "trainer_attempts_ended_total|completed"
            eventually(lambda: scrape(client).get(ended) == 1)
            # Several times past the second for which an answer is kept: still the same one job.
            until = time.monotonic() + 2.5
            assert eventually(lambda: (seen := scrape(client)[ended]) and time.monotonic() > until and seen) == 1


def test_a_scrape_stays_cheap_beside_a_long_history(queue: Queue, tmp_path: Path) -> None:
    """A hundred thousand finished jobs with their stories, five thousand due: one scrape in tens of milliseconds."""
    template = queue.insert()
    with queue.connect() as connection:
        connection.execute("SET session_replication_role = replica")
        columns = "user_id, dataset_id, preset_id, hyperparameters, gpu_config, total_epochs, estimated_total_cost"
        for count, status, due in ((100_000, "completed", False), (5_000, "queued", True)):
            connection.execute(
                f"INSERT INTO training_jobs ({columns}, status, due) SELECT {columns}, %s, %s "
                "FROM training_jobs, generate_series(1, %s) WHERE id = %s",
                (status, due, count, template),
            )
        connection.execute(
            "INSERT INTO training_events (job_id, kind, data) SELECT id, 'completed', '{}' FROM training_jobs"
        )
        connection.execute("ANALYZE training_jobs, training_events")
        with Gateway(queue, tmp_path) as gateway, gateway.client() as client:
            seconds = []
            for _ in range(3):
                begun = time.monotonic()
                assert scrape(client)["trainer_jobs_due"] == 5_001
                seconds.append(time.monotonic() - begun)
                eventually(lambda at=begun: time.monotonic() - at > 1.1)  # past the answer that is kept
    assert min(seconds) < 0.2, seconds
