"""Attention of one packed micro-batch at real widths, over a dense mask and by borders: counted, and timed on a device.

    python benchmarks/packed_attention.py                              counted without a card, in seconds
    python benchmarks/packed_attention.py --time cuda                  and timed: dense, text by text, the varlen kernel
    python benchmarks/packed_attention.py --time cpu --tokens 2048     a CPU has no such kernel

Counted is what one layer moves and launches, forward and backward, times the layers, as kernels for a GPU would do it
(count_traffic.py). The dense mask's way is what PyTorch takes on a GPU where there is a mask: key and value heads are
repeated, the mask becomes a bias, and the memory-efficient kernel computes all tokens; gpt-oss has its attention
written out, with its scores in memory. Projections and rotation are the same either way, and are not counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from count_traffic import H100_BYTES_A_SECOND, H100_FLOPS, Cost, Traffic, costs
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.attention.borders import Borders
from training.attention.choice import borders_of_lengths
from training.attention.text_by_text import attend_text_by_text
from training.attention.varlen import attend_varlen


@dataclass(frozen=True)
class Layers:
    """A model's attention: heads, of keys too, their size, and how many layers have a window or none."""

    name: str
    heads: int
    key_heads: int
    size: int
    full: int
    windowed: int = 0
    window: int | None = None
    has_sinks: bool = False


MODELS = (
    Layers("Qwen3-Next-80B", 16, 2, 256, full=12),
    Layers("Qwen3-8B", 32, 8, 128, full=36),
    Layers("Llama-3.1-8B", 32, 8, 128, full=32),
    Layers("Gemma-3-12B", 16, 8, 256, full=8, windowed=40, window=1024),
    Layers("gpt-oss-20b", 64, 8, 64, full=12, windowed=12, window=128, has_sinks=True),
)


def seen(borders: Borders, *, backward: bool, heads: int, size: int) -> int:
    """Operations for the pairs of tokens that a kernel with borders computes: two products forward, five backward."""
    pairs = 0
    for start, end in zip(borders.ends, borders.ends[1:], strict=False):
        length, window = end - start, min(borders.window or end - start, end - start)
        pairs += window * (window + 1) // 2 + (length - window) * window
    return (5 if backward else 2) * 2 * pairs * heads * size


def _register(borders: Borders) -> None:
    """A kernel with borders reads its operands, writes its results, and computes what is seen."""

    def rule(given: dict[str, Any], result: Any, *, backward: bool) -> list[Cost]:
        tensors = [tensor for tensor in given.values() if isinstance(tensor, torch.Tensor)]
        results = [tensor for tensor in result if isinstance(tensor, torch.Tensor)]
        query = given["query"]
        flops = seen(borders, backward=backward, heads=query.shape[1], size=query.shape[2])
        return [
            Cost("product", *(sum(t.numel() * t.element_size() for t in part) for part in (tensors, results)), flops)
        ]

    for name in ("torch_attn::_varlen_attn", "aten::_flash_attention_forward"):
        costs(name)(partial(rule, backward=False))
    for name in ("torch_attn::_varlen_attn_backward", "aten::_flash_attention_backward"):
        costs(name)(partial(rule, backward=True))


def _heads(model: Layers, tokens: int, device: str) -> list[torch.Tensor]:
    counts = (model.heads, model.key_heads, model.key_heads)
    return [
        torch.randn(tokens, count, model.size, dtype=torch.bfloat16, device=device).transpose(0, 1).requires_grad_()
        for count in counts
    ]


def _dense(query: Any, key: Any, value: Any, mask_TT: torch.Tensor, scale: float, sinks: Any) -> torch.Tensor:
    """The way with a mask. On the meta device, what a GPU does is named; elsewhere PyTorch chooses."""
    groups = query.shape[0] // key.shape[0]
    if sinks is not None:
        layer: Any = SimpleNamespace(num_key_value_groups=groups, sinks=sinks, training=True)
        bias = torch.where(mask_TT, torch.zeros((), dtype=query.dtype, device=query.device), float("-inf"))
        whole: torch.Tensor = eager_attention_forward(
            layer, query[None], key[None], value[None], bias.to(query.dtype)[None, None], scaling=scale
        )[0][0]
        return whole
    repeated = [repeat_kv(heads[None], groups) for heads in (key, value)]
    if query.device.type != "meta":
        attend = torch.nn.functional.scaled_dot_product_attention
        return (
            attend(query[None], *repeated, attn_mask=mask_TT[None, None], scale=scale)[0].transpose(0, 1).contiguous()
        )
    bias = torch.where(mask_TT, torch.zeros((), dtype=query.dtype, device="meta"), float("-inf"))
    bias = bias.to(query.dtype)[None, None].expand(1, query.shape[0], -1, -1)
    found = torch.ops.aten._scaled_dot_product_efficient_attention(query[None], *repeated, bias, True, scale=scale)
    return found[0][0].transpose(0, 1).contiguous()


