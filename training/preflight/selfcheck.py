"""Checks whether this machine can train, and prints one JSON line; `brightrun-trainer doctor` shows it.

    python -m training.preflight.selfcheck cuda --kernels

With --kernels those of linear attention and of experts are proven too; they are compiled first, for a minute on a new
host. Runs as a separate process, so that the daemon never loads torch.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from training.convolution import convolution_is_offered, offer_fla_convolution
from training.distance import distance
from training.preflight.kernel_proof import (
    fault_of_grouped_products,
    fault_of_linear_attention,
    why_not_imported,
)
from training.quick_imports import quick_imports


def examine(device: str, *, kernels: bool = False) -> dict[str, Any]:
    """Reads versions and the GPU's capabilities, and runs a 4-bit layer once on `device` ("cpu" or "cuda")."""
    with quick_imports():
        import bitsandbytes
        import torch
        import transformers

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "cuda_available": torch.cuda.is_available(),
        "cuda": torch.version.cuda,
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None,
        "driver_cuda": _cuda_of_the_driver(),
    }
    if device == "cuda" and not found["cuda_available"]:
        return found | {"nf4_error": f"PyTorch {torch.__version__} sees no GPU"}
    found["nf4_error"] = _four_bit_error(device)
    if kernels:
        # Without these two, Gated DeltaNet (Qwen3-Next) runs in plain PyTorch: correct, but many times slower.
        offer_fla_convolution(device)
        found["flash_linear_attention"] = why_not_imported("fla")
        found["causal_conv1d"] = why_not_imported("causal_conv1d")
        found["causal_conv1d_by_fla"] = convolution_is_offered()
        found["kernel_fault"] = fault_of_linear_attention(device)
        found["experts_fault"] = fault_of_grouped_products(device)
    return found


def _cuda_of_the_driver() -> str | None:
    """Returns the newest CUDA that the driver serves, as 13.0; None without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        number = int(pynvml.nvmlSystemGetCudaDriverVersion())
    except pynvml.NVMLError:
        return None
    return f"{number // 1000}.{number % 1000 // 10}"


def _four_bit_error(device: str) -> str | None:
    """Returns None if a 4-bit layer matches its bf16 original within NF4's own error; else what is wrong."""
    import torch
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    original = torch.nn.Linear(256, 256, bias=False)
    layer = Linear4bit(256, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict(original.state_dict())
    try:
        layer = layer.to(device)
        x = torch.randn(8, 256, device=device, requires_grad=True)
        output = layer(x)
        output.sum().backward()
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    expected = original.to(device)(x)
    off = distance(output, expected)
    # NF4 of normal weights errs by about 10 % (QLoRA, appendix E); twice that is a broken kernel.
    return None if off < 0.2 and x.grad is not None else f"4-bit products are off by {off:.0%}"


if __name__ == "__main__":
    asked = sys.argv[1:]
    device = next((word for word in asked if not word.startswith("-")), "cpu")
    sys.stdout.write(json.dumps(examine(device, kernels="--kernels" in asked)) + "\n")
