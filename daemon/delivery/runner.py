"""Does deliveries on this host: claims one that is due, keeps its lock while a step works, writes how it ended.

An export is work for the CPU and the disk and holds no slot: a job that waits is claimed while one runs. On a CPU host
without spare cores a delivery begins only when no job runs or waits, or when it has waited for long.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from uuid import UUID

import structlog

from daemon.chores import worked
from daemon.database.connection import REFUSALS, Database
from daemon.database.retry import AWAY_SECONDS
from daemon.delivery.beside import Deliveries
from daemon.delivery.context import DeliveryContext, Tools, adopt_folder, deliveries_folder, forget_folder
from daemon.delivery.delivery import Delivery, LockLost
from daemon.delivery.steps import STEPS, Step, kinds_of_host
from daemon.delivery.store import Fault, Reach, SqlDeliveries
from daemon.errors import DatabaseAway, HostFault, JobError, JobFailed, StatementRefused, StorageAway
from daemon.host.inspect import Host
from daemon.queue.outcome import DeliveryKind
from daemon.redaction import Redaction
from daemon.settings import Settings
from daemon.storage.interface import Storage
from daemon.tasks import wait_at_most
from daemon.troubles import Troubles
from training.events import ErrorCode

log = structlog.get_logger()

# Not the name of the chore, whose trouble ends with each good round.
TROUBLE = "a delivery"
MAX_TRIES = 6
FIRST_BACKOFF_SECONDS = 30.0
MAX_BACKOFF_SECONDS = 3600.0
# What this host cannot do now it leaves to others for a while, longer each time.
FIRST_REST_SECONDS = 30.0
MAX_REST_SECONDS = 600.0
# A busy CPU host begins a delivery that nobody has taken for this long: its jobs might never end.
BUSY_PATIENCE_SECONDS = 300.0
TIDY_SECONDS = 3600.0
# While the database is away a delivery is given back by its lock's end: a host that leaves waits no longer than this.
LEAVING_SECONDS = 5.0


class DeliveryRunner(Deliveries):
    """One delivery at a time."""

    def __init__(
        self,
        tools: Tools,
        troubles: Troubles,
        *,
        steps: Mapping[DeliveryKind, Step] = STEPS,
        on_told: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._tools = tools
        self._settings = tools.settings
        self._deliveries = tools.deliveries
        self._troubles = troubles
        self._steps = steps
        # A callback may be in the outbox.
        self._on_told = on_told
        self._kinds = kinds_of_host(tools.settings, steps)
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._leaving = asyncio.Event()
        self._claiming = asyncio.Lock()
        self._paused = False
        self._current: Delivery | None = None
        # Whether a job runs here, or may be about to.
        self._is_busy = True
        # Deliveries that this host leaves to others: until when, and how often already.
        self._rests: dict[UUID, tuple[float, int]] = {}
        self._tidied_at = -TIDY_SECONDS

    @property
    def is_working(self) -> bool:
        return self._current is not None

    async def run(self) -> None:
        """Does what is due, until told to claim nothing more; then it returns after the current one."""
        log.info("deliveries_done_here", kinds=list(self._kinds))
        while not self._closing.is_set():
            # Cleared before claiming, so that a wake-up during the claim is not lost.
            self._wake.clear()
            try:
                delivery = await self._claim()
            except DatabaseAway as error:
                log.debug("delivery_not_claimed", error=str(error))
                delivery = None
            if delivery is not None:
                try:
                    await self._serve(delivery)
                finally:
                    self._current = None
                    self.worked_at = time.monotonic()
                    if self._closing.is_set():
                        self.ended.set()
                continue
            worked()
            await self._tidy()
            await wait_at_most(self._wake, self._settings.poll_seconds)
        self.ended.set()

    async def has_work(self) -> bool:
        """Whether a delivery is under way here, or due and none that this host has just failed at."""
        if self._current is not None:
            return True
        return bool(self._kinds) and await self._deliveries.has_due(self._reach(patience_seconds=0.0))

    # -- claiming -----------------------------------------------------------------------------------------------

    async def _claim(self) -> Delivery | None:
        async with self._claiming:
            if self._paused or self._closing.is_set() or not self._kinds:
                return None
            # With a GPU the processors are mostly idle while a job trains.
            busy = self._tools.host.device == "cpu" and self._is_busy
            reach = self._reach(patience_seconds=BUSY_PATIENCE_SECONDS if busy else 0.0)
            self._current = await self._deliveries.claim(reach, self._settings.lease_seconds)
            return self._current

    def _reach(self, *, patience_seconds: float) -> Reach:
        now = time.monotonic()
        return Reach(
            worker_id=self._tools.host.worker_id,
            kinds=self._kinds,
            storage=self._tools.storage.location.storage,
            models=self._settings.allowed_models or None,
            patience_seconds=patience_seconds,
            skip=[each for each, (until, _times) in self._rests.items() if until > now],
        )

    # -- one delivery -------------------------------------------------------------------------------------------

    async def _serve(self, delivery: Delivery) -> None:
        structlog.contextvars.bind_contextvars(job_id=str(delivery.job_id), delivery=delivery.kind)
        try:
            if delivery.attempts > MAX_TRIES:
                await self._settle(delivery, self._deliveries.fail, _lost_too_often(delivery))
                return
            log.info("delivery_claimed", target=delivery.target, attempt=delivery.attempts, claims=delivery.claims)
            began = time.monotonic()
            ended = await self._work(delivery)
            log.info("delivery_ended", outcome=ended, seconds=round(time.monotonic() - began, 1))
        finally:
            structlog.contextvars.unbind_contextvars("job_id", "delivery")

    async def _work(self, delivery: Delivery) -> str:
        """Does the step under the delivery's lock, and writes how it ended. Returns that in a word."""
        await asyncio.to_thread(adopt_folder, self._settings, delivery)
        context = DeliveryContext(self._tools, delivery)
        step = asyncio.ensure_future(self._steps[delivery.kind].deliver(delivery, context))
        lost = asyncio.create_task(self._keep_lock(delivery))
        left = asyncio.create_task(self._leaving.wait())
        try:
            await asyncio.wait({step, lost, left}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                step.cancel()
                await asyncio.gather(step, return_exceptions=True)
                if lost.done():
                    await asyncio.to_thread(forget_folder, self._settings, delivery)
                    return "lock_lost"
                await self._give_back(delivery)
                return "given_back"
            return await self._end(delivery, step)
        finally:
            for task in (step, lost, left):
                task.cancel()
            await asyncio.gather(step, lost, left, return_exceptions=True)

    async def _keep_lock(self, delivery: Delivery) -> None:
        """Renews the lock; returns once it is lost. While the database is away the step goes on."""
        while True:
            await asyncio.sleep(self._settings.lease_seconds / 3)
            try:
                await self._deliveries.renew(delivery, self._settings.lease_seconds)
            except LockLost as error:
                log.warning("delivery_lock_lost", error=str(error))
                return
            except (DatabaseAway, StatementRefused) as error:
                log.warning("delivery_lock_not_renewed", error=str(error))

    async def _end(self, delivery: Delivery, step: asyncio.Future[dict[str, Any]]) -> str:
        """Writes the outcome of a step that has ended by itself."""
        try:
            result = self._tools.redaction.value(step.result())
        except LockLost as error:
            log.warning("delivery_lock_lost", error=str(error))
            await asyncio.to_thread(forget_folder, self._settings, delivery)
            return "lock_lost"
        except (HostFault, StorageAway) as error:
            return await self._not_here(delivery, error)
        except JobFailed as error:
            await self._fail(delivery, self._fault(error))
            return "failed"
        except JobError as error:
            return await self._later(delivery, self._fault(error))
        except Exception as error:  # the outermost loop of a delivery: the runner must go on
            log.exception("delivery_broke")
            fault = Fault(
                ErrorCode.INTERNAL,
                f"The service failed while it worked on this delivery ({type(error).__name__}).",
                "This is a fault of the service, not of your job. The delivery is tried again.",
            )
            return await self._later(delivery, fault)
        await self._settle(delivery, self._deliveries.finish, result)
        self._rests.pop(delivery.id, None)
        self._troubles.end(TROUBLE)
        await self._forget(delivery)
        return "done"

    async def _not_here(self, delivery: Delivery, error: JobError) -> str:
        """Leaves the delivery to other hosts, uncounted: this host, or its storage, is at fault."""
        _until, times = self._rests.get(delivery.id, (0.0, 0))
        rest = min(FIRST_REST_SECONDS * 2.0**times, MAX_REST_SECONDS)
        self._rests[delivery.id] = (time.monotonic() + rest, times + 1)
        log.warning("delivery_not_here", error=error.for_the_operator, rest_seconds=rest)
        self._troubles.begin(TROUBLE, f"the delivery {delivery.kind} cannot be done here: {error.for_the_operator}")
        if error.code is ErrorCode.DISK_FULL:
            # What is there already fills the disk.
            await self._forget(delivery)
        await self._settle(delivery, self._deliveries.postpone, self._fault(error), 0.0, counted=False)
        self._look_in(rest)
        return "given_back"

    async def _later(self, delivery: Delivery, fault: Fault) -> str:
        if delivery.attempts >= MAX_TRIES:
            await self._fail(delivery, fault)
            return "failed"
        spread = random.uniform(0.75, 1.25)  # noqa: S311 - no secret depends on it
        delay = min(FIRST_BACKOFF_SECONDS * 2.0 ** (delivery.attempts - 1), MAX_BACKOFF_SECONDS) * spread
        log.warning("delivery_postponed", message=fault.message, seconds=round(delay))
        await self._settle(delivery, self._deliveries.postpone, fault, delay, counted=True)
        self._look_in(delay)
        return "postponed"

    def _look_in(self, seconds: float) -> None:
        """Looks again when what this host has put off is due; the slow poll finds what others have."""
        asyncio.get_running_loop().call_later(seconds + 0.01, self._wake.set)

    async def _fail(self, delivery: Delivery, fault: Fault) -> None:
        log.warning("delivery_failed", code=fault.code, message=fault.message, hint=fault.hint)
        await self._settle(delivery, self._deliveries.fail, fault)
        await self._forget(delivery)

    async def _give_back(self, delivery: Delivery) -> None:
        """Gives the delivery back at once: this host leaves. What it has made stays on the volume for the next one."""
        try:
            async with asyncio.timeout(LEAVING_SECONDS):
                await self._deliveries.postpone(delivery, None, 0.0, counted=False)
        except (LockLost, DatabaseAway, *REFUSALS, TimeoutError) as error:
            log.warning("delivery_left_to_its_lock", error=str(error))

    async def _settle(
        self, delivery: Delivery, write: Callable[..., Awaitable[None]], *facts: Any, **named: Any
    ) -> None:
        """Writes the outcome, however long the database is away; a host that leaves tries only for a while."""
        give_up_at: float | None = None
        while True:
            try:
                await write(delivery, *facts, **named)
                self._on_told()
                return
            except LockLost as error:
                log.warning("delivery_lock_lost", error=str(error))
                return
            except DatabaseAway as error:
                log.warning("delivery_not_settled", error=str(error))
            except REFUSALS as error:
                # It is claimed again after its lock, here or elsewhere.
                log.error("delivery_refused_by_database", error=str(error))
                self._troubles.begin(TROUBLE, f"the database refuses how a delivery ended: {error}")
                return
            if self._leaving.is_set():
                give_up_at = give_up_at or time.monotonic() + LEAVING_SECONDS
                if time.monotonic() > give_up_at:
                    return
            await asyncio.sleep(AWAY_SECONDS)

    def _fault(self, error: JobError) -> Fault:
        """What the job's owner may read."""
        redaction = self._tools.redaction
        return Fault(
            error.code, redaction.text(error.message), None if error.hint is None else redaction.text(error.hint)
        )

    async def _forget(self, delivery: Delivery) -> None:
        context = DeliveryContext(self._tools, delivery)
        if context.folder.is_dir():
            await self._tools.storage.end_unfinished_uploads(context.folder)
        await asyncio.to_thread(forget_folder, self._settings, delivery)

    async def _tidy(self) -> None:
        """Deletes folders of deliveries that other hosts have done since, or that nobody goes on with."""
        if time.monotonic() - self._tidied_at < TIDY_SECONDS:
            return
        self._tidied_at = time.monotonic()
        oldest = time.time() - self._settings.keep_days * 86400.0
        folder = deliveries_folder(self._settings)
        for each in folder.iterdir() if folder.is_dir() else ():
            touched_at = max((path.stat().st_mtime for path in (each, *each.glob("*"))), default=0.0)
            if touched_at < oldest:
                await self._tools.storage.end_unfinished_uploads(each)
                await asyncio.to_thread(shutil.rmtree, each, True)

    # -- signals ------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """A delivery may be due."""
        self._wake.set()

    def rested(self, *, idle: bool) -> None:
        if idle and self._is_busy:
            self._wake.set()
        self._is_busy = not idle

    def drain(self) -> None:
        self._closing.set()
        self._wake.set()
        if self._current is None and not self._claiming.locked():
            # `run` may just be failing, and restarted only later.
            self.ended.set()

    def shut_down(self) -> None:
        self._leaving.set()
        self.drain()

    async def pause(self) -> None:
        self._paused = True
        async with self._claiming:
            return

    def resume(self) -> None:
        self._paused = False
        self._wake.set()


def delivery_runner(
    settings: Settings,
    host: Host,
    troubles: Troubles,
    storage: Storage,
    database: Database,
    *,
    on_told: Callable[[], None],
) -> DeliveryRunner:
    """Builds the runner of a host. `on_told` is called when a callback may be in the outbox."""
    redaction = Redaction.of(settings, (host.hostname, host.pod_id))
    tools = Tools(settings, host, storage, database, SqlDeliveries(database), redaction)
    return DeliveryRunner(tools, troubles, on_told=on_told)


def _lost_too_often(delivery: Delivery) -> Fault:
    return Fault(
        ErrorCode.WORKER_LOST,
        f"The hosts that worked on this delivery stopped answering, {delivery.attempts - 1} times.",
        "The export may need more memory or disk than the hosts have: ask for it again on a larger one.",
    )
