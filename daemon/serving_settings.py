"""The settings of what serves finished adapters: the hub, and an endpoint. Part of daemon.settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode

CommaList = Annotated[tuple[str, ...], NoDecode]
EVERYBODY = "*"


class ServingSettings(BaseSettings):
    # The hub and the endpoint.
    hub_tokens: Annotated[tuple[tuple[str, SecretStr], ...], NoDecode] = Field(
        default=(),
        description="Hugging Face tokens for `push_to_hub`, as `USER_ID=hf_…`, separated by commas; `*=hf_…` is for "
        "the jobs of everybody else",
    )
    endpoint_url: str | None = Field(
        default=None,
        description="an OpenAI-compatible server, vLLM say: each finished adapter is served there, and asked until it "
        "answers",
    )
    endpoint_key: SecretStr | None = Field(default=None, description="bearer key for that server")
    endpoint_loads: Literal["told", "itself"] = Field(
        default="told",
        description="how it learns of an adapter: `told`, by vLLM's `/v1/load_lora_adapter`; `itself` finds it by its "
        "name in the folder or on the hub",
    )
    endpoint_dir: Path | None = Field(
        default=None,
        description="folder that this host shares with the endpoint, for adapters; it takes them from the hub "
        "(`push_to_hub`) if not set",
    )
    endpoint_sees: str | None = Field(
        default=None, description="path of that folder on the endpoint's own machine, if it is another one"
    )
    endpoint_base_model: str | None = Field(
        default=None, description="base model that the endpoint serves, if its list of models names it otherwise"
    )
    endpoint_max_rank: int = Field(
        default=16,
        ge=1,
        description="its largest rank (vLLM's `--max-lora-rank`, 16 unless it is started with another)",
    )
    endpoint_target_modules: CommaList = Field(
        default=(),
        description="modules that it adapts (vLLM's `--lora-target-modules`), separated by commas; empty means all",
    )
    endpoint_seconds: float = Field(
        default=600.0, gt=0, description="how long an adapter may take until it answers; then it is tried again later"
    )

    @field_validator("hub_tokens", mode="before")
    @classmethod
    def _hub_tokens_name_their_user(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        tokens = {}
        for entry in (part.strip() for part in value.split(",") if part.strip()):
            user, equals, token = (word.strip() for word in entry.partition("="))
            # The value is not quoted: what stands before a missing `=` is the token.
            if not equals or not token:
                raise ValueError("each entry is USER_ID=TOKEN or *=TOKEN")
            try:
                user = user if user == EVERYBODY else str(UUID(user))
            except ValueError:
                raise ValueError("before each `=` stands a user's id (a UUID) or *") from None
            if user in tokens:
                raise ValueError("a user may have one token only")
            tokens[user] = SecretStr(token)
        return tuple(tokens.items())

    @field_validator("endpoint_target_modules", mode="before")
    @classmethod
    def _split_modules(cls, value: object) -> object:
        return split_commas(value)

    @field_validator("endpoint_url")
    @classmethod
    def _endpoint_is_a_web_address(cls, value: str | None) -> str | None:
        return whole_web_address(value)

    @model_validator(mode="after")
    def _endpoint_is_complete(self) -> ServingSettings:
        if self.endpoint_sees is not None and self.endpoint_dir is None:
            raise ValueError("TRAINER_ENDPOINT_SEES needs TRAINER_ENDPOINT_DIR: they name the same folder")
        return self


def split_commas(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def whole_web_address(value: str | None) -> str | None:
    """Returns the address. Raises ValueError if it names no host, or holds a password."""
    if value is None:
        return None
    try:
        parts = urlsplit(value.strip())
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_whole = False
    if not is_whole:
        raise ValueError("must be a web address, https://HOST")
    # The address is shown in messages; credentials are sent in headers of their own.
    if "@" in parts.netloc:
        raise ValueError("must hold no user and no password: keys have settings of their own")
    return value.strip()
