"""Micro-batches: as many conversations as fit, laid end to end if none leaks, halved when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch


def micro_batches(inputs: dict[str, Any], most_tokens: int) -> list[dict[str, Any]]:
    """Splits the conversations into parts of at most `most_tokens`, padding included; a longer one goes alone."""
    if tokens_in(inputs) <= most_tokens:
        return [inputs]
    if is_packed(inputs):
        ends = inputs["cu_seq_lens_q"].tolist()
        lengths = [end - start for start, end in pairwise(ends)]
        groups = in_groups(lengths, most_tokens, padded=False)
        return [_slice_packed(inputs, ends[group.start : group.stop + 1]) for group in groups]
    # Group conversations of similar length and trim the padding.
    length_B = inputs["attention_mask"].sum(dim=1)
    order_B = length_B.argsort(stable=True)
    lengths = length_B[order_B].tolist()
    return [
        {key: value[order_B[group], : lengths[group.stop - 1]] for key, value in inputs.items()}
        for group in in_groups(lengths, most_tokens, padded=True)
    ]


def in_groups(lengths: Sequence[int], most_tokens: int, *, padded: bool) -> list[slice]:
    """Groups neighbours up to `most_tokens`, at least one per group. With `padded`, padding counts."""
    groups = []
    start = longest = total = 0
    for index, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        if index > start and ((index + 1 - start) * longest if padded else total) > most_tokens:
            groups.append(slice(start, index))
            start, longest, total = index, length, length
    return [*groups, slice(start, len(lengths))] if lengths else []


def packing_pays(lengths: Sequence[int], hidden_size: int, most_tokens: int, *, dense: bool) -> bool:
    """Returns True if laying texts end to end costs less than padding them side by side.

    Padding is wasted computation. End to end, attention looks at each text alone; or, if it is `dense`, computes all
    texts against each other and masks most of it. A token costs 12 × hidden² products a layer, and 2 × hidden for each
    position that its attention looks at.
    """
    total, padded, longest = sum(lengths), len(lengths) * max(lengths), max(lengths)
    looked_at = total * min(total, most_tokens) if dense else sum(length * length for length in lengths)
    return total * 6 * hidden_size + looked_at < padded * (6 * hidden_size + longest)


def halve(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Splits a micro-batch into two, or returns None if it has only one conversation.

    The loss is a sum over tokens divided by a constant, so the two halves' gradients add up to the whole's.
    """
    if is_packed(inputs):
        return _halve_packed(inputs)
    rows = inputs["input_ids"].shape[0]
    if rows < 2:
        return None
    middle = rows // 2
    return (
        {key: value[:middle] for key, value in inputs.items()},
        {key: value[middle:] for key, value in inputs.items()},
    )


def is_packed(inputs: dict[str, Any]) -> bool:
    return "cu_seq_lens_q" in inputs


def tokens_in(inputs: dict[str, Any]) -> int:
    """Returns the tokens including padding: what memory is needed for."""
    return int(inputs["input_ids"].numel())


def pack(texts: list[torch.Tensor]) -> dict[str, Any]:
    """Returns the inputs that keep texts apart when they lie end to end, the same as from TRL's collator."""
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
    ends = inputs["cu_seq_lens_q"].tolist()
    if len(ends) < 3:
        return None
    middle = len(ends) // 2
    return _slice_packed(inputs, ends[: middle + 1]), _slice_packed(inputs, ends[middle:])


def _slice_packed(inputs: dict[str, Any], ends: list[int]) -> dict[str, Any]:
    texts = [inputs["input_ids"][0, start:end] for start, end in pairwise(ends)]
    return {**pack(texts), "labels": inputs["labels"][:, ends[0] : ends[-1]]}
