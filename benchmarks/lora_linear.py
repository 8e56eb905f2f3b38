"""LoRA beside a frozen 4-bit linear layer: our one function, PEFT's layers, and the base layer alone (the floor).

    python benchmarks/lora_linear.py                   counts at the real widths of the 80B, times on this CPU
    python benchmarks/lora_linear.py --device cuda     the same, times on a card

Counted (benchmarks/count_traffic.py, no card): all adapted layers of Qwen3-Next-80B-A3B in one micro-batch, forward,
recomputed, backward, in bf16 with rank 16. Every number is what comes on top of the floor. `elementwise` and `products`
are bytes moved, in GB; float32 products are 2 × tokens × rank × width operations outside the bf16 units. `kept` is what
one layer of each kind keeps for backward beside its input, summed over one decoder layer's kinds; `peak` is the highest
of all layers, over the floor's.

Timed: forward and backward of one layer, the three in turn within a round; medians, and the median of the rounds'
ratios to the floor. On a CPU it is the CPU time of one thread, which other work on the machine hardly changes.

Exit status 1 if ours moves more than PEFT, keeps more, or takes longer at a size.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from peft import LoraConfig, inject_adapter_in_model

from benchmarks.count_traffic import H100_BYTES_A_SECOND, Traffic
from training.adapter import frozen_linear
from training.base.dtype import compute_dtype

# in, out, how many in the 48 layers, tokens that pass through each: all of them.
LAYERS_OF_80B = {
    "in_proj_qkvz": (2048, 12288, 36),
    "out_proj": (4096, 2048, 36),
    "q_proj": (2048, 8192, 12),
    "k_proj, v_proj": (2048, 512, 24),
    "o_proj": (4096, 2048, 12),
    "shared gate, up": (2048, 512, 96),
    "shared down": (512, 2048, 48),
}
CONTESTANTS = ("floor", "PEFT", "ours")
_SIZES = {
    "cpu": [(256, 576, 1536), (256, 2048, 2048), (1024, 2048, 2048)],
    "cuda": [(2048, 2048, 12288), (8192, 2048, 12288), (8192, 4096, 2048), (8192, 2048, 512), (8192, 4096, 14336)],
}


@dataclass(frozen=True)
class Counted:
    """One layer, forward, recomputed and backward."""

    elementwise: int
    products: int
    launches: int
    kept: int
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=8192, help="of the counted micro-batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compute-type", choices=["bfloat16", "float32"], help="the device's own if not set")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    failed = False
    drawn, frozen_linear._kept = frozen_linear._kept, _kept_on_meta
    for dropout in (0.0, 0.05):
        failed |= _count(arguments.tokens, arguments.rank, dropout)
    frozen_linear._kept = drawn
    for dropout in (0.0, 0.05):
        dtype = compute_dtype(arguments.device, arguments.compute_type)
        failed |= _time(arguments.device, dtype, arguments.rank, dropout, arguments.rounds)
    sys.exit(failed)


def _count(tokens: int, rank: int, dropout: float) -> bool:
    print(f"\ncounted: the 80B's adapted layers, {tokens} tokens, rank {rank}, dropout {dropout}; on top of the floor")
    print("| | elementwise GB | products GB | launches | kept MiB | peak MiB | H100 s, memory alone |")
    print("|---|---|---|---|---|---|---|")
    rows = {name: dict(_counts(name, tokens, rank, dropout)) for name in CONTESTANTS}
    totals = {}
    for name in ("PEFT", "ours"):
        elementwise = products = launches = kept = peak = 0
        for layer, (_, _, times) in LAYERS_OF_80B.items():
            found, floor = rows[name][layer], rows["floor"][layer]
            elementwise += times * (found.elementwise - floor.elementwise)
            products += times * (found.products - floor.products)
            launches += times * (found.launches - floor.launches)
            kept += found.kept - floor.kept
            peak = max(peak, found.peak - floor.peak)
        totals[name] = (elementwise, products, launches, kept, peak)
        print(
            f"| {name} | {elementwise / 1e9:.1f} | {products / 1e9:.1f} | {launches} | {kept / 2**20:.0f} | "
            f"{peak / 2**20:.0f} | {(elementwise + products) / H100_BYTES_A_SECOND:.3f} |"
        )
    return any(ours > theirs for ours, theirs in zip(totals["ours"], totals["PEFT"], strict=True))


def _counts(contestant: str, tokens: int, rank: int, dropout: float) -> Any:
    for name, (wide, out, _) in LAYERS_OF_80B.items():
        layer = _layers(wide, out, rank, dropout, "meta", torch.bfloat16)[contestant]
        rows = torch.empty(tokens, wide, dtype=torch.bfloat16, device="meta", requires_grad=True)
        with Traffic() as traffic:
            traffic.ignore([*layer.parameters(), rows])
            with torch.no_grad():
                layer(rows)
            traffic.mark("forward")
            result = layer(rows)
            traffic.mark("recomputed")
            gradient = torch.empty_like(result)
            traffic.mark("given")
            result.backward(gradient)
            traffic.mark("backward")
        own = result.untyped_storage().nbytes()
        yield (
            name,
            Counted(
                traffic.bytes("elementwise"),
                traffic.bytes("product"),
                traffic.launches(),
                traffic.live_after["recomputed"] - own,
                max(traffic.peak_of["recomputed"], traffic.peak_of["backward"]),
            ),
        )


def _kept_on_meta(x_NI: torch.Tensor, dropout: float, _seed: int) -> torch.Tensor:
    """The meta device has no generator to seed."""
    return torch.empty_like(x_NI, dtype=torch.bool).bernoulli_(1 - dropout)


def _layers(wide: int, out: int, rank: int, dropout: float, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The base layer in 4 bits alone, with PEFT's LoRA, and with ours."""
    base = _base(wide, out, device, dtype)
    model = torch.nn.Sequential()
    model.proj = base
    model.is_loaded_in_4bit = True
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["proj"])
    theirs = inject_adapter_in_model(config, model)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, device=device) / 8
    ours = copy.copy(theirs.proj)
    # A shallow copy that shares the weights: the same module with another class.
    ours.__class__ = frozen_linear.Frozen4bitLinearWithLora
    return {"floor": base, "PEFT": theirs.proj.train(), "ours": ours.train()}


