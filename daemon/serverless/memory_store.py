"""An in-memory job store for serverless workers that run without a database.

The worker above it is the same, and so are its moves; what is written here is read back into the
caller's answer, and its endings go to the callback URL from an outbox that lives as long as the process.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

from daemon.database.connection import Database
from daemon.gateway.job_rows import Refused, Standing, unknown_job
from daemon.gateway.schemas import Submission
from daemon.host.inspect import MEMORY_TOLERANCE, Host
from daemon.queue.job import ClaimedJob
from daemon.queue.rows import Callback
from daemon.queue.states import HELD, State
from daemon.queue.store import FoundJob, SqlJobStore
from daemon.serverless.row_store import cannot_serve
from training.spec import Fault, ParsedRow, SpecInvalid, parse_row

MAX_ATTEMPTS = 3
NOBODY = UUID(int=0)

_WORDS = {State.COMPLETED: "completed", State.FAILED: "failed", State.CANCELLED: "failed"}
# As the announcing trigger names them.
_OUTBOX_EVENTS = {State.QUEUED: "job.released", State.RUNNING: "job.started"}


@dataclass
class _Job:
    id: UUID
    submission: Submission
    need_gpus: int
    queued_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    state: State = State.QUEUED
    attempt: int = 0
    due_at: float = 0.0
    spent: float = 0.0
    columns: dict[str, Any] = field(default_factory=dict)
    uploads: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)

    def leftovers(self, bucket: str) -> list[dict[str, Any]]:
        """What was noted as stored and is not needed, and the note of what the answer names."""
        path = self.columns.get("adapter_path") if self.state is State.COMPLETED else None
        return [
            {**noted, "named": path == f"{bucket}/{noted['objects'][0]}"}
            for noted in self.uploads.values()
            if noted["kind"] == "adapter" or self.state in _WORDS
        ]


class MemoryJobStore(SqlJobStore):
    """A job store that never connects. The leases it gives out are never lost: nobody else knows of these jobs."""

    def __init__(self, host: Host, allowed_models: Collection[str]) -> None:
        super().__init__(Database("postgresql://", application_name="none"))
        self._host = host
        self._allowed_models = allowed_models
        self._jobs: dict[UUID, _Job] = {}
        self._outbox: dict[UUID, Callback] = {}
        self._not_before: dict[UUID, float] = {}
        self._sequence = 0

    # -- what the serverless host asks ----------------------------------------------------------------------------

    async def submit(self, submission: Submission) -> UUID:
        """Remember a job; a job_id that was seen before is the same job.

        Raises Refused, before anything is downloaded, for what no attempt of this host could serve."""
        if submission.dataset_url is None:
            raise Refused(
                422, "A job needs a dataset.", faults=(Fault("dataset_url", "needed: no database is configured"),)
            )
        try:
            wanted = parse_row(submission.hyperparameters, submission.gpu_config)
        except SpecInvalid as invalid:
            raise Refused(422, "The job cannot be run as it is written.", faults=tuple(invalid.faults)) from invalid
        if lacking := _lacking(self._host, self._allowed_models, wanted):
            raise cannot_serve(lacking)
        own_id = submission.job_id or str(uuid4())
        job_id = submission.row_id or uuid5(NAMESPACE_URL, own_id)
        self._jobs.setdefault(job_id, _Job(job_id, submission, wanted.gpu_config.num_gpus))
        return job_id

    async def claim(self, job_id: UUID) -> ClaimedJob | None:
        """Take the job if it waits and its time has come."""
        job = self._jobs[job_id]
        if job.state is not State.QUEUED or time.monotonic() < job.due_at:
            return None
        job.attempt += 1
        job.columns = {"current_stage": "setup", "progress": 0.0, "current_epoch": 0, "current_step": 0}
        self._move(job, State.INITIALIZING)
        return ClaimedJob(
            id=job.id,
            lease_epoch=job.attempt,
            lease_token=uuid4(),
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

    async def standing(self, job_id: UUID) -> Standing:
        job = self._jobs.get(job_id)
        if job is None:
            raise unknown_job()
        return Standing(job_id, job.state.value, self._contract(job))

    async def cancel(self, job_id: UUID) -> None:
        """Cancelling twice is no error, and what has ended stays as it ended."""
        job = self._jobs[job_id]
        if job.state in (State.QUEUED, State.INITIALIZING, State.RUNNING):
            self._move(job, State.CANCELLED, error_message="cancelled by request", error_hint=None)

    async def read_limits(self, job_id: UUID) -> tuple[float | None, float | None] | None:  # noqa: ARG002
        """None are set: a request carries neither max_cost nor deadline_at."""
        return None, None

    async def find_job(self, job_id: UUID) -> FoundJob:
        """Nothing is hidden from the only one who knows of these jobs."""
        job = self._jobs[job_id]
        return FoundJob(
            can_tell=True,
            job_exists=True,
            epoch=job.attempt,
            state=job.state.value,
            dataset_exists=True,
            holder={"epoch": job.attempt} if job.state in HELD else None,
            checkpoints=0,
            tables="",
        )

    # -- what the worker writes ------------------------------------------------------------------------------------

    async def _run(self, name: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        match name:
            case "claim_callbacks":
                return self._claim_callbacks(parameters)
            case "deliver_callback" | "bury_callback":
                return [{"id": parameters["id"]}] if self._outbox.pop(parameters["id"], None) else []
            case "postpone_callback":
                self._not_before[parameters["id"]] = time.monotonic() + parameters["delay_seconds"]
                return [{"id": parameters["id"]}] if parameters["id"] in self._outbox else []
            case "oldest_callback":
                ages = [(datetime.now(UTC) - callback.created_at).total_seconds() for callback in self._outbox.values()]
                return [{"seconds": max(ages, default=None)}]
        job = self._jobs[parameters["job_id"]]
        match name:
            case "renew_lease":
                return [{"state": job.state.value}]
            case "start_job":
                if job.state is State.INITIALIZING:
                    self._move(job, State.RUNNING)
                return [{"id": job.id}] if job.state is State.RUNNING else []
            case "record_progress":
                job.columns |= {
                    "current_stage": parameters["stage"],
                    "progress": max(job.columns["progress"], parameters["progress"]),
                    "current_epoch": parameters["current_epoch"],
                    "current_step": parameters["current_step"],
                    "current_metrics": parameters["metrics"].obj,
                }
                return [{"id": job.id, "sequence": self._next_sequence() if job.submission.callback_url else None}]
            case "record_plan" | "record_event" | "finish_checkpoint_upload":
                return [{"id": job.id}]
            case "note_upload" | "forget_upload" | "read_leftovers" | "read_stored_checkpoints" | "read_last_claim":
                return self._account(name, job, parameters)
            case "record_metrics" | "forget_metrics":
                return [{"held": 1}]
            case _:
                return self._end_attempt(name, job, parameters)

    @staticmethod
    def _account(name: str, job: _Job, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What lies in Storage of the job."""
        match name:
            case "note_upload":
                noted = {key: parameters[key] for key in ("job_id", "epoch", "kind", "step", "objects")}
                job.uploads[parameters["epoch"], parameters["step"]] = noted
                return [noted]
            case "forget_upload":
                job.uploads.pop((parameters["noted_epoch"], parameters["step"]), None)
                return []
            case "read_leftovers":
                return job.leftovers(parameters["bucket"])
            case _:
                # Checkpoints: whoever could resume from them has them on its own disk. Claims: nobody else makes any.
                return []

    def _end_attempt(self, name: str, job: _Job, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        job.spent = float(parameters.get("cost") or job.spent)
        if name in ("end_cancelled_job", "settle_cancelled_job", "read_job_state"):
            return [{"ended": 1, "state": job.state.value, "noted": bool(job.uploads)}]
        if job.state is State.CANCELLED:
            return [{"ended": 1, "state": None, "noted": bool(job.uploads)}]
        error = {key: value for key, value in parameters.items() if key.startswith("error_")}
        match name:
            case "complete_job":
                adapter = {key: value for key, value in parameters.items() if key.startswith("adapter_")}
                self._move(job, State.COMPLETED, progress=100.0, **adapter)
            case "fail_job":
                self._move(job, State.FAILED, **error)
            case "retry_job" if job.attempt < MAX_ATTEMPTS:
                job.due_at = time.monotonic() + parameters["delay_seconds"]
                self._move(job, State.QUEUED, **error)
            case "retry_job":
                self._move(job, State.FAILED, **error)
            case "return_job":
                # There is one host: whoever called sees the fault, and RunPod replaces the worker.
                self._move(job, State.FAILED, **error)
            case "release_job":
                job.attempt -= 1
                self._move(job, State.QUEUED)
            case _:
                raise NotImplementedError(f"{name} has no meaning without a database")
        return [{"ended": 1, "state": job.state.value, "noted": bool(job.uploads)}]

    def _move(self, job: _Job, state: State, **columns: Any) -> None:
        job.state = state
        job.columns |= columns
        url = job.submission.callback_url
        if url is None:
            return
        sequence = self._next_sequence()
        event = _OUTBOX_EVENTS.get(state, f"job.{state.value}")
        told = {"job_id": str(job.id), "event": event, "sequence": sequence, "at": datetime.now(UTC).isoformat()}
        callback = Callback(
            id=uuid4(),
            token=uuid4(),
            job_id=job.id,
            sequence=sequence,
            url=url,
            host=urlsplit(url).netloc.rpartition("@")[2].lower(),
            event=event,
            payload=self._contract(job) | told,
            attempts=0,
            created_at=datetime.now(UTC),
        )
        self._outbox[callback.id] = callback

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def _claim_callbacks(self, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        # As the statement does: of each host the first, once at a time, so that a dead one holds up nobody else.
        first: dict[str, Callback] = {}
        for callback in self._outbox.values():
            first.setdefault(callback.host, callback)
        now = time.monotonic()
        due = [callback for callback in first.values() if self._not_before.get(callback.id, 0.0) <= now]
        claimed = [replace(callback, attempts=callback.attempts + 1) for callback in due[: parameters["limit"]]]
        for callback in claimed:
            self._outbox[callback.id] = callback
            self._not_before[callback.id] = now + parameters["lock_seconds"]
        return [vars(callback) for callback in claimed]

    def _contract(self, job: _Job) -> dict[str, Any]:
        """The keys of training_status_json (sql/migrations)."""
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
            "error_code": job.columns.get("error_code"),
            "error_message": job.columns.get("error_message"),
            "error_hint": job.columns.get("error_hint"),
        }


def _lacking(host: Host, allowed_models: Collection[str], wanted: ParsedRow) -> list[str]:
    """What the job asks for and this host lacks, by the conditions and in the words of claim_job_by_id.sql."""
    gpu, model = wanted.gpu_config, wanted.hyperparameters.base_model
    lacking = []
    if host.device == "cuda" and gpu.num_gpus > len(host.gpus):
        lacking.append(f"{gpu.num_gpus} GPUs, and this host has {len(host.gpus)}")
    memory = host.gpu_memory_gb
    if memory is not None and gpu.gpu_memory_gb is not None and gpu.gpu_memory_gb * MEMORY_TOLERANCE > memory:
        lacking.append(f"a GPU of {gpu.gpu_memory_gb:g} GB, and this host's has {memory:g} GB")
    kind = (gpu.gpu_type or "").strip()
    if host.gpu_type is not None and kind.lower() not in host.gpu_type.lower():
        lacking.append(f"a GPU of the type {kind}, and this host has {host.gpu_type}")
    if allowed_models and model is not None and model not in allowed_models:
        lacking.append(f"the model {model}, and this host may load {', '.join(allowed_models)} only")
    return lacking
