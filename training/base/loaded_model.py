"""Identifies exactly which frozen base model a job needs, and holds one in memory as it was loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from training.compute import ComputeType, compute_type
from training.event_writer import EventWriter
from training.events import AnyEvent
from training.files.free_memory import free_bytes
from training.files.model_folder import ModelFolder, open_model_folder
from training.spec import HoldOrder, JobSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Base(BaseModel):
    """Two are equal only if loading gives the same bits: the same unchanged files, loaded the same way."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    base_model: str
    model_path: Path
    quantize: bool
    quantized_dir: Path | None
    device: Literal["cpu", "cuda"]
    compute_type: ComputeType
    files: tuple[tuple[str, int, int, int], ...]

    @classmethod
    def of(cls, wanted: JobSpec | HoldOrder) -> Base:
        """Reads the folder's current state: name, size, mtime and inode of every file in it."""
        stats = [(path.name, path.stat()) for path in sorted(wanted.model_path.iterdir()) if path.is_file()]
        return cls(
            base_model=wanted.base_model,
            model_path=wanted.model_path,
            quantize=wanted.quantize,
            quantized_dir=wanted.quantized_dir,
            device=wanted.device,
            compute_type=compute_type(wanted.device, wanted.compute_type),
            files=tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats),
        )

    def open(self) -> ModelFolder:
        return open_model_folder(self.model_path, self.base_model)


@dataclass(frozen=True)
class HeldBase:
    """A base model in the host's memory. `remarks` are the notices of loading; the job that waited for it reports them.

    No process that forks may open a card, so a model for a card is held in the host's memory too, in 4 bits, and
    moved by the job that uses it.
    """

    base: Base
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    remarks: tuple[AnyEvent, ...]

    def on_its_device(self) -> PreTrainedModel:
        """Returns the model where its job computes. Call it in a fork."""
        from training.base.load import device_of, move

        return self.model if self.base.device == "cpu" else move(self.model, device_of(self.base))


class BufferedWriter(EventWriter):
    """Stores events while there is no job to report them for, without a job id."""

    def __init__(self) -> None:
        super().__init__(-1, "")
        self.events: list[AnyEvent] = []

    def say(self, event: AnyEvent) -> None:
        self.events.append(event)


def may_be_held(base: Base, folder: ModelFolder, needed_bytes: int, most_bytes: int) -> bool:
    """Returns True if a model of `needed_bytes` may stay in the host's memory between jobs, of which it may take
    `most_bytes`.

    For a card only if a 4-bit copy is on the volume: a CPU would take many minutes to quantise what a card quantises in
    seconds. And only into memory that nobody uses: the job itself does not need it.
    """
    from training.base.load import is_packed_on_disk

    if needed_bytes > most_bytes:
        return False
    return base.device == "cpu" or (needed_bytes <= free_bytes() // 2 and is_packed_on_disk(base, folder))


def load_base(base: Base) -> HeldBase | None:
    """Loads model and tokenizer into the host's memory.

    None if it is for a card and the 4-bit copy cannot be used: then the job loads it on its card, and tells why.
    Raises what loading raises: TrainingFailed, memory errors.
    """
    from training.base.load import load_base_model, load_packed
    from training.data.tokenizer import load_tokenizer

    folder = base.open()
    notebook = BufferedWriter()
    tokenizer = load_tokenizer(folder)
    model = load_base_model(base, folder, notebook) if base.device == "cpu" else load_packed(base, folder)
    return None if model is None else HeldBase(base, model, tokenizer, tuple(notebook.events))
