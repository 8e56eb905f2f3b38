"""Callbacks reach their receivers: from a real outbox to a real server, whatever either of them does."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from psycopg.types.json import Jsonb

from daemon.database.connection import Database
from daemon.network.address_rules import AddressRules
from daemon.queue.job import ClaimedJob
from daemon.report.courier import RETRY_SECONDS, CallbackCourier
from daemon.report.outbox import SqlOutbox
from daemon.settings import Settings
from tests.doubles.receiver import Answer, Received
from tests.doubles.receiver import Receiver as AnyReceiver
from tests.doubles.standard_webhooks import NotSigned, verify
from tests.postgres import AppDatabase

SECRET = "whsec_" + base64.b64encode(b"k" * 24).decode()
QUICK = (0.01, 0.01, 0.01)


def settings_of(receivers: list[Receiver], **changes: Any) -> Settings:
    allowed = ",".join(receiver.host for receiver in receivers)
    return Settings(
        _env_file=None, database_url="postgresql://x", allowed_hosts=allowed, callback_secrets=SECRET, **changes
    )


class Receiver(AnyReceiver):
    """As any, and at its end everything that came must have been signed as Standard Webhooks say."""

    async def __aexit__(self, *exc: object) -> None:
        await super().__aexit__(*exc)
        for received in self.received:
            verify(SECRET, received.headers, received.body)


class Outbox:
    """The outbox of one job in a real database."""

    def __init__(self, database: AppDatabase) -> None:
        self.database = database
        self.user = database.insert_user()
        self.job = database.insert_job(self.user)

    def add(self, url: str, event: str = "job.completed", **columns: Any) -> UUID:
        host = url.partition("://")[2].partition("/")[0]
        facts = {"id": uuid4(), "job_id": self.job, "user_id": self.user, "url": url, "host": host, "event": event,
                 "payload": Jsonb({"job_id": str(self.job), "status": "completed"}), **columns}  # fmt: skip
        names, places = ", ".join(facts), ", ".join(f"%({name})s" for name in facts)
        self.database.run(f"INSERT INTO training_callbacks ({names}) VALUES ({places})", facts)
        return facts["id"]

    def row(self, callback_id: UUID) -> dict[str, Any]:
        return self.database.one("SELECT * FROM training_callbacks WHERE id = %s", (callback_id,))

    async def settled(self, callback_id: UUID, enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The row once it is as the test waits for; read from outside the loop's process, so by asking again."""
        async with asyncio.timeout(15):
            while not enough(row := self.row(callback_id)):
                await asyncio.sleep(0.02)
        return row


@pytest.fixture
def outbox(database: AppDatabase) -> Outbox:
    return Outbox(database)


@asynccontextmanager
async def delivering(database: AppDatabase, courier: CallbackCourier) -> AsyncIterator[CallbackCourier]:
    async with Database(database.dsn, application_name="courier under test") as connection:
        running = asyncio.create_task(courier.run(SqlOutbox(connection)))
        try:
            await asyncio.sleep(0)
            yield courier
            assert not running.done(), running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_an_ending_is_posted_signed_and_settled(outbox: Outbox) -> None:
    async with Receiver() as receiver:
        callback = outbox.add(receiver.url)
        async with delivering(outbox.database, CallbackCourier(settings_of([receiver]))):
            row = await outbox.settled(callback, lambda row: row["state"] == "delivered")
    (received,) = receiver.received
    assert received.headers["webhook-id"] == str(callback)
    assert received.payload == {
        "job_id": str(outbox.job), "status": "completed", "event": "job.completed", "sequence": row["sequence"],
    }  # fmt: skip
    assert received.headers["content-type"] == "application/json"
    assert "authorization" not in received.headers
    assert (row["last_status"], row["last_error"], row["attempts"]) == (200, None, 1)


@pytest.mark.parametrize("changed", ["body", "webhook-id", "webhook-timestamp", "webhook-signature", "secret"])
async def test_a_delivered_message_that_somebody_changed_is_refused(outbox: Outbox, changed: str) -> None:
    async with Receiver() as receiver:
        outbox.add(receiver.url)
        async with delivering(outbox.database, CallbackCourier(settings_of([receiver]))):
            (received,) = await receiver.wait_for(lambda all: len(all) == 1)
    headers, body, secret = received.headers, received.body, SECRET
    match changed:
        case "body":
            body = body.replace(b"completed", b"cancelled")
        case "webhook-timestamp":
            headers = headers | {changed: str(int(headers[changed]) + 1)}
        case "secret":
            secret = "whsec_" + base64.b64encode(b"x" * 24).decode()
        case _:
            headers = headers | {changed: headers[changed][:-8] + "AAAAAAA="}
    with pytest.raises(NotSigned):
        verify(secret, headers, body)


