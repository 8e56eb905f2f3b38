"""What is asked of one model, whoever it is: answers to prompts, and the loss on held-out conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from training.comparison.prompts import Prompt
from training.comparison.request import Request
from training.data.chat_template import ChatTemplate
from training.data.example import IGNORED, Example
from training.data.micro_batches import in_groups
from training.events import ErrorCode
from training.failures import TrainingFailed, is_out_of_memory
from training.loop.loss import AnswerLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of a batch, padding and answers included. All models get the same batches.
_BATCH_TOKENS = {"cuda": 16_384, "cpu": 2048}


@dataclass(frozen=True)
class Answer:
    """`is_cut`: the answer had not ended after the most tokens allowed."""

    prompt: int
    text: str
    tokens: int
    is_cut: bool


class Asked:
    """The prompts as tokens, ready to be asked of each model in the same way."""

    def __init__(
        self,
        request: Request,
        prompts: Sequence[Prompt],
        tokenizer: Any,
        template: ChatTemplate,
        *,
        stops: frozenset[int],
        context_length: int,
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        self._stops = sorted({*stops, template.turn_end.stop, *([eos] if isinstance(eos, int) else [])})
        self._tokens = [
            tokenizer(template.prompt(prompt.turns), add_special_tokens=False)["input_ids"] for prompt in prompts
        ]
        room = context_length - request.max_new_tokens
        for number, tokens in enumerate(self._tokens, start=1):
            if len(tokens) > room:
                raise TrainingFailed(
                    ErrorCode.DATASET_INVALID,
                    f"prompt {number} has {len(tokens):,} tokens: with an answer of {request.max_new_tokens:,} that is "
                    f"more than the {context_length:,} that this model reads",
                    "shorten the prompt, or give a smaller --max-tokens",
                )

    def answers(self, model: PreTrainedModel) -> Iterator[Answer]:
        """Yields all answers, shortest prompts first; the same prompts and seed give the same answers."""
        order = sorted(range(len(self._tokens)), key=lambda number: (len(self._tokens[number]), number))
        lengths = [len(self._tokens[number]) + self._request.max_new_tokens for number in order]
        pending = [order[group] for group in in_groups(lengths, _BATCH_TOKENS[self._request.device], padded=True)]
        while pending:
            batch = pending.pop(0)
            try:
                yield from self._generate(model, batch)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
            # Outside the except block, so that the failed pass's tensors are freed before the next try.
            _free_memory()
            pending = [batch[: len(batch) // 2], batch[len(batch) // 2 :], *pending]

    def _generate(self, model: Any, batch: Sequence[int]) -> Iterator[Answer]:
        device = model.get_input_embeddings().weight.device
        longest = max(len(self._tokens[number]) for number in batch)
        padding = self._tokenizer.pad_token_id
        rows = [[padding] * (longest - len(self._tokens[number])) + self._tokens[number] for number in batch]
        ids_BT = torch.tensor(rows, device=device)
        mask_BT = torch.tensor(
            [[0] * (longest - len(self._tokens[number])) + [1] * len(self._tokens[number]) for number in batch],
            device=device,
        )
        warm = self._request.temperature > 0
        torch.manual_seed(self._request.seed)
        with torch.no_grad():
            generated_BT = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=self._request.max_new_tokens,
                do_sample=warm,
                temperature=self._request.temperature if warm else None,
                top_p=None,
                top_k=0 if warm else None,
                use_cache=True,
                eos_token_id=self._stops,
                pad_token_id=padding,
            )
        for number, tokens in zip(batch, generated_BT[:, longest:].tolist(), strict=True):
            end = next((place for place, token in enumerate(tokens) if token in self._stops), None)
            said = tokens if end is None else tokens[:end]
            text = self._tokenizer.decode(said, skip_special_tokens=True).strip()
            yield Answer(number, text, len(said), is_cut=end is None)


def summed_loss(model: PreTrainedModel, examples: Sequence[Example], device: str, padding: int) -> tuple[float, int]:
    """Returns the loss summed over the trained tokens, and their number: as the trainer's validation measures it."""
    in_order = sorted(examples, key=lambda example: len(example.input_ids))
    groups = in_groups([len(example.input_ids) for example in in_order], _BATCH_TOKENS[device], padded=True)
    pending = [in_order[group] for group in groups]
    loss = AnswerLoss(model)
    total, tokens = 0.0, 0
    while pending:
        batch = pending.pop(0)
        try:
            with torch.no_grad():
                summed, count = loss(_side_by_side(batch, model, padding))
            total, tokens = total + summed.item(), tokens + count
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
        _free_memory()
        pending = [batch[: len(batch) // 2], batch[len(batch) // 2 :], *pending]
    return total, tokens


def _side_by_side(batch: Sequence[Example], model: Any, padding: int) -> dict[str, torch.Tensor]:
    device = model.get_input_embeddings().weight.device
    longest = max(len(example.input_ids) for example in batch)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    rows = {
        "input_ids": [padded(example.input_ids, padding) for example in batch],
        "attention_mask": [padded([1] * len(example.input_ids), 0) for example in batch],
        "labels": [padded(example.labels, IGNORED) for example in batch],
    }
    return {name: torch.tensor(values, device=device) for name, values in rows.items()}


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
