"""The real Qwen3-Next-80B-A3B architecture with random 4-bit weights: build time, memory, tokens a second.

    python benchmarks/moe_80b.py --device cuda            all 48 layers, 512 experts, 2k to 16k tokens a micro-batch
    python benchmarks/moe_80b.py                          a dry run on a CPU: 2 layers, 32 experts, 64 to 256 tokens

No weights are needed: the skeleton is made without memory and filled layer by layer with random NF4 bytes, as many as
the real model has. Time and memory do not depend on their values. The dtype is the trainer's: bf16 on a GPU, float32 on
a CPU without bf16 units, where a grouped product of bf16 is sixty times slower (measured: 0.24 against 15 GFLOP/s on
two cores without AVX512-BF16; a step did not end).
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from training.adapter.lora import attach_adapter, trainable_parameters
from training.base.dtype import compute_dtype
from training.files.module_names import UNQUANTISED_MODULES
from training.loop.loss import AnswerLoss
from training.quantization.choose_product import choose_products
from training.quantization.experts import (
    EXPERTS_FUNCTION,
    Nf4Config,
    Nf4Quantizer,
    expert_states,
    has_fused_experts,
    unpack_once_for_backward,
)
from training.spec import Hyperparameters

_GIB = 2**30
_USUAL: dict[str, dict[str, Any]] = {
    "cuda": {"layers": 48, "experts": 512, "tokens": [2048, 4096, 8192, 16384], "steps": 3},
    "cpu": {"layers": 2, "experts": 32, "tokens": [64, 128, 256], "steps": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, help="48 on a card, 2 on a CPU")
    parser.add_argument("--experts", type=int, help="512 on a card, 32 on a CPU")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens a micro-batch, one line of the table each")
    parser.add_argument("--steps", type=int, help="timed steps a size, after one to warm up")
    parser.add_argument("--rank", type=int, default=16)
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    arguments = argparse.Namespace(**{**_USUAL[given["device"]], **given})
    began = time.perf_counter()
    model = build(arguments.layers, arguments.experts, arguments.device)
    adapted = attach_adapter(model, Hyperparameters(lora_rank=arguments.rank, lora_dropout=0.0))
    adapted.train()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()
    unpack_once_for_backward(adapted)
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{machine}; torch {torch.__version__}; {arguments.layers} layers × {arguments.experts} experts, "
        f"computed in {str(compute_dtype(arguments.device)).removeprefix('torch.')}"
    )
    print(f"built in {time.perf_counter() - began:.1f} s, {_memory(arguments.device):.2f} GiB in use")
    print(f"trainable {trainable_parameters(adapted) / 1e6:.1f} M", flush=True)
    loss = AnswerLoss(adapted.get_base_model())
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    print(f"{'tokens':>8} {'s/step':>9} {'tokens/s':>10} {'peak GiB':>10}")
    for tokens in arguments.tokens:
        if arguments.device == "cuda":
            # As the trainer does at the start of a job.
            print(*(f"  {tried}" for tried in choose_products(adapted, tokens)), sep="\n")
        try:
            seconds = _time_steps(loss, optimizer, tokens, arguments)
        except torch.OutOfMemoryError:
            print(f"{tokens:>8} {'out of memory':>31}")
            break
        print(f"{tokens:>8} {seconds:>9.2f} {tokens / seconds:>10.1f} {_peak(arguments.device):>10.2f}", flush=True)


def build(layers: int, experts: int, device: str) -> Any:
    """Returns the model with random 4-bit weights on the device, frozen; no expert is ever in 16 bits."""
    config = Qwen3NextConfig(
        num_hidden_layers=layers, num_experts=experts, num_experts_per_tok=min(10, experts), pad_token_id=0
    )
    config.use_cache = False
    dtype = compute_dtype(device)
    settings = Nf4Config(dtype, list(UNQUANTISED_MODULES))
    with torch.device("meta"):
        model = Qwen3NextForCausalLM._from_config(config, dtype=dtype, experts_implementation=EXPERTS_FUNCTION)
    replace_with_bnb_linear(model, modules_to_not_convert=list(UNQUANTISED_MODULES), quantization_config=settings)
    for path, module in list(model.named_modules()):
        _fill(model, path, module, device)
    model.is_quantized = True
    Nf4Quantizer(settings, pre_quantized=False).postprocess_model(model)
    return model.requires_grad_(False)


def _fill(model: Any, path: str, module: Any, device: str) -> None:
    if isinstance(module, bnb.nn.Linear4bit):
        packed, state = _random_nf4(torch.Size((module.out_features, module.in_features)), device)
        module.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=64, compress_statistics=True, quant_type="nf4",
            bnb_quantized=True, module=module,
        )  # fmt: skip
        module.quant_state = state
        module.support_avx512bf16_for_cpu = False
    elif has_fused_experts(module):
        for name in ("gate_up_proj", "down_proj"):
            packed, state = _random_nf4(module._parameters[name].shape, device)
            expert_states(module)[name] = state
            module._parameters[name] = torch.nn.Parameter(packed, requires_grad=False)
    elif type(module).__name__.endswith("RotaryEmbedding"):
        model.set_submodule(path, type(module)(config=model.config).to(device))
    else:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=compute_dtype(device), device=device)
                _initialise(value, path, name, type(module).__name__)
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)


def _initialise(value: torch.Tensor, path: str, name: str, kind: str) -> None:
    """Numbers as large as the real ones, so that nothing overflows on the way through 48 layers."""
    if name == "A_log":
        value.uniform_(0.01, 16).log_()
    elif name == "dt_bias" or ("norm" in path and kind != "Qwen3NextRMSNorm"):
        value.fill_(1.0)
    elif "norm" in path:
        value.zero_()
    else:
        value.normal_(0, 0.02)


def _random_nf4(shape: torch.Size, device: str) -> tuple[torch.Tensor, bnb_functional.QuantState]:
    """Random bytes and the state of a double quantisation whose weights have a standard deviation of about 0.02."""
    blocks = shape.numel() // 64
    second = bnb_functional.QuantState(
        absmax=torch.full((-(-blocks // 256),), 0.01, device=device),
        code=bnb_functional.create_dynamic_map().to(device),
        blocksize=256,
        dtype=torch.float32,
    )
    state = bnb_functional.QuantState(
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        shape=shape,
        dtype=compute_dtype(device),
        blocksize=64,
        code=bnb_functional.get_4bit_type("nf4", device=device),
        quant_type="nf4",
        offset=torch.tensor(0.05, device=device),
        state2=second,
    )
    return torch.randint(0, 256, (shape.numel() // 2, 1), dtype=torch.uint8, device=device), state


def _time_steps(loss: AnswerLoss, optimizer: Any, tokens: int, arguments: argparse.Namespace) -> float:
    """Returns the seconds of an optimizer step over one sequence of this many tokens, half of them trained."""
    ids_BT = torch.randint(0, 50_000, (1, tokens), device=arguments.device)
    labels_BT = ids_BT.clone()
    labels_BT[:, : tokens // 2] = -100
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = 0.0
    for step in range(arguments.steps + 1):
        if step == 1:
            _wait(arguments.device)
            began = time.perf_counter()
        # As in the trainer: the adapter is float32, the arithmetic bf16 where the hardware has it.
        with torch.autocast(
            arguments.device, dtype=torch.bfloat16, enabled=compute_dtype(arguments.device) is torch.bfloat16
        ):
            total, count = loss({"input_ids": ids_BT, "labels": labels_BT})
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    _wait(arguments.device)
    assert torch.isfinite(total)
    return (time.perf_counter() - began) / arguments.steps


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _memory(device: str) -> float:
    return torch.cuda.memory_allocated() / _GIB if device == "cuda" else _peak(device)


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / _GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB


if __name__ == "__main__":
    main()
