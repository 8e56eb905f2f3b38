"""The whole line with Supabase's doubles around it: datasets signed, adapters uploaded, callbacks delivered.

The daemon is a process of its own; Storage and the callback receiver are real HTTP servers on loopback.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest

from tests.daemon_process import alive, eventually
from tests.doubles.receiver import Answer, Receiver
from tests.doubles.standard_webhooks import verify
from tests.doubles.storage import StorageDouble
from tests.lifecycle.project import SECRET, Project
from tests.lifecycle.queue import Queue
from tests.storage.real_server import SERVERS, open_storage_server


@pytest.fixture(params=SERVERS)
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StorageDouble]:
    async with open_storage_server(request, tmp_path) as storage:
        yield storage


async def test_a_row_becomes_an_adapter_in_storage_and_every_row_that_the_app_expects(project: Project) -> None:
    with project.daemon():
        job = project.insert(gpu_config=json.dumps({"type": "H100", "count": 1, "cost_per_gpu_hour": 3.5}))
        row = await project.wait_for(job, "completed")
        (ending, *_again) = await project.endings(job)
    assert ending.payload["status"] == "completed"
    assert ending.payload["adapter_path"] == row["adapter_path"] == f"lora-models/adapters/{job}.tar.gz"
    verify(SECRET, ending.headers, ending.body)
    told = [one.payload["event"] for one in project.receiver.received if one.payload["event"] != "job.progress"]
    assert told == ["job.initializing", "job.started", "job.completed"]
    sequences = [one.payload["sequence"] for one in project.receiver.received if one.payload["event"] != "job.progress"]
    assert sequences == sorted(sequences)

    stored = project.storage.read("lora-models", f"adapters/{job}.tar.gz")
    assert hashlib.sha256(stored).hexdigest() == row["adapter_sha256"] and len(stored) == row["adapter_bytes"]
    (artifact,) = project.queue.select("SELECT * FROM model_artifacts WHERE job_id = %s", job)
    assert row["artifact_id"] == artifact["id"]
    for name in ("adapter_model", "adapter_config", "training_logs", "metrics_chart"):
        assert artifact["artifacts"][name] in project.objects()
    (cost,) = project.queue.select("SELECT * FROM cost_records WHERE job_id = %s", job)
    assert cost["cost_type"] == "training_compute"
    kinds = {row["type"] for row in project.queue.select("SELECT type FROM notifications")}
    assert {"job_started", "job_completed"} <= kinds


async def test_secrets_appear_in_no_row_log_callback_argument_environment_or_file(project: Project) -> None:
    marks = {"SUPABASE_SERVICE_ROLE_KEY": project.storage.key, "secret": SECRET, "HF_TOKEN": "hf_marked_token_0001"}
    marks |= {"WANDB_API_KEY": "marked-tracker-key-0004", "signed url": "/object/sign/"}
    seen = project.folder / "environment.json"
    daemon = project.daemon(callback_authorization="Bearer marked-authorization-0002", forked=False)
    daemon.environment |= {"HF_TOKEN": marks["HF_TOKEN"], "RUNPOD_API_KEY": "rpa_marked_0003"}
    daemon.environment |= {"WANDB_API_KEY": marks["WANDB_API_KEY"]}
    marks |= {"authorization": "marked-authorization-0002", "runpod": "rpa_marked_0003"}
    arguments: list[str] = []
    with daemon:
        job = project.insert(script=[["environment", str(seen)], ["steps", 100, 0.05]])
        await project.wait_for(job, "running")
        for pid in (daemon.pid, *daemon.children()):
            arguments.append(Path(f"/proc/{pid}/cmdline").read_text())
        await project.wait_for(job, "completed")
        await project.endings(job)
        # The one whose trainer is given a key, for the tracker that it asks for.
        tracked = project.insert(hyperparameters={"base_model": "tiny", "trackers": ["wandb"]})
        await project.wait_for(tracked, "completed")
        await project.endings(tracked)
        broken = project.insert(script=[["print", "x"], ["exit", 3]], max_attempts=1)
        await project.wait_for(broken, "failed")
    tables = [
        row["name"]
        for row in project.queue.select(
            "SELECT c.relname AS name FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'"
        )
    ]
    places = {f"table {name}": str(project.queue.select(f"SELECT * FROM {name}")) for name in tables}
    places["log"] = daemon.log_path.read_text()
    places["arguments"] = "\n".join(arguments)
    places["child environment"] = seen.read_text()
    places |= {f"callback {index}": one.body.decode() for index, one in enumerate(project.receiver.received)}
    files = [file for root in ("jobs", "storage") for file in (project.folder / root).rglob("*")]
    places |= {str(file): file.read_bytes().decode("latin-1") for file in files if file.is_file()}
    stored = {f"stored {name}": project.storage.read("lora-models", name) for name in project.objects()}
    places |= {name: content.decode("latin-1") for name, content in stored.items()}
    leaks = [f"{mark} in {place}" for place, text in places.items() for mark, secret in marks.items() if secret in text]
    assert leaks == []
    assert stored, "no uploaded file was looked into"
    # Other accounts of the host have no business in a job's folder.
    assert stat.S_IMODE((project.folder / "jobs" / str(broken)).stat().st_mode) == 0o700
    assert "token=secret-of-the-url" not in places["log"]


@pytest.mark.parametrize("requests_before", [1, 3, 6, 9, 12])
async def test_killed_between_any_two_steps_of_finishing_there_is_one_artifact_and_one_completion(
    project: Project, requests_before: int
) -> None:
    with project.daemon("first") as first:
        job = project.insert(script=[["steps", 5, 0.0]])
        await asyncio.to_thread(first.wait_for_log, "trainer_waits")
        before = len(project.storage.requests)
        async with asyncio.timeout(20):
            while len(project.storage.requests) < before + requests_before and alive(first.pid):
                if project.queue.row(job)["status"] == "completed":
                    break
                await asyncio.sleep(0.001)
        os.kill(first.pid, signal.SIGKILL)
    with project.daemon("second"):
        row = await project.wait_for(job, "completed")
        endings = await project.endings(job)
        await project.tidied()
    assert len({one.headers["webhook-id"] for one in endings}) == 1
    assert project.queue.story(job).count("completed") == 1
    assert len(project.queue.select("SELECT id FROM model_artifacts WHERE job_id = %s", job)) == 1
    winner = row["adapter_path"].removeprefix("lora-models/")
    stored = project.storage.read("lora-models", winner)
    assert hashlib.sha256(stored).hexdigest() == row["adapter_sha256"]
    # What the dead host had stored is gone, or is the winner's.
    folder = winner.removesuffix(".tar.gz")
    assert {name for name in project.objects() if name != winner and not name.startswith(f"{folder}/")} == set()


@pytest.mark.parametrize("moment", ["row written", "callback sent"])
async def test_killed_after_the_ending_was_written_it_is_told_under_one_id(project: Project, moment: str) -> None:
    with project.daemon("first") as first:
        job = project.insert(script=[["steps", 60, 0.05]])
        await project.endings(job, "job.started")
        project.receiver.answers = [Answer(hang=True)]
        if moment == "row written":
            async with asyncio.timeout(40):
                while project.queue.row(job)["status"] != "completed":
                    await asyncio.sleep(0.001)
        else:
            await project.endings(job)
        os.kill(first.pid, signal.SIGKILL)
    project.receiver.answers = [Answer()]
    # What the dead host had locked is free when its lock runs out; the clock is the database's.
    project.queue.select("UPDATE training_callbacks SET next_at = now(), locked_until = now() WHERE state = 'pending'")
    told = len(project.receiver.received)
    with project.daemon("second"):
        await project.receiver.wait_for(
            lambda received: any(one.payload["event"] == "job.completed" for one in received[told:]), seconds=30
        )
        endings = await project.endings(job)
    assert len({one.headers["webhook-id"] for one in endings}) == 1
    assert project.queue.story(job).count("completed") == 1
    assert len(project.queue.select("SELECT id FROM model_artifacts WHERE job_id = %s", job)) == 1


async def test_what_cannot_be_deleted_holds_up_neither_the_callback_nor_the_next_job(project: Project) -> None:
    left = f"adapters/{UUID(int=7)}.tar.gz"
    project.storage.put("lora-models", left, b"of a host that died")
    project.storage.fail("DELETE", status=503, times=1_000_000)
    job = project.insert()
    project.queue.select(
        "INSERT INTO training_uploads (job_id, epoch, kind, storage, bucket, objects) "
        "VALUES (%s, 0, 'adapter', %s, 'lora-models', %s)",
        job,
        project.storage.url,
        [left],
    )
    with project.daemon() as daemon:
        await project.wait_for(job, "completed")
        await project.endings(job)
        following = project.insert()
        await project.wait_for(following, "completed")
        await project.endings(following)
        assert left in project.objects() and project.storage.count("DELETE") > 0
        project.storage.faults.clear()
        await project.tidied()
        assert left not in project.objects(), daemon.tail()


async def test_a_dead_receiver_delays_neither_training_nor_the_next_callback(
    queue: Queue, storage: StorageDouble, tmp_path: Path
) -> None:
    async with Receiver(Answer(hang=True)) as dead, Receiver() as well:
        project = Project(queue, storage, dead, tmp_path)
        daemon = project.daemon()
        daemon.environment["TRAINER_ALLOWED_HOSTS"] = f"{dead.host},{well.host}"
        with daemon:
            unheard = project.insert()
            await project.wait_for(unheard, "completed")
            project.receiver = well
            heard = project.insert()
            await project.wait_for(heard, "completed")
            assert await project.endings(heard)
    (waiting,) = queue.select(
        "SELECT state FROM training_callbacks WHERE job_id = %s AND event = 'job.completed'", unheard
    )
    assert waiting["state"] == "pending"


async def test_a_second_term_waits_neither_for_an_upload_nor_for_a_receiver(
    queue: Queue, storage: StorageDouble, tmp_path: Path
) -> None:
    never = asyncio.Event()
    async with Receiver(Answer(hang=True)) as dead:
        project = Project(queue, storage, dead, tmp_path)
        with project.daemon(drain_seconds=60) as daemon:
            held = storage.fail("POST", "object/lora-models", held_until=never)
            job = project.insert(script=[["steps", 5, 0.0]])
            await asyncio.to_thread(eventually, lambda: held.times == 0 and bool(dead.received))
            daemon.signal(signal.SIGTERM)
            await asyncio.to_thread(daemon.wait_for_log, "signal_received")
            begun = time.monotonic()
            daemon.signal(signal.SIGTERM)
            assert await asyncio.to_thread(daemon.wait, 50) == 0
            # Of the minute for the upload and the half of one for the receiver.
            assert time.monotonic() - begun < 20
    row = queue.row(job)
    assert (row["status"], row["attempt"]) == ("queued", 0)
