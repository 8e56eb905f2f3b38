"""The ranks that vLLM can be started with: for the model card, and for the fit to an endpoint."""

from __future__ import annotations

# The values that vLLM's --max-lora-rank takes (its source, 0.32); 16 unless it is given.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def smallest_max_lora_rank(rank: int) -> int:
    """Returns the smallest --max-lora-rank that takes this rank: vLLM's buffers grow with it."""
    return min((each for each in VLLM_RANKS if each >= rank), default=VLLM_RANKS[-1])
