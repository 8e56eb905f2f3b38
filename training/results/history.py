"""What happened in a run, step by step: kept in every checkpoint, so that a resumed run tells one unbroken story."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_FILE = "journal.json"


@dataclass(frozen=True)
class StepRecord:
    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    tokens_per_second: float | None
    tokens_seen: int


@dataclass(frozen=True)
class EvaluationRecord:
    step: int
    epoch: float
    validation_loss: float


@dataclass
class RunHistory:
    """Grows while the run goes on. Seconds and tokens count over all attempts."""

    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    training_seconds: float = 0.0
    # What a micro-batch was fitted to; None where the plan's number holds. An attempt that goes on adds up in the same
    # order as the one before it.
    micro_batch_tokens: int | None = None

    @property
    def tokens_seen(self) -> int:
        return self.steps[-1].tokens_seen if self.steps else 0

    @property
    def best(self) -> EvaluationRecord | None:
        """The trained step with the lowest validation loss; the earliest of equals."""
        trained = [record for record in self.evaluations if record.step > 0 and math.isfinite(record.validation_loss)]
        return min(trained, key=lambda record: (record.validation_loss, record.step), default=None)

    def evaluated(self, step: int) -> bool:
        return any(record.step == step for record in self.evaluations)

    def save(self, folder: Path) -> None:
        (folder / _FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> RunHistory:
        raw: dict[str, Any] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        return cls(
            steps=[StepRecord(**record) for record in raw["steps"]],
            evaluations=[EvaluationRecord(**record) for record in raw["evaluations"]],
            training_seconds=raw["training_seconds"],
            micro_batch_tokens=raw["micro_batch_tokens"],
        )

    def write_log(self, path: Path) -> None:
        """The training log that is uploaded: one JSON object a line, steps and evaluations in order."""
        records: list[StepRecord | EvaluationRecord] = sorted(
            [*self.steps, *self.evaluations], key=lambda record: (record.step, isinstance(record, EvaluationRecord))
        )
        path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records), encoding="utf-8")
