"""The events that the trainer reports: one JSON object per line, one fact per event.

With the spec, the interface between daemon and trainer: standard library and pydantic only.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class ErrorCode(StrEnum):
    """The short, fixed list of codes that a user's program may branch on; documented in docs/reference/errors.md."""

    INVALID_SPEC = "invalid_spec"
    DATASET_UNREACHABLE = "dataset_unreachable"
    DATASET_INVALID = "dataset_invalid"
    DATASET_FORBIDDEN = "dataset_forbidden"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_INCOMPLETE = "model_incomplete"
    MODEL_UNSUPPORTED = "model_unsupported"
    OUT_OF_MEMORY = "out_of_memory"
    NON_FINITE_LOSS = "non_finite_loss"
    DISK_FULL = "disk_full"
    UPLOAD_FAILED = "upload_failed"
    STALLED = "stalled"
    WORKER_LOST = "worker_lost"
    RANK_LOST = "rank_lost"
    ENDPOINT_FAILED = "endpoint_failed"
    BUDGET_EXCEEDED = "budget_exceeded"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    INTERNAL = "internal"


class Stage(StrEnum):
    """The stage that an attempt has reached; the row's current_stage."""

    SETUP = "setup"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"
    UPLOADING = "uploading"


# The parts of a host that can be broken, whatever the job.
HostPart = Literal["work folder", "models folder", "storage folder", "storage", "trainer", "GPU"]

# Exit status of a trainer that was asked to stop and saved a checkpoint (EX_TEMPFAIL).
EXIT_STOPPED = 75


class _Event(BaseModel):
    # NaN is sent as a string: the daemon decides what a column can hold.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings", protected_namespaces=())

    job_id: str


class Started(_Event):
    """The trainer has read its spec and can report events."""

    kind: Literal["started"] = "started"
    pid: int
    versions: dict[str, str] = Field(default_factory=dict)


class StageEntered(_Event):
    kind: Literal["stage"] = "stage"
    stage: Stage
    detail: str | None = None


class Preparing(_Event):
    """The data are being encoded: a large file takes minutes, and the trainer is not stuck."""

    kind: Literal["preparing"] = "preparing"
    done: int
    total: int


class Planned(_Event):
    """The run's real size, known before the model is loaded. Corrects the row's estimates."""

    kind: Literal["planned"] = "planned"
    total_steps: int
    total_epochs: int
    train_examples: int
    validation_examples: int
    train_conversations: int | None = Field(default=None, description="of pairs, many belong to one conversation")
    train_answers: int | None = None
    validation_conversations: int | None = None
    validation_answers: int | None = None
    train_tokens: int
    trained_tokens: int = Field(description="tokens that carry loss, one epoch")
    max_length: int
    compute_type: str | None = Field(default=None, description="what the products are computed in")
    trained_with: dict[str, Any] = Field(
        default_factory=dict, description="the resolved settings, as far as they are known without the model"
    )
    data: dict[str, Any] = Field(default_factory=dict)


class AdapterAttached(_Event):
    """The adapter is in its place: what only the loaded model could decide."""

    kind: Literal["adapter_attached"] = "adapter_attached"
    target_modules: tuple[str, ...]
    packing: bool
    trainable_parameters: int


class Progress(_Event):
    """One optimizer step is done. `step` counts from 1 and repeats after a resume."""

    kind: Literal["progress"] = "progress"
    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    tokens_seen: int | None = None
    gpu_memory_gib: float | None = None


class Evaluated(_Event):
    """Loss on the held-out conversations, averaged over trained tokens."""

    kind: Literal["evaluated"] = "evaluated"
    step: int
    epoch: float
    validation_loss: float


class CheckpointSaved(_Event):
    kind: Literal["checkpoint_saved"] = "checkpoint_saved"
    step: int
    path: str
    bytes: int


class Sample(_Event):
    """The model's answer to a held-out prompt, before and after training."""

    kind: Literal["sample"] = "sample"
    when: Literal["before", "after"]
    prompt: str
    answer: str


class Notice(_Event):
    """Something the user should know that does not end the run: resumed, recovered from out of memory, rows skipped."""

    kind: Literal["notice"] = "notice"
    code: str
    message: str
    data: dict[str, Any] = Field(default_factory=dict)


class AdapterSaved(_Event):
    """The adapter folder is complete on disk. The last event of a successful run."""

    kind: Literal["adapter_saved"] = "adapter_saved"
    path: str
    summary: dict[str, Any] = Field(default_factory=dict)
    serving: dict[str, Any] = Field(default_factory=dict, description="what a server must be told to serve it")


class RunFailed(_Event):
    """The run cannot go on. `transient` says whether another attempt may succeed."""

    kind: Literal["failed"] = "failed"
    code: ErrorCode
    message: str
    hint: str | None = None
    stack: str | None = None
    transient: bool = False
    host: HostPart | None = Field(
        default=None, description="the part of the host that does not work, where that and not the job is to blame"
    )


class Ready(BaseModel):
    """Sent by a warm trainer process, not by a job: it is ready to read a spec. It holds no data of any earlier job."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    kind: Literal["ready"] = "ready"
    served: int = Field(description="lines read and done with since the start; 0 says that the libraries are imported")
    base_model: str | None = Field(default=None, description="the base model in memory")
    resident_bytes: int = 0


AnyEvent = (
    Started
    | StageEntered
    | Preparing
    | Planned
    | AdapterAttached
    | Progress
    | Evaluated
    | CheckpointSaved
    | Sample
    | Notice
    | AdapterSaved
    | RunFailed
)
Event = Annotated[AnyEvent, Field(discriminator="kind")]

_EVENT: TypeAdapter[Event] = TypeAdapter(Event)
_LINE: TypeAdapter[Event | Ready] = TypeAdapter(Annotated[Event | Ready, Field(discriminator="kind")])


def parse_event(line: bytes | str) -> Event | None:
    """Reads one line. Returns None for an unknown kind or a torn last line: neither must stop the daemon."""
    try:
        return _EVENT.validate_json(line)
    except ValidationError:
        return None


def parse_line(line: bytes | str) -> Event | Ready | None:
    """Reads one line of a process that may serve several jobs: an event of a job, or `ready`."""
    try:
        return _LINE.validate_json(line)
    except ValidationError:
        return None
