"""The story of a host: wait for a wake-up, claim, run, report, upload, settle, and again.

One attempt, from the row to its ending:

    claim -> parse -> fetch the data, find the model -> run the trainer -> publish the adapter -> settle

Each step either yields what the next one needs or raises a JobError; the outcome is decided in
one place and mapped to one move in another.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, assert_never

import structlog

from daemon.adapter_size import expected_adapter_bytes
from daemon.callback import CallbackCourier
from daemon.child import Patience, Stopped, Verdict, run_child
from daemon.cost import Meter, price_per_gpu_hour
from daemon.download import fetch_dataset
from daemon.errors import DatabaseAway, JobDelayed, JobError, JobFailed, LeaseLost
from daemon.host import GpuPool, Host, installed_versions, read_load
from daemon.job import Cancelled, ClaimedJob, Completed, Failed, Outcome, Released, State, Superseded
from daemon.lease import HeldLease, LeaseKeeper
from daemon.models import resolve_model
from daemon.pack import publish_adapter, withdraw_adapter
from daemon.reporter import Reporter
from daemon.settings import Settings
from daemon.stop import Stop, StopReason
from daemon.storage import Storage
from daemon.store import Store, WorkerRow, WorkerState
from daemon.workspace import Workspace, remove_old_jobs
from training.events import ErrorCode, Stage
from training.spec import JobSpec, ParsedRow, SpecInvalid, parse_row

log = structlog.get_logger()
T = TypeVar("T")

TOUCH_SECONDS = 10.0
LIMITS_SECONDS = 1.0
AWAY_SECONDS = 1.0
TIDY_SECONDS = 3600.0
MAX_LOST_RACES = 8
RACE_SECONDS = 0.25
MAX_BACKOFF_SECONDS = 3600.0


class Interrupted(Exception):
    """A stop request arrived between two steps, or cut one short."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Collaborators:
    """What a worker works with; built in __main__ only."""

    settings: Settings
    host: Host
    store: Store
    leases: LeaseKeeper
    storage: Storage
    courier: CallbackCourier
    trainer_command: tuple[str, ...]


