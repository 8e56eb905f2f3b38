"""The gateway's few connections: never more of them, and none is lost to a request that was given up."""

from __future__ import annotations

import asyncio
import random
from uuid import uuid4

from daemon.gateway.job_rows import CONNECTIONS, GatewayRows
from daemon.settings import Settings
from tests.postgres import AppDatabase


async def test_requests_given_up_at_any_moment_lose_no_connection(database: AppDatabase) -> None:
    rng = random.Random(7)
    settings = Settings(_env_file=None, database_url=database.dsn)
    async with GatewayRows(settings).open() as rows:

        async def ask(give_up_after: float) -> bool:
            try:
                async with asyncio.timeout(give_up_after):
                    return len(await rows.fetch("find_job", {"job_id": uuid4()})) == 1
            except TimeoutError:
                return False

        answered = await asyncio.gather(*(ask(rng.uniform(0.0, 1.0)) for _ in range(600)))
        assert 0 < sum(answered) < len(answered), "some were given up while they waited, and some were answered"
        assert all(await asyncio.gather(*(ask(10.0) for _ in range(20 * CONNECTIONS))))
        assert rows._free.qsize() == CONNECTIONS, "all of them are free again"
        sessions = "SELECT count(*) AS n FROM pg_stat_activity WHERE application_name = 'brightrun-trainer gateway'"
        # A backend whose client has gone ends a moment later.
        async with asyncio.timeout(10):
            while database.one(f"{sessions} AND datname = current_database()")["n"] > CONNECTIONS:
                await asyncio.sleep(0.1)
