"""Every setting of the service, read once from the environment and a .env file.

Names that platforms use stay as they are; ours begin with TRAINER_. All faults are reported
together, and a broken configuration exits 78 so that no supervisor restarts it in a loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from daemon.errors import HostUnfit

_CommaList = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
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
    database_url: SecretStr = Field(validation_alias=AliasChoices("DATABASE_URL", "database_url"))
    supabase_url: str | None = Field(default=None, validation_alias=AliasChoices("SUPABASE_URL", "supabase_url"))
    supabase_service_role_key: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("SUPABASE_SERVICE_ROLE_KEY", "supabase_service_role_key")
    )

    # Models.
    default_model: str = "Qwen/Qwen3-Next-80B-A3B-Instruct"
    models_dir: Path = Path("/workspace/models")
    allowed_models: _CommaList = ()
    model_downloads: bool = True
    model_path: Path | None = Field(default=None, validation_alias=AliasChoices("MODEL_PATH", "model_path"))
    hf_home: Path | None = Field(default=None, validation_alias=AliasChoices("HF_HOME", "hf_home"))
    transformers_cache: Path | None = Field(
        default=None, validation_alias=AliasChoices("TRANSFORMERS_CACHE", "transformers_cache")
    )
    hf_token: SecretStr | None = Field(default=None, validation_alias=AliasChoices("HF_TOKEN", "hf_token"))

    # Work on this host.
    work_dir: Path = Path("/workspace/jobs")
    device: Literal["auto", "cuda", "cpu"] = "auto"
    slots: int | None = Field(default=None, ge=1, le=64, description="jobs side by side; one a GPU when absent")
    user_cap: int | None = Field(default=None, ge=1, description="running jobs a user, over all hosts")
    cost_per_gpu_hour: float | None = Field(default=None, ge=0)
    checkpoint_seconds: float = Field(default=300.0, gt=0)
    keep_days: float = Field(default=7.0, gt=0, description="checkpoints of failed and cancelled jobs")

    # Time.
    lease_seconds: float = Field(default=60.0, ge=1, description="a host that says nothing for so long is lost")
    poll_seconds: float = Field(default=15.0, gt=0, description="backup of the wake-up; one cheap query")
    stall_seconds: float = Field(default=1800.0, gt=0, description="no event for so long ends the attempt")
    drain_seconds: float = Field(default=60.0, gt=0, description="grace for a checkpoint on shutdown")
    kill_seconds: float = Field(default=10.0, gt=0, description="from TERM to KILL when a job is cancelled")
    on_partition: Literal["continue", "stop"] = "continue"
    retry_backoff_seconds: float = Field(default=30.0, ge=0, description="first retry's delay; doubles, with jitter")

    # Storage.
    storage: Literal["supabase", "folder"] | None = Field(default=None, description="supabase when its URL is set")
    storage_dir: Path = Path("/workspace/storage")
    models_bucket: str = "lora-models"
    dataset_buckets: _CommaList = ("lora-datasets", "training-files")
    max_dataset_bytes: int = Field(default=2 * 1024**3, ge=1)

    # Callbacks and downloads.
    callback_secrets: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    callback_authorization: SecretStr | None = None
    allowed_hosts: _CommaList = Field(default=(), description="host or host:port that may be private or plain http")

    # Logs.
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "pretty"] = "auto"

    @field_validator("allowed_models", "dataset_buckets", "allowed_hosts", "callback_secrets", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("database_url")
    @classmethod
    def _database_url_is_postgres(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("postgres://", "postgresql://")):
            raise ValueError("must begin with postgresql://")
        return value

    @model_validator(mode="after")
    def _storage_is_complete(self) -> Settings:
        if self.effective_storage == "supabase":
            if self.supabase_url is None:
                raise ValueError("TRAINER_STORAGE=supabase needs SUPABASE_URL")
            if self.supabase_service_role_key is None:
                raise ValueError("SUPABASE_URL needs SUPABASE_SERVICE_ROLE_KEY (or set TRAINER_STORAGE=folder)")
        return self

    @property
    def effective_storage(self) -> Literal["supabase", "folder"]:
        return self.storage or ("supabase" if self.supabase_url else "folder")


def load_settings() -> Settings:
    """Read the environment. Raises HostUnfit listing every fault, by the variable's name and never by its value."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"  {_variable(item['loc'])}: {item['msg']}" for item in error.errors(include_input=False)]
        raise HostUnfit("the configuration is not usable:\n" + "\n".join(lines)) from None


def _variable(location: tuple[int | str, ...]) -> str:
    if not location:
        return "settings"
    name = str(location[0])
    return name if name.isupper() else f"TRAINER_{name.upper()}"
