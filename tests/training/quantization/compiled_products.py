"""Compiles the fused kernel for cards that are not here, and prints what it takes of them, as JSON.

Arguments: compute capabilities (90 for 9.0), and `all` for every height of tile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from training.quantization.fused_product import _GROUP, _STAGES, _TILE_OUT, _TILE_SUM, TILE_ROWS, _product, warps_for

# Tensor cores, by generation: mma (8.x, 12.x), wgmma (9.0), tcgen05 (10.0).
_TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


def compiled(capability: int, height: int, *, along: bool, even: bool) -> dict[str, Any]:
    types = {
        **dict.fromkeys(("rows", "out"), "*bf16"),
        **dict.fromkeys(("packed", "maxima"), "*u8"),
        **dict.fromkeys(("maxima_code", "maxima_scale", "maxima_offset", "table"), "*fp32"),
        **dict.fromkeys(("tiles", "size_a", "size_b", "num_tiles"), "i32"),
        "tiles": "*i32",
    }
    fixed = {
        "ALONG": along,
        "EVEN": even,
        "TILE_ROWS": height,
        "TILE_OUT": _TILE_OUT,
        "TILE_SUM": _TILE_SUM,
        "GROUP": _GROUP,
        "EMULATED": False,
    }
    names = _product.arg_names
    source = ASTSource(
        _product,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        # As at run time: what torch allocates is aligned, and widths are whole multiples of 16.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types if name != "num_tiles"},
    )
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps_for(height), "num_stages": _STAGES},
    )
    return {
        "capability": capability,
        "height": height,
        "along": along,
        "even": even,
        "shared": kernel.metadata.shared,
        "spilled": _stack_bytes(kernel.asm["cubin"]),
        "uses": [name for name in _TENSOR_CORES if name in kernel.asm["ptx"]],
    }


def _stack_bytes(binary: bytes) -> int:
    """What ptxas put into memory instead of registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"STACK:(\d+)", said)))


def main() -> None:
    capabilities = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    if "all" in sys.argv:
        kernels = [
            compiled(capability, height, along=along, even=even)
            for capability in capabilities
            for height, even in (*((height, True) for height in TILE_ROWS), (64, False))
            for along in (True, False)
        ]
    else:
        kernels = [
            compiled(capability, 64, along=along, even=True)
            for capability, along in zip(capabilities, (True, False), strict=False)
        ]
    json.dump(kernels, sys.stdout)


if __name__ == "__main__":
    main()
