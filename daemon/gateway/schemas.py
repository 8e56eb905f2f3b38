"""The requests and responses of the two older HTTP contracts, and how each shows a job's status.

Callers of the first submit to /training/… and read running, completed or failed. The second is RunPod's
serverless API. In both, the external id of a job is its own id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from daemon.sentence import as_sentence, with_advice

# No valid job nests deeper. Without a limit, a body of nested brackets would overflow the stack.
MAX_DEPTH = 16
MAX_ID_CHARACTERS = 200
_HTTP_URL = r"^[Hh][Tt][Tt][Pp][Ss]?://[^\s/]"

OldStatus = Literal["running", "completed", "failed"]
ServerlessStatus = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED"]

_SERVERLESS: Mapping[str, ServerlessStatus] = {
    "queued": "IN_QUEUE",
    "initializing": "IN_PROGRESS",
    "running": "IN_PROGRESS",
    "lost": "IN_PROGRESS",
    "completed": "COMPLETED",
    "failed": "FAILED",
    "cancelled": "CANCELLED",
}


class Submission(BaseModel):
    """A job as a caller sends it. Other keys are ignored: older callers send some."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job_id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARACTERS)] | None = Field(
        default=None,
        description="The id of a row that exists (nothing is inserted), or an id of your own: submitted again, it "
        "names the same job, and so it does to /status and /cancel. The row is what runs: a submit changes nothing in "
        "it.",
        examples=["test-123"],
    )
    dataset_url: Annotated[str, Field(max_length=8192, pattern=_HTTP_URL)] | None = Field(
        default=None,
        description="Where the file is; needed unless the row exists, which says so itself.",
        examples=["https://files.example.com/conversations.jsonl"],
    )
    hyperparameters: dict[str, Any] = Field(
        default_factory=dict,
        description="In either spelling: num_epochs or epochs, lora_rank or rank, …; every fault is listed in a 422.",
        examples=[{"base_model": "Qwen/Qwen3-8B", "learning_rate": 0.0002, "batch_size": 4, "epochs": 3, "rank": 16}],
    )
    gpu_config: dict[str, Any] = Field(
        default_factory=dict,
        description="In either spelling: {gpu_type, num_gpus, …} or {type, count}.",
        examples=[{"type": "H100", "count": 1}],
    )
    callback_url: Annotated[str, Field(max_length=2048, pattern=_HTTP_URL)] | None = Field(
        default=None, description="Told of every change of state, by signed webhook."
    )

    @field_validator("*")
    @classmethod
    def _fits_into_a_row(cls, value: Any) -> Any:
        _require_storable(value, 0)
        return value

    @property
    def row_id(self) -> UUID | None:
        """The job's own id, if job_id is a valid id."""
        return as_job_id(self.job_id or "")


class RunRequest(BaseModel):
    """RunPod's envelope. Its `policy` has no effect: a job's limits are in its row."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    input: Submission
    webhook: None = Field(default=None, description="Not served: put a callback_url into `input`.")


Notice = Annotated[
    str | None,
    Field(description="what was asked for and the job's row does not say; absent if they agree. The row is what runs."),
]


class Submitted(BaseModel):
    external_job_id: str
    notice: Notice = None


class Metrics(BaseModel):
    """The newest values; null until they are known."""

    training_loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    throughput: float | None = Field(default=None, description="tokens a second")
    gpu_utilization: float | None = Field(default=None, description="percent")
    gradient_norm: float | None = None


class DeliveryStatus(BaseModel):
    """What follows a completed job: an export of its adapter, say. Whatever becomes of it, the job stays completed."""

    kind: str
    target: str | None = None
    state: Literal["waiting", "running", "done", "failed"]
    path: str | None = Field(default=None, description="in the storage, once it is done")
    bytes: int | None = None
    manifest_sha256: str | None = Field(default=None, description="of the file delivery.json in that folder")
    error_message: str | None = Field(default=None, description="what happened and what to do")


# The older contract as it was, unless the job asked for more.
Deliveries = Annotated[
    list[DeliveryStatus],
    Field(description="what follows the completed job; absent if nothing does", exclude_if=lambda found: not found),
]


class TrainingStatus(BaseModel):
    status: OldStatus = Field(description="running from the submit on; cancelled reads as failed")
    progress: float = Field(description="percent")
    current_epoch: int
    current_step: int
    stage: str | None = Field(
        description="queued, setup, downloading, loading, training, …; lost: its host went silent"
    )
    metrics: Metrics
    error_message: str | None = Field(description="what happened and what to do")
    deliveries: Deliveries = []


class TrainingCancelled(BaseModel):
    external_job_id: str
    status: Literal["cancelled"] = "cancelled"


class Accepted(BaseModel):
    id: str
    status: ServerlessStatus
    notice: Notice = None


class Output(BaseModel):
    status: OldStatus
    progress: float
    current_epoch: int
    current_step: int
    metrics: Metrics
    adapter_path: str | None = Field(description="in the storage: lora-models/adapters/<job>.tar.gz")
    deliveries: Deliveries = []


class RunStatus(BaseModel):
    id: str
    status: ServerlessStatus
    output: Output
    error: str | None = Field(default=None, description="absent unless the job failed or was cancelled")
    notice: Notice = None


class JobCounts(BaseModel):
    completed: int
    failed: int
    inProgress: int
    inQueue: int
    retried: int


class WorkerCounts(BaseModel):
    idle: int
    running: int


class Health(BaseModel):
    """Health in RunPod's terms. Ended jobs are counted since this gateway started."""

    jobs: JobCounts
    workers: WorkerCounts


