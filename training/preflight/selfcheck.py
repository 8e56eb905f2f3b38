"""Checks whether this machine can train, and prints one JSON line; `brightrun-trainer doctor` shows it.

    python -m training.preflight.selfcheck cuda

Runs as a separate process, so that the daemon never loads torch.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from typing import Any

from training.kernels import fault_of_kernels
from training.quick_imports import quick_imports


def examine(device: str) -> dict[str, Any]:
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
        # Without these two, Gated DeltaNet (Qwen3-Next) runs in plain PyTorch: correct, but many times slower.
        "flash_linear_attention": find_spec("fla") is not None,
        "causal_conv1d": find_spec("causal_conv1d") is not None,
    }
    found["kernel_fault"] = fault_of_kernels(torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
    found["nf4_error"] = _four_bit_error(device)
    return found


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
    distance = ((output - expected).norm() / expected.norm()).item()
    # NF4 of normal weights errs by about 10 % (QLoRA, appendix E); twice that is a broken kernel.
    return None if distance < 0.2 and x.grad is not None else f"4-bit products are off by {distance:.0%}"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(examine(sys.argv[1] if len(sys.argv) > 1 else "cpu")) + "\n")
