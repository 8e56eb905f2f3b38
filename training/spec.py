"""What a job asks for, checked once: the row's JSON becomes a JobSpec, with all faults listed together.

With the events, the interface between daemon and trainer: standard library and pydantic only, so that the daemon can
import it without loading torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from training.compute import ComputeType

# One or two segments, as the hub names models; a path, `..` or a drive letter never matches.
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$"

# Keys of other trainers whose meaning is not exactly that of one of ours.
_INSTEAD = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps", "micro_batch_size", "train_batch_size"),
        "batch_size is that of a whole optimizer step",
    ),
    "learning_rate_multiplier": "set learning_rate itself",
    "warmup_ratio": "set warmup_steps",
    "max_steps": "set num_epochs",
    **dict.fromkeys(("val_size", "validation_split", "test_size", "eval_size"), "set validation_fraction"),
    **dict.fromkeys(("lora_target", "lora_target_modules"), "set target_modules"),
}
# The name under which an endpoint shall serve an adapter.
_SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_JOB_ID = re.compile(r"(?i)[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}")
# As the hub names repositories.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_PART}/{_PART}")
_OTHER_NAMES_OF_THE_MODEL = ("model", "model_id", "model_name", "model_name_or_path", "base_model_name_or_path")
_SHOWN_CHARACTERS = 60

# Where a run's curves can be sent.
Tracker = Literal["tensorboard", "wandb"]

# What can be made of a finished adapter.
Export = Literal["merged", "gguf", "transformers4"]


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a spec: where (`hyperparameters.learning_rate`) and what."""

    field: str
    message: str


class SpecInvalid(ValueError):
    """The row asks for something that cannot be run. Carries every fault, not only the first."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__("; ".join(f"{fault.field}: {fault.message}" for fault in faults))


class Hyperparameters(BaseModel):
    """What the user may choose, in either spelling of the app. Every field has a working default.

    Ranges are the app's, widened where the method allows more.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, allow_inf_nan=False)

    base_model: Annotated[str, Field(pattern=MODEL_NAME, max_length=200)] | None = Field(
        default=None,
        description="name of the base model on the Hugging Face hub; the service's default model if not set",
    )
    learning_rate: Annotated[float, Field(ge=1e-7, le=1e-1)] = Field(
        default=2e-4,
        validation_alias=AliasChoices("learning_rate", "lr"),
        description="peak learning rate, followed by a cosine decay",
    )
    batch_size: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=4, description="conversations per optimizer step, however many fit on the GPU at once"
    )
    num_epochs: Annotated[int, Field(ge=1, le=100)] = Field(
        default=3,
        validation_alias=AliasChoices("num_epochs", "epochs", "n_epochs", "num_train_epochs"),
        description="passes over the data",
    )
    lora_rank: Annotated[int, Field(ge=1, le=512)] = Field(
        default=16, validation_alias=AliasChoices("lora_rank", "rank", "r", "lora_r"), description="rank of the adapter"
    )
    lora_alpha: Annotated[float, Field(gt=0, le=4096)] | None = Field(
        default=None,
        validation_alias=AliasChoices("lora_alpha", "alpha"),
        description="scale of the adapter; twice the rank if not set",
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05,
        validation_alias=AliasChoices("lora_dropout", "dropout"),
        description="dropout on the adapter's input",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="steps of linear warm-up; 3 % of all steps if not set"
    )
    weight_decay: Annotated[float, Field(ge=0, le=1)] = Field(default=0.0, description="weight decay of AdamW")
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] | None = Field(
        default=None,
        validation_alias=AliasChoices("max_length", "max_seq_length", "cutoff_len"),
        description="most tokens of a conversation; if not set, as many as the data need, up to 32,768 and to what the "
        "model reads",
    )
    long_conversations: Literal["cut", "refuse"] = Field(
        default="cut",
        description="what to do with longer ones: `cut` after the last answer that fits, or `refuse` and fail the job",
    )
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.1,
        description="fraction of the conversations held out for validation, with all their pairs; the seed chooses",
    )
    target_modules: tuple[Annotated[str, Field(min_length=1, max_length=100)], ...] | None = Field(
        default=None, description="modules to adapt; found from the architecture if not set"
    )
    packing: bool | None = Field(
        default=None,
        description="put several short conversations into one row, isolated from each other; where possible if not set",
    )
    early_stopping_patience: Annotated[int, Field(ge=1, le=100)] | None = Field(
        default=None, description="evaluations without improvement before training stops; never if not set"
    )
    sample_prompts: tuple[Annotated[str, Field(min_length=1, max_length=4000)], ...] | None = Field(
        default=None, description="prompts answered before and after training; held-out ones if not set"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="seed of data order, validation split and adapter"
    )
    trackers: tuple[Tracker, ...] | None = Field(
        default=None, description="where the metrics go: `tensorboard`, `wandb`; the host's setting if not set"
    )
    exports: tuple[Export, ...] = Field(
        default=(),
        description="what to make of the adapter after the training: `merged` (the whole model), `gguf` (a "
        "LoRA for llama.cpp), `transformers4` (an adapter for transformers 4)",
    )

    push_to_hub: str | None = Field(
        default=None,
        description="repository on the Hugging Face hub, `owner/name`, that the finished adapter is pushed to; private "
        "if it is made by this",
    )
    deploy: bool | str | None = Field(
        default=None,
        description="whether the finished adapter is served on the operator's endpoint: `true` fails a job that does "
        "not fit it, before it is trained, and a name means the same and is what the adapter is served as; where there "
        "is an endpoint if not set",
    )

    @model_validator(mode="before")
    @classmethod
    def _auto_is_not_set(cls, value: Any) -> Any:
        """OpenAI's `auto`: the service shall choose. For a base model it would be a name."""
        if not isinstance(value, Mapping):
            return value
        return {key: given for key, given in value.items() if given != "auto" or key == "base_model"}

    @field_validator("target_modules", "sample_prompts", "trackers", mode="before")
    @classmethod
    def _lists_become_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("exports", mode="before")
    @classmethod
    def _one_export_is_a_list(cls, value: Any) -> Any:
        """A single word is a list of one, null is none, and asking twice is asking once."""
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
            return tuple(dict.fromkeys(value))
        return value

    @field_validator("push_to_hub")
    @classmethod
    def _is_a_repository(cls, value: str | None) -> str | None:
        if value is not None and not is_hub_repository(value):
            raise ValueError("must be OWNER/NAME, as the hub names repositories")
        return value

    @field_validator("deploy")
    @classmethod
    def _is_a_name(cls, value: bool | str | None) -> bool | str | None:
        if isinstance(value, str) and not _SERVED_NAME.fullmatch(value):
            raise ValueError("must be true, false or a name: up to 64 letters, digits and . _ -")
        # Each adapter is served under its job's id: nobody's name may be that of somebody else's job.
        if isinstance(value, str) and _JOB_ID.fullmatch(value):
            raise ValueError("must not look like a job's id")
        return value

    @property
    def effective_lora_alpha(self) -> float:
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * self.lora_rank


