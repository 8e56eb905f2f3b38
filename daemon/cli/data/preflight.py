"""Asks the trainer, before anything is uploaded, whether a job can succeed; estimates its time and cost."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.cli.data.trainer_process import trainer_environment
from daemon.cli.errors import CommandFailed, Misused
from training.events import ErrorCode

if TYPE_CHECKING:
    from daemon.cli.data.connection import Connection
    from training.spec import ParsedRow

# Enough for a tokenizer on a slow disk and two gigabytes of conversations.
_LIMIT_SECONDS = 900
# For English text, on average over the vocabularies of the models in use.
_CHARACTERS_A_TOKEN = 4.0


@dataclass(frozen=True)
class PreflightReport:
    """The output of `python -m training.check`. `data` has counts; `estimate` is None without the model."""

    ok: bool
    errors: tuple[dict[str, Any], ...]
    remarks: tuple[dict[str, Any], ...]
    data: dict[str, Any]
    estimate: dict[str, Any] | None

    @property
    def answers(self) -> int:
        """Answers in the file that can be trained on, held-out ones included."""
        known = self.data.get("answers")
        return int(known if known is not None else self.data["train_answers"] + self.data["validation_answers"])

    @property
    def tokens(self) -> int:
        """Tokens in one epoch: counted if the tokenizer is here, else estimated from the characters."""
        counted = self.data.get("train_tokens")
        return int(counted) if counted is not None else round(self.data.get("characters", 0) / _CHARACTERS_A_TOKEN)

    @property
    def tokens_are_counted(self) -> bool:
        return "train_tokens" in self.data


@dataclass(frozen=True)
class Forecast:
    """Time and cost of a run, and the basis of the estimate. None if unknown."""

    seconds: float | None
    dollars: float | None
    by: str


def judge_dataset(file: Path) -> PreflightReport:
    """Checks only the dataset: format, lines, counts."""
    return _ask(file)


def judge_job(dataset: Path, row: ParsedRow, model_name: str, model_dir: Path, device: str) -> PreflightReport:
    """Checks the whole job: data with the model's tokenizer and template, plan, estimate."""
    from training.spec import JobSpec

    with tempfile.TemporaryDirectory(prefix="brightrun-check-") as scratch:
        folder = Path(scratch)
        spec = JobSpec(
            job_id="check",
            base_model=model_name,
            model_path=model_dir,
            dataset_path=dataset.resolve(),
            work_dir=folder,
            checkpoint_dir=folder / "checkpoints",
            output_dir=folder / "adapter",
            hyperparameters=row.hyperparameters,
            num_gpus=row.gpu_config.num_gpus,
            device="cpu" if device == "cpu" else "cuda",
        )
        file = folder / "spec.json"
        file.write_text(spec.model_dump_json())
        memory = row.gpu_config.gpu_memory_gb
        return _ask(file, *(("--memory-gib", str(memory)) if memory else ()))


def refuse_unless_ok(verdict: PreflightReport, dataset: Path) -> None:
    """Raises CommandFailed with the first fault if the job cannot succeed."""
    if verdict.ok:
        return
    first = verdict.errors[0] if verdict.errors else {"message": "it was refused without a reason", "hint": None}
    # Of a model or of hyperparameters, the message names what is wrong.
    is_the_datasets = first.get("code") in (None, ErrorCode.DATASET_INVALID)
    about = f"the dataset {dataset.name} cannot be used for training: " if is_the_datasets else ""
    raise CommandFailed(f"{about}{first['message']}", first.get("hint"))


def forecast(connection: Connection, model: str | None, verdict: PreflightReport, epochs: int) -> Forecast:
    """Estimates from the pace of earlier jobs of the same model; else uses the trainer's own estimate, if any."""
    from daemon.database.statements import read_statement
    from daemon.terminal.format import count

    past = connection.execute(read_statement("past_pace"), {"model": model}).fetchone()
    if past is not None and past["jobs"] and past["tokens_per_second"]:
        seconds = verdict.tokens * epochs / past["tokens_per_second"] + (past["other_seconds"] or 0.0)
        price = past["dollars_per_hour"]
        by = f"by {count(past['jobs'], 'earlier job')} of this model, {past['tokens_per_second']:,.0f} tokens/s"
        return Forecast(seconds, None if price is None else price * seconds / 3600, by)
    if verdict.estimate is not None:
        return Forecast(
            verdict.estimate["seconds"], verdict.estimate.get("cost"), "computed from the model's size; rough"
        )
    return Forecast(None, None, "no job of this model has completed here yet")


def _ask(file: Path, *arguments: str) -> PreflightReport:
    if not file.is_file():
        raise Misused(f"there is no file {file}")
    try:
        answer = subprocess.run(
            [sys.executable, "-m", "training.check", str(file.resolve()), *arguments],
            capture_output=True,
            text=True,
            timeout=_LIMIT_SECONDS,
            env=trainer_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"the dataset {file.name} was not read within {_LIMIT_SECONDS} s") from error
    # Libraries may print lines before the answer.
    lines = answer.stdout.strip().splitlines()
    try:
        said = json.loads(lines[-1])
        return PreflightReport(
            said["ok"], tuple(said["errors"]), tuple(said["remarks"]), said["data"], said["estimate"]
        )
    except (IndexError, ValueError, KeyError, TypeError) as error:
        tail = (answer.stderr.strip().splitlines() or ["no output"])[-1]
        raise CommandFailed(f"the check itself failed (exit status {answer.returncode}): {tail}") from error