class Worker:
    def __init__(self, collaborators: Collaborators) -> None:
        self._with = collaborators
        self._settings = collaborators.settings
        self._store = collaborators.store
        self._host = collaborators.host
        self._pool = GpuPool(collaborators.host, collaborators.settings.slots)
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._attempts: dict[asyncio.Task[None], tuple[ClaimedJob, Stop]] = {}

    # -- what moves left: wake-ups and stops --------------------------------------------------------------------

    def wake(self) -> None:
        self._wake.set()

    def cancelled(self, job_id: object) -> None:
        """The job was cancelled in the database; its heartbeat would find out, this is sooner."""
        for job, stop in self._attempts.values():
            if job.id == job_id:
                stop.request(StopReason.CANCELLED)

    def drain(self) -> None:
        """Claim nothing more; the jobs at hand run to their end."""
        log.info("worker_draining", running=len(self._attempts))
        self._closing.set()
        self._wake.set()

    def shut_down(self) -> None:
        """Claim nothing more; the jobs at hand leave a checkpoint and go back to the queue."""
        self.drain()
        for _job, stop in self._attempts.values():
            stop.request(StopReason.SHUTDOWN)

    def hurry(self) -> None:
        """As shut_down, but do not wait for checkpoints any longer."""
        for _job, stop in self._attempts.values():
            stop.hurry()

    # -- the host's loop ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Claim and run jobs until told to stop; return when the last attempt is settled."""
        chores = [asyncio.create_task(chore()) for chore in (self._report_host, self._reap, self._tidy)]
        try:
            while not self._closing.is_set():
                # Cleared before claiming: a wake-up that comes during the claim is not lost.
                self._wake.clear()
                seconds = await self._claim_all()
                if self._closing.is_set():
                    break
                await _wait(self._wake, seconds)
            while self._attempts:
                await asyncio.wait(self._attempts)
        finally:
            for chore in chores:
                chore.cancel()
            await asyncio.gather(*chores, return_exceptions=True)
        await self._say_goodbye()

    async def _claim_all(self) -> float:
        """Claim until nothing is due or no place is free. Returns the seconds to sleep unless woken."""
        settings = self._settings
        try:
            await self._store.promote_due_jobs()
            lost_races = 0
            while self._pool.has_room and not self._closing.is_set():
                claim = await self._store.claim_job(
                    self._host.worker_id,
                    free_gpus=self._pool.free_gpus,
                    gpu_memory_gb=self._host.gpu_memory_gb,
                    gpu_type=self._host.gpu_type,
                    models=settings.allowed_models or None,
                    user_cap=settings.user_cap,
                    lease_seconds=settings.lease_seconds,
                )
                if claim.job is not None:
                    self._begin(claim.job)
                    continue
                if claim.seen == 0:
                    break
                # Candidates were there and somebody else took them, or holds them still: look again, but not for ever.
                lost_races += 1
                if lost_races == MAX_LOST_RACES:
                    return RACE_SECONDS
            due_in = await self._store.next_due_in()
        except DatabaseAway as error:
            log.warning("claim_failed", error=str(error))
            return AWAY_SECONDS
        return settings.poll_seconds if due_in is None else max(0.01, min(due_in, settings.poll_seconds))

    def _begin(self, job: ClaimedJob) -> None:
        places = self._pool.take(job.need_gpus)
        stop = Stop()
        task = asyncio.create_task(self._attempt(job, stop, places), name=f"attempt {job.id}")
        self._attempts[task] = (job, stop)

        def ended(done: asyncio.Task[None]) -> None:
            del self._attempts[done]
            self._pool.give_back(places)
            self._wake.set()
            if not done.cancelled() and (error := done.exception()) is not None:
                log.error("attempt_crashed", job_id=str(job.id), exc_info=error)

        task.add_done_callback(ended)

    async def _report_host(self) -> None:
        """Register this host and keep its row current, so that a waiting job can say what it waits for."""
        host = self._host
        row = WorkerRow(
            id=host.worker_id,
            host=host.hostname,
            pod=host.pod_id,
            device=host.device,
            gpus=[{"index": gpu.index, "name": gpu.name, "memory_gb": gpu.memory_gb} for gpu in host.gpus],
            gpu_count=len(host.gpus),
            gpu_memory_gb=host.gpu_memory_gb,
            gpu_type=host.gpu_type,
            models=list(self._settings.allowed_models) or None,
            slots=self._settings.slots or max(len(host.gpus), 1),
            versions=installed_versions(),
        )
        registered = False
        while True:
            try:
                if not registered:
                    await self._store.register_worker(row)
                    registered = True
                wish = await self._store.touch_worker(
                    host.worker_id, state=self._worker_state, busy=len(self._attempts), data={}
                )
                registered = wish is not None
                if wish == "drain" and not self._closing.is_set():
                    self.drain()
            except DatabaseAway as error:
                log.debug("worker_row_delayed", error=str(error))
            await asyncio.sleep(TOUCH_SECONDS)

    @property
    def _worker_state(self) -> WorkerState:
        if self._closing.is_set():
            return "draining"
        return "busy" if self._attempts else "idle"

    async def _reap(self) -> None:
        """Take back jobs whose host went silent, here or anywhere."""
        lease_seconds = self._settings.lease_seconds
        while True:
            await asyncio.sleep(lease_seconds / 2)
            # After our own reconnect, first give every holder one lease's time to renew: an outage of
            # the database must not look like the death of all hosts.
            connected_at = self._store.database.connected_at
            if connected_at is None or time.monotonic() - connected_at < lease_seconds:
                continue
            try:
                for reaped in await self._store.reap_expired_leases():
                    log.warning("job_reaped", job_id=str(reaped.job_id), state=reaped.state)
            except DatabaseAway as error:
                log.debug("reap_delayed", error=str(error))

    async def _tidy(self) -> None:
        """Remove what jobs left on the volume that nobody came back for."""
        settings = self._settings
        while True:
            running = {str(job.id) for job, _stop in self._attempts.values()}
            await asyncio.to_thread(remove_old_jobs, settings.work_dir, settings.keep_days, running)
            await asyncio.sleep(TIDY_SECONDS)

    async def _say_goodbye(self) -> None:
        try:
            await self._store.end_worker(self._host.worker_id)
        except DatabaseAway as error:
            log.warning("worker_row_left", error=str(error))

    # -- one attempt --------------------------------------------------------------------------------------------

    async def _attempt(self, job: ClaimedJob, stop: Stop, places: tuple[int, ...]) -> None:
        structlog.contextvars.bind_contextvars(job_id=str(job.id), attempt=job.attempt)
        log.info("job_claimed", waited_seconds=round(job.waited_seconds, 3), lease_epoch=job.lease_epoch)
        async with self._with.leases.hold(job.lease, stop) as held:
            reporter = self._reporter(job, held, places)
            writing = asyncio.create_task(reporter.run())
            limits = asyncio.create_task(_watch_limits(job, reporter, stop))
            try:
                outcome = await self._outcome(job, stop, reporter, places)
            finally:
                limits.cancel()
                writing.cancel()
                await asyncio.gather(limits, writing, return_exceptions=True)
            await self._settle(job, outcome, reporter)
        log.info("attempt_settled", outcome=type(outcome).__name__.lower(), seconds=round(reporter.attempt_seconds, 1))

    def _reporter(self, job: ClaimedJob, held: HeldLease, places: tuple[int, ...]) -> Reporter:
        asked_price, num_gpus = _asked_price(job)
        meter = Meter(
            price=price_per_gpu_hour(self._settings.cost_per_gpu_hour, asked_price),
            num_gpus=num_gpus,
            already_spent=job.spent,
        )
        on_gpu = self._host.device == "cuda"
        return Reporter(
            self._store,
            job.lease,
            meter=meter,
            on_refused=held.doubt,
            read_load=(lambda: read_load(places[0])) if on_gpu else (lambda: None),
            on_written=lambda status: self._with.courier.send_progress(job, status),
        )

    async def _outcome(self, job: ClaimedJob, stop: Stop, reporter: Reporter, places: tuple[int, ...]) -> Outcome:
        """Run the attempt and say how it ended. Decides everything, writes nothing."""
        try:
            return await self._work(job, stop, reporter, places)
        except Interrupted as interruption:
            return self._outcome_of_stop(interruption.reason, reporter)
        except JobError as error:
            transient = isinstance(error, JobDelayed)
            return Failed(error.code, error.message, error.hint, error.stack, transient)
        except Exception as error:  # the outermost loop of an attempt: the daemon lives on
            log.exception("attempt_broke")
            return Failed(
                ErrorCode.INTERNAL,
                f"The service failed while it worked on this job ({type(error).__name__}).",
                hint="This is a fault of the service, not of your job. The job is tried again.",
                stack=repr(error),
                transient=True,
            )

    async def _work(self, job: ClaimedJob, stop: Stop, reporter: Reporter, places: tuple[int, ...]) -> Outcome:
        settings = self._settings
        row = _parse(job)
        if row.unknown_keys:
            reporter.tell("unknown_keys", f"Unknown and unused: {', '.join(row.unknown_keys)}.")
        workspace = Workspace.open(settings.work_dir, job.id, job.lease_epoch)

        # The data first: they are what is wrong most often, and cost seconds where a model may cost hours.
        reporter.enter(Stage.DOWNLOADING)
        dataset = await _until_stopped(fetch_dataset(job, settings, self._with.storage, workspace.dataset_path), stop)
        model = await _until_stopped(
            resolve_model(row.hyperparameters.base_model, settings, reporter.note_download), stop
        )
        adapter_bytes = await asyncio.to_thread(expected_adapter_bytes, model.path, row.hyperparameters)
        await _until_stopped(self._with.storage.check(adapter_bytes), stop)

        spec = JobSpec(
            job_id=str(job.id),
            attempt=job.attempt,
            lease_epoch=job.lease_epoch,
            base_model=model.name,
            model_path=model.path,
            model_revision=model.revision,
            dataset_path=dataset.path,
            work_dir=workspace.attempt_dir,
            checkpoint_dir=workspace.checkpoint_dir,
            output_dir=workspace.adapter_dir,
            quantized_dir=settings.models_dir / ".quantized",
            hyperparameters=row.hyperparameters,
            num_gpus=row.gpu_config.num_gpus,
            device=self._host.device,
            checkpoint_seconds=settings.checkpoint_seconds,
        )
        verdict = await self._train(spec, workspace, stop, reporter, places)
        if isinstance(verdict, Failed):
            return verdict
        if isinstance(verdict, Stopped):
            return self._outcome_of_stop(verdict.reason, reporter)

        reporter.enter(Stage.UPLOADING)
        published = await _until_stopped(
            publish_adapter(
                self._with.storage,
                verdict.adapter_dir,
                job.id,
                job.lease_epoch,
                _manifest_facts(spec, verdict.summary),
                workspace.attempt_dir,
            ),
            stop,
            grace=lambda reason: settings.drain_seconds if reason is StopReason.SHUTDOWN else 0.0,
        )
        return replace(published, summary=verdict.summary)

    async def _train(
        self, spec: JobSpec, workspace: Workspace, stop: Stop, reporter: Reporter, places: tuple[int, ...]
    ) -> Verdict:
        settings = self._settings
        if stop.reason is not None:
            return Stopped(stop.reason)
        return await run_child(
            spec,
            on_event=reporter.report,
            stop=stop,
            patience=Patience(settings.stall_seconds, settings.drain_seconds, settings.kill_seconds),
            log_path=workspace.log_path,
            gpus=places if self._host.device == "cuda" else (),
            command=self._with.trainer_command,
        )

    def _outcome_of_stop(self, reason: StopReason, reporter: Reporter) -> Outcome:
        match reason:
            case StopReason.LEASE_LOST:
                return Superseded()
            case StopReason.CANCELLED:
                return Cancelled()
            case StopReason.SHUTDOWN:
                return Released("the host is shutting down")
            case StopReason.BUDGET:
                return Failed(
                    ErrorCode.BUDGET_EXCEEDED,
                    f"The job reached its max_cost (spent {reporter.cost or 0:.2f} US dollars).",
                    hint="Raise max_cost and retry: it goes on from the last checkpoint.",
                )
            case StopReason.DEADLINE:
                return Failed(
                    ErrorCode.DEADLINE_EXCEEDED,
                    "The job passed its deadline_at before it was done.",
                    hint="Set a later deadline_at and retry: it goes on from the last checkpoint.",
                )
            case _:
                assert_never(reason)

    # -- the ending ---------------------------------------------------------------------------------------------

    async def _settle(self, job: ClaimedJob, outcome: Outcome, reporter: Reporter) -> None:
        """Write the ending, however long the database is away: an ending is never dropped."""
        workspace = Workspace(self._settings.work_dir / str(job.id), job.lease_epoch)
        if isinstance(outcome, Superseded):
            log.warning("attempt_superseded")
            workspace.forget_attempt()
            return
        while True:
            try:
                await _last_words(reporter)
                state = await self._move(job, outcome, reporter.cost)
                break
            except LeaseLost:
                log.warning("ending_refused", outcome=type(outcome).__name__.lower())
                workspace.forget_attempt()
                return
            except DatabaseAway as error:
                log.warning("ending_delayed", error=str(error))
                await asyncio.sleep(AWAY_SECONDS)
        self._with.courier.forget(job.id)
        self._with.courier.wake()
        if state is State.COMPLETED:
            await self._withdraw_earlier(job)
            workspace.remove()
        else:
            # Whoever retries goes on from the checkpoints; what nobody retries is tidied away.
            workspace.forget_attempt()

    async def _withdraw_earlier(self, job: ClaimedJob) -> None:
        """Delete what earlier attempts stored before they died: the row names the winner, nobody misses the rest."""
        try:
            for epoch in range(1, job.lease_epoch):
                await withdraw_adapter(self._with.storage, job.id, epoch)
        except JobError as error:
            log.warning("earlier_objects_left", error=error.message)

    async def _move(self, job: ClaimedJob, outcome: Outcome, cost: float | None) -> State | None:
        store, lease = self._store, job.lease
        match outcome:
            case Completed():
                ending = await store.complete_job(lease, outcome, cost=cost)
            case Failed(transient=True):
                delay = self._retry_delay(job.attempt)
                ending = await store.retry_job(lease, outcome, delay_seconds=delay, cost=cost)
            case Failed():
                ending = await store.fail_job(lease, outcome, cost=cost)
            case Released():
                ending = await store.release_job(lease, outcome.reason, cost=cost)
            case Cancelled():
                ending = await store.end_cancelled_job(lease, cost=cost, data={})
            case Superseded():
                return None
            case _:
                assert_never(outcome)
        log.info("job_moved", state=ending.state, moved=ending.moved)
        return ending.state

    def _retry_delay(self, attempt: int) -> float:
        # Jitter, so that jobs which failed together do not come back together.
        spread = random.uniform(0.75, 1.25)  # noqa: S311 - no secret depends on it
        return min(self._settings.retry_backoff_seconds * 2.0 ** (attempt - 1), MAX_BACKOFF_SECONDS) * spread


