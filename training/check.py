"""Checks in seconds, on any machine and without loading a model, whether a job can succeed.

    python -m training.check spec.json          checks a whole job
    python -m training.check dataset.jsonl      checks only a dataset

Prints one JSON object: ok, errors (code, message, hint), remarks, data, estimate. Exit 0 when ok, 1 when not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from pydantic import ValidationError

from training.data.corpus import gather
from training.events import ErrorCode
from training.failures import TrainingFailed
from training.files.free_memory import Memory
from training.files.model_folder import open_model_folder
from training.preflight.check import (
    PreflightReport,
    check_dataset,
    check_resources,
    memory_remark,
    plan_and_estimate,
    refused,
)
from training.quick_imports import quick_imports
from training.spec import JobSpec, faults_of


def check_spec(spec: JobSpec, memory: Memory | None = None) -> PreflightReport:
    """Checks a whole job: model folder, architecture, tokenizer, template, data, plan, memory, disk."""
    # Heavy libraries, which a dataset alone does not need.
    from training.adapter.lora import choose_targets
    from training.base.rehearsal import rehearse_loading
    from training.data.chat_template import ChatTemplate
    from training.data.tokenizer import load_tokenizer, stop_tokens

    try:
        folder = open_model_folder(spec.model_path, spec.base_model)
        found = rehearse_loading(spec, folder)
        choose_targets(found.model, spec.hyperparameters.target_modules)
        template = ChatTemplate(load_tokenizer(folder), stops=stop_tokens(folder), today=spec.today)
        corpus = gather(
            spec.dataset_path, spec.validation_path, spec.hyperparameters, template, found.architecture.context_length
        )
        plan, estimate = plan_and_estimate(spec, folder, corpus)
        check_resources(spec, estimate, memory)
    except TrainingFailed as error:
        return refused(error)
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
    parser = argparse.ArgumentParser(prog="python -m training.check")
    parser.add_argument("path", type=Path, help="a spec (JSON) or a dataset")
    parser.add_argument("--memory-gib", type=float, help="memory of the card the job will run on")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    memory = Memory.all_free(int(arguments.memory_gib * 2**30)) if arguments.memory_gib else None
    try:
        spec = _read_spec(arguments.path.read_text(encoding="utf-8"))
        if spec is None:
            verdict = check_dataset(arguments.path)
        else:
            with quick_imports():
                import training.base.rehearsal  # noqa: F401 - imported here to be quick
            verdict = check_spec(spec, memory)
    except TrainingFailed as error:
        verdict = refused(error)
    except (OSError, UnicodeDecodeError):
        verdict = check_dataset(arguments.path)
    sys.stdout.write(verdict.as_json() + "\n")
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
