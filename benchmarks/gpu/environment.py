"""Which card this is, with which libraries, and how fast it multiplies and copies.

python benchmarks/gpu/environment.py cuda
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.metadata import distributions

import torch

_LIBRARIES = {"torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "fla-core",
              "causal-conv1d", "tokenizers", "safetensors"}  # fmt: skip


def main() -> None:
    installed = {found.metadata["Name"]: found.version for found in distributions()}
    print(", ".join(f"{name} {installed[name]}" for name in sorted(_LIBRARIES & installed.keys())))
    if sys.argv[1:] != ["cuda"]:
        return
    card = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    print(f"{card.name}, compute capability {card.major}.{card.minor}, CUDA {torch.version.cuda}, "
          f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")  # fmt: skip
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    goal = torch.empty_like(source)
    print(f"bf16 product of 8192 × 8192: {2 * 8192**3 / _seconds(lambda: left @ left) / 1e12:.0f} TFLOP/s")
    print(f"copy of 1 GiB, read and written: {2 * 2**30 / _seconds(lambda: goal.copy_(source)) / 1e12:.2f} TB/s")


def _seconds(run: Callable[[], object]) -> float:
    """Returns the mean of ten runs, after one to warm up."""
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / 10


if __name__ == "__main__":
    main()
