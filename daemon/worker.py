"""The main loop of a host: wait for a wake-up, claim a job, begin an attempt, and again.

The steps of an attempt are in daemon.attempt.steps; how it ends is in daemon.attempt.settle.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from daemon.attempt.cleanup import Cleanup, FinishedAttempt
from daemon.attempt.collaborators import Collaborators
from daemon.attempt.steps import Attempt
from daemon.attempt.work_folder import clean_up_forever
from daemon.chores import Chores
from daemon.database.retry import AWAY_SECONDS
from daemon.database.wire import Sent
from daemon.dataset.prefetch import Prefetch
from daemon.errors import DatabaseAway, HostUnfit, StatementRefused
from daemon.host.slots import GpuSlots
from daemon.queue.job import ClaimedJob
from daemon.queue.reaper import reap_forever
from daemon.queue.row_visibility import RowVisibility, watch_row_visibility
from daemon.queue.rows import Claim, Limits, limits_of
from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.worker_registry import Load, WorkerRegistry, keep_registered, unregister
from daemon.stop_request import Stop, StopReason

log = structlog.get_logger()

MAX_LOST_RACES = 8
RACE_SECONDS = 0.25
PROMOTE_SECONDS = 1.0
# Jobs in a row to set aside. After that the worker tries one now and then, until whatever refuses them all is fixed.
MAX_REFUSALS = 8
REFUSED_SECONDS = 30.0


@dataclass(frozen=True)
class Queue:
    """The statements through which `Worker.run` takes its jobs."""

    store: SqlJobStore
    visibility: RowVisibility
    registry: WorkerRegistry


class Worker:
    """Runs the attempts of one host. Without a queue it runs only what `begin` is given."""

    def __init__(self, collaborators: Collaborators, queue: Queue | None = None) -> None:
        self._with = collaborators
        self._queue_or_none = queue
        self._deliveries = collaborators.deliveries
        self._settings = collaborators.settings
        self._host = collaborators.host
        self._pool = GpuSlots(collaborators.host, collaborators.settings.slots)
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._shutting_down = False
        self._attempts: dict[asyncio.Task[FinishedAttempt], tuple[ClaimedJob, Stop]] = {}
        self._cleanup = Cleanup(
            collaborators.store, collaborators.uploads, collaborators.storage, collaborators.settings
        )
        self._prefetch = Prefetch(
            collaborators.settings, collaborators.host, collaborators.storage, collaborators.store.owns_training_file
        )
        self._near_end: dict[asyncio.Task[FinishedAttempt], tuple[int, ...]] = {}
        self._claiming = asyncio.Lock()
        self._at_rest = False
        # A claim that `wake` has sent, with its limits.
        self._ahead: tuple[Limits, Sent] | None = None
        self._paused = False
        # The claim may have succeeded although its answer was lost: the job would wait until its lease expires.
        self._answer_lost = False
        self._promote_at = 0.0
        # How many claims in a row the database has refused, and until when none is tried because of that.
        self._refusals = 0
        self._rest_until = 0.0
        self._idle_since = time.monotonic()
        collaborators.fitness.on_mended = self._mended

    async def run(self) -> None:
        """Claims and runs jobs until told to stop; returns when the last attempt is settled."""
        async with Chores(self._with.troubles) as chores:
            self._begin_chores(chores)
            try:
                await self._serve()
            finally:
                self._prefetch.stop()
                await self._prefetch.ended()
        await unregister(self._queue.registry, self._host)
        await self._cleanup.finish()

    async def _serve(self) -> None:
        await self._with.fitness.look()
        while self._ahead is not None or not self._closing.is_set():
            # Cleared before claiming, so that a wake-up during the claim is not lost.
            self._wake.clear()
            async with self._claiming:
                seconds = await self._claim_all()
            if self._closing.is_set():
                break
            alarm = asyncio.get_running_loop().call_later(seconds, self._wake.set)
            self._at_rest = True
            self._deliveries.rested(idle=not self._attempts)
            await self._wake.wait()
            self._at_rest = False
            alarm.cancel()
        await self._leave_no_claim()
        while self._attempts:
            await asyncio.wait(self._attempts)
        await self._leave_no_claim()
        await self._deliveries.ended.wait()

    def _begin_chores(self, chores: Chores) -> None:
        """Starts the work beside claiming. It goes on during a drain."""
        settings, host, queue = self._settings, self._host, self._queue
        troubles, load = self._with.troubles, self._load
        chores.start(
            "worker row",
            lambda: keep_registered(queue.registry, host, settings, troubles, load=load, on_drain=self.drain),
        )
        chores.start("sight of rows", lambda: watch_row_visibility(queue.visibility, troubles))
        chores.start("reaper", lambda: reap_forever(queue.store, queue.visibility, settings.lease_seconds))
        chores.start(
            "clean-up of work folders",
            lambda: clean_up_forever(
                settings.work_dir,
                settings.keep_days,
                host,
                running=self._running,
                may_come_back=queue.visibility.may_come_back,
                end_uploads=self._with.storage.end_unfinished_uploads,
            ),
        )
        chores.start("waiting trainers", self._with.trainers.tend)
        chores.start("probes of the host", self._with.fitness.run)
        chores.start("deliveries", self._deliveries.run)

    async def _claim_all(self) -> float:
        """Claims until nothing is due or no slot is free. Returns the seconds to sleep unless woken."""
        if self._ahead is None and (seconds := self._rest_until - time.monotonic()) > 0:
            return seconds
        try:
            seconds = await self._claim_what_is_due()
        except DatabaseAway as error:
            log.warning("claim_failed", error=str(error))
            self._answer_lost = True
            return AWAY_SECONDS
        except HostUnfit:
            raise
        except Exception as error:  # the outermost loop of claiming: it must go on
            log.exception("claim_broke")
            self._answer_lost = True
            self._with.troubles.begin("claims", f"no job can be claimed: {type(error).__name__}: {error}")
            return self._rest()
        if not self._refusals:
            self._with.troubles.end("claims")
        return seconds

    async def _claim_what_is_due(self) -> float:
        settings = self._settings
        lost_races = 0
        await self._return_unanswered()
        while self._ahead is not None or self._may_claim:
            limits, sent = self._ahead or (self._limits_now(), None)
            self._ahead = None
            claim = await self._claim(limits, sent)
            if claim.job is not None:
                self._refusals = 0
                self.begin(claim.job)
                continue
            if self._refusals >= MAX_REFUSALS:
                # Every claim is refused, not one job's: leave the rest of the queue as it is.
                return self._rest()
            if claim.contested:
                # Other hosts took the candidates, or still lock them: look again, but not forever.
                lost_races += 1
                if lost_races == MAX_LOST_RACES:
                    return RACE_SECONDS
                continue
            # After the claim, so that a wake-up does not wait for it.
            due_in = await self._queue.store.next_due_in()
            if due_in == 0 and await self._queue.store.promote_due_jobs():
                continue
            self._prefetch.drop()
            if due_in == 0:
                return RACE_SECONDS  # it is due, but its row is locked
            return settings.poll_seconds if due_in is None else min(due_in, settings.poll_seconds)
        if not self._pool.has_room:
            # A queue that is never empty must not starve scheduled jobs; a burst must not check once per job.
            if time.monotonic() >= self._promote_at:
                self._promote_at = time.monotonic() + PROMOTE_SECONDS
                await self._queue.store.promote_due_jobs()
            await self._look_ahead()
        return settings.poll_seconds  # a freed slot wakes us, and so does the end of a pause

    def _rest(self) -> float:
        """Claims nothing for a while, even when woken. Returns for how many seconds."""
        self._rest_until = time.monotonic() + REFUSED_SECONDS
        return REFUSED_SECONDS

    async def _claim(self, limits: Limits, sent: Sent | None) -> Claim:
        seconds = self._settings.lease_seconds
        try:
            return await self._queue.store.claim_job(self._host.worker_id, limits, lease_seconds=seconds, sent=sent)
        except StatementRefused:
            return await self._claim_past_a_refusal(limits)

    async def _claim_past_a_refusal(self, limits: Limits) -> Claim:
        """Claims the first job in line by its id, after the database refused a claim without naming the job.

        If that is refused too, the job is set aside and the next one may be claimed."""
        first = await self._queue.store.peek_next_job(limits)
        if first is None:
            return Claim(None)
        worker_id, seconds = self._host.worker_id, self._settings.lease_seconds
        try:
            job = await self._queue.store.claim_job_by_id(worker_id, first.job_id, limits, lease_seconds=seconds)
        except StatementRefused as error:
            self._refusals += 1
            log.error("claim_refused", job_id=str(first.job_id), error=str(error))
            self._with.troubles.begin(
                "claims",
                f"the database refuses the claim of job {first.job_id}, which is set aside: {error}. "
                "Correct what refuses it, then run `SELECT release_held_jobs()`.",
            )
            await self._queue.store.set_aside_job(first.job_id, error)
            return Claim(None, contested=self._refusals < MAX_REFUSALS)
        return Claim(job, contested=job is None)

    async def _return_unanswered(self) -> None:
        if self._answer_lost:
            known = [job.id for job, _stop in self._attempts.values()]
            await self._queue.store.return_unanswered_claims(self._host.worker_id, known)
            self._answer_lost = False

    async def _leave_no_claim(self) -> None:
        """Gives back jobs claimed during shutdown whose answer was lost; a reaper would count them as attempts."""
        try:
            await self._return_unanswered()
        except (DatabaseAway, StatementRefused) as error:
            log.warning("claim_failed", error=str(error))

    @property
    def _queue(self) -> Queue:
        assert self._queue_or_none is not None, "a worker without a queue only begins what it is given"
        return self._queue_or_none

    @property
    def fit(self) -> bool:
        """True unless a part of this host is known to be broken."""
        return self._with.fitness.fit

    @property
    def _may_claim(self) -> bool:
        return self._pool.has_room and self.fit and not self._paused and not self._closing.is_set()

    def _limits_now(self) -> Limits:
        return self._limits(self._pool.free_gpus, self._with.trainers.bases())

    async def _look_ahead(self) -> None:
        """Prefetches the data of the likely next job, when every slot is taken and one will soon be free.

        The guess may be wrong: it skips a user whose cap is full only because of the job that is about to end."""
        if not self._near_end or not self._prefetch.wants_a_job or self._paused or self._closing.is_set():
            return
        free_gpus = self._pool.free_gpus
        if free_gpus is not None:
            free_gpus = min(free_gpus + min(map(len, self._near_end.values())), self._host.gpus_per_job)
        warm = self._with.trainers.bases_after(self._attempts[task][0].base_model for task in self._near_end)
        dataset = await self._queue.store.peek_next_job(self._limits(free_gpus, warm))
        if dataset is not None:
            self._prefetch.guess(dataset)

    def _limits(self, free_gpus: int | None, warm_models: Sequence[str]) -> Limits:
        return limits_of(self._settings, self._host, free_gpus, warm_models, self._queue.store.refused_claims.skip)

    def begin(self, job: ClaimedJob) -> asyncio.Task[FinishedAttempt]:
        """Runs an attempt at a job that has been claimed for this host. The task ends when the attempt is settled."""
        log.info(
            "job_claimed",
            job_id=str(job.id),
            attempt=job.attempt,
            waited_seconds=round(job.waited_seconds, 3),
            lease_epoch=job.lease_epoch,
        )
        slots = self._pool.take(job.need_gpus, self._with.trainers.preferred(self._pool.free, job.base_model))
        stop = Stop()
        if self._shutting_down:  # shutdown was requested during the claim
            stop.request(StopReason.SHUTDOWN)

        def near_end() -> None:
            if task not in self._near_end:
                self._near_end[task] = slots
                self._wake.set()

        early = self._prefetch.hand_over(job.dataset)
        attempt = Attempt(self._with, job, stop, slots, early=early, on_near_end=near_end)
        task = asyncio.create_task(attempt.run(), name=f"attempt {job.id}")
        self._attempts[task] = (job, stop)

        def ended(done: asyncio.Task[FinishedAttempt]) -> None:
            del self._attempts[done]
            self._near_end.pop(done, None)
            self._pool.give_back(slots)
            self._idle_since = time.monotonic()
            self._wake.set()
            if done.cancelled():
                return
            if (error := done.exception()) is not None:
                log.error("attempt_crashed", job_id=str(job.id), exc_info=error)
                return
            self._cleanup.begin(done.result())

        task.add_done_callback(ended)
        return task

    def _load(self) -> Load:
        if self._closing.is_set() or self._paused:
            return Load("draining", len(self._attempts))
        if not self.fit:
            return Load("out_of_service", len(self._attempts))
        return Load("busy" if self._attempts else "idle", len(self._attempts))

    def _running(self) -> set[str]:
        return {str(job.id) for job, _stop in self._attempts.values()}

    # -- signals: wake-ups and stops ----------------------------------------------------------------------------

    def wake(self) -> None:
        """Wakes the worker for a possible claim. At rest, the claim is sent before the worker's own task runs."""
        resting = time.monotonic() < self._rest_until
        if self._at_rest and not self._wake.is_set() and self._may_claim and not self._answer_lost and not resting:
            limits = self._limits_now()
            sent = self._queue.store.send_claim(
                self._host.worker_id, limits, lease_seconds=self._settings.lease_seconds
            )
            self._ahead = None if sent is None else (limits, sent)
        self._wake.set()

    def cancelled(self, job_id: object) -> None:
        """Stops a job that was cancelled in the database, sooner than its next heartbeat would."""
        for job, stop in self._attempts.values():
            if job.id == job_id:
                stop.request(StopReason.CANCELLED)
        self._prefetch.forget(job_id)

    def _mended(self) -> None:
        self._with.trainers.try_again()
        self._wake.set()

    def drain(self) -> None:
        """Claims nothing more; running jobs continue to their end."""
        log.info("worker_draining", running=len(self._attempts))
        self._with.trainers.drain()
        self._prefetch.stop()
        self._deliveries.drain()
        self._closing.set()
        self._wake.set()

    def shut_down(self) -> None:
        """Claims nothing more; running jobs save a checkpoint and go back to the queue."""
        self._shutting_down = True
        self.drain()
        self._deliveries.shut_down()
        for _job, stop in self._attempts.values():
            stop.request(StopReason.SHUTDOWN)

    def hurry(self) -> None:
        """Like shut_down, but no longer waits for checkpoints."""
        for _job, stop in self._attempts.values():
            stop.hurry()

    @property
    def idle_seconds(self) -> float | None:
        """Seconds since the last attempt or delivery ended, or since the start; None while one is running."""
        if self._attempts or self._deliveries.is_working:
            return None
        return time.monotonic() - max(self._idle_since, self._deliveries.worked_at)

    async def pause(self) -> None:
        """Claims nothing until `resume`; returns when no claim is under way."""
        self._paused = True
        await self._deliveries.pause()
        async with self._claiming:
            if self._ahead is not None:
                await self._claim_all()

    def resume(self) -> None:
        self._paused = False
        self._deliveries.resume()
        self._wake.set()