async def test_a_callback_written_later_is_delivered_when_woken(outbox: Outbox) -> None:
    async with Receiver() as receiver:
        courier = CallbackCourier(settings_of([receiver]), poll_seconds=3600)
        async with delivering(outbox.database, courier):
            assert await courier.flush(10)
            outbox.add(receiver.url)
            courier.wake()
            await receiver.wait_for(lambda all: len(all) == 1)


@pytest.mark.parametrize("answer", [Answer(500), Answer(404), Answer(301, {"Location": "/elsewhere"}), Answer(400)])
async def test_anything_but_success_is_tried_again_under_the_same_id(outbox: Outbox, answer: Answer) -> None:
    async with Receiver(answer, answer, Answer(204)) as receiver:
        callback = outbox.add(receiver.url)
        courier = CallbackCourier(settings_of([receiver]), retry_seconds=QUICK)
        async with delivering(outbox.database, courier):
            row = await outbox.settled(callback, lambda row: row["state"] == "delivered")
    assert row["attempts"] == 3
    assert {received.headers["webhook-id"] for received in receiver.received} == {str(callback)}
    assert {received.path for received in receiver.received} == {"/callback"}, "redirects are not followed"


@pytest.mark.parametrize("nonsense", [b"", b"\0\xff garbage\r\n\r\n", b"HTTP/1.1 two OK\r\n\r\n", b"SSH-2.0\r\n"])
async def test_a_receiver_that_talks_nonsense_is_tried_again(outbox: Outbox, nonsense: bytes) -> None:
    async with Receiver(Answer(nonsense=nonsense), Answer(200)) as receiver:
        callback = outbox.add(receiver.url)
        courier = CallbackCourier(settings_of([receiver]), retry_seconds=QUICK)
        async with delivering(outbox.database, courier):
            await outbox.settled(callback, lambda row: row["state"] == "delivered")


async def test_a_receiver_that_answers_without_end_costs_nothing(outbox: Outbox) -> None:
    async with Receiver(Answer(200, {"Content-Length": "100000000000"}, b"x" * 1000)) as receiver:
        callback = outbox.add(receiver.url)
        async with delivering(outbox.database, CallbackCourier(settings_of([receiver]))):
            await outbox.settled(callback, lambda row: row["state"] == "delivered")


async def test_gone_buries_the_callback(outbox: Outbox) -> None:
    async with Receiver(Answer(410)) as receiver:
        callback = outbox.add(receiver.url)
        async with delivering(outbox.database, CallbackCourier(settings_of([receiver]))):
            row = await outbox.settled(callback, lambda row: row["state"] == "dead")
    assert row["last_status"] == 410
    assert len(receiver.received) == 1


async def test_the_last_try_buries_and_the_operator_can_send_it_again(outbox: Outbox) -> None:
    async with Receiver(Answer(503)) as receiver:
        callback = outbox.add(receiver.url)
        courier = CallbackCourier(settings_of([receiver]), retry_seconds=QUICK)
        async with delivering(outbox.database, courier):
            row = await outbox.settled(callback, lambda row: row["state"] == "dead")
            assert row["attempts"] == len(QUICK) + 1 == len(receiver.received)
            assert row["last_error"] == "HTTP 503"
            receiver.answers = [Answer(200)]
            outbox.database.run("SELECT resend_callback(%s)", (callback,))
            courier.wake()
            await outbox.settled(callback, lambda row: row["state"] == "delivered")


async def test_the_schedule_is_the_specifications_with_jitter(outbox: Outbox) -> None:
    async with Receiver(Answer(500)) as receiver:
        rows = {outbox.add(receiver.url, attempts=tried): seconds for tried, seconds in enumerate(RETRY_SECONDS)}
        last = outbox.add(receiver.url, attempts=len(RETRY_SECONDS))
        async with delivering(outbox.database, CallbackCourier(settings_of([receiver]), poll_seconds=3600)):
            await outbox.settled(last, lambda row: row["state"] == "dead")
        for callback, seconds in rows.items():
            wait = (outbox.row(callback)["next_at"] - datetime.now(UTC)).total_seconds()
            assert 0.89 * seconds - 15 < wait < 1.11 * seconds


@pytest.mark.parametrize("as_date", [False, True])
async def test_retry_after_is_honoured(outbox: Outbox, as_date: bool) -> None:
    later = datetime.now(UTC) + timedelta(seconds=7000)
    value = format_datetime(later, usegmt=True) if as_date else "7000"
    async with Receiver(Answer(429, {"Retry-After": value})) as receiver:
        callback = outbox.add(receiver.url)
        async with delivering(outbox.database, CallbackCourier(settings_of([receiver]))):
            row = await outbox.settled(callback, lambda row: row["last_status"] == 429)
    assert 6900 < (row["next_at"] - datetime.now(UTC)).total_seconds() < 7001


