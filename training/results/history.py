"""The metrics history of a run. It is saved in every checkpoint, so that a resumed run continues it."""

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
    """Grows while the run goes on. Seconds and tokens add up over all attempts."""

    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    training_seconds: float = 0.0
    # The micro-batch size that was found to fit; None if the plan's number is used. A resumed attempt keeps it, so that
    # it adds up in the same order as the one before.
    micro_batch_tokens: int | None = None
    # How experts are multiplied on a GPU (training.quantization.choose_product), by the layers' shape. Kept likewise.
    experts_product: dict[str, list[list[Any]]] = field(default_factory=dict)

    @property
    def tokens_seen(self) -> int:
        return self.steps[-1].tokens_seen if self.steps else 0

    @property
    def best(self) -> EvaluationRecord | None:
        """The trained step with the lowest validation loss; of equal ones, the earliest."""
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
            # Checkpoints of earlier versions have none.
            experts_product=raw.get("experts_product", {}),
        )

    def write_log(self, path: Path) -> None:
        """Writes the training log that is uploaded: one JSON object per line, steps and evaluations in order."""
        records: list[StepRecord | EvaluationRecord] = sorted(
            [*self.steps, *self.evaluations], key=lambda record: (record.step, isinstance(record, EvaluationRecord))
        )
        path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records), encoding="utf-8")
