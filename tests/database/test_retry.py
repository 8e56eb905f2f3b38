"""A call that nothing can go on without is asked again until the database answers."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from daemon.database import retry
from daemon.errors import DatabaseAway, LeaseLost


async def test_a_call_is_repeated_until_the_database_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "AWAY_SECONDS", 0.01)
    answers = [DatabaseAway("gone"), DatabaseAway("starting up"), "row"]

    async def ask() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with capture_logs() as said:
        assert await retry.retry_until_database_is_back(ask, "not_asked", step=3) == "row"
    assert said == [
        {"event": "not_asked", "step": 3, "error": error, "log_level": "warning"} for error in ("gone", "starting up")
    ]


async def test_any_other_error_is_not_waited_for() -> None:
    async def ask() -> None:
        raise LeaseLost("another host has it")

    with pytest.raises(LeaseLost):
        await retry.retry_until_database_is_back(ask, "not_asked")
