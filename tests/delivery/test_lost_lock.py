"""A host that has lost a delivery writes nothing about it: by each statement, and by the judge of the chaos runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from uuid import uuid4

import pytest

from daemon.database.connection import Database
from daemon.database.statements import statement
from daemon.delivery.delivery import Delivery, LockLost
from daemon.delivery.store import Fault, Reach, SqlDeliveries
from daemon.queue.outcome import Completed, Wanted
from daemon.queue.sql_job_store import SqlJobStore
from daemon.storage.interface import Location
from tests.lifecycle.queue import Queue
from tests.lifecycle.test_chaos import as_host, run_oracle
from tests.lifecycle.test_peer_failures import claim

ADAPTER = Completed("lora-models/adapters/x.tar.gz", "ab" * 32, 1234, deliveries=(Wanted("merged"),))
FAULT = Fault("internal", "It broke.")
Write = Callable[[SqlDeliveries, Delivery], Awaitable[None]]
STALE_WRITES: dict[str, Write] = {
    "finish_delivery": lambda store, held: store.finish(held, {"path": "a", "bytes": 1, "claims": held.claims}),
    "fail_delivery": lambda store, held: store.fail(held, FAULT),
    "postpone_delivery": lambda store, held: store.postpone(held, FAULT, 0.0, counted=True),
    "renew_delivery": lambda store, held: store.renew(held, 60.0),
    "record_export": lambda store, held: store.record_export(held, Location("s", "lora-models"), ["x"]),
}


class Forgetful(Database):
    """Its statements forgot their lock."""

    async def fetch(self, text: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        if any(text == statement(name) for name in STALE_WRITES):
            forgot = text.replace("AND delivery.lock_token = %(token)s", "")
            assert forgot != text
            text = forgot
        return await super().fetch(text, parameters)


@pytest.mark.parametrize("write", STALE_WRITES)
async def test_a_stale_host_writes_nothing_and_the_judge_would_see_it(queue: Queue, write: str) -> None:
    assert run_oracle(queue.dsn, "--install").returncode == 0
    app = Queue(as_host(queue.dsn, "app"), queue.folder)
    job = app.insert(hyperparameters={"base_model": "tiny", "exports": ["merged"]})
    async with (
        Database(as_host(queue.dsn, "stale"), application_name="stale") as one,
        Forgetful(as_host(queue.dsn, "stale"), application_name="stale") as forgetful,
        Database(as_host(queue.dsn, "heir"), application_name="heir") as other,
    ):
        lease = await claim(SqlJobStore(one))
        await SqlJobStore(one).complete_job(lease, ADAPTER, cost=None)
        with app.connect() as connection:
            connection.execute(
                "UPDATE training_deliveries SET storage = 's', next_at = now() WHERE job_id = %s", (job,)
            )
        reach = Reach(uuid4(), ("merged",), "s")
        held = await SqlDeliveries(one).claim(reach, 0.001)
        await asyncio.sleep(0.01)
        taken = await SqlDeliveries(other).claim(reach, 60.0)
        assert held is not None and taken is not None and taken.claims == held.claims + 1
        assert await SqlDeliveries(other).claim(reach, 60.0) is None, "nobody takes what another host has"
        with pytest.raises(LockLost):
            await STALE_WRITES[write](SqlDeliveries(one), held)
        assert not offences(queue.dsn)
        await STALE_WRITES[write](SqlDeliveries(forgetful), held)
    assert offences(queue.dsn)


def offences(dsn: str) -> list[str]:
    lines = run_oracle(as_host(dsn, "oracle")).stdout.splitlines()[1:]
    return [line for line in lines if line.startswith(("stale ", "delivery ")) and ": stale " in line]
