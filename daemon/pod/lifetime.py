"""Decides when to shut down the RunPod pod this daemon runs on: after an idle timeout or a maximum age.

Never while a job, an upload or a delivery is open; a job that is inserted during the shutdown is still taken. If the
pod cannot be ended, the daemon goes on serving, which is better than an idle pod, and tries again later.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from daemon.chores import worked
from daemon.errors import DatabaseAway, StatementRefused
from daemon.settings import Settings

log = structlog.get_logger()

CHECK_SECONDS = 5.0
# Final callbacks that are not delivered within this time are left to the next daemon, the gateway or the fleet loop.
ENDINGS_SECONDS = 300.0
# A delivery that is due holds an idle pod for this long and no longer: something may keep this host from doing it.
DELIVERY_SECONDS = 600.0
# Between two tries to end the pod: often enough to save money, rarely enough for a readable log.
RETRY_SECONDS = 60.0


class Working(Protocol):
    """What PodLife needs from the worker."""

    @property
    def idle_seconds(self) -> float | None:
        """Seconds since the last attempt was settled, or since the start; None while one is open."""

    async def pause(self) -> None:
        """Stops claiming; returns when no claim is in progress."""

    def resume(self) -> None: ...

    def drain(self) -> None: ...


async def _no_delivery() -> bool:
    return False


class PodLife:
    """Run `run` as a task; it returns once RunPod has accepted the pod's end and the worker was asked to leave."""

    def __init__(
        self,
        settings: Settings,
        worker: Working,
        *,
        endings_wait: Callable[[], Awaitable[bool]],
        end_pod: Callable[[], Awaitable[bool]],
        delivery_waits: Callable[[], Awaitable[bool]] = _no_delivery,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._idle_limit = None if settings.idle_minutes is None else settings.idle_minutes * 60
        self._age_limit = None if settings.max_hours is None else settings.max_hours * 3600
        self._worker = worker
        self._endings_wait = endings_wait
        self._end_pod = end_pod
        self._delivery_waits = delivery_waits
        self._retry_seconds = retry_seconds
        self._born_at = time.monotonic()
        self._leaving = False
        self._ended = False

    async def run(self) -> None:
        if self._idle_limit is None and self._age_limit is None:
            return
        while True:
            if self._too_old:
                ended = await self._end_of_age()
            elif self._too_idle:
                ended = await self._end_of_idling()
            else:
                ended = None
            if ended:
                self._ended = True
                self._worker.drain()
                return
            worked()
            await asyncio.sleep(self._seconds_to_look if ended is None else self._retry_seconds)

    async def end_drained(self) -> None:
        """Ends the pod after the daemon was drained and has left, unless we caused that ourselves."""
        if not self._ended:
            log.info("pod_ends", reason="drained")
            self._ended = await self._end_pod()

    @property
    def _too_old(self) -> bool:
        return self._age_limit is not None and time.monotonic() - self._born_at >= self._age_limit

    @property
    def _too_idle(self) -> bool:
        idle = self._worker.idle_seconds
        return self._idle_limit is not None and idle is not None and idle >= self._idle_limit

    @property
    def _seconds_to_look(self) -> float:
        shortest = min(limit for limit in (self._idle_limit, self._age_limit) if limit is not None)
        return min(CHECK_SECONDS, max(shortest / 10, 0.02))

    async def _end_of_idling(self) -> bool | None:
        """Ends the idle pod. None if there is work again."""
        if self._may_wait_for_delivery and await self._waiting(self._delivery_waits):
            return None
        await self._await_endings()
        await self._worker.pause()
        if not self._too_idle:
            self._worker.resume()
            return None
        log.info("pod_ends", reason="idle", idle_seconds=round(self._worker.idle_seconds or 0.0))
        if await self._end_pod():
            return True
        self._worker.resume()
        return False

    async def _end_of_age(self) -> bool | None:
        """Ends a pod that is too old; it stays paused, as the operator wants it gone. None while its last jobs run."""
        if not self._leaving:
            self._leaving = True
            log.info("pod_drains", reason="lifetime", hours=round((time.monotonic() - self._born_at) / 3600, 2))
            await self._worker.pause()
        if self._worker.idle_seconds is None:
            return None
        await self._await_endings()
        log.info("pod_ends", reason="lifetime")
        return await self._end_pod()

    async def _await_endings(self) -> None:
        """Waits for callbacks to be delivered, for a limited time from the end of the last job."""
        while (idle := self._worker.idle_seconds) is not None and idle < ENDINGS_SECONDS:
            if not await self._waiting(self._endings_wait):
                return
            await asyncio.sleep(min(1.0, self._seconds_to_look * 10))

    @property
    def _may_wait_for_delivery(self) -> bool:
        idle, limit = self._worker.idle_seconds, self._idle_limit
        return idle is not None and limit is not None and idle < limit + DELIVERY_SECONDS

    async def _waiting(self, for_what: Callable[[], Awaitable[bool]]) -> bool:
        try:
            return await for_what()
        except (DatabaseAway, StatementRefused) as error:
            log.debug("endings_unknown", error=str(error))
            return True


def pod_environment(settings: Settings) -> dict[str, str]:
    """The environment that daemon.pod.shutdown reads, including values from a .env file."""
    given = {
        "RUNPOD_API_KEY": settings.pod_api_key and settings.pod_api_key.get_secret_value(),
        "TRAINER_RUNPOD_API_KEY": settings.runpod_api_key and settings.runpod_api_key.get_secret_value(),
        "TRAINER_RUNPOD_API": settings.runpod_api,
        "TRAINER_POD_END": settings.pod_end,
    }
    return dict(os.environ) | {name: value for name, value in given.items() if value}
