"""Supervised background work: each chore has a name, and is restarted after any exception.

A chore is a loop. While it fails it is a trouble of this process (daemon.troubles), from its first failure until it
calls `worked()` after a good round, or returns.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import structlog
from tenacity import AsyncRetrying, retry_if_exception, wait_exponential_jitter
from tenacity.wait import wait_base

from daemon.errors import DatabaseAway, HostUnfit
from daemon.troubles import Troubles

log = structlog.get_logger()

BACKOFF = wait_exponential_jitter(multiplier=1.0, max=30.0)
# A failure is logged with its stack once; the same failure is logged again only this often.
LOG_SECONDS = 300.0

_working: ContextVar[Callable[[], None] | None] = ContextVar("working chore", default=None)


def worked() -> None:
    """Called by a chore after a good round: ends its trouble."""
    if (say := _working.get()) is not None:
        say()


class Chores:
    """The background work of one process, or of one attempt. Leaving the block cancels every chore and waits for it."""

    def __init__(
        self,
        troubles: Troubles,
        *,
        on_failure: Callable[[str], None] = lambda _name: None,
        backoff: wait_base = BACKOFF,
    ) -> None:
        self._troubles = troubles
        self._on_failure = on_failure
        self.backoff = backoff
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.failures: Counter[str] = Counter()

    def start(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs this work until it returns or the block is left, and restarts it after every exception."""
        self._tasks[name] = asyncio.create_task(_Chore(name, work, self).run(), name=name)

    async def __aenter__(self) -> Chores:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks.values():
            task.cancel()
        endings = await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for name, ending in zip(self._tasks, endings, strict=True):
            # The chore failed while it was being cancelled: without this line the error would be lost.
            if isinstance(ending, Exception):
                log.error("chore_ended_badly", chore=name, exc_info=ending)
            self._troubles.end(name)

    def failed(self, name: str, error: Exception) -> None:
        self.failures[name] += 1
        self._on_failure(name)
        self._troubles.begin(
            name, f"the background task {name} failed and is restarted: {type(error).__name__}: {error}"
        )

    def works(self, name: str) -> None:
        self._troubles.end(name)


class _Chore:
    def __init__(self, name: str, work: Callable[[], Coroutine[Any, Any, None]], chores: Chores) -> None:
        self._name = name
        self._work = work
        self._chores = chores
        self._failing = False
        self._worked_since = False
        self._said: str | None = None
        self._said_at = 0.0

    async def run(self) -> None:
        _working.set(self._works)
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, Exception) and not _is_leaving()),
            wait=self._chores.backoff,
        ):
            with attempt:
                self._worked_since = False
                try:
                    await self._once()
                except Exception as error:
                    if _is_leaving():
                        raise
                    if self._worked_since:
                        # It worked before this failure: one failure a day must not add up to a long pause.
                        attempt.retry_state.attempt_number = 1
                    self._failed(error)
                    raise
        self._works()

    async def _once(self) -> None:
        try:
            await self._work()
        except asyncio.CancelledError:
            if _is_leaving():
                raise
            # A cancellation that something it awaited has raised is a failure like any other.
            raise RuntimeError("cancelled from within") from None

    def _works(self) -> None:
        self._worked_since = True
        if self._failing:
            self._failing = False
            self._said = None
            log.info("chore_works_again", chore=self._name)
        self._chores.works(self._name)

    def _failed(self, error: Exception) -> None:
        self._failing = True
        self._chores.failed(self._name, error)
        said = f"{type(error).__name__}: {error}"
        if said != self._said or time.monotonic() - self._said_at >= LOG_SECONDS:
            again = said == self._said
            said_all = isinstance(error, DatabaseAway | HostUnfit)
            self._said, self._said_at = said, time.monotonic()
            log.error("chore_failed", chore=self._name, error=said, exc_info=None if again or said_all else error)


def _is_leaving() -> bool:
    """True if this chore was asked to end. Then it is not restarted, whatever it raises."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