def _both_ways(model: Layers, lengths: list[int], device: str, *, windowed: bool) -> tuple[Any, Any, Any]:
    """Returns a layer's heads, its attention over a dense mask, and its attention by borders (given which one)."""
    tokens, window = sum(lengths), model.window if windowed else None
    borders = borders_of_lengths(lengths, window if window and window < max(lengths) else None, device)
    heads, scale = _heads(model, tokens, device), model.size**-0.5
    sinks = torch.randn(model.heads, dtype=torch.bfloat16, device=device) if model.has_sinks else None
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    if device != "meta":
        text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
        back = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)[None]
        mask = (back >= 0) & (back < (window or tokens)) & (text[:, None] == text[None])

    def by_borders(attend: Any) -> torch.Tensor:
        result: torch.Tensor = attend(*heads, borders, scale=scale, sinks_H=sinks)
        return result

    _register(borders)
    return heads, partial(_dense, *heads, mask, scale, sinks), by_borders


def count(model: Layers, lengths: list[int]) -> None:
    totals = {way: [0.0] * 5 for way in ("dense", "varlen")}
    for windowed, layers in ((False, model.full), (True, model.windowed)):
        if not layers:
            continue
        heads, dense, by_borders = _both_ways(model, lengths, "meta", windowed=windowed)
        for way, run in (("dense", dense), ("varlen", lambda: by_borders(attend_varlen))):  # noqa: B023 - called at once
            with Traffic() as traffic:
                traffic.ignore(heads)
                result = run()
                traffic.mark("forward")
                kept = traffic.live_bytes
                torch.autograd.grad(result, heads, torch.empty_like(result))
                traffic.mark("backward")
            seconds = sum(
                max((cost.read + cost.written) / H100_BYTES_A_SECOND, cost.flops / H100_FLOPS)
                for cost in traffic.costs()
            )
            peak = max(traffic.peak_of.values())
            for place, amount in enumerate((traffic.launches(), traffic.bytes(), traffic.flops(), seconds)):
                totals[way][place] += layers * amount
            totals[way][4] = max(totals[way][4], peak, kept)
    for way, (launches, moved, flops, seconds, peak) in totals.items():
        print(f"| {model.name} | {way} | {launches:,.0f} | {moved / 1e9:.1f} | {flops / 1e12:.1f} | {seconds:.3f} | "
              f"{peak / 2**30:.2f} |")  # fmt: skip


def measure(model: Layers, lengths: list[int], device: str) -> None:
    for windowed, layers in ((False, model.full), (True, model.windowed)):
        if not layers:
            continue
        heads, dense, by_borders = _both_ways(model, lengths, device, windowed=windowed)
        ways = {"dense": dense, "text by text": lambda: by_borders(attend_text_by_text)}  # noqa: B023 - called at once
        if device == "cuda":
            ways["varlen"] = lambda: by_borders(attend_varlen)  # noqa: B023 - called at once
        shown = []
        for way, run in ways.items():
            try:
                seconds = min(_seconds(run, heads, device) for _ in range(4))
                shown.append(f"{way} {seconds * 1e3:.1f} ms")
            except (RuntimeError, ValueError) as error:
                shown.append(f"{way}: {str(error).splitlines()[0][:80]}")
        print(f"{model.name}, a layer {'with a window' if windowed else 'without a window'}: {', '.join(shown)}")


def _seconds(run: Any, heads: list[torch.Tensor], device: str) -> float:
    begun = time.perf_counter()
    result = run()
    torch.autograd.grad(result, heads, torch.ones_like(result))
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--time", choices=("cpu", "cuda"))
    chosen = parser.parse_args()
    # Ragged: from half to one and a half times the mean.
    mean, rest = chosen.tokens // chosen.texts, chosen.tokens
    lengths = []
    for number in range(chosen.texts):
        step = mean // 2 + mean * number // max(1, chosen.texts - 1)
        lengths.append(min(step, rest) if number < chosen.texts - 1 else rest)
        rest -= lengths[-1]
    lengths = [length for length in lengths if length]
    print(f"{sum(lengths):,} tokens in {len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens, bfloat16\n")
    print("| all attention of | way | launches | GB moved | TFLOP | H100 s (counted) | peak of a layer, GiB |")
    print("|---|---|---|---|---|---|---|")
    for model in MODELS:
        count(model, lengths)
    if chosen.time:
        print(f"\nforward and backward on {torch.cuda.get_device_name() if chosen.time == 'cuda' else 'this CPU'}:")
        for model in MODELS:
            measure(replace(model), lengths, chosen.time)


if __name__ == "__main__":
    main()