async def test_a_receiver_that_hangs_delays_nobody_else(outbox: Outbox) -> None:
    async with Receiver(Answer(hang=True)) as hanging, Receiver() as quick:
        stuck = [outbox.add(hanging.url) for _ in range(40)]
        fine = [outbox.add(quick.url) for _ in range(40)]
        begun = time.monotonic()
        async with delivering(outbox.database, CallbackCourier(settings_of([hanging, quick]))):
            await quick.wait_for(lambda all: len(all) == len(fine), seconds=12)
            assert time.monotonic() - begun < 12
            assert hanging.most_at_once == 1, "one message at a time to one host"
        assert all(outbox.row(callback)["state"] == "pending" for callback in stuck)


async def test_messages_of_one_host_arrive_in_their_order(outbox: Outbox) -> None:
    async with Receiver() as receiver:
        for number in range(12):
            outbox.add(receiver.url, event=f"job.{number}")
        async with delivering(outbox.database, CallbackCourier(settings_of([receiver]))):
            received = await receiver.wait_for(lambda all: len(all) == 12)
    sequences = [one.payload["sequence"] for one in received]
    assert sequences == sorted(sequences)


async def test_two_daemons_deliver_each_callback_once(outbox: Outbox) -> None:
    async with Receiver() as receiver:
        callbacks = {str(outbox.add(receiver.url)) for _ in range(20)}
        settings = settings_of([receiver])
        async with (
            delivering(outbox.database, CallbackCourier(settings)),
            delivering(outbox.database, CallbackCourier(settings)),
        ):
            await receiver.wait_for(lambda all: len(all) >= 20)
    ids = [received.headers["webhook-id"] for received in receiver.received]
    assert set(ids) == callbacks
    assert len(ids) == 20


async def test_a_daemon_that_died_while_sending_leaves_it_to_the_next(outbox: Outbox) -> None:
    async with Receiver(Answer(hang=True), Answer(200)) as receiver:
        callback = outbox.add(receiver.url)
        async with delivering(outbox.database, CallbackCourier(settings_of([receiver]))):
            await receiver.wait_for(lambda all: len(all) == 1)
        assert outbox.row(callback)["state"] == "pending"
        # Its lock runs out; the clock is the database's.
        outbox.database.run("UPDATE training_callbacks SET next_at = now(), locked_until = now()")
        async with delivering(outbox.database, CallbackCourier(settings_of([receiver]))):
            await outbox.settled(callback, lambda row: row["state"] == "delivered")
    assert [received.headers["webhook-id"] for received in receiver.received] == [str(callback)] * 2


async def test_an_address_that_is_not_allowed_is_never_contacted_and_buried(outbox: Outbox) -> None:
    urls = ["http://10.0.0.1/x", "https://169.254.169.254/", "http://127.0.0.1:1/x", "ftp://a.b/", "nonsense"]
    callbacks = [outbox.add(url) for url in urls]
    async with delivering(outbox.database, CallbackCourier(settings_of([]))):
        for callback in callbacks:
            row = await outbox.settled(callback, lambda row: row["state"] == "dead")
            assert row["last_error"]


async def test_a_host_that_is_down_is_tried_later_and_its_url_stays_out_of_the_error(outbox: Outbox) -> None:
    async with Receiver() as receiver:
        settings, url = settings_of([receiver]), receiver.url
    callback = outbox.add(url)
    async with delivering(outbox.database, CallbackCourier(settings)):
        row = await outbox.settled(callback, lambda row: row["last_error"] is not None)
    assert row["state"] == "pending"
    assert "ConnectError" in row["last_error"]
    assert "secret-of-the-url" not in row["last_error"]


async def test_flush_returns_when_all_is_sent_and_gives_up_at_its_deadline(outbox: Outbox) -> None:
    async with Receiver() as receiver:
        callbacks = [outbox.add(receiver.url) for _ in range(5)]
        courier = CallbackCourier(settings_of([receiver]), poll_seconds=3600)
        async with delivering(outbox.database, courier):
            assert await courier.flush(15)
            assert all(outbox.row(callback)["state"] == "delivered" for callback in callbacks)
            receiver.answers = [Answer(hang=True)]
            outbox.add(receiver.url)
            assert not await courier.flush(0.5)
    assert not await courier.flush(5), "nobody delivers any more"


# -- progress ---------------------------------------------------------------------------------------------------------


def job_with(url: str | None) -> ClaimedJob:
    now = datetime.now(UTC)
    return ClaimedJob(
        id=uuid4(), lease_epoch=3, lease_token=uuid4(), attempt=1, max_attempts=3, user_id=uuid4(), dataset_id=uuid4(),
        need_gpus=1,
        hyperparameters={}, gpu_config={}, dataset_url=None, storage_bucket=None, storage_path=None,
        dataset_user_id=None, callback_url=url, queued_at=now, claimed_at=now, started_at=None,
    )  # fmt: skip


