"""Delivers callbacks: final states from the outbox, at least once; progress from memory, latest only.

An outbox row is written in the transaction of the state it reports, so nothing is lost when this
process dies: any daemon delivers it later, under the same id. A receiver that is down, slow
or misbehaving delays only its own messages.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, assert_never
from uuid import UUID, uuid4

import httpx
import structlog

from daemon.chores import worked
from daemon.errors import DatabaseAway, StatementRefused
from daemon.network.address_rules import AddressRefused, AddressRules, AddressUnknown, own_hosts, redact, rules_from
from daemon.network.pinned_client import Target, guarded_client
from daemon.network.retry_after import retry_after_seconds
from daemon.queue.job import ClaimedJob
from daemon.report.outbox import Callback, Outbox
from daemon.report.webhook import message_body, signed_headers, signing_keys
from daemon.settings import Settings
from daemon.tasks import wait_at_most

log = structlog.get_logger()

# The schedule of Standard Webhooks: at once, then after 5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 14 h, 20 h, 24 h.
RETRY_SECONDS = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
JITTER = 0.1

TIMEOUT = httpx.Timeout(15.0, connect=5.0)
TOTAL_SECONDS = 20.0
MAX_IN_FLIGHT = 32
# Longer than one message may take. If a daemon dies, a receiving host's messages are delayed this long.
LOCK_SECONDS = 60.0
POLL_SECONDS = 15.0
MAX_PROGRESS_IN_FLIGHT = 8
# After a failed progress post the receiver gets nothing for a while; then the newest is sent.
PROGRESS_PAUSE_SECONDS = 5.0


@dataclass(frozen=True)
class Delivered:
    """The receiver accepted it."""

    status: int


@dataclass(frozen=True)
class Postponed:
    """Try again later: no answer, or one that may change."""

    status: int | None
    error: str
    after_seconds: float = 0.0


@dataclass(frozen=True)
class Buried:
    """Never try again: the receiver refuses more (410), or the rules forbid its address."""

    status: int | None
    error: str


DeliveryResult = Delivered | Postponed | Buried


class CallbackCourier:
    """Delivers callbacks while `run` runs. Raises HostUnfit when a signing secret is unusable."""

    def __init__(
        self,
        settings: Settings,
        *,
        rules: AddressRules | None = None,
        tls: ssl.SSLContext | None = None,
        retry_seconds: tuple[float, ...] = RETRY_SECONDS,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._rules = rules or rules_from(settings)
        self._keys = signing_keys(settings.callback_secrets)
        self._authorization = settings.callback_authorization
        self._own_hosts = own_hosts(settings)
        self._own_scheme = httpx.URL(settings.supabase_url).scheme if settings.supabase_url else "https"
        self._retry_seconds = retry_seconds
        self._poll_seconds = poll_seconds
        self._client = guarded_client(TIMEOUT, tls)
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._running = False
        self._in_flight: set[asyncio.Task[None]] = set()
        self._newest_progress: dict[UUID, tuple[ClaimedJob, dict[str, Any]]] = {}
        self._progress_tasks: dict[UUID, asyncio.Task[None]] = {}
        self._progress_room = asyncio.Semaphore(MAX_PROGRESS_IN_FLIGHT)
        self._muted: set[UUID] = set()

    def wake(self) -> None:
        """Wakes the courier: a callback was added to the outbox."""
        self._idle.clear()
        self._wake.set()

    async def run(self, outbox: Outbox) -> None:
        """Delivers what is due, until cancelled. A bad receiver raises nothing here."""
        self._running = True
        if not self._keys:
            log.warning("callbacks_unsigned", hint="set TRAINER_CALLBACK_SECRETS so that receivers can trust them")
        try:
            while True:
                self._wake.clear()
                claimed = await self._claim(outbox)
                worked()
                for callback in claimed or ():
                    self._start(outbox, callback)
                if claimed:
                    continue
                # If woken during the claim, a callback may be due that the answer did not contain.
                if claimed == [] and not self._in_flight and not self._wake.is_set():
                    self._idle.set()
                await self._wait()
        except asyncio.CancelledError:
            # Cancelled: this is the end. After any other exception the loop is restarted, and messages in flight go on.
            await self._end_all()
            raise
        finally:
            self._running = False

    async def flush(self, deadline_seconds: float) -> bool:
        """Waits until nothing is due or in flight, at most `deadline_seconds`. Returns True if that was reached.

        What a receiver has postponed stays in the outbox: the next daemon delivers it.
        """
        if not self._running:
            return False
        self.wake()
        try:
            async with asyncio.timeout(deadline_seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("callbacks_left", in_flight=len(self._in_flight))
            return False
        return True

    def send_progress(self, job: ClaimedJob, status: Mapping[str, Any]) -> None:
        """Posts the status as job.progress if the job has a callback_url. Never waits; a newer status replaces it.

        Failed progress is not sent again: the next one supersedes it.
        """
        if job.callback_url is None or job.id in self._muted:
            return
        payload = {
            "sequence": None,
            **status,
            "job_id": str(job.id),
            "event": "job.progress",
            "lease_epoch": job.lease_epoch,
            "at": datetime.now(UTC).isoformat(),
        }
        self._newest_progress[job.id] = (job, payload)
        if job.id not in self._progress_tasks:
            task = asyncio.create_task(self._post_progress(job.id), name=f"progress {job.id}")
            self._progress_tasks[job.id] = task
            task.add_done_callback(_log_a_crash)

    def forget(self, job_id: UUID) -> None:
        """Sends no more progress of this job: the attempt is over. Its final state comes from the outbox."""
        self._newest_progress.pop(job_id, None)
        self._muted.discard(job_id)

    # -- the outbox -----------------------------------------------------------------------------------------------

    async def _claim(self, outbox: Outbox) -> list[Callback] | None:
        """Claims due callbacks, one per receiving host; None when the outbox cannot be read now."""
        room = MAX_IN_FLIGHT - len(self._in_flight)
        if room <= 0:
            return None
        try:
            return await outbox.claim_callbacks(room, LOCK_SECONDS)
        except DatabaseAway as error:
            log.debug("callbacks_delayed", error=str(error))
            return None

    def _start(self, outbox: Outbox, callback: Callback) -> None:
        task = asyncio.create_task(self._serve(outbox, callback), name=f"callback {callback.id}")
        self._in_flight.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._in_flight.discard(done)
            # There may be another callback for the same receiver.
            self._wake.set()
            if not done.cancelled() and (error := done.exception()) is not None:
                log.error("callback_crashed", callback_id=str(callback.id), exc_info=error)

        task.add_done_callback(ended)

    async def _serve(self, outbox: Outbox, callback: Callback) -> None:
        """Posts one row and settles it. The outbox hands out one row per receiving host at a time."""
        payload = {**callback.payload, "event": callback.event, "sequence": callback.sequence}
        verdict = await self._post(str(callback.id), callback.url, message_body(payload))
        delay = self._delay_after(callback.attempts, verdict)
        try:
            await self._settle(outbox, callback, verdict, delay)
        except (DatabaseAway, StatementRefused) as error:
            # The row's lock expires and it is sent again, under the same id.
            log.warning("callback_unsettled", callback_id=str(callback.id), error=str(error))

    async def _settle(self, outbox: Outbox, callback: Callback, verdict: DeliveryResult, delay: float | None) -> None:
        about = {"callback_id": str(callback.id), "job_id": str(callback.job_id), "event_name": callback.event}
        match verdict:
            case Delivered(status):
                await outbox.deliver_callback(callback.id, callback.token, status)
                log.info("callback_delivered", status=status, **about)
            case Postponed(status, error) if delay is not None:
                await outbox.postpone_callback(callback.id, callback.token, delay, status, error)
                log.info("callback_postponed", status=status, error=error, seconds=round(delay), **about)
                if delay < self._poll_seconds:
                    asyncio.get_running_loop().call_later(delay, self._wake.set)
            case Postponed(status, error) | Buried(status, error):
                await outbox.mark_callback_dead(callback.id, callback.token, status, error)
                log.warning("callback_buried", status=status, error=error, url=redact(callback.url), **about)
            case _:
                assert_never(verdict)

    def _delay_after(self, attempts: int, verdict: DeliveryResult) -> float | None:
        """Seconds until the next try, None if there is none. `attempts` includes the one just made."""
        if not isinstance(verdict, Postponed) or attempts > len(self._retry_seconds):
            return None
        planned = self._retry_seconds[max(attempts, 1) - 1]
        # Jitter, so that a receiver that comes back does not get every message at once.
        spread = planned * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - no secret depends on it
        return max(spread, verdict.after_seconds)

    # -- progress -------------------------------------------------------------------------------------------------

    async def _post_progress(self, job_id: UUID) -> None:
        try:
            while (newest := self._newest_progress.pop(job_id, None)) is not None:
                job, payload = newest
                assert job.callback_url is not None
                async with self._progress_room:
                    verdict = await self._post(f"progress_{uuid4()}", job.callback_url, message_body(payload))
                match verdict:
                    case Delivered():
                        continue
                    case Postponed():
                        log.debug("progress_lost", job_id=str(job_id), status=verdict.status, error=verdict.error)
                        await asyncio.sleep(max(PROGRESS_PAUSE_SECONDS, min(verdict.after_seconds, 60.0)))
                    case Buried():
                        log.warning("progress_muted", job_id=str(job_id), status=verdict.status, error=verdict.error)
                        self._muted.add(job_id)
                        self._newest_progress.pop(job_id, None)
                    case _:
                        assert_never(verdict)
        finally:
            self._progress_tasks.pop(job_id, None)

    # -- one message ----------------------------------------------------------------------------------------------

    async def _post(self, message_id: str, url: str, body: bytes) -> DeliveryResult:
        """Sends one message once and judges the answer by its status alone; its body is not read."""
        try:
            async with asyncio.timeout(TOTAL_SECONDS):
                target = await self._rules.check(url)
                headers = signed_headers(self._keys, message_id, int(time.time()), body)
                if self._authorization is not None and self._is_own_function(target):
                    headers["Authorization"] = self._authorization.get_secret_value()
                request = target.request(self._client, "POST", headers=headers, content=body)
                response = await self._client.send(request, stream=True)
                await response.aclose()
        except AddressRefused as error:
            return Buried(None, str(error))
        except AddressUnknown as error:
            return Postponed(None, str(error))
        except TimeoutError:
            return Postponed(None, f"no answer within {TOTAL_SECONDS:.0f} seconds")
        # httpx reads a redirect that it does not follow, and raises InvalidURL where that is none.
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return Postponed(None, f"{target.host}: {type(error).__name__}")
        status = response.status_code
        if response.is_success:
            return Delivered(status)
        if status == httpx.codes.GONE:
            return Buried(status, "the receiver wants no more messages (410)")
        if response.is_redirect:
            return Postponed(status, f"HTTP {status}: redirects are not followed; correct callback_url")
        return Postponed(status, f"HTTP {status}", retry_after_seconds(response))

    def _is_own_function(self, target: Target) -> bool:
        """Whether this host may get the authorization header. It is a credential: it goes to the project's edge
        functions, not to its other APIs, where a tenant's URL could make us act in our name."""
        if f"{target.host}:{target.port}" not in self._own_hosts or target.url.scheme != self._own_scheme:
            return False
        path = target.url.raw_path.decode("ascii", "replace").partition("?")[0].lower()
        if ".functions." in target.host:
            return True
        return path.startswith("/functions/v1/") and not any(trick in path for trick in ("..", "%2e", "%2f", "//"))

    # -- waiting and ending ---------------------------------------------------------------------------------------

    async def _wait(self) -> None:
        await wait_at_most(self._wake, self._poll_seconds)

    async def _end_all(self) -> None:
        tasks = [*self._in_flight, *self._progress_tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()


def _log_a_crash(done: asyncio.Task[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        log.error("progress_crashed", task=done.get_name(), exc_info=error)
