"""One suite over both job stores: what daemon.queue.job_store promises, in Postgres and in memory."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.errors import LeaseLost
from daemon.gateway.schemas import Submission
from daemon.host.inspect import Host
from daemon.queue.job import ClaimedJob, Lease, Returned
from daemon.queue.job_store import JobStore
from daemon.queue.outcome import Completed, Failed, Wanted
from daemon.queue.rows import Ending, Limits, MetricPoint
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.states import State
from daemon.report.outbox import SqlOutbox
from daemon.serverless.memory_job_store import MAX_ATTEMPTS, MemoryJobStore
from daemon.serverless.memory_outbox import MemoryOutbox
from daemon.storage.interface import Location
from daemon.storage.upload_log import SqlUploadLog, UploadLog
from tests.postgres import AppDatabase
from training.events import ErrorCode

DONE = Completed("lora-models/adapters/x.tar.gz", "ab" * 32, 1234, {"adapter_model": "adapters/x.tar.gz"}, {})
BACK = Returned("work folder", ErrorCode.DISK_FULL, "the host's disk is full", hint="wait", stack="/data: full")
BROKEN = Failed(ErrorCode.INTERNAL, "it broke", hint="mend it", stack="Traceback", transient=True)
BUCKET = Location("a storage", "lora-models")


class InPostgres:
    """A store, and what the owners of its jobs do."""

    def __init__(self, app: AppDatabase, database: Database) -> None:
        self._app = app
        self._user = app.insert_user()
        self.store = SqlJobStore(database)
        self.uploads = SqlUploadLog(database)
        self.outbox = SqlOutbox(database)

    async def submit(self, callback_url: str | None = None) -> UUID:
        """A job that waits, with three attempts."""
        return self._app.insert_job(self._user, max_attempts=MAX_ATTEMPTS, callback_url=callback_url)

    async def cancel(self, job_id: UUID) -> None:
        self._app.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job_id,))

    async def contract(self, job_id: UUID) -> dict[str, Any]:
        """Where the job stands, in the words of the HTTP contract."""
        row = self._app.one("SELECT contract FROM training_job_status WHERE job_id = %s", (job_id,))
        contract: dict[str, Any] = row["contract"]
        return contract


class InMemory:
    """The same without a database."""

    def __init__(self) -> None:
        self.outbox = MemoryOutbox()
        self.store = self.uploads = MemoryJobStore(Host(device="cpu"), (), self.outbox)

    async def submit(self, callback_url: str | None = None) -> UUID:
        url, given = "https://files.example.com/d.jsonl", {"base_model": "mistralai/Mistral-7B-v0.1"}
        return await self.store.submit(
            Submission(dataset_url=url, hyperparameters=given, gpu_config={}, callback_url=callback_url)
        )

    async def cancel(self, job_id: UUID) -> None:
        await self.store.cancel(job_id)

    async def contract(self, job_id: UUID) -> dict[str, Any]:
        return dict((await self.store.standing(job_id)).contract)


Kept = InPostgres | InMemory


@asynccontextmanager
async def in_postgres(request: pytest.FixtureRequest) -> AsyncIterator[Kept]:
    app: AppDatabase = request.getfixturevalue("database")
    async with Database(app.dsn, application_name="test") as database:
        yield InPostgres(app, database)


@asynccontextmanager
async def in_memory(_request: pytest.FixtureRequest) -> AsyncIterator[Kept]:
    yield InMemory()


@pytest.fixture(params=[in_postgres, in_memory], ids=["Postgres", "memory"])
async def kept(request: pytest.FixtureRequest) -> AsyncIterator[Kept]:
    async with request.param(request) as kept:
        yield kept


async def claim(kept: Kept, job_id: UUID) -> ClaimedJob | None:
    return await kept.store.claim_job_by_id(uuid4(), job_id, Limits(), lease_seconds=60.0)


async def claimed(kept: Kept, job_id: UUID | None = None, *, callback_url: str | None = None) -> ClaimedJob:
    job = await claim(kept, await kept.submit(callback_url) if job_id is None else job_id)
    assert job is not None
    return job


async def progress(store: JobStore, lease: Lease, percent: float, **changes: Any) -> int | None:
    values: dict[str, Any] = {
        "stage": "training",
        "progress": percent,
        "epoch": 1,
        "step": 5,
        "metrics": {"training_loss": 1.5},
        "current_cost": 0.5,
        "seconds_left": 60.0,
    }
    return await store.record_progress(lease, **(values | changes))


Write = Callable[[Kept, Lease], Awaitable[object]]

# What a job that was cancelled takes until its lease ends, and what it does not take.
STILL_HEARD: dict[str, Write] = {
    "renew_lease": lambda kept, lease: kept.store.renew_lease(lease, 60.0),
    "record_metrics": lambda kept, lease: kept.store.record_metrics(lease, [MetricPoint(1, 0, 1.0, 1e-4)]),
    "record_metrics, of none": lambda kept, lease: kept.store.record_metrics(lease, []),
    "forget_metrics": lambda kept, lease: kept.store.forget_metrics(lease, 0),
    "record_event": lambda kept, lease: kept.store.record_event(lease, "notice", "x", {}),
    "finish_checkpoint_upload": lambda kept, lease: kept.uploads.finish_checkpoint_upload(
        lease, 5, manifest_sha256="c" * 64, size=1
    ),
    "record_upload": lambda kept, lease: kept.uploads.record_upload(lease, "adapter", BUCKET, ["x"]),
}
OF_A_RUNNING_JOB: dict[str, Write] = {
    "start_job": lambda kept, lease: kept.store.start_job(lease),
    "record_plan": lambda kept, lease: kept.store.record_plan(
        lease, total_steps=1, total_epochs=1, estimated_total_cost=None, trained_with={"base_model": "other"}
    ),
    "record_progress": lambda kept, lease: progress(kept.store, lease, 50.0),
}
ENDINGS: dict[str, Callable[[JobStore, Lease], Awaitable[Ending]]] = {
    "complete_job": lambda store, lease: store.complete_job(lease, DONE, cost=7.5),
    "fail_job": lambda store, lease: store.fail_job(lease, BROKEN, cost=7.5),
    "retry_job": lambda store, lease: store.retry_job(lease, BROKEN, delay_seconds=60.0, cost=7.5),
    "release_job": lambda store, lease: store.release_job(lease, "the host shuts down", cost=7.5),
    "return_job": lambda store, lease: store.return_job(lease, BACK, cost=7.5),
}
CANCELLED: dict[str, Callable[[JobStore, Lease], Awaitable[Ending]]] = {
    "end_cancelled_job": lambda store, lease: store.end_cancelled_job(lease, cost=7.5, data={}),
}
# Where each ending leads a running job that has attempts left. A host that gives a job back has no other in memory.
LEADS_TO = {
    "complete_job": State.COMPLETED,
    "fail_job": State.FAILED,
    "retry_job": State.QUEUED,
    "release_job": State.QUEUED,
    "end_cancelled_job": State.QUEUED,
}


# -- claims -----------------------------------------------------------------------------------------------------------


async def test_a_claim_takes_a_waiting_job_once(kept: Kept) -> None:
    job_id = await kept.submit()
    job = await claimed(kept, job_id)
    assert (job.id, job.attempt, job.max_attempts, job.lease_epoch, job.spent) == (job_id, 1, 3, 1, 0.0)
    assert (job.lease.job_id, job.lease.epoch) == (job_id, 1)
    assert await claim(kept, job_id) is None, "it is held"
    assert await claim(kept, uuid4()) is None, "nobody knows of it"
    contract = await kept.contract(job_id)
    assert (contract["state"], contract["status"], contract["attempt"]) == ("initializing", "running", 1)
    assert (contract["stage"], contract["progress"], contract["metrics"]) == ("setup", 0, {})


@pytest.mark.parametrize("ending", ["complete_job", "fail_job"])
async def test_what_has_ended_is_not_claimed_again(kept: Kept, ending: str) -> None:
    job = await claimed(kept)
    await ENDINGS[ending](kept.store, job.lease)
    assert await claim(kept, job.id) is None


async def test_a_job_cancelled_while_it_waits_is_not_claimed(kept: Kept) -> None:
    job_id = await kept.submit()
    await kept.cancel(job_id)
    assert await claim(kept, job_id) is None
    contract = await kept.contract(job_id)
    assert (contract["state"], contract["status"], contract["error_message"]) == (
        "cancelled", "failed", "Cancelled by request.",
    )  # fmt: skip


async def test_a_job_cancelled_while_it_runs_is_not_claimed_before_nor_after_its_lease_ends(kept: Kept) -> None:
    job = await claimed(kept)
    await kept.cancel(job.id)
    assert await claim(kept, job.id) is None
    await kept.store.end_cancelled_job(job.lease, cost=None, data={})
    assert await claim(kept, job.id) is None


async def test_each_claim_has_a_higher_epoch_and_a_new_token(kept: Kept) -> None:
    job = await claimed(kept)
    await kept.store.release_job(job.lease, "the host shuts down", cost=None)
    again = await claimed(kept, job.id)
    assert again.lease_epoch == 2 and again.lease_token != job.lease_token


async def test_what_there_is_of_a_job_is_found_with_its_holder(kept: Kept) -> None:
    job_id = await kept.submit()
    found = await kept.store.find_job(job_id)
    assert found.can_tell and found.job_exists and found.dataset_exists and not found.is_deleted
    assert (found.state, found.epoch, found.holder) == ("queued", 0, None)
    job = await claimed(kept, job_id)
    found = await kept.store.find_job(job_id)
    assert (found.state, found.epoch) == ("initializing", 1) and found.is_held_by(job.lease)
    assert not found.is_held_by(replace(job.lease, token=uuid4()))
    await kept.store.release_job(job.lease, "x", cost=None)
    assert (await kept.store.find_job(job_id)).holder is None
    assert (await kept.store.find_job(uuid4())).is_deleted


async def test_a_job_without_limits_has_none_and_one_that_is_gone_is_told_apart(kept: Kept) -> None:
    job = await claimed(kept)
    assert await kept.store.read_limits(job.id) == (None, None)
    assert await kept.store.read_limits(uuid4()) is None


async def test_a_jobs_dataset_is_what_it_was_at_the_claim(kept: Kept) -> None:
    job = await claimed(kept)
    assert await kept.store.read_dataset(job.dataset) == job.dataset


# -- what the holder of a lease writes --------------------------------------------------------------------------------


async def test_a_renewal_says_the_jobs_state(kept: Kept) -> None:
    lease = (await claimed(kept)).lease
    assert await kept.store.renew_lease(lease, 60.0) is State.INITIALIZING
    await kept.store.start_job(lease)
    assert await kept.store.renew_lease(lease, 60.0) is State.RUNNING
    await kept.cancel(lease.job_id)
    assert await kept.store.renew_lease(lease, 60.0) is State.CANCELLED
    assert await kept.store.renew_lease(lease, 60.0) is State.CANCELLED, "the lease lasts until it is ended"


async def test_a_start_said_twice_holds(kept: Kept) -> None:
    lease = (await claimed(kept)).lease
    await kept.store.start_job(lease)
    await kept.store.start_job(lease)
    assert (await kept.contract(lease.job_id))["state"] == "running"


async def test_progress_is_kept_as_its_columns_hold_it_and_never_falls_within_an_attempt(kept: Kept) -> None:
    lease = (await claimed(kept)).lease
    await kept.store.record_plan(lease, total_steps=90, total_epochs=3, estimated_total_cost=2.5, trained_with={})
    for percent, shown in ((10, 10), (60, 60), (30, 60), (math.nan, 60), (-5, 60)):
        assert await progress(kept.store, lease, percent, metrics={"training_loss": 1.5, "norm": math.inf}) is None
        assert (await kept.contract(lease.job_id))["progress"] == shown
    contract = await kept.contract(lease.job_id)
    assert (contract["stage"], contract["current_epoch"], contract["current_step"]) == ("training", 1, 5)
    assert contract["metrics"] == {"training_loss": 1.5, "norm": None}
    await progress(kept.store, lease, 1e9, stage="s" * 60, step=2**40)
    contract = await kept.contract(lease.job_id)
    assert (contract["progress"], len(contract["stage"]), contract["current_step"]) == (60, 50, 2**31 - 1)


async def test_the_next_attempt_begins_at_nothing(kept: Kept) -> None:
    job = await claimed(kept)
    await progress(kept.store, job.lease, 60)
    await kept.store.release_job(job.lease, "x", cost=None)
    await claimed(kept, job.id)
    contract = await kept.contract(job.id)
    assert (contract["progress"], contract["current_step"], contract["current_epoch"]) == (0, 0, 0)


async def test_progress_that_is_reported_has_a_rising_number(kept: Kept) -> None:
    lease = (await claimed(kept, callback_url="https://app.example.org/hook")).lease
    first, second = [await progress(kept.store, lease, percent) for percent in (10, 20)]
    assert first is not None and second is not None and second > first


async def test_points_and_events_are_taken_while_the_lease_holds(kept: Kept) -> None:
    lease = (await claimed(kept)).lease
    points = [MetricPoint(step, 0, 2.0, 1e-4, gradient_norm=math.inf) for step in (1, 2, 2)]
    await kept.store.record_metrics(lease, points)
    await kept.store.record_metrics(lease, [])
    await kept.store.forget_metrics(lease, 1)
    await kept.store.record_event(lease, "notice\x00", "NUL \x00 and \ud83d alone", {"k\x00": ["\x00", {1: math.nan}]})


async def test_of_a_cancelled_job_its_holder_is_heard_until_the_lease_ends(kept: Kept) -> None:
    lease = (await claimed(kept)).lease
    await kept.uploads.record_upload(lease, "checkpoint", BUCKET, ["checkpoints/5"], step=5)
    await kept.cancel(lease.job_id)
    for write in STILL_HEARD.values():
        await write(kept, lease)


async def test_the_columns_of_a_cancelled_job_are_final(kept: Kept) -> None:
    lease = (await claimed(kept)).lease
    await kept.cancel(lease.job_id)
    await writes_nothing(kept, lease, writes=OF_A_RUNNING_JOB)


# -- fencing ----------------------------------------------------------------------------------------------------------


EVERY_WRITE: dict[str, Write] = {
    **STILL_HEARD,
    **OF_A_RUNNING_JOB,
    "complete_job": lambda kept, lease: ENDINGS["complete_job"](kept.store, lease),
    "fail_job": lambda kept, lease: ENDINGS["fail_job"](kept.store, lease),
    "retry_job": lambda kept, lease: ENDINGS["retry_job"](kept.store, lease),
    "release_job": lambda kept, lease: ENDINGS["release_job"](kept.store, lease),
    "return_job": lambda kept, lease: ENDINGS["return_job"](kept.store, lease),
    "end_cancelled_job": lambda kept, lease: CANCELLED["end_cancelled_job"](kept.store, lease),
}


async def writes_nothing(
    kept: Kept, lease: Lease, *, of: UUID | None = None, writes: Iterable[str] = EVERY_WRITE
) -> None:
    """Each of these writes under this lease raises LeaseLost and leaves the job `of` as it is."""
    job_id = of or lease.job_id
    before = await kept.contract(job_id), await leftovers(kept, job_id)
    for write in writes:
        with pytest.raises(LeaseLost):
            await EVERY_WRITE[write](kept, lease)
        assert (await kept.contract(job_id), await leftovers(kept, job_id)) == before, write


def test_every_promise_that_names_a_lease_is_tried_by_a_stale_owner() -> None:
    fenced = {
        name
        for promises in (JobStore, UploadLog)
        for name, promise in vars(promises).items()
        if callable(promise) and "lease" in inspect.signature(promise).parameters
    }
    # A question, not a write.
    fenced -= {"names_are_ours"}
    assert {name.partition(",")[0] for name in EVERY_WRITE} == fenced


async def test_an_owner_from_before_the_last_claim_writes_nothing(kept: Kept) -> None:
    stale = (await claimed(kept)).lease
    await kept.store.release_job(stale, "it fell silent", cost=None)
    heir = (await claimed(kept, stale.job_id)).lease
    await kept.store.start_job(heir)
    await writes_nothing(kept, stale)
    assert await kept.store.renew_lease(heir, 60.0) is State.RUNNING, "the heir holds it still"


@pytest.mark.parametrize("part", ["token", "epoch", "job_id"])
async def test_a_lease_with_one_wrong_part_writes_nothing(kept: Kept, part: str) -> None:
    """The right epoch with another token is what a backup that took the rows back in time would give."""
    lease = (await claimed(kept)).lease
    wrong: dict[str, Any] = {"token": uuid4(), "epoch": lease.epoch + 1, "job_id": uuid4()}
    await writes_nothing(kept, replace(lease, **{part: wrong[part]}), of=lease.job_id)
    assert await kept.store.renew_lease(lease, 60.0) is State.INITIALIZING


@pytest.mark.parametrize("ending", ENDINGS)
async def test_after_its_ending_a_lease_writes_nothing_more(kept: Kept, ending: str) -> None:
    lease = (await claimed(kept)).lease
    await ENDINGS[ending](kept.store, lease)
    await writes_nothing(kept, lease, writes=STILL_HEARD | OF_A_RUNNING_JOB)


# -- endings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("started", [False, True], ids=["initializing", "running"])
@pytest.mark.parametrize("ending", LEADS_TO)
async def test_each_ending_leads_where_its_move_does(kept: Kept, ending: str, started: bool) -> None:
    lease = (await claimed(kept)).lease
    if started:
        await kept.store.start_job(lease)
    assert await (ENDINGS | CANCELLED)[ending](kept.store, lease) == Ending(True, LEADS_TO[ending], noted=False)
    contract = await kept.contract(lease.job_id)
    assert (contract["state"], float(contract["cost"])) == (LEADS_TO[ending], 7.5)


async def test_a_completed_job_names_its_adapter(kept: Kept) -> None:
    lease = (await claimed(kept)).lease
    await kept.store.complete_job(lease, DONE, cost=None)
    contract = await kept.contract(lease.job_id)
    assert (contract["status"], contract["progress"], contract["error_code"]) == ("completed", 100, None)
    assert [contract[f"adapter_{name}"] for name in ("path", "sha256", "bytes")] == [DONE.adapter_path, "ab" * 32, 1234]


@pytest.mark.parametrize("ending", ["fail_job", "retry_job"])
async def test_a_failure_is_told_in_words_that_every_column_holds(kept: Kept, ending: str) -> None:
    lease = (await claimed(kept)).lease
    failed = Failed(ErrorCode.INTERNAL, "bad \x00 \udfff", "hint\x00", "x" * 1_000_000)
    if ending == "fail_job":
        await kept.store.fail_job(lease, failed, cost=math.nan)
    else:
        await kept.store.retry_job(lease, failed, delay_seconds=0.0, cost=math.nan)
    contract = await kept.contract(lease.job_id)
    assert (contract["error_code"], contract["error_message"], contract["error_hint"]) == (
        "internal", "Bad \ufffd ?. hint\ufffd.", "hint\ufffd.",
    )  # fmt: skip
    if ending == "retry_job":
        await claimed(kept, lease.job_id)
        assert (await kept.contract(lease.job_id))["error_code"] is None


async def test_a_retry_waits_for_its_time_and_the_last_one_fails(kept: Kept) -> None:
    job = await claimed(kept)
    for attempt in (1, 2):
        assert job.attempt == attempt
        ending = await kept.store.retry_job(job.lease, BROKEN, delay_seconds=0.3, cost=float(attempt))
        assert ending == Ending(True, State.QUEUED, noted=False)
        assert await claim(kept, job.id) is None, "its time has not come"
        await asyncio.sleep(0.35)
        job = await claimed(kept, job.id)
        assert job.spent == attempt
    assert job.attempt == job.max_attempts == 3
    ending = await kept.store.retry_job(job.lease, BROKEN, delay_seconds=0.0, cost=3.0)
    assert ending == Ending(True, State.FAILED, noted=False)
    contract = await kept.contract(job.id)
    assert (contract["error_code"], contract["error_hint"], float(contract["cost"])) == ("internal", "Mend it.", 3.0)


@pytest.mark.parametrize("ending", ["release_job", "end_cancelled_job"])
async def test_a_job_that_goes_back_unharmed_loses_no_attempt_however_often(kept: Kept, ending: str) -> None:
    job = await claimed(kept)
    for epoch in range(1, 6):
        assert (job.attempt, job.lease_epoch) == (1, epoch)
        await (ENDINGS | CANCELLED)[ending](kept.store, job.lease)
        assert (await kept.contract(job.id))["attempt"] == 0
        job = await claimed(kept, job.id)


async def test_a_job_returned_for_what_works_again_is_tried_again_everywhere(kept: Kept) -> None:
    job = await claimed(kept)
    assert (await kept.store.return_job(job.lease, replace(BACK, works_again=True), cost=None)).state is State.QUEUED


async def test_a_returned_job_waits_for_another_host_where_there_may_be_one(kept: Kept) -> None:
    lease = (await claimed(kept)).lease
    expected = State.FAILED if isinstance(kept, InMemory) else State.QUEUED
    assert await kept.store.return_job(lease, BACK, cost=1.0) == Ending(True, expected, noted=False)
    contract = await kept.contract(lease.job_id)
    told = (
        ("disk_full", "The host's disk is full. Wait.", "Wait.") if isinstance(kept, InMemory) else (None, None, None)
    )
    assert (contract["error_code"], contract["error_message"], contract["error_hint"]) == told
    assert contract["state"] == expected


@pytest.mark.parametrize("ending", ENDINGS | CANCELLED)
async def test_an_ending_whose_answer_was_lost_recognises_its_own_work(kept: Kept, ending: str) -> None:
    lease = (await claimed(kept)).lease
    if ending in CANCELLED:
        await kept.cancel(lease.job_id)
    first = await (ENDINGS | CANCELLED)[ending](kept.store, lease)
    before = await kept.contract(lease.job_id)
    assert first.moved and await (ENDINGS | CANCELLED)[ending](kept.store, lease) == first
    assert await kept.contract(lease.job_id) == before


@pytest.mark.parametrize("second", ENDINGS | CANCELLED)
@pytest.mark.parametrize("first", ["complete_job", "fail_job"])
async def test_a_final_state_is_never_left(kept: Kept, first: str, second: str) -> None:
    lease = (await claimed(kept)).lease
    ended = await ENDINGS[first](kept.store, lease)
    before = await kept.contract(lease.job_id)
    try:
        again = await (ENDINGS | CANCELLED)[second](kept.store, lease)
    except LeaseLost:
        assert first != second
    else:
        # Where it wanted the job the job already is: a lost answer looks the same.
        assert again.state is ended.state
    assert await kept.contract(lease.job_id) == before


@pytest.mark.parametrize("ending", ENDINGS)
async def test_every_ending_yields_to_a_cancel_and_records_the_cost(kept: Kept, ending: str) -> None:
    lease = (await claimed(kept)).lease
    await kept.cancel(lease.job_id)
    assert await ENDINGS[ending](kept.store, lease) == Ending(False, State.CANCELLED, noted=False)
    contract = await kept.contract(lease.job_id)
    assert (contract["state"], float(contract["cost"]), contract["adapter_path"]) == ("cancelled", 7.5, None)
    with pytest.raises(LeaseLost):
        await kept.store.renew_lease(lease, 60.0)


async def test_a_cancelled_job_ends_when_its_child_is_gone(kept: Kept) -> None:
    lease = (await claimed(kept)).lease
    await kept.cancel(lease.job_id)
    ending = await kept.store.end_cancelled_job(lease, cost=2.0, data={"checkpoint": 5})
    assert ending == Ending(True, State.CANCELLED, noted=False)
    assert float((await kept.contract(lease.job_id))["cost"]) == 2.0
    with pytest.raises(LeaseLost):
        await kept.store.renew_lease(lease, 60.0)


@pytest.mark.parametrize("final", ["complete_job", "fail_job"])
async def test_a_cancel_that_comes_too_late_changes_nothing(kept: Kept, final: str) -> None:
    lease = (await claimed(kept)).lease
    await ENDINGS[final](kept.store, lease)
    before = await kept.contract(lease.job_id)
    if isinstance(kept, InMemory):
        await kept.cancel(lease.job_id)
    else:
        with pytest.raises(psycopg.Error, match="cancelled"):
            await kept.cancel(lease.job_id)
    assert await kept.contract(lease.job_id) == before


async def test_every_move_is_told_to_the_receiver_in_order(kept: Kept) -> None:
    job = await claimed(kept, callback_url="https://app.example.org:8443/hook")
    await kept.store.start_job(job.lease)
    await kept.store.release_job(job.lease, "the host shuts down", cost=None)
    job = await claimed(kept, job.id)
    await kept.store.complete_job(job.lease, DONE, cost=1.0)
    told = []
    while due := await kept.outbox.claim_callbacks(10, 60.0):
        (callback,) = due
        assert await kept.outbox.claim_callbacks(10, 60.0) == [], "one at a time to one host"
        assert (callback.job_id, callback.host, callback.attempts) == (job.id, "app.example.org:8443", 1)
        assert callback.payload["state"] == {"released": "queued", "started": "running"}.get(
            callback.event.removeprefix("job."), callback.event.removeprefix("job.")
        )
        told.append(callback)
        assert await kept.outbox.deliver_callback(callback.id, callback.token, 200)
        assert not await kept.outbox.deliver_callback(callback.id, callback.token, 200)
    assert [each.event for each in told] == [
        "job.initializing", "job.started", "job.released", "job.initializing", "job.completed",
    ]  # fmt: skip
    assert sorted(each.sequence for each in told) == [each.sequence for each in told]


# -- what lies in storage ---------------------------------------------------------------------------------------------


async def leftovers(kept: Kept, job_id: UUID) -> list[tuple[str, int, list[str], bool]]:
    found = await kept.uploads.leftovers(
        BUCKET, job_id=job_id, idle_seconds=0.0, keep_seconds=0.0, orphans=True, limit=10
    )
    return sorted((each.kind, each.step, each.objects, each.named) for each in found)


@pytest.mark.parametrize("ending", ENDINGS)
async def test_an_ending_says_whether_something_of_the_job_may_lie_in_storage(kept: Kept, ending: str) -> None:
    lease = (await claimed(kept)).lease
    await kept.uploads.record_upload(lease, "adapter", BUCKET, ["adapters/y.tar.gz"])
    assert await leftovers(kept, lease.job_id) == [], "somebody holds it"
    assert (await ENDINGS[ending](kept.store, lease)).noted
    # The next attempt may adopt the adapter, on whatever host. In memory there is no other host.
    is_kept = isinstance(kept, InPostgres) and ending in ("retry_job", "release_job", "return_job")
    assert await leftovers(kept, lease.job_id) == ([] if is_kept else [("adapter", 0, ["adapters/y.tar.gz"], False)])


async def test_of_a_completed_job_the_adapter_that_it_names_is_told_from_what_is_left(kept: Kept) -> None:
    lease = (await claimed(kept)).lease
    await kept.uploads.record_upload(lease, "checkpoint", BUCKET, ["checkpoints/5"], step=5)
    await kept.uploads.record_upload(lease, "adapter", BUCKET, ["adapters/x.tar.gz", "adapters/x.json"])
    await kept.store.complete_job(lease, DONE, cost=None)
    assert await leftovers(kept, lease.job_id) == [
        ("adapter", 0, ["adapters/x.tar.gz", "adapters/x.json"], True),
        ("checkpoint", 5, ["checkpoints/5"], False),
    ]
    for upload in await kept.uploads.leftovers(
        BUCKET, job_id=lease.job_id, idle_seconds=0.0, keep_seconds=0.0, orphans=True, limit=10
    ):
        await kept.uploads.forget_upload(upload)
    assert await leftovers(kept, lease.job_id) == []


async def test_names_are_ours_until_the_rows_are_not_those_that_we_claimed(kept: Kept) -> None:
    lease = (await claimed(kept)).lease
    assert await kept.uploads.names_are_ours(lease)
    assert not await kept.uploads.names_are_ours(replace(lease, token=uuid4())), "another host has that epoch"
    await kept.store.release_job(lease, "x", cost=None)
    await claimed(kept, lease.job_id)
    assert await kept.uploads.names_are_ours(lease), "the heir's names are of a higher epoch"


async def test_what_follows_a_job_is_written_down_or_said_to_need_a_database(kept: Kept) -> None:
    job = await claimed(kept)
    await kept.store.complete_job(job.lease, replace(DONE, deliveries=(Wanted("merged"),)), cost=None)
    (row,) = (await kept.contract(job.id))["deliveries"]
    assert row["kind"] == "merged"
    if row["state"] == "failed":
        assert "no database" in row["error_message"]
    else:
        assert row["state"] == "waiting" and row["attempts"] == 0
