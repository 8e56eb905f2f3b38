"""Checks in seconds, on any machine and without loading a model, whether a job can succeed.

    python -m training.preflight.check spec.json          checks a whole job
    python -m training.preflight.check dataset.jsonl      checks only a dataset

Prints one JSON object: ok, errors (code, message, hint), remarks, data, estimate. Exit 0 when ok, 1 when not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from training.data.corpus import Corpus, gather
from training.data.formats.read_dataset import read_conversations
from training.data.holding_out import count_conversations
from training.data.plan import Plan, make_plan
from training.data.remarks import remarks_on
from training.events import ErrorCode
from training.failures import TrainingFailed, memory_advice
from training.files.free_memory import Memory
from training.files.model_folder import ModelFolder, open_model_folder
from training.preflight.estimate import Estimate, estimate_run
from training.spec import JobSpec, faults_of


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
        return _refused(error)
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


def check_spec(spec: JobSpec, memory: Memory | None = None) -> PreflightReport:
    """Checks a whole job: model folder, tokenizer, template, data, plan, memory, disk."""
    from training.data.chat_template import ChatTemplate
    from training.data.tokenizer import load_tokenizer, stop_tokens

    try:
        folder = open_model_folder(spec.model_path, spec.base_model)
        template = ChatTemplate(load_tokenizer(folder), stops=stop_tokens(folder), today=spec.today)
        corpus = gather(spec.dataset_path, spec.validation_path, spec.hyperparameters, template, folder.context_length)
        plan, estimate = plan_and_estimate(spec, folder, corpus)
        check_resources(spec, estimate, memory)
    except TrainingFailed as error:
        return _refused(error)
    remarks = [{"code": remark.code, "message": remark.message} for remark in corpus.remarks]
    warning = memory_remark(spec, estimate, memory)
    if warning:
        remarks.append({"code": "memory_tight", "message": warning})
    return PreflightReport(
        ok=True,
        remarks=tuple(remarks),
        data={
            **corpus.statistics(),
            "train_examples": len(corpus.train),
            "validation_examples": len(corpus.validation),
            **corpus.sides(),
            "train_tokens": corpus.train_tokens,
            "trained_tokens": corpus.trained_tokens,
            "max_length": corpus.max_length,
            "total_steps": plan.total_steps,
            "total_epochs": spec.hyperparameters.num_epochs,
        },
        estimate=estimate.as_dict(),
    )


def plan_and_estimate(spec: JobSpec, folder: ModelFolder, corpus: Corpus) -> tuple[Plan, Estimate]:
    plan = make_plan(spec, corpus)
    return plan, estimate_run(spec, folder, corpus, plan)


def _refused(error: TrainingFailed) -> PreflightReport:
    return PreflightReport(ok=False, errors=({"code": error.code, "message": error.message, "hint": error.hint},))


def _read_spec(text: str) -> JobSpec | None:
    """Parses a JobSpec; None if the file is something else, a dataset. Raises TrainingFailed for a broken spec."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or "hyperparameters" not in raw:
        return None
    try:
        return JobSpec.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(f"{fault.field}: {fault.message}" for fault in faults_of(error))
        raise TrainingFailed(ErrorCode.INVALID_SPEC, faults, "correct the named fields") from None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.preflight.check")
    parser.add_argument("path", type=Path, help="a spec (JSON) or a dataset")
    parser.add_argument("--memory-gib", type=float, help="memory of the card the job will run on")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    memory = Memory.all_free(int(arguments.memory_gib * 2**30)) if arguments.memory_gib else None
    try:
        spec = _read_spec(arguments.path.read_text(encoding="utf-8"))
        verdict = check_dataset(arguments.path) if spec is None else check_spec(spec, memory)
    except TrainingFailed as error:
        verdict = _refused(error)
    except (OSError, UnicodeDecodeError):
        verdict = check_dataset(arguments.path)
    sys.stdout.write(verdict.as_json() + "\n")
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
