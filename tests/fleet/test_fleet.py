"""What the fleet starts and what it ends: a real Postgres, a RunPod on loopback, a clock in the test's hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from daemon.errors import HostUnfit
from daemon.fleet.loop import serve_fleet
from daemon.fleet.pod_plan import read_plan
from daemon.pod.runpod_api import RunPodError
from daemon.queue.rows import Limits
from tests.doubles.runpod_api import RunPodDouble
from tests.fleet.yard import A40, H100, Yard
from tests.postgres import AppDatabase


@pytest.fixture
def open_yard(database: AppDatabase, runpod: RunPodDouble) -> Callable[..., Yard]:
    return lambda **settings: Yard(database, runpod, **settings)


@pytest.fixture
def yard(open_yard: Callable[..., Yard]) -> Yard:
    return open_yard()


# -- starting ---------------------------------------------------------------------------------------------------------


async def test_where_nothing_waits_nothing_is_started_and_nothing_is_paid(yard: Yard) -> None:
    async with yard.fleet() as fleet:
        for _ in range(3):
            await fleet.look()
            yard.after(minutes=10)
    assert yard.asked == 0 and yard.decisions() == []


async def test_a_job_that_nobody_can_take_gets_one_pod_however_often_the_fleet_looks(yard: Yard) -> None:
    job = yard.job()
    async with yard.fleet() as fleet:
        for _ in range(4):
            await fleet.look()
            yard.after(minutes=1)
    (pod,) = yard.pods
    (row,) = yard.rows()
    assert pod.name == f"brightrun-{row['id']}" and row["pod"] == pod.id and row["price_per_hour"] == 3.0
    assert pod.body["gpu"] == {"id": H100, "count": 1} and pod.body["image"] == "brightrun-trainer"
    assert yard.decisions() == ["ask", "start"]
    assert str(job) in yard.story()[0]["reason"] and "secret" not in str(yard.story())


async def test_a_job_has_patience_with_the_hosts_that_there_are(open_yard: Callable[..., Yard]) -> None:
    yard = open_yard(fleet_patience_seconds=120)
    yard.job()
    async with yard.fleet() as fleet:
        assert await fleet.look() <= 120 and yard.asked == 0
        yard.after(seconds=121)
        await fleet.look()
    assert yard.asked == 1


async def test_a_living_host_with_room_is_enough_and_a_busy_one_is_not(yard: Yard) -> None:
    worker = yard.boot(yard.runpod.add("by-hand"))
    yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        assert yard.asked == 0
        yard.touch(worker, busy=1)
        await fleet.look()
        assert yard.asked == 1
        yard.touch(worker, busy=0, state="draining")
        yard.job()
        await fleet.look()
        assert yard.asked == 2


async def test_each_waiting_job_gets_a_pod_up_to_the_limit_which_is_said_once(yard: Yard) -> None:
    for _ in range(5):
        yard.job()
    async with yard.fleet() as fleet:
        for _ in range(3):
            await fleet.look()
            yard.after(minutes=1)
    assert len(yard.pods) == 3
    assert yard.decisions() == ["ask", "start"] * 3 + ["limit"]


async def test_several_jobs_may_share_a_pod(open_yard: Callable[..., Yard]) -> None:
    yard = open_yard(fleet_jobs_per_pod=4)
    for _ in range(5):
        yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        assert yard.asked == 2
        for pod in yard.pods:
            yard.boot(pod, busy=1)
        await fleet.look()
    assert yard.asked == 2, "the others wait for these two"


async def test_a_user_at_his_cap_starts_no_further_pod(open_yard: Callable[..., Yard]) -> None:
    yard = open_yard(user_cap=1)
    yard.job()
    yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        assert yard.asked == 1
        yard.job(user=yard.database.insert_user())
        await fleet.look()
        assert yard.asked == 2


async def test_a_user_at_his_cap_with_a_long_queue_does_not_hide_the_others(
    open_yard: Callable[..., Yard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.fleet.store.MOST_JOBS", 3)
    yard = open_yard(user_cap=1)
    running = yard.job(priority=9)
    for _ in range(5):
        yard.job(priority=5)
    yard.job(user=yard.database.insert_user())
    yard.database.run(
        "INSERT INTO training_leases (job_id, epoch, worker_id, user_id, expires_at) "
        "SELECT id, 1, gen_random_uuid(), user_id, now() + interval '1 hour' FROM training_jobs WHERE id = %s",
        (running,),
    )
    async with yard.fleet() as fleet:
        await fleet.look()
    assert yard.asked == 1


async def test_a_scheduled_job_is_promoted_when_no_daemon_is_left_to_do_it(yard: Yard) -> None:
    now = yard.database.one("SELECT clock_timestamp() AS at")["at"]
    yard.job(run_after=now + timedelta(seconds=1))
    async with yard.fleet() as fleet:
        seconds = await fleet.look()
        assert seconds <= 1 and yard.asked == 0
        await asyncio.sleep(seconds + 0.05)
        await fleet.look()
    assert yard.asked == 1


# -- kinds of cards ---------------------------------------------------------------------------------------------------


async def test_when_one_kind_is_sold_out_the_next_that_fits_is_taken_and_the_first_cools_down(yard: Yard) -> None:
    yard.runpod.sold_out.add(H100)
    yard.job(gpu_config={"num_gpus": 1, "gpu_memory_gb": 40})
    async with yard.fleet() as fleet:
        await fleet.look()
        assert [pod.body["gpu"]["id"] for pod in yard.pods] == [A40]
        assert [(line["decision"], line["gpu_type"]) for line in yard.story()] == [
            ("ask", H100), ("end", H100), ("ask", A40), ("start", A40)
        ]  # fmt: skip
        yard.job(gpu_config={"num_gpus": 1, "gpu_memory_gb": 80})
        tries = []
        for minute in range(20):
            before = yard.asked
            await fleet.look()
            if yard.asked > before:
                tries.append(minute)
            yard.after(minutes=1)
    assert tries == [1, 3, 7, 15], "a minute, then two, four, eight"


async def test_a_kind_has_a_limit_of_its_own_and_a_job_too_large_for_all_is_named(yard: Yard) -> None:
    too_large = yard.job(gpu_config={"num_gpus": 4, "gpu_memory_gb": 80})
    yard.runpod.sold_out.add(H100)
    for _ in range(2):
        yard.job(gpu_config={"num_gpus": 1, "gpu_memory_gb": 24})
    async with yard.fleet() as fleet:
        for _ in range(3):
            await fleet.look()
    assert [pod.body["gpu"]["id"] for pod in yard.pods] == [A40], "max_pods of this kind is one"
    said = [line["reason"] for line in yard.story() if line["decision"] == "unservable"]
    assert len(said) == 1 and str(too_large) in said[0] and "4 GPUs" in said[0]


async def test_a_refused_key_is_tried_once_and_then_ever_more_rarely(yard: Yard) -> None:
    yard.runpod.fail(402, detail="Your balance is too low", times=1000, only="POST")
    for _ in range(3):
        yard.job()
    async with yard.fleet() as fleet:
        for _ in range(10):
            await fleet.look()
            yard.after(seconds=5)
    assert yard.asked == 1
    assert yard.rows()[0]["ending"] == "refused" and "Your balance is too low" in yard.story()[1]["reason"]


# -- ending -----------------------------------------------------------------------------------------------------------


async def test_a_pod_that_never_reports_in_is_terminated_and_the_next_try_waits(yard: Yard) -> None:
    yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        yard.pods[0].status = "RUNNING"
        yard.after(minutes=19)
        await fleet.look()
        assert len(yard.pods) == 1
        yard.after(minutes=2)
        await fleet.look()
        # The other kind of card does not serve this job: 80 GB are asked for.
        assert yard.pods == [] and yard.runpod.pods["pod1"].status == "TERMINATED"
        assert yard.rows()[0]["ending"] == "never_reported"
        await fleet.look()
        assert yard.asked == 1, "it cools down"
        yard.after(minutes=2)
        await fleet.look()
        assert yard.asked == 2


async def test_a_pod_that_works_is_left_alone_and_one_that_ended_itself_frees_its_place(yard: Yard) -> None:
    yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        (pod,) = yard.pods
        worker = yard.boot(pod)
        for _ in range(40):
            yard.after(minutes=10)
            yard.touch(worker, busy=1)
            await fleet.look()
        assert pod.status == "RUNNING"
        yard.database.run("UPDATE training_jobs SET status = 'cancelled'")
        pod.status = "EXITED"
        await fleet.look()
        assert pod.status == "TERMINATED", "a stopped pod's disk costs"
    assert yard.rows()[0]["ending"] == "stopped" and yard.decisions()[-2:] == ["terminate", "end"]


async def test_an_idle_pod_that_overstays_is_drained_first_and_then_terminated(yard: Yard) -> None:
    yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        (pod,) = yard.pods
        worker = yard.boot(pod)
        yard.database.run("UPDATE training_jobs SET status = 'cancelled'")
        for _ in range(7):
            await fleet.look()
            yard.after(minutes=10)
            yard.touch(worker)
        await fleet.look()
        assert yard.wants_drain(worker) and pod.status == "RUNNING"
        # It had claimed a job the moment before: that job is waited for.
        yard.after(minutes=2)
        yard.touch(worker, busy=1, state="draining")
        await fleet.look()
        assert pod.status == "RUNNING"
        yard.touch(worker, state="gone")
        await fleet.look()
    assert pod.status == "TERMINATED" and yard.rows()[0]["ending"] == "overstayed"


async def test_a_pod_that_works_on_a_delivery_is_not_idle_and_still_has_room(yard: Yard) -> None:
    job = yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        (pod,) = yard.pods
        worker = yard.boot(pod)
        yard.database.run("UPDATE training_jobs SET status = 'cancelled'")
        yard.database.run(
            "INSERT INTO training_deliveries (job_id, user_id, kind, state, worker_id, lock_token, locked_until) "
            "SELECT id, user_id, 'merged', 'running', %s, gen_random_uuid(), now() + interval '1 year' "
            "FROM training_jobs WHERE id = %s",
            (worker, job),
        )
        for _ in range(9):
            await fleet.look()
            yard.after(minutes=10)
            yard.touch(worker)
        assert not yard.wants_drain(worker) and pod.status == "RUNNING"
        # Its slot is free: the next job starts no pod.
        yard.job()
        await fleet.look()
    assert len(yard.pods) == 1


async def test_a_pod_whose_host_is_out_of_service_is_no_room_and_is_ended(yard: Yard) -> None:
    yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        (pod,) = yard.pods
        broken = yard.boot(pod)
        yard.touch(broken, state="out_of_service")
        await fleet.look()
        _, other = yard.pods  # the job that waits gets a pod that works
        healthy = yard.boot(other, busy=1)
        for _ in range(3):
            yard.after(minutes=9)
            yard.touch(broken, state="out_of_service")
            yard.touch(healthy, busy=1)
            await fleet.look()
        assert yard.wants_drain(broken) and not yard.wants_drain(healthy)
        yard.after(minutes=2)
        yard.touch(broken, state="draining")
        yard.touch(healthy, busy=1)
        await fleet.look()
    assert pod.status == "TERMINATED" and other.status == "RUNNING"
    assert yard.row_of(pod.id)["ending"] == "unfit"


async def test_a_silent_host_is_ended_but_not_while_it_may_have_been_our_own_silence(yard: Yard) -> None:
    yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        yard.boot(yard.pods[0])
        await fleet.look()
    # The database was away: nobody could touch his row, and the job waits.
    yard.after(minutes=30)
    async with yard.fleet(settle_seconds=3600) as reconnected:
        await reconnected.look()
        assert [pod.id for pod in yard.pods] == ["pod1"], "every host first gets its turn; none is started in its place"
    async with yard.fleet() as fleet:
        await fleet.look()
    assert yard.runpod.pods["pod1"].status == "TERMINATED" and yard.rows()[0]["ending"] == "silent"


@pytest.mark.parametrize("row", ["stale", "none"])
async def test_a_pod_that_keeps_a_lease_alive_is_not_ended_whatever_became_of_its_row(yard: Yard, row: str) -> None:
    """The chore that writes the row has failed, or the database refuses that row; the training goes on."""
    job_id = yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        (pod,) = yard.pods
        worker = yard.boot(pod)
        job = (await fleet._store.claim_job(worker, Limits(), lease_seconds=86_400)).job
        assert job is not None and job.id == job_id
        if row == "none":
            yard.database.run("DELETE FROM training_workers")
            yard.database.run("UPDATE training_pods SET reported_at = NULL")
        for _ in range(3):
            yard.after(minutes=30)
            await fleet.look()
        assert pod.status == "RUNNING" and "terminate" not in yard.decisions()
        # Its lease runs out: now it is as silent as it seems.
        yard.database.run("UPDATE training_leases SET expires_at = clock_timestamp() - interval '1 s'")
        await fleet.look()
    assert pod.status == "TERMINATED"


@pytest.mark.parametrize("table", ["training_workers", "training_jobs"])
async def test_a_fleet_from_which_rows_are_hidden_ends_no_pod(yard: Yard, table: str) -> None:
    yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        (pod,) = yard.pods
        yard.boot(pod, busy=1)
        yard.database.run(f"CREATE POLICY tenants ON {table} AS RESTRICTIVE USING (false)")
        yard.after(minutes=45)
        await fleet.look()
        assert pod in yard.pods and "terminate" not in yard.decisions()
        yard.database.run(f"DROP POLICY tenants ON {table}")
        await fleet.look()
        assert pod not in yard.pods, "seen again, it is judged again"


async def test_pods_of_others_are_never_touched(yard: Yard) -> None:
    yard.runpod.add("somebodys", name="brightrun-notebook", status="EXITED")
    yard.runpod.add("another-fleets", name=f"brightrun-{UUID(int=7)}", status="EXITED")
    async with yard.fleet() as fleet:
        await fleet.look()
    assert [call for call in yard.runpod.calls if call[0] == "POST"] == []


# -- crashes, races and outages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [{"status": 0, "cut": True}, {"status": 502}])
async def test_a_pod_whose_answer_was_lost_is_found_by_its_name(yard: Yard, failure: dict[str, Any]) -> None:
    yard.job()
    yard.runpod.fail(failure.pop("status"), after=True, only="POST", **failure)
    async with yard.fleet() as fleet:
        await fleet.look()
        assert yard.rows()[0]["pod"] is None
        await fleet.look()
    assert yard.asked == 1 and yard.rows()[0]["pod"] == "pod1"
    assert yard.decisions() == ["ask", "adopt"]


async def test_a_request_that_came_to_nothing_gives_its_place_back_and_a_late_pod_is_ended(yard: Yard) -> None:
    yard.job()
    yard.runpod.fail(503, only="POST")
    async with yard.fleet() as fleet:
        await fleet.look()
        yard.after(minutes=1)
        await fleet.look()
        assert yard.asked == 1, "in doubt, nothing is asked for twice"
        yard.after(minutes=2)
        await fleet.look()
        row = yard.rows()[0]
        assert row["ending"] == "never_came"
        yard.runpod.add("late", name=f"brightrun-{row['id']}")
        await fleet.look()
    assert yard.runpod.pods["late"].status == "TERMINATED"


async def test_while_runpod_does_not_answer_nothing_is_decided(yard: Yard) -> None:
    yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        yard.boot(yard.pods[0], busy=1)
        yard.job()
        yard.runpod.fail(503, times=3, only="GET")
        yard.after(minutes=60)
        for _ in range(3):
            with pytest.raises(RunPodError):
                await fleet.look()
    assert yard.decisions() == ["ask", "start"] and len(yard.pods) == 1


async def test_a_pod_that_cannot_be_ended_keeps_its_place_until_it_is(yard: Yard) -> None:
    yard.job()
    async with yard.fleet() as fleet:
        await fleet.look()
        yard.pods[0].status = "EXITED"
        yard.runpod.fail(500, times=2, only="action")
        for _ in range(2):
            await fleet.look()
            assert yard.row_of("pod1")["ended_at"] is None
        await fleet.look()
    assert yard.row_of("pod1")["ending"] == "stopped"


async def test_two_loops_at_once_start_no_pod_too_many(yard: Yard) -> None:
    for _ in range(8):
        yard.job()
    async with yard.fleet() as one, yard.fleet() as other, yard.fleet() as third:
        for _ in range(5):
            await asyncio.gather(one.look(), other.look(), third.look())
    assert len(yard.pods) == 3 and yard.asked == 3


async def test_the_limit_holds_even_without_the_turn(yard: Yard) -> None:
    # Through a transaction pooler the lock is nobody's: the numbered slots hold alone.
    async with yard.fleet() as one, yard.fleet() as other:
        kind = read_plan(yard.settings.fleet_pod).gpus[0]
        asking = [fleet._fleet.ask_for_pod(yard.now, kind, 3, "race") for fleet in (one, other) * 6]
        rows = await asyncio.gather(*asking)
    assert len({row for row in rows if row is not None}) == 3


# -- what the operator gave -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "needs TRAINER_FLEET_POD"),
        ("{nonsense", "not JSON"),
        ("/nowhere/plan.json", "cannot be read"),
        ('{"pod": {"name": "x", "image": "i"}, "gpus": []}', "the fleet fills in name"),
        ('{"pod": {}, "gpus": [{"id": "A", "cout": 1}]}', "gpus.0.cout"),
    ],
)
async def test_an_unusable_plan_is_refused_with_every_fault(
    open_yard: Callable[..., Yard], given: str | None, words: str
) -> None:
    with pytest.raises(HostUnfit, match=words):
        await serve_fleet(open_yard(fleet_pod=given).settings)


async def test_without_a_key_there_is_no_fleet(open_yard: Callable[..., Yard]) -> None:
    with pytest.raises(HostUnfit, match="TRAINER_RUNPOD_API_KEY"):
        await serve_fleet(open_yard(runpod_api_key=None).settings)
