"""Runs one attempt at a claimed job. Start reading at `_work`.

    parse -> fetch the data, find the model -> run the trainer -> publish the adapter

An adapter that an earlier attempt has finished is published without a model or a trainer.

Each step either returns what the next one needs or raises a JobError; a stop request cuts any of
them short. The outcome is decided here and written by daemon.attempt.settle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC
from pathlib import Path
from typing import TypeVar

import structlog

from daemon.attempt.after_training import check_deliveries, wanted_deliveries
from daemon.attempt.choose_trackers import Tracking, choose_trackers
from daemon.attempt.cleanup import FinishedAttempt
from daemon.attempt.collaborators import Collaborators
from daemon.attempt.finished_adapter import EarlierAdapters, FinishedAdapter, keep_finished, spec_hash
from daemon.attempt.limits import enforce_limits
from daemon.attempt.publishing import Publishing, manifest_facts
from daemon.attempt.settle import settle
from daemon.attempt.stopped import outcome_of_stop
from daemon.attempt.stored_checkpoints import CheckpointStore
from daemon.attempt.work_folder import WorkFolder
from daemon.base_model.candidates import ResolvedModel
from daemon.base_model.resolve import folders_exist, resolve_model
from daemon.base_model.upload_size import expected_adapter_bytes
from daemon.chores import Chores
from daemon.database.retry import retry_until_database_is_back
from daemon.dataset.fetch import fetch_dataset
from daemon.dataset.prefetch import NEAR_END_SECONDS, EarlyDataset
from daemon.dataset.transfer import FetchedDataset
from daemon.errors import HostFault, JobDelayed, JobError, JobFailed, LeaseLost, StorageAway
from daemon.host.gpu_load import read_load
from daemon.queue.job import ClaimedJob, JobDataset, Returned
from daemon.queue.lease import HeldLease
from daemon.queue.outcome import Failed, Outcome, Superseded
from daemon.report.cost import CostMeter, price_per_gpu_hour
from daemon.report.reporter import Reporter
from daemon.report.trained_with import model_in_words
from daemon.settings import quantized_dir
from daemon.stop_request import Stop, StopReason
from daemon.trainer.process import Timeouts
from daemon.trainer.verdict import Stopped, Verdict
from training.events import CheckpointSaved, ErrorCode, Event, Stage
from training.spec import JobSpec, ParsedRow, SpecInvalid, parse_row

log = structlog.get_logger()
T = TypeVar("T")

# How often a grace period checks for a second SIGTERM or a lost lease.
LOOK_SECONDS = 0.25
# How often a hidden dataset row is looked for again.
HIDDEN_SECONDS = 5.0


class Interrupted(Exception):
    """A stop request arrived between two steps, or cut one short."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason)
        self.reason = reason


