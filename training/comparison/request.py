"""What is asked of the process: one JSON object on stdin. Paths are local; nothing in it is secret."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from training.compute import ComputeType
from training.spec import Hyperparameters


class Contestant(BaseModel):
    """An adapter; and, if they are known, the data that it was trained on and how they were divided."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    adapter: Path
    dataset: Path | None = None
    hyperparameters: Hyperparameters | None = None


class Request(BaseModel):
    """`prompts`: a file of them; held-out ones if not set. `held_out`: a dataset to measure the loss on, in place of
    what the jobs held out. `quantize`: in 4 bits; if not set, on a GPU and where only a 4-bit copy is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base_model: str
    model_path: Path
    quantized_dir: Path | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    compute_type: ComputeType | None = None
    quantize: bool | None = None
    contestants: Annotated[tuple[Contestant, ...], Field(min_length=1)]
    prompts: Path | None = None
    most_prompts: Annotated[int, Field(ge=1)] | None = None
    held_out: Path | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    seed: int = 0
    today: date | None = None