async def test_progress_is_posted_and_the_newest_wins(outbox: Outbox) -> None:
    async with Receiver(Answer(hang=True), Answer(200)) as receiver:
        job = job_with(receiver.url)
        courier = CallbackCourier(settings_of([receiver]))
        async with delivering(outbox.database, courier):
            courier.send_progress(job, {"status": "running", "current_step": 1})
            await receiver.wait_for(lambda all: len(all) == 1)
            for step in range(2, 100):
                courier.send_progress(job, {"status": "running", "current_step": step})
            receiver.release()
            received = await receiver.wait_for(lambda all: len(all) == 2)
    assert [one.payload["current_step"] for one in received] == [1, 99]
    assert received[1].payload["event"] == "job.progress"
    assert received[1].payload["job_id"] == str(job.id)
    assert receiver.most_at_once == 1


async def test_sending_progress_never_waits(outbox: Outbox) -> None:
    async with Receiver(Answer(hang=True)) as receiver:
        courier = CallbackCourier(settings_of([receiver]))
        async with delivering(outbox.database, courier):
            job = job_with(receiver.url)
            begun = time.monotonic()
            for step in range(10_000):
                courier.send_progress(job, {"current_step": step})
            assert time.monotonic() - begun < 2.0


async def test_progress_without_a_url_and_after_the_end_is_not_sent(outbox: Outbox) -> None:
    async with Receiver(Answer(hang=True), Answer(200)) as receiver:
        courier = CallbackCourier(settings_of([receiver]))
        async with delivering(outbox.database, courier):
            courier.send_progress(job_with(None), {"current_step": 1})
            job = job_with(receiver.url)
            courier.send_progress(job, {"current_step": 1})
            await receiver.wait_for(lambda all: len(all) == 1)
            courier.send_progress(job, {"current_step": 2})
            courier.forget(job.id)
            receiver.release()
            callback = outbox.add(receiver.url)
            courier.wake()
            await outbox.settled(callback, lambda row: row["state"] == "delivered")
    assert len(receiver.received) == 2, "the first progress and the ending"


async def test_a_receiver_that_wants_no_progress_is_left_alone(outbox: Outbox) -> None:
    async with Receiver(Answer(410)) as receiver:
        courier = CallbackCourier(settings_of([receiver]))
        async with delivering(outbox.database, courier):
            job = job_with(receiver.url)
            courier.send_progress(job, {"current_step": 1})
            await receiver.wait_for(lambda all: len(all) == 1)
            await asyncio.sleep(0.1)
            courier.send_progress(job, {"current_step": 2})
            await asyncio.sleep(0.1)
    assert len(receiver.received) == 1


# -- the project's own functions --------------------------------------------------------------------------------------


OWN_PATHS = {
    "/functions/v1/training-webhook": True,
    "/functions/v1/other?x=1": True,
    "/rest/v1/users": False,
    "/auth/v1/admin/users": False,
    "/functions/v1/../../rest/v1/users": False,
    "/functions/v1/%2e%2e/rest/v1/users": False,
    "/functions/v1/..%2frest/v1/users": False,
    "/functions/v1//rest": False,
    "/": False,
}


async def test_the_authorization_goes_to_the_projects_functions_and_nowhere_else(outbox: Outbox) -> None:
    async with Receiver() as own, Receiver() as foreign:
        base, other = (receiver.url.partition("/callback")[0] for receiver in (own, foreign))
        settings = settings_of(
            [foreign], supabase_url=base, supabase_service_role_key="key", callback_authorization="Bearer own-secret"
        )
        to_own = {str(outbox.add(base + path)): given for path, given in OWN_PATHS.items()}
        for path in OWN_PATHS:
            outbox.add(other + path)
        async with delivering(outbox.database, CallbackCourier(settings)) as courier:
            assert await courier.flush(15)
    given = {received.headers["webhook-id"]: _authorization(received) for received in own.received}
    assert given == {callback: "Bearer own-secret" if wanted else None for callback, wanted in to_own.items()}
    assert [_authorization(received) for received in foreign.received] == [None] * len(OWN_PATHS)


def _authorization(received: Received) -> str | None:
    return received.headers.get("authorization")


async def test_a_name_that_leads_inside_is_not_posted_to(outbox: Outbox) -> None:
    async def rebinding(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async with Receiver() as receiver:
        port = receiver.host.partition(":")[2]
        callback = outbox.add(f"https://innocent.example.com:{port}/callback")
        courier = CallbackCourier(settings_of([]), rules=AddressRules(resolve=rebinding))
        async with delivering(outbox.database, courier):
            row = await outbox.settled(callback, lambda row: row["state"] == "dead")
    assert receiver.received == []
    assert "127.0.0.1" in row["last_error"]
