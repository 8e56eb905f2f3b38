"""Checks of a job that need no model: its dataset, its memory, its disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.data.corpus import Corpus
from training.data.formats.read_dataset import read_conversations
from training.data.holding_out import count_conversations
from training.data.plan import Plan, make_plan
from training.data.remarks import remarks_on
from training.events import ErrorCode
from training.failures import TrainingFailed, memory_advice
from training.files.free_memory import Memory
from training.files.model_folder import ModelFolder
from training.preflight.estimate import Estimate, estimate_run
from training.spec import JobSpec


@dataclass(frozen=True)
class PreflightReport:
    """The result of checking a job before it runs."""

    ok: bool
    errors: tuple[dict[str, Any], ...] = ()
    remarks: tuple[dict[str, Any], ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    estimate: dict[str, Any] | None = None

    def as_json(self) -> str:
        return json.dumps(
            {
                "ok": self.ok,
                "errors": list(self.errors),
                "remarks": list(self.remarks),
                "data": self.data,
                "estimate": self.estimate,
            }
        )


def check_resources(spec: JobSpec, estimate: Estimate, memory: Memory | None) -> None:
    """Refuses a job that is sure to fail: a model that does not fit, a disk without room. Raises TrainingFailed.

    Where only other processes are in the way, the failure is transient: another GPU may be free, or this one soon.
    """
    if memory is not None and estimate.model_bytes > memory.free_bytes:
        fits = estimate.model_bytes <= memory.total_bytes
        here = f"this {'GPU' if spec.device == 'cuda' else 'host'} has {memory.total_bytes / 2**30:.1f} GiB"
        if fits:
            held_bytes = memory.total_bytes - memory.free_bytes
            here += f", of which other processes hold {held_bytes / 2**30:.1f} GiB"
        raise TrainingFailed(
            ErrorCode.OUT_OF_MEMORY,
            f"{spec.base_model} needs {estimate.model_bytes / 2**30:.1f} GiB for its weights alone; {here}",
            "the job is tried again; if it stays so, the operator finds the other processes with `nvidia-smi`"
            if fits
            else "choose a smaller base model or a GPU with more memory",
            transient=fits,
        )
    parent = next(path for path in (spec.checkpoint_dir, *spec.checkpoint_dir.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < estimate.disk_bytes:
        raise TrainingFailed(
            ErrorCode.DISK_FULL,
            f"checkpoints and adapter need {estimate.disk_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free",
            f"free space on the volume or reduce lora_rank (current {spec.hyperparameters.lora_rank})",
            host="work folder",
        )


def memory_remark(spec: JobSpec, estimate: Estimate, memory: Memory | None) -> str | None:
    """Returns a warning if the whole run may not fit; out-of-memory recovery will try smaller micro-batches."""
    if memory is None or estimate.memory_bytes <= memory.free_bytes:
        return None
    return (
        f"about {estimate.memory_bytes / 2**30:.1f} GiB are expected and {memory.free_bytes / 2**30:.1f} GiB are free; "
        f"if it runs out: {memory_advice(spec)}"
    )


def check_dataset(path: Path) -> PreflightReport:
    """Checks a dataset without a model: format, lines, counts. No token counts, since they need a tokenizer."""
    try:
        reading = read_conversations(path)
    except TrainingFailed as error:
        return refused(error)
    return PreflightReport(
        ok=True,
        remarks=tuple({"code": remark.code, "message": remark.message} for remark in remarks_on(reading)),
        data={
            "format": reading.format,
            "conversations": count_conversations(reading.conversations),
            "answers": sum(turn.trained for c in reading.conversations for turn in c.turns),
            "characters": sum(len(turn.content) for c in reading.conversations for turn in c.turns),
        },
    )


def plan_and_estimate(spec: JobSpec, folder: ModelFolder, corpus: Corpus) -> tuple[Plan, Estimate]:
    plan = make_plan(spec, corpus)
    return plan, estimate_run(spec, folder, corpus, plan)


def refused(error: TrainingFailed) -> PreflightReport:
    return PreflightReport(ok=False, errors=({"code": error.code, "message": error.message, "hint": error.hint},))
