"""A weight is packed and unpacked in pieces: equal to one call, and no call is larger than the kernels can count."""

from __future__ import annotations

import math

import bitsandbytes.functional as bnb
import pytest
import torch

import training.quantization.nf4
from training.quantization.nf4 import BLOCK, pack, pieces_of, unpack

# The gate and up projections of one layer's experts, as transformers fuses them.
DEEPSEEK_V3_EXPERTS = torch.Size((256, 4096, 7168))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
# A whole number of pieces, a piece that is not full, a block that is not full, one piece.
@pytest.mark.parametrize("shape", [(4, 64, 64), (3, 64, 100), (5, 33, 31), (2, 8, 8)])
def test_a_weight_unpacked_in_pieces_is_the_weight_unpacked_at_once(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed, state = pack(pieces_of(weight), weight.shape, weight.dtype, weight.device)
    at_once = bnb.dequantize_4bit(packed, state)
    monkeypatch.setattr(training.quantization.nf4, "MOST_ELEMENTS", 64 * BLOCK)
    monkeypatch.setattr(training.quantization.nf4, "_PART_ELEMENTS", 32 * BLOCK)
    in_pieces = unpack(packed, state)
    assert in_pieces.shape == weight.shape and in_pieces.dtype == dtype
    assert torch.equal(in_pieces, at_once)


def test_more_elements_than_32_bits_count_never_go_into_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    count = math.prod(DEEPSEEK_V3_EXPERTS)
    assert count > 2**31
    meta = torch.device("meta")
    state = bnb.QuantState(
        absmax=torch.empty(count // BLOCK, dtype=torch.uint8, device=meta),
        shape=DEEPSEEK_V3_EXPERTS,
        dtype=torch.bfloat16,
        blocksize=BLOCK,
        code=torch.empty(16, device=meta),
        quant_type="nf4",
        offset=torch.empty((), device=meta),
        state2=bnb.QuantState(
            absmax=torch.empty(count // BLOCK // 256, device=meta),
            blocksize=256,
            code=torch.empty(256, device=meta),
            dtype=torch.float32,
        ),
    )
    calls: list[int] = []
    kernel = bnb.dequantize_4bit

    def counted(packed: torch.Tensor, part: bnb.QuantState) -> torch.Tensor:
        assert packed.numel() * 2 == math.prod(part.shape) == part.absmax.numel() * BLOCK
        calls.append(math.prod(part.shape))
        return kernel(packed, part)

    monkeypatch.setattr(bnb, "dequantize_4bit", counted)
    whole = unpack(torch.empty((count // 2, 1), dtype=torch.uint8, device=meta), state)
    assert whole.shape == DEEPSEEK_V3_EXPERTS
    assert sum(calls) == count and max(calls) < 2**31