def is_hub_repository(name: str) -> bool:
    """Whether the hub takes this as `owner/name`."""
    return len(name) <= 96 and _REPOSITORY.fullmatch(name) is not None


class GpuConfig(BaseModel):
    """The hardware the row asks for, in either spelling of the app."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, allow_inf_nan=False)

    gpu_type: str | None = Field(default=None, max_length=100, validation_alias=AliasChoices("gpu_type", "type"))
    num_gpus: Annotated[int, Field(ge=1, le=64)] = Field(default=1, validation_alias=AliasChoices("num_gpus", "count"))
    gpu_memory_gb: Annotated[float, Field(gt=0, le=4096)] | None = None
    cost_per_gpu_hour: Annotated[float, Field(ge=0, le=10_000)] | None = None


@dataclass(frozen=True)
class ParsedRow:
    """The user's choices, typed, and the unknown keys (they are reported, never silently ignored)."""

    hyperparameters: Hyperparameters
    gpu_config: GpuConfig
    unknown_keys: tuple[str, ...]


def parse_row(hyperparameters: object, gpu_config: object) -> ParsedRow:
    """Parses both JSON columns of a row. Raises SpecInvalid with every fault of both."""
    faults: list[Fault] = []
    unknown: list[str] = []
    parsed: dict[str, Any] = {}
    for column, model, raw in (
        ("hyperparameters", Hyperparameters, hyperparameters),
        ("gpu_config", GpuConfig, gpu_config),
    ):
        if not isinstance(raw, Mapping):
            faults.append(Fault(column, f"must be a JSON object, got {type(raw).__name__}"))
            continue
        unknown += [f"{column}.{note}" for note in _unused_keys(model, raw)]
        faults += [Fault(f"{column}.{fault.field}", fault.message) for fault in _models_by_another_name(model, raw)]
        try:
            parsed[column] = model.model_validate(dict(raw))
        except ValidationError as error:
            faults += faults_of(error, prefix=column)
    if faults:
        raise SpecInvalid(faults)
    return ParsedRow(parsed["hyperparameters"], parsed["gpu_config"], tuple(sorted(unknown)))


