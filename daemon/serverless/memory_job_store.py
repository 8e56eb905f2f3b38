"""An in-memory job store for serverless workers that run without a database.

The worker is the same, and so are the moves. What is stored here becomes part of the result,
and final states go to the callback URL from an outbox that lives as long as the process.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

from daemon.database.column_types import clean_json, clean_text, fit_integer, fit_numeric
from daemon.errors import LeaseLost
from daemon.gateway.differences import notice_of
from daemon.gateway.job_rows import Standing, dataset_needed, invalid_job, unknown_job
from daemon.gateway.schemas import Submission
from daemon.host.inspect import MEMORY_TOLERANCE, Host
from daemon.queue.fitted_columns import adapter_columns, error_columns, percent
from daemon.queue.job import ClaimedJob, JobDataset, Lease, Returned
from daemon.queue.outcome import Completed, Failed
from daemon.queue.rows import Ending, FoundJob, Limits, MetricPoint
from daemon.queue.states import HELD, UNFINISHED, State
from daemon.serverless.memory_job import MemoryJob
from daemon.serverless.memory_outbox import MemoryOutbox
from daemon.serverless.row_store import cannot_serve
from daemon.storage.interface import Location
from daemon.storage.upload_log import RecordedUpload, UploadKind
from training.spec import ParsedRow, SpecInvalid, parse_row

MAX_ATTEMPTS = 3
RETURN_SECONDS = 30.0
NOBODY = UUID(int=0)

_WORDS = {State.COMPLETED: "completed", State.FAILED: "failed", State.CANCELLED: "failed"}
# The same event names as the announcing trigger uses.
_OUTBOX_EVENTS = {State.QUEUED: "job.released", State.RUNNING: "job.started"}
_NEEDS_A_DATABASE = "This endpoint has no database, which exports and pushes need. Make them from the stored adapter."


class MemoryJobStore:
    """A JobStore and an UploadLog without a connection: one process remembers its own jobs."""

    def __init__(self, host: Host, allowed_models: Collection[str], outbox: MemoryOutbox) -> None:
        self._host = host
        self._allowed_models = allowed_models
        self._outbox = outbox
        self._jobs: dict[UUID, MemoryJob] = {}

    # -- for the serverless host ----------------------------------------------------------------------------------

    async def submit(self, submission: Submission) -> UUID:
        """Adds a job; a job_id that was seen before is the same job.

        Raises Refused, before anything is downloaded, for a job that this host cannot serve."""
        if submission.dataset_url is None:
            raise dataset_needed("no database is configured")
        try:
            wanted = parse_row(submission.hyperparameters, submission.gpu_config)
        except SpecInvalid as invalid:
            raise invalid_job(invalid) from invalid
        if lacking := _lacking(self._host, self._allowed_models, wanted):
            raise cannot_serve(lacking)
        own_id = submission.job_id or str(uuid4())
        job_id = submission.row_id or uuid5(NAMESPACE_URL, own_id)
        self._jobs.setdefault(job_id, MemoryJob(job_id, submission, wanted.gpu_config.num_gpus))
        return job_id

    async def notice(self, submission: Submission, job_id: UUID) -> str | None:
        """Returns what a repeated submit asks for and the first one did not."""
        return notice_of(submission, self._jobs[job_id].submission.model_dump() | {"storage_path": None})

    async def claim(self, job_id: UUID) -> ClaimedJob | None:
        """Claims the job if it waits and is due. `submit` has refused jobs that this host cannot serve."""
        return await self.claim_job_by_id(self._host.worker_id, job_id, Limits(), lease_seconds=0.0)

    async def standing(self, job_id: UUID) -> Standing:
        job = self._jobs.get(job_id)
        if job is None:
            raise unknown_job()
        return Standing(job_id, job.state.value, self._contract(job))

    async def cancel(self, job_id: UUID) -> None:
        """Cancels an unfinished job. Cancelling twice is no error, and a final state stays."""
        job = self._jobs[job_id]
        if job.state in UNFINISHED:
            self._move(job, State.CANCELLED, error_message="Cancelled by request.", error_hint=None)

    # -- JobStore: reads -------------------------------------------------------------------------------------------

    async def claim_job_by_id(
        self,
        worker_id: UUID,  # noqa: ARG002
        job_id: UUID,
        limits: Limits,  # noqa: ARG002
        *,
        lease_seconds: float,  # noqa: ARG002
    ) -> ClaimedJob | None:
        job = self._jobs.get(job_id)
        if job is None or job.state is not State.QUEUED or time.monotonic() < job.due_at:
            return None
        job.attempt += 1
        job.epoch += 1
        job.lease, job.is_leased = Lease(job.id, job.epoch, uuid4()), True
        job.columns = {"current_stage": "setup", "progress": 0.0, "current_epoch": 0, "current_step": 0}
        self._move(job, State.INITIALIZING)
        return ClaimedJob(
            id=job.id,
            lease_epoch=job.lease.epoch,
            lease_token=job.lease.token,
            attempt=job.attempt,
            max_attempts=MAX_ATTEMPTS,
            user_id=NOBODY,
            dataset_id=job.id,
            need_gpus=job.need_gpus,
            hyperparameters=job.submission.hyperparameters,
            gpu_config=job.submission.gpu_config,
            dataset_url=job.submission.dataset_url,
            storage_bucket=None,
            storage_path=None,
            dataset_user_id=None,
            callback_url=job.submission.callback_url,
            queued_at=job.queued_at,
            claimed_at=datetime.now(UTC),
            started_at=None,
            spent=job.spent,
        )

    async def find_job(self, job_id: UUID) -> FoundJob:
        job = self._jobs.get(job_id)
        return FoundJob(
            can_tell=True,
            job_exists=job is not None,
            epoch=None if job is None else job.epoch,
            state=None if job is None else job.state.value,
            dataset_exists=job is not None,
            holder=job.lease.parameters() if job is not None and job.lease is not None and job.is_leased else None,
            checkpoints=0,
            tables="",
        )

    async def read_limits(self, job_id: UUID) -> tuple[float | None, float | None] | None:
        """None are set: a request carries neither max_cost nor deadline_at."""
        return (None, None) if job_id in self._jobs else None

    async def read_dataset(self, dataset: JobDataset) -> JobDataset | None:
        return dataset

    async def owns_training_file(self, user_id: UUID, path: str) -> bool:  # noqa: ARG002
        return False

    # -- JobStore: writes under a lease ----------------------------------------------------------------------------

    async def renew_lease(self, lease: Lease, lease_seconds: float) -> State:  # noqa: ARG002
        return self._held(lease).state

    async def start_job(self, lease: Lease) -> None:
        job = self._running(lease)
        if job.state is State.INITIALIZING:
            self._move(job, State.RUNNING)

    async def record_plan(
        self,
        lease: Lease,
        *,
        total_steps: int | None,  # noqa: ARG002
        total_epochs: int | None,  # noqa: ARG002
        estimated_total_cost: float | None,  # noqa: ARG002
        trained_with: Mapping[str, Any],  # noqa: ARG002
    ) -> None:
        self._running(lease)

    async def record_progress(
        self,
        lease: Lease,
        *,
        stage: str,
        progress: float,
        epoch: int,
        step: int,
        metrics: Mapping[str, Any],
        current_cost: float | None,  # noqa: ARG002
        seconds_left: float | None,  # noqa: ARG002
    ) -> int | None:
        job = self._running(lease)
        job.columns |= {
            "current_stage": clean_text(stage, 50),
            "progress": max(job.columns["progress"], percent(progress)),
            "current_epoch": fit_integer(epoch),
            "current_step": fit_integer(step),
            "current_metrics": clean_json(metrics),
        }
        return self._outbox.next_sequence() if job.submission.callback_url else None

    async def record_metrics(self, lease: Lease, points: Sequence[MetricPoint]) -> None:  # noqa: ARG002
        self._held(lease)

    async def forget_metrics(self, lease: Lease, after_step: int | None, *, most: int = 0) -> int:  # noqa: ARG002
        self._held(lease)
        return 0

    async def record_event(self, lease: Lease, kind: str, message: str, data: Mapping[str, Any]) -> None:  # noqa: ARG002
        self._held(lease)

    # -- JobStore: endings -----------------------------------------------------------------------------------------

    async def complete_job(self, lease: Lease, outcome: Completed, *, cost: float | None) -> Ending:
        # Said, not done: what follows a job outlives this process, and its rows need a database.
        undone = [
            {"kind": wanted.kind, "target": wanted.target, "state": "failed", "error_message": _NEEDS_A_DATABASE}
            for wanted in outcome.deliveries
        ]
        return self._end(lease, cost, State.COMPLETED, progress=100.0, deliveries=undone, **adapter_columns(outcome))

    async def fail_job(self, lease: Lease, failed: Failed, *, cost: float | None) -> Ending:
        return self._end(lease, cost, State.FAILED, **error_columns(failed))

    async def retry_job(self, lease: Lease, failed: Failed, *, delay_seconds: float, cost: float | None) -> Ending:
        again = self._job_of(lease).attempt < MAX_ATTEMPTS
        return self._end(
            lease,
            cost,
            State.QUEUED if again else State.FAILED,
            delay_seconds=delay_seconds,
            **error_columns(failed),
        )

    async def release_job(self, lease: Lease, reason: str, *, cost: float | None) -> Ending:  # noqa: ARG002
        return self._end(lease, cost, State.QUEUED, counts=False)

    async def return_job(self, lease: Lease, returned: Returned, *, cost: float | None) -> Ending:
        """There is only one host: the caller gets the error, and RunPod replaces the worker. What works again is tried
        again, as after any fault that may pass."""
        failed = Failed(returned.code, returned.message, returned.hint, returned.stack)
        if returned.works_again:
            return await self.retry_job(lease, failed, delay_seconds=RETURN_SECONDS, cost=cost)
        return self._end(lease, cost, State.FAILED, **error_columns(failed))

    async def end_cancelled_job(self, lease: Lease, *, cost: float | None, data: Mapping[str, Any]) -> Ending:  # noqa: ARG002
        job = self._job_of(lease)
        if job.is_held_by(lease) and job.state is not State.CANCELLED:
            return self._end(lease, cost, State.QUEUED, counts=False)
        return self._end(lease, cost, State.CANCELLED)

    # -- UploadLog -------------------------------------------------------------------------------------------------

    async def record_upload(
        self,
        lease: Lease,
        kind: UploadKind,
        location: Location,  # noqa: ARG002
        objects: Sequence[str],
        *,
        step: int = 0,
    ) -> None:
        job = self._held(lease)
        job.uploads[lease.epoch, kind, step] = RecordedUpload(job.id, lease.epoch, kind, step, [*objects])

    async def finish_checkpoint_upload(self, lease: Lease, step: int, *, manifest_sha256: str, size: int) -> None:  # noqa: ARG002
        self._held(lease)

    async def names_are_ours(self, lease: Lease) -> bool:
        job = self._job_of(lease)
        return job.lease is not None and (job.lease.epoch > lease.epoch or job.lease == lease)

    async def stored_checkpoints(self, job_id: UUID, location: Location) -> list[RecordedUpload]:  # noqa: ARG002
        """Always empty: a later attempt runs in this process and has them on its own disk."""
        return []

    async def stored_adapters(self, job_id: UUID, location: Location) -> list[RecordedUpload]:  # noqa: ARG002
        """Always empty, as for checkpoints."""
        return []

    async def leftovers(
        self,
        location: Location,
        *,
        job_id: UUID | None,
        idle_seconds: float,  # noqa: ARG002
        keep_seconds: float,  # noqa: ARG002
        orphans: bool,  # noqa: ARG002
        limit: int,
    ) -> list[RecordedUpload]:
        """Lists at once what is not needed of jobs without a lease: no other process could want it later."""
        jobs = [self._jobs[job_id]] if job_id is not None else list(self._jobs.values())
        return [upload for job in jobs for upload in job.leftovers(location)][:limit]

    async def forget_upload(self, upload: RecordedUpload) -> None:
        self._jobs[upload.job_id].uploads.pop((upload.epoch, upload.kind, upload.step), None)

    # -- moves -----------------------------------------------------------------------------------------------------

    def _job_of(self, lease: Lease) -> MemoryJob:
        if (job := self._jobs.get(lease.job_id)) is None:
            raise _lost(lease)
        return job

    def _held(self, lease: Lease) -> MemoryJob:
        job = self._job_of(lease)
        if not job.is_held_by(lease):
            raise _lost(lease)
        return job

    def _running(self, lease: Lease) -> MemoryJob:
        """Returns the job of a lease that is held, unless it was cancelled: then its columns are final."""
        job = self._held(lease)
        if job.state not in HELD:
            raise _lost(lease)
        return job

    def _end(
        self,
        lease: Lease,
        cost: float | None,
        target: State,
        *,
        counts: bool = True,
        delay_seconds: float = 0.0,
        **columns: Any,
    ) -> Ending:
        job = self._job_of(lease)
        noted = bool(job.uploads)
        if not job.is_held_by(lease):
            # It was written before, and the answer was lost.
            if job.lease == lease and job.state is target:
                return Ending(True, job.state, noted)
            raise _lost(lease)
        job.is_leased = False
        job.spent = float(fit_numeric(cost, 10, 2) or job.spent)
        if job.state is State.CANCELLED:
            return Ending(target is State.CANCELLED, State.CANCELLED, noted)
        if not counts:
            job.attempt -= 1
        job.due_at = time.monotonic() + max(delay_seconds, 0.0)
        self._move(job, target, **columns)
        return Ending(True, target, noted)

    def _move(self, job: MemoryJob, state: State, **columns: Any) -> None:
        job.state = state
        job.columns |= columns
        if (url := job.submission.callback_url) is not None:
            event = _OUTBOX_EVENTS.get(state, f"job.{state.value}")
            self._outbox.add(job.id, url, event, self._contract(job))

    def _contract(self, job: MemoryJob) -> dict[str, Any]:
        """Returns the keys of training_status_json (sql/migrations)."""
        return {
            "status": _WORDS.get(job.state, "running"),
            "state": job.state.value,
            "progress": job.columns.get("progress", 0.0),
            "current_epoch": job.columns.get("current_epoch", 0),
            "current_step": job.columns.get("current_step", 0),
            "stage": job.columns.get("current_stage", "queued"),
            "metrics": job.columns.get("current_metrics") or {},
            "attempt": job.attempt,
            "cost": job.spent,
            "adapter_path": job.columns.get("adapter_path"),
            "adapter_sha256": job.columns.get("adapter_sha256"),
            "adapter_bytes": job.columns.get("adapter_bytes"),
            "deliveries": job.columns.get("deliveries", []),
            "error_code": job.columns.get("error_code"),
            "error_message": job.columns.get("error_message"),
            "error_hint": job.columns.get("error_hint"),
        }


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(f"the lease {lease.epoch} of job {lease.job_id} is not this host's any more, or the job is final")


def _lacking(host: Host, allowed_models: Collection[str], wanted: ParsedRow) -> list[str]:
    """Lists what the job asks for and this host lacks, by the conditions and in the words of claim_job_by_id.sql."""
    gpu, model = wanted.gpu_config, wanted.hyperparameters.base_model
    lacking = []
    if host.device == "cuda" and gpu.num_gpus > host.gpus_per_job:
        lacking.append(f"{gpu.num_gpus} GPUs, and this host has {host.gpus_per_job}")
    memory = host.gpu_memory_gb
    if memory is not None and gpu.gpu_memory_gb is not None and gpu.gpu_memory_gb * MEMORY_TOLERANCE > memory:
        lacking.append(f"a GPU of {gpu.gpu_memory_gb:g} GB, and this host's has {memory:g} GB")
    kind = (gpu.gpu_type or "").strip()
    if host.gpu_type is not None and kind.lower() not in host.gpu_type.lower():
        lacking.append(f"a GPU of the type {kind}, and this host has {host.gpu_type}")
    if allowed_models and model is not None and model not in allowed_models:
        lacking.append(f"the model {model}, and this host may load {', '.join(allowed_models)} only")
    return lacking