async def _last_words(reporter: Reporter) -> None:
    try:
        await reporter.flush()
    except LeaseLost:
        # Cancelled meanwhile, or lost: the move itself finds out which, by the lease and not by the row.
        return


async def _watch_limits(job: ClaimedJob, reporter: Reporter, stop: Stop) -> None:
    """Ask for an end when the job passes what its owner set: money or time."""
    while True:
        await asyncio.sleep(LIMITS_SECONDS)
        if job.max_cost is not None and (reporter.cost or 0.0) >= job.max_cost:
            stop.request(StopReason.BUDGET)
        seconds_left = job.seconds_to_deadline(reporter.attempt_seconds)
        if seconds_left is not None and seconds_left <= 0:
            stop.request(StopReason.DEADLINE)


async def _until_stopped(
    step: Awaitable[T], stop: Stop, grace: Callable[[StopReason], float] = lambda _reason: 0.0
) -> T:
    """Await one step; on a stop request give it its grace, then cut it short and raise Interrupted."""
    task = asyncio.ensure_future(step)
    asked = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await asyncio.wait({task}, timeout=grace(asked.result()))
        if task.done():
            return task.result()
        raise Interrupted(asked.result())
    finally:
        asked.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return


def _parse(job: ClaimedJob) -> ParsedRow:
    try:
        return parse_row(job.hyperparameters, job.gpu_config)
    except SpecInvalid as invalid:
        listed = "\n".join(f"- {fault.field}: {fault.message}" for fault in invalid.faults)
        count = f"{len(invalid.faults)} fault{'s' if len(invalid.faults) > 1 else ''}"
        raise JobFailed(
            ErrorCode.INVALID_SPEC,
            f"The job cannot be run as it is written: {count}.\n{listed}",
            hint="Correct the fields and insert the job again.",
        ) from invalid


def _asked_price(job: ClaimedJob) -> tuple[float | None, int]:
    try:
        config = parse_row({}, job.gpu_config).gpu_config
    except SpecInvalid:
        return None, 1
    return config.cost_per_gpu_hour, config.num_gpus


def _manifest_facts(spec: JobSpec, summary: dict[str, Any]) -> dict[str, Any]:
    """What lies beside the adapter for whoever serves it: what it was made from, and how it went."""
    return {
        "job_id": spec.job_id,
        "base_model": spec.base_model,
        "base_model_revision": spec.model_revision,
        "hyperparameters": spec.hyperparameters.model_dump(mode="json"),
        "summary": summary,
        "versions": installed_versions(),
    }
