"""The rules for names of modules that adapter/lora.py chooses by, and the names that are never trained or quantised."""

from __future__ import annotations

# Linear layers of a decoder block as transformers names them: attention and feed-forward of dense models, Gated
# DeltaNet's in_proj and out_proj, and the fused forms of some families.
DEFAULT_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "in_proj_qkvz",
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
    "qkv_proj",
    "gate_up_proj",
    "dense",
    "query_key_value",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "c_attn",
    "c_proj",
    "c_fc",
    "fc1",
    "fc2",
)
# A router decides which experts process a token. Trained on a few hundred conversations it only gets worse.
ROUTERS = ("gate", "router", "shared_expert_gate")
# Kept in 16 bits. The head: quantising it costs quality and saves little. The other two are too small for the 4-bit
# kernels' blocks. (This list replaces the library's own, which is why it names lm_head.)
UNQUANTISED_MODULES = ("lm_head", "in_proj_ba", "shared_expert_gate")
# transformers' names for the list of a model's repeated blocks.
_BLOCK_LISTS = ("layers", "h", "blocks")


def is_in_block(tensor: str) -> bool:
    """Returns True if a tensor belongs to one of the model's repeated blocks, by its full name."""
    return any(part in _BLOCK_LISTS for part in tensor.split("."))
