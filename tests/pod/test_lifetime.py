"""A pod ends itself when it has nothing to do, and never while it has: the real daemon, a RunPod on loopback."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import pytest

from daemon.doctor.service_checks import check_pod
from daemon.errors import DatabaseAway
from daemon.pod import lifetime as pod_life
from daemon.pod.lifetime import PodLife
from daemon.read_settings import load_settings
from tests.daemon_process import DaemonProcess, eventually
from tests.doubles.runpod_api import RunPodDouble
from tests.doubles.storage import Bucket, StorageDouble
from tests.lifecycle.queue import Queue
from tests.postgres import AppDatabase

TWO_SECONDS = 2 / 60


@pytest.fixture
def queue(database: AppDatabase, tmp_path: Path) -> Queue:
    return Queue(database.dsn, tmp_path)


def on_a_pod(
    queue: Queue, folder: Path, runpod: RunPodDouble, key: str = "good-key", **settings: object
) -> DaemonProcess:
    """A daemon in the pod `me`, which costs 6 dollars an hour for its two cards."""
    runpod.add("me", cost=6.0, gpu={"id": "NVIDIA H100 80GB HBM3", "count": 2})
    daemon = queue.daemon(folder, runpod_api=runpod.url, **settings)
    # A PATH without runpodctl, an older API that is ours too.
    daemon.environment |= {
        "RUNPOD_POD_ID": "me",
        "RUNPOD_API_KEY": key,
        "RUNPOD_API_BASE_URL": runpod.root,
        "PATH": str(folder),
    }
    return daemon


def test_an_idle_pod_stops_itself_and_the_daemon_leaves_in_good_order(
    database: AppDatabase, queue: Queue, tmp_path: Path, runpod: RunPodDouble
) -> None:
    with on_a_pod(queue, tmp_path, runpod, idle_minutes=TWO_SECONDS) as daemon:
        assert daemon.wait(30) == 0
    assert runpod.pods["me"].status == "EXITED"
    assert daemon.logged("pod_ends", reason="idle") and daemon.logged("pod_stopped", way="api")
    assert [row["state"] for row in database.run("SELECT state FROM training_workers")] == ["gone"]


def test_a_job_that_outlasts_the_idle_time_is_not_disturbed_and_the_clock_starts_at_its_end(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble
) -> None:
    gate = tmp_path / "gate"
    job = queue.insert(script=[["steps", 200, 0.03, str(gate)]])
    with on_a_pod(queue, tmp_path, runpod, idle_minutes=TWO_SECONDS, pod_end="terminate") as daemon:
        daemon.wait_for_log("job_claimed")
        time.sleep(4)  # twice the idle time
        gate.touch()
        row = queue.wait_for(job, "completed")
        assert runpod.pods["me"].status == "RUNNING" and row["attempt"] == 1
        ended_at = time.monotonic()
        assert daemon.wait(30) == 0
        assert time.monotonic() - ended_at > 1.5
    assert runpod.pods["me"].status == "TERMINATED"


def test_a_delivery_is_work_for_a_pod_as_long_as_it_lasts(queue: Queue, tmp_path: Path, runpod: RunPodDouble) -> None:
    go = tmp_path / "go"
    (tmp_path / "models" / "tiny" / "export.json").write_text(json.dumps({"wait_for": str(go)}))
    job = queue.insert(hyperparameters={"base_model": "tiny", "exports": ["merged", "gguf"]})
    with on_a_pod(queue, tmp_path, runpod, idle_minutes=TWO_SECONDS) as daemon:
        daemon.wait_for_log("delivery_claimed")
        assert queue.row(job)["status"] == "completed"
        time.sleep(4)  # twice the idle time
        assert runpod.pods["me"].status == "RUNNING"
        go.touch()
        assert daemon.wait(30) == 0
    assert runpod.pods["me"].status == "EXITED"
    rows = queue.select("SELECT kind, state FROM training_deliveries ORDER BY kind")
    assert [(row["kind"], row["state"]) for row in rows] == [("gguf", "done"), ("merged", "done")]


async def test_a_delivery_that_this_host_never_takes_holds_the_pod_no_longer_than_its_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pod_life, "DELIVERY_SECONDS", 1.0)

    async def waits() -> bool:
        return True

    async def nothing() -> bool:
        return False

    async def ended() -> bool:
        return True

    given = load_settings(database_url="postgresql://nowhere", idle_minutes=0.2 / 60)
    worker = IdleWorker()
    life = PodLife(given, worker, endings_wait=nothing, end_pod=ended, delivery_waits=waits)
    await asyncio.wait_for(life.run(), 30)
    assert worker.idle_seconds is not None and worker.idle_seconds >= 1.2 and worker.drained


def test_without_the_setting_a_pod_never_ends_itself(queue: Queue, tmp_path: Path, runpod: RunPodDouble) -> None:
    with on_a_pod(queue, tmp_path, runpod) as daemon:
        daemon.wait_for_log("listener_hears")
        queue.wait_for(queue.insert(), "completed")
    assert runpod.called("POST") == []


def test_a_pod_past_its_lifetime_finishes_its_job_takes_no_other_and_ends(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble
) -> None:
    gate = tmp_path / "gate"
    first = queue.insert(script=[["steps", 150, 0.03, str(gate)]])
    with on_a_pod(queue, tmp_path, runpod, max_hours=1 / 3600) as daemon:
        daemon.wait_for_log("pod_drains", reason="lifetime")
        second = queue.insert()
        assert runpod.pods["me"].status == "RUNNING"
        gate.touch()
        queue.wait_for(first, "completed")
        assert daemon.wait(30) == 0
    assert queue.row(second)["status"] == "queued" and queue.row(second)["attempt"] == 0
    assert runpod.pods["me"].status == "EXITED"


def test_a_pod_whose_host_is_drained_finishes_its_job_and_ends_as_an_idle_one_does(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble
) -> None:
    gate = tmp_path / "gate"
    first = queue.insert(script=[["steps", 150, 0.03, str(gate)]])
    daemon = on_a_pod(queue, tmp_path, runpod)
    daemon.environment["RUNPOD_VOLUME_ID"] = "volume"
    with daemon:
        queue.wait_for(first, "running")
        queue.select("UPDATE training_workers SET drain = true")
        daemon.wait_for_log("worker_draining", seconds=60)
        second = queue.insert()
        gate.touch()
        assert daemon.wait(60) == 0
    assert queue.row(first)["status"] == "completed" and queue.row(second)["status"] == "queued"
    assert daemon.logged("pod_ends", reason="drained") and runpod.pods["me"].status == "TERMINATED"


def test_a_daemon_that_is_stopped_by_a_signal_leaves_the_pod_to_whoever_sent_it(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble
) -> None:
    with on_a_pod(queue, tmp_path, runpod, idle_minutes=15) as daemon:
        daemon.wait_for_log("listener_hears", seconds=60)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(60) == 0
    assert runpod.called("POST") == [] and runpod.pods["me"].status == "RUNNING"


async def test_a_pod_does_not_end_while_an_upload_is_open(queue: Queue, tmp_path: Path, runpod: RunPodDouble) -> None:
    """Its storage answers 503 for longer than the idle time; the training itself takes no second."""
    async with StorageDouble(tmp_path / "double") as storage:
        job = queue.insert(script=[["steps", 5, 0.01]])
        source = tmp_path / "storage" / "lora-datasets"
        for file in source.rglob("*.jsonl"):
            storage.put("lora-datasets", str(file.relative_to(source)), file.read_bytes())
        storage.buckets["lora-models"] = Bucket()
        refusals = storage.fail("POST", "adapters", status=503, times=1000)
        daemon = on_a_pod(queue, tmp_path, runpod, idle_minutes=TWO_SECONDS, storage="supabase")
        daemon.environment |= {"SUPABASE_URL": storage.url, "SUPABASE_SERVICE_ROLE_KEY": storage.key}
        with daemon:
            await asyncio.to_thread(eventually, lambda: refusals.times < 1000, seconds=60, why=daemon.tail)
            await asyncio.sleep(4)  # twice the idle time
            assert runpod.pods["me"].status == "RUNNING" and queue.row(job)["current_stage"] == "uploading"
            refusals.times = 0
            await asyncio.to_thread(queue.wait_for, job, "completed", seconds=90)
            assert await asyncio.to_thread(daemon.wait, 60) == 0
    assert runpod.pods["me"].status == "EXITED"


def test_a_pod_that_cannot_be_ended_says_so_loudly_and_goes_on_serving(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble
) -> None:
    with on_a_pod(queue, tmp_path, runpod, key="wrong-key", idle_minutes=TWO_SECONDS) as daemon:
        daemon.wait_for_log("pod_idle_and_billing", seconds=40)
        queue.wait_for(queue.insert(), "completed")
        assert daemon.process is not None and daemon.process.poll() is None
        assert "wrong-key" not in daemon.log_path.read_text()


def test_an_ending_that_nobody_takes_yet_holds_the_pod_for_its_minutes(
    database: AppDatabase, queue: Queue, tmp_path: Path, runpod: RunPodDouble
) -> None:
    # Nobody listens at port 9: the first retry comes after five seconds, the idle time is two.
    settings = {"idle_minutes": TWO_SECONDS, "allowed_hosts": "127.0.0.1:9"}
    job = queue.insert(callback_url="http://127.0.0.1:9/callback")
    with on_a_pod(queue, tmp_path, runpod, **settings) as daemon:
        queue.wait_for(job, "completed")
        daemon.wait_for_log("callback_postponed", count=4, seconds=30)
        assert runpod.pods["me"].status == "RUNNING", "the retry after five seconds was awaited"
        database.run("UPDATE training_callbacks SET state = 'dead'")
        assert daemon.wait(30) == 0
    assert runpod.pods["me"].status == "EXITED"


async def test_an_ending_that_nobody_ever_takes_holds_the_pod_no_longer_than_its_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five minutes, two seconds here; an outbox that cannot be asked holds it no longer either."""
    monkeypatch.setattr(pod_life, "ENDINGS_SECONDS", 2.0)
    asked = 0

    async def waits() -> bool:
        nonlocal asked
        asked += 1
        if asked % 2:
            raise DatabaseAway("for a moment")
        return True

    async def ended() -> bool:
        return True

    given = load_settings(database_url="postgresql://nowhere", idle_minutes=0.2 / 60)
    worker = IdleWorker()
    await asyncio.wait_for(PodLife(given, worker, endings_wait=waits, end_pod=ended).run(), 30)
    assert worker.idle_seconds is not None and worker.idle_seconds >= 2.0
    assert asked > 1 and worker.drained


