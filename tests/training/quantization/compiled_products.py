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

from training.quantization.fused_product import (
    _GROUP,
    _STAGES,
    _TILE_OUT,
    _TILE_SUM,
    TILE_ROWS,
    _list_tiles,
    _product,
    warps_for,
)
from training.quantization.fused_rows import _TILE, _spread_rows, _sum_rows, _weighted_rows_backward

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


def compiled_helpers(capability: int) -> list[dict[str, Any]]:
    """The kernels around the product, at the 80B's sizes: nothing to see but that they compile and do not spill."""
    rows = dict.fromkeys(("tokens", "rows", "total", "grad", "grad_rows", "weight", "grad_weight"), "*bf16")
    types = {**rows, "back": "*i64", "ends": "*i32", "tiles": "*i32", **dict.fromkeys(("width", "num_experts"), "i32")}
    types["num_tiles"] = "i32"
    fixed = {"K": 10, "TILE": _TILE, "WEIGHTED": True, "EMULATED": False, "EMULATED_WEIGHT": False}
    fixed |= {"TILE_ROWS": 128, "EXPERTS": 512, "TILES": 16}
    found = []
    for kernel in (_list_tiles, _spread_rows, _sum_rows, _weighted_rows_backward):
        names = kernel.arg_names
        source = ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in fixed.items() if name in names},
        )
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        found.append(
            {
                "capability": capability,
                "name": kernel.__name__,
                "shared": made.metadata.shared,
                "spilled": _stack_bytes(made.asm["cubin"]),
                "uses": ["no tensor cores needed"],
            }
        )
    return found


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
    kernels += [helper for capability in capabilities for helper in compiled_helpers(capability)]
    json.dump(kernels, sys.stdout)


if __name__ == "__main__":
    main()
