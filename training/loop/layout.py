"""Lays out the conversations of a step: end to end or side by side, whichever costs less, in our own order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from training.data.example import IGNORED, Example
from training.data.micro_batches import packing_pays
from training.data.sampler import StepOrder

# A padding example with no loss, for ranks that run out of conversations before the others.
BLANK = Example([0, 0], [IGNORED, IGNORED], place="")


@dataclass(frozen=True)
class CheaperLayout:
    """Lays out a step's conversations the cheaper way; the losses are the same either way."""

    end_to_end: Any
    side_by_side: Any
    hidden_size: int
    most_tokens: int
    # Whether attention computes all texts of a packed row against each other.
    dense: bool

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        lengths = [len(row["input_ids"]) for row in rows]
        pays = packing_pays(lengths, self.hidden_size, self.most_tokens, dense=self.dense)
        return self.end_to_end(rows) if pays else self.side_by_side(rows)


class EpochLoader(DataLoader[Any]):
    """Passes the epoch number, which the library sets on a loader, on to the sampler."""

    def set_epoch(self, epoch: int) -> None:
        order = self.batch_sampler
        assert isinstance(order, StepOrder)
        order.set_epoch(epoch)


def as_row(example: Example) -> dict[str, list[int]]:
    return {"input_ids": example.input_ids, "labels": example.labels}


def token_count(inputs: Any) -> int:
    if bool((inputs["labels"] == IGNORED).all()):
        return 0  # the padding example
    mask = inputs.get("attention_mask")
    return int(mask.sum().item()) if mask is not None else int(inputs["input_ids"].numel())