class Problem(BaseModel):
    """The body of every error."""

    error: Annotated[str, AfterValidator(as_sentence)]
    hint: Annotated[str, AfterValidator(as_sentence)] | None = None
    faults: list[dict[str, str]] | None = Field(default=None, description="each with its field and its message")


def as_job_id(text: str) -> UUID | None:
    """Parses a job's own id in its usual form; None for any other text."""
    if len(text) != 36:
        return None
    try:
        return UUID(text) if text.count("-") == 4 else None
    except ValueError:
        return None


def training_status(state: str, contract: Mapping[str, Any]) -> TrainingStatus:
    """A job's status in the first contract."""
    return TrainingStatus(
        status=contract["status"],
        progress=contract["progress"],
        current_epoch=contract["current_epoch"],
        current_step=contract["current_step"],
        stage="lost" if state == "lost" else contract["stage"],
        metrics=_metrics(contract),
        error_message=_error(contract),
        deliveries=_deliveries(contract),
    )


def run_status(job_id: UUID, state: str, contract: Mapping[str, Any]) -> RunStatus:
    """A job's status in the serverless API."""
    return RunStatus(
        id=str(job_id),
        status=_SERVERLESS[state],
        output=run_output(contract),
        error=_error(contract) if state in ("failed", "cancelled") else None,
    )


def run_output(contract: Mapping[str, Any]) -> Output:
    return Output(
        status=contract["status"],
        progress=contract["progress"],
        current_epoch=contract["current_epoch"],
        current_step=contract["current_step"],
        metrics=_metrics(contract),
        adapter_path=contract.get("adapter_path"),
        deliveries=_deliveries(contract),
    )


def _deliveries(contract: Mapping[str, Any]) -> list[DeliveryStatus]:
    found = []
    for each in contract.get("deliveries") or ():
        result = each.get("result") or {}
        message = each.get("error_message")
        found.append(
            DeliveryStatus(
                kind=each["kind"],
                target=each["target"] or None,
                state=each["state"],
                path=result.get("path"),
                bytes=result.get("bytes"),
                manifest_sha256=result.get("manifest_sha256"),
                error_message=None if message is None else with_advice(message, each.get("error_hint")),
            )
        )
    return found


def _metrics(contract: Mapping[str, Any]) -> Metrics:
    known = contract.get("metrics") or {}
    return Metrics(**{name: known.get(name) for name in Metrics.model_fields})


def _error(contract: Mapping[str, Any]) -> str | None:
    # A failed attempt that is retried leaves its error in the row; callers only want the error of the whole job.
    if contract["status"] != "failed":
        return None
    return with_advice(contract.get("error_message") or "The job failed.", contract.get("error_hint"))


def is_storable(text: str) -> bool:
    """Whether a text column can hold it: no NUL, no lone surrogates."""
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _require_storable(value: Any, depth: int) -> None:
    """Refuses what jsonb and text columns cannot store: NUL, lone surrogates, NaN, too deep nesting."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        if not is_storable(value):
            raise ValueError("text must not hold NUL characters or lone surrogates")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("NaN and infinity are no JSON numbers")
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**300:
        raise ValueError("a number of more than 300 digits")
    elif isinstance(value, dict):
        for key, item in value.items():
            _require_storable(key, depth)
            _require_storable(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _require_storable(item, depth + 1)
