"""What the board tells of what it was shown, and how a stream treats a browser that does not keep up."""

from __future__ import annotations

import asyncio
from typing import Any

from daemon.gateway.dashboard.sse import MOST_WAITING, Client, EventStream
from daemon.gateway.dashboard.state import MOST_ENDED, MOST_POINTS, Board


def line(
    job_id: str, state: str = "running", step: int = 0, loss: float | None = None, **fields: Any
) -> dict[str, Any]:
    metrics = {} if loss is None else {"training_loss": loss}
    row = {"job_id": job_id, "state": state, "step": step, "metrics": metrics, "attempt": 1, "completed_at": None}
    return row | fields


def welcome() -> bool:
    return True


def event(number: int, job_id: str, kind: str, **data: Any) -> dict[str, Any]:
    return {
        "id": number,
        "job_id": job_id,
        "at": "2026-01-01T00:00:00+00:00",
        "kind": kind,
        "message": "",
        "data": data,
    }


def running(step: int = 0, loss: float | None = None) -> Board:
    board = Board()
    board.take_jobs([line("a", step=step, loss=loss)], whole=True)
    board.take_curves(["a"], [])
    board.changes()
    return board


def test_nothing_is_told_twice() -> None:
    board = running()
    board.take_jobs([line("a")], whole=False)
    assert board.changes() == {}
    board.take_jobs([line("a", step=1, loss=2.0)], whole=False)
    told = board.changes()
    assert [job["step"] for job in told["jobs"]] == [1] and told["points"] == {"a": [(1, 2.0)]}
    assert board.changes() == {}


def test_an_event_that_is_read_again_is_told_once() -> None:
    board = running()
    assert board.take_story([event(5, "a", "claimed", to="initializing")], settled=3)
    assert not board.take_story([event(5, "a", "claimed", to="initializing"), event(4, "a", "notice")], settled=3)
    # Old enough to be settled, they are read for the last time.
    assert not board.take_story([event(4, "a", "notice"), event(5, "a", "claimed", to="initializing")], settled=5)
    assert [told["id"] for told in board.changes()["story"]] == [5, 4]


def test_a_whole_look_forgets_what_is_no_longer_there() -> None:
    board = running()
    board.take_jobs([line("b")], whole=True)
    assert board.changes()["gone"] == ["a"] and "a" not in board.curves


def test_a_curve_is_read_anew_after_another_attempt_and_after_a_resume() -> None:
    board = running(step=5, loss=2.0)
    board.take_jobs([line("a", step=6, loss=1.9, attempt=2)], whole=False)
    assert board.missing_curves() == ["a"]
    board.take_curves(["a"], [])
    board.take_jobs([line("a", step=2, loss=2.2, attempt=2)], whole=False)
    assert board.missing_curves() == ["a"]
    board.take_curves(["a"], [])
    board.take_story([event(9, "a", "resumed", step=2)], settled=0)
    assert board.missing_curves() == ["a"]


def test_a_step_that_stands_still_asks_for_no_further_read() -> None:
    """A second attempt begins at step 0 while the points of the first are still there."""
    board = Board()
    board.take_jobs([line("a", state="initializing", attempt=2)], whole=True)
    board.take_curves(["a"], [{"job_id": "a", "step": 120, "loss": 1.0, "validation_loss": None}])
    for _ in range(3):
        board.take_jobs([line("a", state="initializing", attempt=2)], whole=False)
        assert board.missing_curves() == []


def test_a_live_curve_is_bounded_and_keeps_its_ends() -> None:
    board = running()
    for step in range(1, 4 * MOST_POINTS):
        board.take_jobs([line("a", step=step, loss=1.0 / step)], whole=False)
    points = board.curves["a"].points
    assert len(points) <= MOST_POINTS and points[0][0] == 1 and points[-1][0] == 4 * MOST_POINTS - 1


def test_only_the_newest_endings_are_kept() -> None:
    board = Board()
    rows = [line(f"job{n:04}", "completed", completed_at=f"2026-01-01T{n:06}") for n in range(MOST_ENDED + 5)]
    board.take_jobs(rows, whole=False)
    assert len(board.jobs) == MOST_ENDED and "job0004" not in board.jobs and "job0005" in board.jobs


def test_a_long_event_is_cut_for_the_stream_and_says_so() -> None:
    board = running()
    board.take_story([event(1, "a", "sample", answer="x" * 100_000)], settled=0)
    told = board.changes()["story"][0]
    assert told["data"] == {} and told["cut"]


async def test_a_browser_that_does_not_keep_up_is_let_go() -> None:
    client = Client(welcome)
    for _ in range(MOST_WAITING):
        client.offer(b"x")
    assert not client.ended.is_set()
    client.offer(b"one too many")
    assert client.ended.is_set() and await client.take() is None


async def test_a_browser_that_takes_nothing_does_not_hold_the_gateway() -> None:
    """Its connection is full: sending never returns. The answer ends all the same, and the feed is told."""
    client, left = Client(welcome), []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    client.offer(b"hello")
    answer = asyncio.create_task(EventStream(client, left.append)({}, receive, send))
    await asyncio.sleep(0)
    client.end()
    async with asyncio.timeout(30):
        await answer
    assert left == [client]