def faults_of(error: ValidationError, prefix: str = "") -> list[Fault]:
    """Returns one Fault for each error that pydantic found, with the offending value in the message."""
    faults = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in ((prefix,) if prefix else ()) + item["loc"])
        shown = repr(item["input"])
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        faults.append(Fault(path or "spec", f"{item['msg'].removeprefix('Value error, ')} (got {shown})"))
    return faults


def _spellings(model: type[BaseModel]) -> dict[str, tuple[str, ...]]:
    """Returns each field with all the keys under which it can be given; the first that is there counts."""
    spellings = {}
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        spellings[name] = tuple(map(str, alias.choices)) if isinstance(alias, AliasChoices) else (name,)
    return spellings


def by_own_names(model: type[BaseModel], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what was asked for under the names of our fields, in their order; keys that are not read come last."""
    asked: dict[str, Any] = {}
    read = set()
    for name, spellings in _spellings(model).items():
        for key in spellings:
            if key in raw:
                asked[name] = raw[key]
                read.add(key)
                break
    return asked | {key: value for key, value in raw.items() if key not in read}


def _unused_keys(model: type[BaseModel], raw: Mapping[str, Any]) -> list[str]:
    """Returns the keys that change nothing, with what to give instead where that is known."""
    unused = []
    known: set[str] = set()
    for spellings in _spellings(model).values():
        known.update(spellings)
        first, *others = [key for key in spellings if key in raw] or [""]
        unused += [f"{key} ({first} is used)" for key in others if raw[key] != raw[first]]
    for key in raw:
        if key not in known:
            name = str(key)[:_SHOWN_CHARACTERS]
            unused.append(f"{name} ({_INSTEAD[key]})" if key in _INSTEAD else name)
    return unused


def _models_by_another_name(model: type[BaseModel], raw: Mapping[str, Any]) -> list[Fault]:
    """A base model under a key that is not read would be replaced by the default one: the job fails instead."""
    if "base_model" not in model.model_fields or raw.get("base_model") is not None:
        return []
    return [
        Fault(key, f"is not read: name the base model under the key base_model (got {repr(raw[key])[:80]})")
        for key in _OTHER_NAMES_OF_THE_MODEL
        if raw.get(key) is not None
    ]


class JobSpec(BaseModel):
    """Everything that the trainer needs to know, and nothing secret: one JSON line on its stdin.

    Paths are absolute and local: the daemon has already resolved the model and downloaded the data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    job_id: str
    attempt: int = 1
    lease_epoch: int = 1
    base_model: str
    model_path: Path
    model_revision: str | None = None
    dataset_path: Path
    validation_path: Path | None = None
    work_dir: Path = Field(description="this attempt's scratch: logs, tokenised data")
    checkpoint_dir: Path = Field(description="survives attempts; the trainer resumes from what it finds here")
    output_dir: Path = Field(description="the finished adapter folder; absent until it is whole")
    quantized_dir: Path | None = Field(default=None, description="where 4-bit copies of base models are kept")
    hyperparameters: Hyperparameters
    num_gpus: int = Field(default=1, ge=1, le=64, description="GPUs, or slots of a CPU host: one process on each")
    device: Literal["cpu", "cuda"] = "cpu"
    compute_type: ComputeType | None = Field(default=None, description="found from the hardware when absent")
    quantize: bool = Field(default=True, description="NF4 with double quantisation; bf16 when false")
    checkpoint_seconds: float = Field(default=300.0, gt=0)
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    today: date | None = Field(
        default=None,
        description="the date that chat templates are told: the job's, equal in every attempt; the real one if not set",
    )
    cost_per_hour: float | None = None


class HoldOrder(BaseModel):
    """Sent in place of a spec: load this base model and wait for a job that needs it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    kind: Literal["hold"] = "hold"
    base_model: str
    model_path: Path
    model_revision: str | None = None
    quantized_dir: Path | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    compute_type: ComputeType | None = None
    quantize: bool = True