class Attempt:
    """A claimed job, the slots (GPUs, or slots of a CPU host) it may use, and a way to stop it.

    `early` is its dataset, if that was fetched before the claim. `on_near_end` is called repeatedly when training is
    about to end."""

    def __init__(
        self,
        collaborators: Collaborators,
        job: ClaimedJob,
        stop: Stop,
        slots: tuple[int, ...],
        *,
        early: EarlyDataset | None,
        on_near_end: Callable[[], None],
    ) -> None:
        self._with = collaborators
        self._job = job
        self._stop = stop
        self._slots = slots
        self._early = early
        self._on_near_end = on_near_end
        self._publishing = Publishing(collaborators, job)
        self._is_trained = False
        # A job without a callback adds nothing to the outbox: the courier need not look.
        self._tell = collaborators.courier.wake if job.callback_url is not None else lambda: None

    async def run(self) -> FinishedAttempt:
        """Holds the lease, does the work, writes the outcome. Nothing of it still runs on return."""
        job = self._job
        structlog.contextvars.bind_contextvars(job_id=str(job.id), attempt=job.attempt)
        self._tell()  # the claim is reported
        async with self._with.leases.hold(job.lease, self._stop) as held:
            reporter = self._reporter(held)
            try:
                async with Chores(self._with.troubles) as chores:
                    chores.start(f"reports of job {job.id}", reporter.run)
                    chores.start(
                        f"limits of job {job.id}",
                        lambda: enforce_limits(job, reporter, self._with.store, self._stop),
                    )
                    outcome = await self._outcome(reporter)
            finally:
                if self._early is not None:
                    self._early.discard()
            self._with.courier.forget(job.id)
            ending = await settle(
                job, outcome, reporter, stop=self._stop, store=self._with.store, settings=self._with.settings
            )
            self._tell()
        log.info("attempt_settled", outcome=type(outcome).__name__.lower(), seconds=round(reporter.attempt_seconds, 1))
        filled = isinstance(outcome, Failed | Returned) and outcome.code is ErrorCode.DISK_FULL
        return FinishedAttempt(job, ending, self._publishing.begun, filled)

    def _reporter(self, held: HeldLease) -> Reporter:
        asked_price, num_gpus = _asked_price(self._job)
        meter = CostMeter(
            price=price_per_gpu_hour(self._with.platform_price(), self._with.settings.cost_per_gpu_hour, asked_price),
            num_gpus=num_gpus,
            already_spent=self._job.spent,
        )
        on_gpu = self._with.host.device == "cuda"
        return Reporter(
            self._with.store,
            self._job.lease,
            meter=meter,
            on_refused=held.doubt,
            read_load=(lambda: read_load(self._with.host.gpus[self._slots[0]])) if on_gpu else (lambda: None),
            on_moved=self._tell,
            on_written=lambda status: self._with.courier.send_progress(self._job, status),
            redaction=self._with.redaction,
            most_points=self._with.settings.metrics_points,
        )

    async def _outcome(self, reporter: Reporter) -> Outcome:
        """Does the work and returns how it ended. Decides everything, writes nothing."""
        try:
            try:
                return await self._work(reporter)
            except StorageAway as error:
                return await self._return_for_storage(error)
        except Interrupted as interruption:
            return outcome_of_stop(interruption.reason, reporter, is_trained=self._is_trained)
        except LeaseLost:
            return Superseded()
        except HostFault as fault:
            self._with.fitness.report(fault.part, fault.for_the_operator)
            return Returned(fault.part, fault.code, fault.message, fault.hint, fault.detail)
        except JobError as error:
            transient = isinstance(error, JobDelayed)
            return Failed(error.code, error.message, error.hint, error.detail, transient)
        except Exception as error:  # the outermost loop of an attempt: the daemon must go on
            log.exception("attempt_broke")
            return Failed(
                ErrorCode.INTERNAL,
                f"The service failed while it worked on this job ({type(error).__name__}).",
                hint="This is a fault of the service, not of your job. The job is tried again.",
                stack=repr(error),
                transient=True,
            )

    async def _work(self, reporter: Reporter) -> Outcome:
        job, stop, settings = self._job, self._stop, self._with.settings
        row = _parse(job)
        if row.unknown_keys:
            reporter.tell("unknown_keys", f"these keys are unknown and are ignored: {', '.join(row.unknown_keys)}")
        tracking = choose_trackers(row.hyperparameters, settings)
        workspace = WorkFolder.open(settings.work_dir, job.lease)

        # The data first: it is wrong most often, and fetching it takes seconds where a model may take hours.
        reporter.enter(Stage.DOWNLOADING)
        dataset = await _until_stopped(self._fetch_dataset(workspace.dataset_path), stop)
        earlier = EarlierAdapters(self._with.uploads, self._with.storage, job, workspace)
        adapter = await _until_stopped(earlier.adopt(row.hyperparameters, dataset.sha256, reporter), stop)
        if adapter is None:
            ended = await self._run_trainer(row, tracking, dataset, workspace, reporter)
            if not isinstance(ended, FinishedAdapter):
                return ended
            adapter = ended
        self._is_trained = True

        reporter.enter(Stage.UPLOADING)
        published = await _until_stopped(
            self._publishing.publish(adapter, workspace, reporter),
            stop,
            grace=lambda reason: settings.drain_seconds if reason is StopReason.SHUTDOWN else 0.0,
        )
        wanted = wanted_deliveries(row.hyperparameters, settings)
        return replace(published, summary=adapter.summary, deliveries=wanted)

    async def _run_trainer(
        self, row: ParsedRow, tracking: Tracking, dataset: FetchedDataset, workspace: WorkFolder, reporter: Reporter
    ) -> FinishedAdapter | Outcome:
        """Finds the model and trains. Returns the adapter, or how the attempt ended without one."""
        job, stop, settings = self._job, self._stop, self._with.settings
        model = await _until_stopped(self._find_model(row.hyperparameters.base_model, reporter), stop)
        await _until_stopped(check_deliveries(job, model.name, row.hyperparameters, settings, reporter), stop)
        adapter_bytes = await asyncio.to_thread(expected_adapter_bytes, model.path, row.hyperparameters)
        await _until_stopped(self._with.storage.check(adapter_bytes), stop)

        keeper = None
        if settings.checkpoints_in_storage:
            keeper = CheckpointStore(self._with.uploads, self._with.storage, job, workspace, reporter.tell)
            await _until_stopped(keeper.fetch(), stop)

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
            quantized_dir=quantized_dir(settings),
            hyperparameters=row.hyperparameters,
            num_gpus=len(self._slots),
            device=self._with.host.device,
            compute_type=settings.asked_compute_type,
            checkpoint_seconds=settings.checkpoint_seconds,
            trackers=tracking.trackers,
            # The first attempt's date: with another one, a template that tells it would make checkpoints useless.
            today=(job.started_at or job.claimed_at).astimezone(UTC).date(),
        )
        verdict = await self._train(spec, tracking, workspace, reporter, keeper)
        if isinstance(verdict, Failed):
            return await self._job_or_host(verdict)
        if isinstance(verdict, Stopped):
            return outcome_of_stop(verdict.reason, reporter, is_trained=False)
        spec_sha256 = spec_hash(row.hyperparameters.base_model or model.name, row.hyperparameters, dataset.sha256)
        facts = manifest_facts(spec, spec_sha256, reporter, verdict)
        return await asyncio.to_thread(keep_finished, workspace, verdict.adapter_dir, facts)

    async def _fetch_dataset(self, to: Path) -> FetchedDataset:
        dataset, around = await self._seen_dataset(), self._with
        known = await self._early.take(to) if self._early is not None else None
        try:
            return await fetch_dataset(
                dataset, around.settings, around.storage, to, known=known, owns_file=around.owns_file
            )
        finally:
            if known is not None:
                known.path.unlink(missing_ok=True)

    async def _seen_dataset(self) -> JobDataset:
        """Returns the job's dataset. Waits while its row is hidden from us, which is not the job's fault."""
        dataset = self._job.dataset
        while dataset.dataset_url is None and dataset.dataset_user_id is None:
            seen = await retry_until_database_is_back(
                lambda: self._with.store.read_dataset(dataset), "dataset_not_read"
            )
            if seen is not None:
                return seen
            log.error("dataset_hidden", dataset_id=str(dataset.dataset_id))
            await asyncio.sleep(HIDDEN_SECONDS)
        return dataset

    async def _find_model(self, asked: str | None, reporter: Reporter) -> ResolvedModel:
        """Finds the job's base model, else that of an attempt that has trained a step, else the default."""
        settings, earlier = self._with.settings, self._job.base_model
        try:
            model = await resolve_model(asked or earlier, settings, reporter.note_download)
        except JobFailed as error:
            if error.code is ErrorCode.MODEL_NOT_FOUND and not await asyncio.to_thread(folders_exist, settings):
                raise HostFault(
                    "models folder", error.code, "The host has no models folder.", detail=error.for_the_operator
                ) from error
            raise
        used = {"base_model": model.name, "model_revision": model.revision, "gpu_type": self._with.host.gpu_type}
        reporter.train_with(used)
        reporter.tell("base_model", model_in_words(model.name, model.revision, asked, earlier), used)
        return model

    async def _train(
        self,
        spec: JobSpec,
        tracking: Tracking,
        workspace: WorkFolder,
        reporter: Reporter,
        keeper: CheckpointStore | None,
    ) -> Verdict:
        settings = self._with.settings
        if self._stop.reason is not None:
            return Stopped(self._stop.reason)

        def hear(event: Event) -> None:
            reporter.report(event)
            if reporter.seconds_left is not None and reporter.seconds_left <= NEAR_END_SECONDS:
                self._on_near_end()
            if keeper is not None and isinstance(event, CheckpointSaved):
                keeper.offer(event.step)

        try:
            return await self._with.trainers.run(
                spec,
                self._slots,
                on_event=hear,
                stop=self._stop,
                patience=Timeouts(settings.stall_seconds, settings.drain_seconds, settings.kill_seconds),
                log_path=workspace.log_path,
                own_environment=tracking.environment,
            )
        finally:
            if keeper is not None:
                await keeper.finish(settings.drain_seconds if self._stop.saves_a_checkpoint else 0.0, self._stop)

    async def _return_for_storage(self, error: StorageAway) -> Returned:
        """The storage is needed before and after each training. A probe decides whether this host goes on claiming."""
        fitness = self._with.fitness
        fault = await _until_stopped(fitness.probe(fitness.storage_part), self._stop)
        if fault is not None:
            fitness.report(fitness.storage_part, fault)
        log.warning("storage_away", error=error.for_the_operator, works_again=fault is None)
        return Returned(
            fitness.storage_part, error.code, error.message, error.hint, error.detail, works_again=fault is None
        )

    async def _job_or_host(self, failed: Failed) -> Outcome:
        """Decides whether the host is at fault. A probe checks it first: the model may only need a missing package."""
        part = failed.host
        if part is None:
            return failed
        detail: str | None = failed.message
        if part in ("trainer", "GPU"):
            detail = await _until_stopped(self._with.fitness.probe(part), self._stop)
            if detail is None:
                return replace(failed, host=None)
        self._with.fitness.report(part, f"{failed.message} ({detail})" if detail != failed.message else detail)
        return Returned(part, failed.code, failed.message, failed.hint, failed.stack)


async def _until_stopped(
    step: Awaitable[T], stop: Stop, grace: Callable[[StopReason], float] = lambda _reason: 0.0
) -> T:
    """Awaits one step; after a stop request and its grace period, cancels the step and raises Interrupted.

    A lost lease or a second SIGTERM ends the grace period early."""
    task = asyncio.ensure_future(step)
    asked = asyncio.create_task(stop.wait())
    clock = asyncio.get_running_loop().time
    try:
        await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked_at = clock()
        while not task.done():
            reason = await stop.wait()
            left = asked_at + grace(reason) - clock()
            if left <= 0 or stop.hurried:
                raise Interrupted(reason)
            await asyncio.wait({task}, timeout=min(left, LOOK_SECONDS))
        return task.result()
    finally:
        asked.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


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
