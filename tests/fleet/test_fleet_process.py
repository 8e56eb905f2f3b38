"""The fleet as its own process: woken by an insert, killed between asking and noting, helping hosts that died."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.daemon_process import DaemonProcess, eventually
from tests.doubles.receiver import Receiver
from tests.doubles.runpod_api import RunPodDouble
from tests.fleet.yard import PLAN
from tests.paths import COMMAND_LINE
from tests.postgres import AppDatabase

FLEET = (sys.executable, str(COMMAND_LINE), "fleet")


def fleet(database: AppDatabase, runpod: RunPodDouble, folder: Path, name: str, **settings: Any) -> DaemonProcess:
    given = {"fleet_pod": json.dumps(PLAN), "fleet_patience_seconds": 0, "fleet_max_pods": 2, "fleet_poll_seconds": 1}
    given |= {"runpod_api": runpod.url, "runpod_api_key": "good-key"}
    return DaemonProcess(database.dsn, folder, name=name, command=FLEET, **(given | settings))


def asked(runpod: RunPodDouble) -> int:
    return len([call for call in runpod.calls if call[:2] == ("POST", "/v2/pods")])


def test_an_inserted_job_wakes_the_fleet_and_a_signal_ends_it_while_the_pods_stay(
    database: AppDatabase, runpod: RunPodDouble, tmp_path: Path
) -> None:
    import signal

    with fleet(database, runpod, tmp_path, "fleet", fleet_poll_seconds=60) as process:
        process.wait_for_log("listener_hears")
        eventually(lambda: runpod.called("GET"))
        database.insert_job(database.insert_user())
        eventually(lambda: runpod.billing, seconds=10, why=process.tail)
        process.signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert process.logged("fleet_ended") and len(runpod.billing) == 1
    text = process.log_path.read_text()
    assert "good-key" not in text and "postgresql://secret" not in text


def test_killed_between_asking_and_noting_its_successor_finds_the_pod_and_asks_for_no_other(
    database: AppDatabase, runpod: RunPodDouble, tmp_path: Path
) -> None:
    runpod.hold_create = True
    database.insert_job(database.insert_user())
    with fleet(database, runpod, tmp_path, "first") as first:
        assert runpod.created.wait(20), first.tail()
        first.kill()
    assert database.one("SELECT pod FROM training_pods")["pod"] is None
    runpod.release()
    with fleet(database, runpod, tmp_path, "second") as second:
        second.wait_for_log("fleet_pod_adopted")
        looks = len(runpod.called("GET"))
        eventually(lambda: len(runpod.called("GET")) > looks + 2, why=second.tail)
    assert asked(runpod) == 1 and database.one("SELECT pod FROM training_pods")["pod"] == "pod1"


def test_two_fleets_at_once_start_as_many_pods_as_one(
    database: AppDatabase, runpod: RunPodDouble, tmp_path: Path
) -> None:
    with fleet(database, runpod, tmp_path, "one") as one, fleet(database, runpod, tmp_path, "other") as other:
        for process in (one, other):
            process.wait_for_log("listener_hears")
        user = database.insert_user()
        for _ in range(6):
            database.insert_job(user)
        eventually(lambda: len(runpod.billing) == 2, why=one.tail)
        looks = len(runpod.called("GET"))
        eventually(lambda: len(runpod.called("GET")) > looks + 3, why=one.tail)
    assert asked(runpod) == 2


async def test_a_host_that_died_has_its_lease_reaped_and_its_ending_told(
    database: AppDatabase, runpod: RunPodDouble, tmp_path: Path
) -> None:
    """Nobody else is there: the only host is dead, with the last attempt of a job."""
    import asyncio

    async with Receiver() as receiver:
        job = database.insert_job(database.insert_user(), callback_url=receiver.url, max_attempts=1)
        database.run(
            "SET ROLE training_daemon; "
            "UPDATE training_jobs SET status = 'initializing', lease_epoch = 1, attempt = 1, due = false; "
            "RESET ROLE"
        )
        database.run(
            "INSERT INTO training_leases (job_id, epoch, worker_id, user_id, heartbeat_at, expires_at) "
            "SELECT id, 1, %s, user_id, now() - interval '1 second', now() FROM training_jobs",
            (uuid4(),),
        )
        with fleet(database, runpod, tmp_path, "fleet", lease_seconds=1, allowed_hosts=receiver.host) as process:
            received = await receiver.wait_for(lambda all_of_it: any(b"failed" in one.body for one in all_of_it), 20)
            await asyncio.to_thread(process.wait_for_log, "job_reaped")
    row = database.job(job)
    assert row["status"] == "failed" and row["error_code"] == "worker_lost"
    assert received and runpod.billing == []