class IdleWorker:
    """A worker that never has anything to do, and keeps the promise of daemon.pod.lifetime.Working."""

    def __init__(self) -> None:
        self._idle_since = time.monotonic()
        self.drained = False

    @property
    def idle_seconds(self) -> float | None:
        return time.monotonic() - self._idle_since

    async def pause(self) -> None:
        """Nothing is ever claimed."""

    def resume(self) -> None:
        """Nothing is ever claimed."""

    def drain(self) -> None:
        self.drained = True


def test_the_price_that_runpod_charges_counts_before_the_setting_and_the_tenants_price(
    queue: Queue, tmp_path: Path, runpod: RunPodDouble
) -> None:
    tenant = json.dumps({"cost_per_gpu_hour": 1e-6})
    job = queue.insert(script=[["steps", 100, 0.02]], gpu_config=tenant)
    with on_a_pod(queue, tmp_path, runpod, cost_per_gpu_hour=1e-6) as daemon:
        runpod.pods["me"].cost = 36_000.0  # 5 dollars a second for each of the two cards
        daemon.wait_for_log("pod_price", per_gpu_hour=18_000.0)
        row = queue.wait_for(job, "completed")
    assert row["final_cost"] > 5, "the two seconds and more that its steps took"


@pytest.mark.parametrize(
    ("key", "settings", "light", "words"),
    [
        ("good-key", {"idle_minutes": 15}, "ok", "6.00 US dollars an hour, ends itself after 15 idle minutes"),
        ("good-key", {}, "warning", "never ends itself"),
        ("wrong-key", {"idle_minutes": 15}, "warning", "The API key is not valid"),
    ],
)
async def test_the_doctor_says_whether_the_pod_can_end_itself(
    runpod: RunPodDouble, key: str, settings: dict[str, object], light: str, words: str
) -> None:
    runpod.add("me", cost=6.0)
    given = {"database_url": "postgresql://nowhere", "pod_id": "me", "pod_api_key": key, "runpod_api": runpod.url}
    finding = await check_pod(load_settings(**given, **settings))
    assert finding.light == light and words in finding.detail and key not in f"{finding.detail} {finding.advice}"