def _base(wide: int, out: int, device: str, dtype: torch.dtype) -> Any:
    layer = bnb.nn.Linear4bit(wide, out, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    layer.support_avx512bf16_for_cpu = False
    count = wide * out
    if device == "meta":
        nothing: dict[str, Any] = {"device": "meta"}
        second = bnb_functional.QuantState(
            absmax=torch.empty(-(-count // 64 // 256), **nothing), code=torch.empty(256, **nothing), blocksize=256,
            dtype=torch.float32,
        )  # fmt: skip
        state = bnb_functional.QuantState(
            absmax=torch.empty(count // 64, dtype=torch.uint8, **nothing), shape=torch.Size((out, wide)), dtype=dtype,
            blocksize=64, code=torch.empty(16, **nothing), quant_type="nf4", offset=torch.empty((), **nothing),
            state2=second,
        )  # fmt: skip
        packed = torch.empty(count // 2, 1, dtype=torch.uint8, **nothing)
    else:
        weight = torch.randn(out, wide, dtype=dtype, device=device) / 50
        packed, state = bnb_functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=64, compress_statistics=True, quant_type="nf4",
        bnb_quantized=True, module=layer,
    )  # fmt: skip
    layer.quant_state = state
    return layer


def _time(device: str, dtype: torch.dtype, rank: int, dropout: float, rounds: int) -> bool:
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread"
    print(f"\ntimed: {machine}, {str(dtype).removeprefix('torch.')}, rank {rank}, dropout {dropout}, {rounds} rounds")
    print("| tokens, in → out | floor ms | PEFT ms | ours ms | PEFT / floor | ours / floor |")
    print("|---|---|---|---|---|---|")
    slower = False
    for tokens, wide, out in _SIZES[device]:
        layers = _layers(wide, out, rank, dropout, device, dtype)
        rows = torch.randn(tokens, wide, dtype=dtype, device=device, requires_grad=True)
        gradient = torch.randn(tokens, out, dtype=dtype, device=device)
        taken: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        for turn in range(rounds + 1):
            # Each round begins with another, so that a busy machine slows all alike.
            for name in (*CONTESTANTS[turn % 3 :], *CONTESTANTS[: turn % 3]):
                seconds = _seconds(layers[name], rows, gradient, device)
                if turn:
                    taken[name].append(seconds)
        ratios = {
            name: statistics.median(mine / base for mine, base in zip(taken[name], taken["floor"], strict=True))
            for name in CONTESTANTS
        }
        floor, theirs, ours = (1000 * statistics.median(taken[name]) for name in CONTESTANTS)
        print(
            f"| {tokens}, {wide} → {out} | {floor:.2f} | {theirs:.2f} | {ours:.2f} | {ratios['PEFT']:.2f} | "
            f"**{ratios['ours']:.2f}** |",
            flush=True,
        )
        slower |= ratios["ours"] > ratios["PEFT"]
    return slower


def _seconds(layer: Any, rows: torch.Tensor, gradient: torch.Tensor, device: str) -> float:
    on_gpu = device == "cuda"
    repeats, clock = (20, time.perf_counter) if on_gpu else (2, time.thread_time)
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    for _ in range(repeats):
        rows.grad = None
        layer(rows).backward(gradient)
    if on_gpu:
        torch.cuda.synchronize()
    return (clock() - began) / repeats


if __name__ == "__main__":
    main()
