"""Every setting of the service with its default and its meaning; daemon/read_settings.py reads them.

Names that platforms use stay as they are; ours begin with TRAINER_. All errors are reported
together, and an invalid configuration exits with 78 so that no supervisor restarts it in a loop.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from daemon.database.url import DatabaseUrl, read_database_url
from daemon.serving_settings import CommaList, ServingSettings, split_commas, whole_web_address
from training.compute import ComputeType
from training.spec import Tracker


class Settings(ServingSettings):
    model_config = SettingsConfigDict(
        env_prefix="TRAINER_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    # The database and the app's project.
    database_url: SecretStr = Field(
        validation_alias=AliasChoices("DATABASE_URL", "database_url"),
        description="connection string of Postgres: the session pooler (port 5432) or the direct connection",
    )
    supabase_url: str | None = Field(
        default=None,
        validation_alias=AliasChoices("SUPABASE_URL", "supabase_url"),
        description="URL of the Supabase project; turns Supabase Storage on",
    )
    supabase_service_role_key: SecretStr | None = Field(
        default=None,
        validation_alias=AliasChoices("SUPABASE_SERVICE_ROLE_KEY", "supabase_service_role_key"),
        description="the service role key, or an `sb_secret_…` key, for Storage",
    )

    # Models.
    default_model: str = Field(
        default="Qwen/Qwen3-Next-80B-A3B-Instruct", description="base model of jobs that name none"
    )
    models_dir: Path = Field(
        default=Path("/workspace/models"), description="folder of base models, as `<org>/<name>` or `<name>`"
    )
    allowed_models: CommaList = Field(
        default=(), description="base models that jobs may name, separated by commas; empty allows all"
    )
    model_downloads: bool = Field(default=True, description="download missing base models from the hub")
    model_path: Path | None = Field(
        default=None,
        validation_alias=AliasChoices("MODEL_PATH", "model_path"),
        description="folder of the default model; used only if it holds the model that a job asks for",
    )
    hf_home: Path | None = Field(
        default=None,
        validation_alias=AliasChoices("HF_HOME", "hf_home"),
        description="Hugging Face cache; base models are looked for there too",
    )
    transformers_cache: Path | None = Field(
        default=None,
        validation_alias=AliasChoices("TRANSFORMERS_CACHE", "transformers_cache"),
        description="the older name of that cache; also searched",
    )
    hf_token: SecretStr | None = Field(
        default=None,
        validation_alias=AliasChoices("HF_TOKEN", "hf_token"),
        description="Hugging Face token, for gated models",
    )

    # Work on this host.
    work_dir: Path = Field(
        default=Path("/workspace/jobs"),
        description="folder for datasets, logs and checkpoints; put it on the network volume",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto", description="`auto` requires a GPU; `cpu` takes every job, for small models"
    )
    compute_type: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="number format of the trainer's matrix products; `auto` is bfloat16 where the hardware supports it",
    )
    slots: int | None = Field(
        default=None, ge=1, le=64, description="jobs at the same time on this host; one per GPU if not set"
    )
    user_cap: int | None = Field(
        default=None, ge=1, description="running jobs per user, over all hosts; unlimited if not set"
    )
    cost_per_gpu_hour: float | None = Field(
        default=None, ge=0, description="price in US dollars; takes precedence over the price in `gpu_config`"
    )
    checkpoint_seconds: float = Field(default=300.0, gt=0, description="time between checkpoints")
    checkpoints_in_storage: bool = Field(
        default=False,
        description="keep the newest checkpoint in Storage too, so that a host without this volume can resume the job",
    )
    metrics_points: int = Field(
        default=100,
        ge=0,
        description="points of a job in `metrics_points`, at most, spread over the run; 0 keeps one for each step",
    )
    keep_days: float = Field(
        default=7.0, gt=0, description="how long checkpoints of failed and cancelled jobs are kept"
    )

    # After a job.
    deliveries: CommaList | None = Field(
        default=None,
        description="what this host does for completed jobs, separated by commas: `merged`, `gguf`, `transformers4`, "
        "`hub`, `endpoint`, or `none`; all that it can if not set",
    )

    # Experiment trackers.
    trackers: Annotated[tuple[Tracker, ...], NoDecode] = Field(
        default=("tensorboard",),
        description="trackers of jobs that name none, separated by commas: `tensorboard` (a file among the "
        "artifacts), `wandb`",
    )
    wandb_api_key: SecretStr | None = Field(
        default=None,
        validation_alias=AliasChoices("WANDB_API_KEY", "wandb_api_key"),
        description="key for Weights & Biases; lets jobs use that tracker, and is given to their trainer process only",
    )
    wandb_project: str = Field(
        default="brightrun-trainer",
        validation_alias=AliasChoices("WANDB_PROJECT", "wandb_project"),
        description="project at Weights & Biases that the runs belong to",
    )
    wandb_entity: str | None = Field(
        default=None,
        validation_alias=AliasChoices("WANDB_ENTITY", "wandb_entity"),
        description="team at Weights & Biases; the key's own if not set",
    )
    wandb_base_url: str | None = Field(
        default=None,
        validation_alias=AliasChoices("WANDB_BASE_URL", "wandb_base_url"),
        description="a Weights & Biases server of your own",
    )

    # Between jobs.
    warm: Literal["off", "libraries", "model"] = Field(
        default="model",
        description="what a pre-started trainer keeps in memory between jobs; each job runs in a process of "
        "its own in any case",
    )
    warm_minutes: float = Field(default=15.0, gt=0, description="an unused base model is released after this time")
    warm_memory_gb: float | None = Field(
        default=None, ge=0, description="host memory for base models between jobs; half of the host's memory if not set"
    )
    warm_default_model: bool = Field(
        default=False,
        description="load the default model at startup, before a job asks for it, if it fits in that memory; on a "
        "GPU host once its 4-bit copy is on the volume",
    )
    warm_first_seconds: float = Field(
        default=120.0,
        ge=0,
        description="a job whose base model is in memory is claimed before an older job of the same "
        "priority, unless that one has waited this long",
    )

    # Time.
    lease_seconds: float = Field(
        default=60.0, ge=1, description="a host that does not renew its lease for this long is considered lost"
    )
    poll_seconds: float = Field(
        default=15.0, gt=0, description="how often the queue is checked without a notification, in case one was missed"
    )
    stall_seconds: float = Field(
        default=1800.0, gt=0, description="an attempt ends if the trainer reports nothing for this long"
    )
    drain_seconds: float = Field(default=60.0, gt=0, description="time for a job to save a checkpoint on shutdown")
    kill_seconds: float = Field(
        default=10.0, gt=0, description="time between SIGTERM and SIGKILL when a job is cancelled"
    )
    on_partition: Literal["continue", "stop"] = Field(
        default="continue",
        description="what a host does when it is cut off from Postgres: train on, or stop the attempt after "
        "the length of a lease",
    )
    retry_backoff_seconds: float = Field(
        default=30.0, ge=0, description="delay before the first retry; doubles each time, with jitter"
    )

    # Storage.
    storage: Literal["supabase", "folder"] | None = Field(
        default=None, description="`supabase` if SUPABASE_URL is set, else `folder`"
    )
    storage_dir: Path = Field(default=Path("/workspace/storage"), description="folder that stands in for Storage")
    models_bucket: str = Field(default="lora-models", description="bucket for adapters")
    dataset_buckets: CommaList = Field(
        default=("lora-datasets", "training-files"), description="buckets that datasets may be in, separated by commas"
    )
    upload_hours: float = Field(
        default=6.0,
        ge=0,
        description="how long a finished adapter waits for a storage that is away; then the attempt ends, and the next "
        "one stores the same adapter",
    )
    max_dataset_bytes: int = Field(default=2 * 1024**3, ge=1, description="larger dataset files are refused")

    # Callbacks and downloads.
    callback_secrets: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="`whsec_…`, separated by commas; callbacks carry a signature by each, so that you can rotate them",
    )
    callback_authorization: SecretStr | None = Field(
        default=None, description="Authorization header for callbacks to the project's own functions host"
    )
    allowed_hosts: CommaList = Field(
        default=(),
        description="`host` or `host:port`, separated by commas: these may have private addresses or use plain http",
    )

    judge_key: SecretStr | None = Field(
        default=None, description="key that `compare --judge` sends to the endpoint of the judge"
    )

    # The HTTP gateway.
    gateway_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="bearer keys for callers of `serve`, separated by commas, at least 16 characters each"
    )
    gateway_host: str = Field(default="0.0.0.0", description="address that the gateway listens on")  # noqa: S104
    gateway_port: int = Field(default=8000, ge=0, le=65535, description="port that the gateway listens on")
    gateway_requests_per_second: float = Field(
        default=50.0, gt=0, description="limit per key, with bursts of twice as many; more are answered 429"
    )
    gateway_max_body_bytes: int = Field(default=1024**2, ge=1024, description="larger requests are answered 413")
    gateway_wait_seconds: float = Field(
        default=60.0,
        ge=0,
        le=95,
        description="how long `/runsync` waits for the job to end; proxies cut connections at 100 s",
    )
    service_user_id: UUID | None = Field(
        default=None,
        description="a user of the project, the owner of jobs that are submitted without one (over HTTP, or "
        "by `submit`)",
    )

    # Pod life.
    pod_id: str | None = Field(
        default=None,
        validation_alias=AliasChoices("RUNPOD_POD_ID", "pod_id"),
        description="id of this pod; set by RunPod",
    )
    pod_api_key: SecretStr | None = Field(
        default=None,
        validation_alias=AliasChoices("RUNPOD_API_KEY", "pod_api_key"),
        description="the pod's own API key; set by RunPod, and it may lack rights",
    )
    runpod_api_key: SecretStr | None = Field(
        default=None,
        description="your own API key; must be allowed to read and end pods (for `fleet` also to create them)",
    )
    runpod_api: str = Field(default="https://api.runpod.io/v2", description="address of RunPod's API")
    idle_minutes: float | None = Field(
        default=None, gt=0, description="a pod without a job for this long ends itself; never if not set"
    )
    max_hours: float | None = Field(
        default=None, gt=0, description="a pod of this age finishes its jobs and ends itself; never if not set"
    )
    pod_end: Literal["stop", "terminate"] | None = Field(
        default=None,
        description="how a pod ends itself; if not set, it is terminated if it has a network volume, else stopped",
    )

    # Fleet.
    fleet_pod: str | None = Field(
        default=None, description="the pod that `fleet` starts: JSON, or a file with it; see the operator's guide"
    )
    fleet_max_pods: int = Field(default=1, ge=0, le=1000, description="largest number of pods at the same time")
    fleet_jobs_per_pod: int = Field(default=1, ge=1, description="waiting jobs per GPU before another pod is started")
    fleet_patience_seconds: float = Field(
        default=10.0, ge=0, description="how long a job waits before a pod is started for it"
    )
    fleet_cooldown_seconds: float = Field(
        default=60.0,
        ge=0,
        description="pause for a GPU type that was not available or whose pod failed; doubles each time",
    )
    fleet_report_minutes: float = Field(
        default=20.0, gt=0, description="a pod whose daemon does not report for this long is terminated"
    )
    fleet_overstay_minutes: float = Field(
        default=60.0, gt=0, description="a pod that is idle for this long and has not ended itself is terminated"
    )
    fleet_poll_seconds: float = Field(
        default=30.0, gt=0, description="time between two checks when no notification arrives"
    )

    # Logs.
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="the lowest level that is logged"
    )
    log_format: Literal["auto", "json", "pretty"] = Field(
        default="auto", description="`auto` is pretty on a terminal and JSON elsewhere"
    )

    @field_validator(
        "allowed_models",
        "dataset_buckets",
        "allowed_hosts",
        "callback_secrets",
        "gateway_keys",
        "trackers",
        "deliveries",
        mode="before",
    )
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return split_commas(value)

    @field_validator("gateway_keys")
    @classmethod
    def _gateway_keys_are_long(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(key.get_secret_value()) < 16 for key in keys):
            raise ValueError("each key needs 16 characters or more; `openssl rand -hex 32` makes a good one")
        return keys

    @field_validator("deliveries")
    @classmethod
    def _deliveries_are_known(cls, kinds: tuple[str, ...] | None) -> tuple[str, ...] | None:
        known = ("merged", "gguf", "transformers4", "hub", "endpoint")
        if kinds is not None and kinds != ("none",) and (unknown := [kind for kind in kinds if kind not in known]):
            raise ValueError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}, or `none` alone")
        return kinds

    @field_validator("database_url")
    @classmethod
    def _database_url_is_understood(cls, value: SecretStr) -> SecretStr:
        return value if isinstance(value, DatabaseUrl) else read_database_url(value.get_secret_value())

    @field_validator("supabase_url", "runpod_api", "wandb_base_url")
    @classmethod
    def _web_address_is_whole(cls, value: str | None) -> str | None:
        return whole_web_address(value)

    @model_validator(mode="after")
    def _storage_is_complete(self) -> Settings:
        if self.effective_storage == "supabase":
            if self.supabase_url is None:
                raise ValueError("TRAINER_STORAGE=supabase needs SUPABASE_URL")
            if self.supabase_service_role_key is None:
                raise ValueError("SUPABASE_URL needs SUPABASE_SERVICE_ROLE_KEY (or set TRAINER_STORAGE=folder)")
        return self

    @model_validator(mode="after")
    def _trackers_are_complete(self) -> Settings:
        if "wandb" in self.trackers:
            if find_spec("wandb") is None:
                raise ValueError("TRAINER_TRACKERS=wandb needs its package: pip install 'brightrun-trainer[wandb]'")
            if self.wandb_api_key is None:
                raise ValueError("TRAINER_TRACKERS=wandb needs WANDB_API_KEY")
        return self

    @property
    def asked_compute_type(self) -> ComputeType | None:
        """The compute type that was asked for. None: the trainer chooses by the hardware."""
        return None if self.compute_type == "auto" else self.compute_type

    @property
    def effective_storage(self) -> Literal["supabase", "folder"]:
        return self.storage or ("supabase" if self.supabase_url else "folder")


def quantized_dir(settings: Settings) -> Path:
    """Returns the folder of 4-bit copies of base models: beside the models, on the same volume."""
    return settings.models_dir / ".quantized"
