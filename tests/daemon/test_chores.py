"""A chore that fails is begun again, said, and a trouble until it has worked."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs
from tenacity import wait_exponential_jitter

from daemon.chores import Chores, worked
from daemon.troubles import Troubles

SOON = wait_exponential_jitter(multiplier=0.001, max=0.01, jitter=0.001)


async def until(*events: asyncio.Event) -> None:
    async with asyncio.timeout(30):
        for event in events:
            await event.wait()


@pytest.mark.parametrize("ending", [ValueError("odd"), OSError(28, "full"), asyncio.CancelledError()])
async def test_a_chore_is_begun_again_after_whatever_ends_it(ending: BaseException) -> None:
    troubles, again, go_on = Troubles(), asyncio.Event(), asyncio.Event()
    runs = 0

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs < 4:
            raise ending
        again.set()
        await go_on.wait()
        worked()
        await asyncio.Event().wait()

    counted: list[str] = []
    with capture_logs() as logs:
        async with Chores(troubles, on_failure=counted.append, backoff=SOON) as chores:
            chores.start("sweeping", work)
            await until(again)
            # It runs, and has not worked yet.
            (trouble,) = troubles
            assert (trouble.name, trouble.times) == ("sweeping", 3) and "task sweeping failed" in trouble.message
            assert counted == ["sweeping"] * 3 and chores.failures == {"sweeping": 3}
            go_on.set()
            async with asyncio.timeout(30):
                while "sweeping" in troubles:
                    await asyncio.sleep(0.001)
    # With its stack once; the same again is for the counter.
    (said,) = [line for line in logs if line["event"] == "chore_failed"]
    assert said["exc_info"] is not None and said["chore"] == "sweeping"
    assert [line["event"] for line in logs].count("chore_works_again") == 1


async def test_one_failing_chore_disturbs_no_other() -> None:
    troubles, ticks = Troubles(), asyncio.Queue[int]()

    async def fails() -> None:
        raise RuntimeError("always")

    async def ticks_on() -> None:
        for number in range(1000):
            await ticks.put(number)
            await asyncio.sleep(0.001)

    async with Chores(troubles, backoff=SOON) as chores:
        chores.start("bad", fails)
        chores.start("good", ticks_on)
        async with asyncio.timeout(30):
            while chores.failures["bad"] < 5:
                await asyncio.sleep(0.001)
        assert ticks.qsize() > 0 and "bad" in troubles and "good" not in troubles
    # Who has left has no troubles any more.
    assert list(troubles) == []


async def test_leaving_the_block_ends_the_work_and_tells_of_a_bad_end() -> None:
    ended: list[str] = []
    begun = asyncio.Event()

    async def work() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.append("work")
            raise OSError("the disk is gone")

    with capture_logs() as logs:
        async with Chores(Troubles(), backoff=SOON) as chores:
            chores.start("work", work)
            await until(begun)
    assert ended == ["work"]
    assert [line["chore"] for line in logs if line["event"] in ("chore_ended_badly", "chore_failed")] == ["work"]


async def test_work_that_returns_is_done() -> None:
    runs = 0

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise ValueError("first")

    troubles = Troubles()
    async with Chores(troubles, backoff=SOON) as chores:
        chores.start("once", work)
        async with asyncio.timeout(30):
            while runs < 2:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert runs == 2 and list(troubles) == []
