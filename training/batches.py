"""Micro-batches: conversations end to end where no word can leak across, halved when memory runs out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch


def halve(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Two micro-batches with the same conversations, or None where there is only one.

    The loss is a sum over tokens divided by a number that does not change, so the halves' gradients add up to the
    whole's.
    """
    if "cu_seq_lens_q" in inputs:
        return _halve_packed(inputs)
    rows = inputs["input_ids"].shape[0]
    if rows < 2:
        return None
    middle = rows // 2
    return (
        {key: value[:middle] for key, value in inputs.items()},
        {key: value[middle:] for key, value in inputs.items()},
    )


def conversations_in(inputs: dict[str, Any]) -> int:
    if "cu_seq_lens_q" in inputs:
        return int(inputs["cu_seq_lens_q"].numel()) - 1
    return int(inputs["input_ids"].shape[0])


def packs_without_leaks(model: Any) -> bool:
    """Whether this model reads two texts laid end to end exactly as it reads them apart.

    Asked of the model itself and not of a list of names: attention honours position_ids, while linear attention and
    its convolutions carry a state across unless their kernels know the borders.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().num_embeddings
    first = torch.arange(1, 8, device=device) % vocabulary
    second = torch.arange(9, 14, device=device) % vocabulary
    was_training = model.training
    model.eval()
    with torch.no_grad():
        apart = torch.cat([_logits(model, input_ids=text[None]) for text in (first, second)], dim=1)
        try:
            together = _logits(model, **pack([first, second]))
        except (ValueError, TypeError, NotImplementedError):
            # Some architectures say so themselves: without their kernels, or altogether.
            return False
        finally:
            model.train(was_training)
    return bool(torch.allclose(apart, together, rtol=2e-2, atol=2e-2))


def pack(texts: list[torch.Tensor]) -> dict[str, Any]:
    """The inputs that a model needs to keep texts apart that lie end to end: what TRL's collator gives it, too."""
    lengths = torch.tensor([len(text) for text in texts])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    device = texts[0].device
    return {
        "input_ids": torch.cat(texts)[None],
        "position_ids": torch.cat([torch.arange(len(text), device=device) for text in texts])[None],
        "cu_seq_lens_q": ends.to(device),
        "cu_seq_lens_k": ends.to(device),
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
        "seq_idx": torch.repeat_interleave(torch.arange(len(texts), dtype=torch.int32), lengths)[None].to(device),
    }


def _halve_packed(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    ends = [int(end) for end in inputs["cu_seq_lens_q"]]
    if len(ends) < 3:
        return None
    middle = len(ends) // 2
    return _slice_packed(inputs, ends[: middle + 1]), _slice_packed(inputs, ends[middle:])


def _slice_packed(inputs: dict[str, Any], ends: list[int]) -> dict[str, Any]:
    texts = [inputs["input_ids"][0, start:end] for start, end in pairwise(ends)]
    return {**pack(texts), "labels": inputs["labels"][:, ends[0] : ends[-1]]}


def _logits(model: Any, **inputs: Any) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs, use_cache=False).logits.float()
    return logits
