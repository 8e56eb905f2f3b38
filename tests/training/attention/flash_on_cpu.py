"""PyTorch's flash attention operators for a CPU, written out: the arguments, layouts and gradients of the GPU's kernel.

Its backward takes attention's result and the logarithms of its sums from its caller, as the kernel's does, so that what
our code makes of them is tested without a GPU. What the kernel itself computes is tested on one, by `pytest -m gpu`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch


@contextmanager
def flash_on_cpu() -> Iterator[list[str]]:
    """Registers the operators for a CPU meanwhile. Yields the names of those that were called."""
    called: list[str] = []
    library = torch.library.Library("aten", "IMPL")

    def forward(*given: Any, **options: Any) -> Any:
        called.append("forward")
        return _forward(*given, **options)

    def backward(*given: Any, **options: Any) -> Any:
        called.append("backward")
        return _backward(*given, **options)

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield called
    finally:
        library._destroy()


def _scores(
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    start: int,
    end: int,
    is_causal: bool,
    scale: float | None,
    options: Any,
) -> torch.Tensor:
    query_HLD = query_THD[start:end].transpose(0, 1).float()
    key_HLD = _repeated(key_TGD[start:end], query_HLD.shape[0])
    scores_HLL = query_HLD @ key_HLD.transpose(1, 2) * (query_HLD.shape[2] ** -0.5 if scale is None else scale)
    back_LL = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
    left, right = (-1 if side is None else side for side in (options["window_size_left"], options["window_size_right"]))
    right = 0 if is_causal else right
    hidden_LL = torch.zeros_like(back_LL, dtype=torch.bool)
    if left >= 0:
        hidden_LL |= back_LL > left
    if right >= 0:
        hidden_LL |= back_LL < -right
    return scores_HLL.masked_fill(hidden_LL, -math.inf)


def _repeated(heads_LGD: torch.Tensor, count: int) -> torch.Tensor:
    return heads_LGD.transpose(0, 1).float().repeat_interleave(count // heads_LGD.shape[1], dim=0)


def _forward(
    query: Any, key: Any, value: Any, ends: Any, key_ends: Any, longest: int, _longest_key: int, dropout: float,
    is_causal: bool, _mask: bool, *, scale: float | None = None, **options: Any,
) -> Any:  # fmt: skip
    assert query.shape[2] % 8 == 0 and query.shape[2] <= 256 and query.shape[2] == value.shape[2], query.shape
    assert query.dtype in (torch.bfloat16, torch.float16) and ends.dtype == torch.int32 and dropout == 0.0
    assert longest == max(end - start for start, end in pairwise(ends.tolist()))
    result, sums = torch.empty_like(query), torch.empty(query.shape[1], query.shape[0])
    for start, end in pairwise(ends.tolist()):
        scores_HLL = _scores(query, key, start, end, is_causal, scale, options)
        sums[:, start:end] = scores_HLL.logsumexp(dim=-1)
        attended_HLD = scores_HLL.softmax(dim=-1) @ _repeated(value[start:end], query.shape[1])
        result[start:end] = attended_HLD.transpose(0, 1).to(query.dtype)
    return result, sums, torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def _backward(
    gradient: Any, query: Any, key: Any, value: Any, result: Any, sums: Any, ends: Any, key_ends: Any, longest: int,
    _longest_key: int, dropout: float, is_causal: bool, _random: Any, _unused: Any, *, scale: float | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    by_query, by_key, by_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    factor = query.shape[2] ** -0.5 if scale is None else scale
    for start, end in pairwise(ends.tolist()):
        shares_HLL = (_scores(query, key, start, end, is_causal, scale, options) - sums[:, start:end, None]).exp()
        gradient_HLD, result_HLD = (whole[start:end].transpose(0, 1).float() for whole in (gradient, result))
        shares_gradient_HLL = gradient_HLD @ _repeated(value[start:end], query.shape[1]).transpose(1, 2)
        mean_HL1 = (gradient_HLD * result_HLD).sum(dim=-1, keepdim=True)
        scores_gradient_HLL = shares_HLL * (shares_gradient_HLL - mean_HL1) * factor
        by_query[start:end] = (
            (scores_gradient_HLL @ _repeated(key[start:end], query.shape[1])).transpose(0, 1).to(query.dtype)
        )
        grouped = (key.shape[1], query.shape[1] // key.shape[1], end - start, query.shape[2])
        query_HLD = query[start:end].transpose(0, 1).float()
        for whole, part_HLD in (
            (by_key, scores_gradient_HLL.transpose(1, 2) @ query_HLD),
            (by_value, shares_HLL.transpose(1, 2) @ gradient_HLD),
        ):
            whole[start:end] = part_HLD.reshape(grouped).sum(dim=1).transpose(0, 1).to(whole.dtype)
    return by_query, by_key, by_value
