"""The experts of Qwen3-Next-80B in one micro-batch: bytes and launches of each way to multiply by them, and its time.

    python benchmarks/expert_product.py                 counted on the meta device, without a card: bytes, launches
    python benchmarks/expert_product.py --device cuda   the same, and the trainer's own choice on this card, timed
    python benchmarks/expert_product.py --experts 8 --hidden 4096 --intermediate 14336 --layers 32 --of 2   Mixtral 8x7B

What is counted is what a GPU job does with a layer's experts: forward, once more when backward recomputes it, and
backward; the unpacked weights are held between the last two. Every operand is read once from memory and every result is
written once (benchmarks/count_traffic.py). Tiles of the fused kernel read rows and weights again, from L2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.count_traffic import H100_BYTES_A_SECOND, KINDS, Cost, Traffic, costs
from training.quantization.choose_product import choose_products
from training.quantization.experts import expert_states, nf4_grouped_experts, set_product, unpack_once_for_backward
from training.quantization.fused_product import tile_rows_for
from training.quantization.grouped_product import UNPACKED, Choice, Implementation, Kind

_PHASES = ("forward", "recompute", "backward")


@costs("brightrun::nf4_grouped_product")
def _(arguments: dict[str, Any], result: torch.Tensor) -> list[Cost]:
    """Rows, packed bytes and both levels of absmax once; nothing of 16 bits but the rows and the result."""
    weights = sum(_bytes(arguments[name]) for name in ("packed", "maxima", "maxima_scale"))
    rows = arguments["rows"]
    flops = 2 * rows.shape[0] * arguments["size_a"] * arguments["size_b"]
    return [Cost("product", _bytes(rows) + weights + _bytes(arguments["tiles"]), _bytes(result), flops)]


@costs("aten::_grouped_mm")
def _(arguments: dict[str, Any], result: torch.Tensor) -> list[Cost]:
    """Each row with one expert's matrix: torch's own table of operations does not know it."""
    rows, weights = arguments["self"], arguments["mat2"]
    read = sum(_bytes(arguments[name]) for name in ("self", "mat2", "offs"))
    return [Cost("product", read, _bytes(result), 2 * rows.numel() * weights.shape[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="meta", choices=["meta", "cuda"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--of", type=int, default=10, help="experts of a token")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=512)
    arguments = parser.parse_args()
    counted = _layer(arguments, "meta")
    print(f"{arguments.layers} layers, counted:")
    heads = "".join(f"{kind} GB".rjust(15) for kind in KINDS)
    print(f"{'tokens':>6}  {'':<39}{heads}{'sum':>9}{'launches':>10}{'peak GiB':>10}")
    for tokens in arguments.tokens:
        heights = tile_rows_for(tokens * arguments.of, arguments.experts)
        for implementation in (
            UNPACKED,
            Implementation(Kind.UNPACKED, moves_rows=True),
            Implementation(Kind.FUSED, heights[-1]),
            Implementation(Kind.FUSED, heights[-1], moves_rows=True),
        ):
            traffic = _count(counted, tokens, implementation, arguments)
            parts = [traffic.bytes(kind) * arguments.layers / 1e9 for kind in KINDS]
            columns = "".join(f"{part:>15.1f}" for part in parts)
            peak = max(traffic.peak_of.values()) / 2**30
            print(
                f"{tokens:>6}  {implementation!s:<39}{columns}{sum(parts):>9.1f}"
                f"{traffic.launches() * arguments.layers:>10}{peak:>10.2f}"
            )
    print(f"At {H100_BYTES_A_SECOND / 1e12} TB/s, an H100's, 100 GB take {1e11 / H100_BYTES_A_SECOND:.2f} s.")
    if arguments.device == "cuda":
        _time(arguments)


def _count(module: torch.nn.Module, tokens: int, implementation: Implementation, arguments: Any) -> Traffic:
    set_product(module, Choice(((1, implementation),)))
    hidden = torch.empty(tokens, arguments.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(tokens, arguments.of, dtype=torch.bfloat16, device="meta", requires_grad=True)
    chosen = torch.empty(tokens, arguments.of, dtype=torch.int64, device="meta")
    with Traffic() as traffic:
        traffic.ignore([hidden, weight, chosen])
        traffic.ignore(_stored(module))
        with torch.no_grad():
            nf4_grouped_experts(module, hidden, chosen, weight)
        traffic.mark("forward")
        out = nf4_grouped_experts(module, hidden, chosen, weight)
        traffic.mark("recompute")
        out.backward(torch.empty_like(out))
        traffic.mark("backward")
    assert tuple(traffic.phases) == _PHASES
    return traffic


def _time(arguments: Any) -> None:
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, one layer:")
    module = _layer(arguments, "cuda")
    for tokens in arguments.tokens:
        torch.cuda.reset_peak_memory_stats()
        (tried,) = choose_products(torch.nn.ModuleList([module]), tokens)
        print(tried)
        for name, reason in tried.faults.items():
            print(f"  left out: {name}: {reason}")


def _layer(arguments: Any, device: str) -> torch.nn.Module:
    """One layer's experts at the real widths, with random bytes for weights."""
    config = Qwen3MoeConfig(
        hidden_size=arguments.hidden,
        moe_intermediate_size=arguments.intermediate,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.of,
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    for name in ("gate_up_proj", "down_proj"):
        shape = module.get_parameter(name).shape
        blocks = shape.numel() // 64
        second = bnb.QuantState(
            absmax=torch.full((-(-blocks // 256),), 0.01, device=device),
            code=bnb.create_dynamic_map().to(device),
            blocksize=256,
            dtype=torch.float32,
        )
        expert_states(module)[name] = bnb.QuantState(
            absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
            shape=shape,
            dtype=torch.bfloat16,
            blocksize=64,
            code=bnb.get_4bit_type("nf4", device="cpu").to(device),
            quant_type="nf4",
            offset=torch.tensor(0.05, device=device),
            state2=second,
        )
        packed = torch.randint(0, 256, (shape.numel() // 2, 1), dtype=torch.uint8, device=device)
        module.register_parameter(name, torch.nn.Parameter(packed, requires_grad=False))
    unpack_once_for_backward(module)
    return module


def _stored(module: torch.nn.Module) -> list[torch.Tensor]:
    states = expert_states(module).values()
    return [*module.parameters(), *(tensor for state in states for tensor in (state.absmax, state.state2.absmax))]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    main()
