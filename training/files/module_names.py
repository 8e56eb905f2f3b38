"""The rules for names of modules that adapter/lora.py chooses by, and the names that are never trained or quantised."""

from __future__ import annotations

import re

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
    # Latent attention (DeepSeek). Not kv_b_proj: servers multiply it into other weights, and would lose its adapter.
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
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
# Kept in 16 bits. The head: quantising it costs quality and saves little. The others are small, and decide how much a
# layer remembers and how much a shared expert counts; some are too small for the 4-bit kernels' blocks. (This list
# replaces the library's own, which is why it names lm_head.)
UNQUANTISED_MODULES = ("lm_head", "in_proj_ba", "in_proj_a", "in_proj_b", "shared_expert_gate")
# transformers' names for the list of a model's repeated blocks.
_BLOCK_LISTS = ("layers", "h", "blocks")
# Parts of a model that see or hear, and what joins them to the language model. Conversations here are text.
OTHER_SENSES = (
    "vision_tower",
    "vision_model",
    "vision_encoder",
    "visual",
    "audio_tower",
    "audio_model",
    "audio_encoder",
    "multi_modal_projector",
    "mm_projector",
)
# The decoder's own list of layers, as checkpoints name it, with the number of a layer.
_DECODER_LAYER = re.compile(r"(?:language_model\.)?(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")


def is_in_block(tensor: str) -> bool:
    """Returns True if a tensor belongs to one of the model's repeated blocks, by its full name."""
    return any(part in _BLOCK_LISTS for part in tensor.split("."))


def may_be_adapted(path: str) -> bool:
    """Returns True for what the adapter may adapt: the language model's blocks, without their experts."""
    parts = path.split(".")
    return is_in_block(path) and "experts" not in parts and set(OTHER_SENSES).isdisjoint(parts)


def is_loaded(tensor: str, layers: int) -> bool:
    """Returns False for a layer that predicts tokens further on: published with some models, and never loaded.

    Qwen calls it `mtp`; DeepSeek and GLM count it as one more layer than their config has.
    """
    layer = _DECODER_LAYER.match(tensor)
    return not tensor.startswith("mtp.") and (layer is None or int(layer[1]) < layers)


def in_block(path: str) -> str:
    """What follows the number of the block: `self_attn.q_proj`."""
    parts = path.split(".")
    after = max((index + 1 for index, part in enumerate(parts) if part.isdigit()), default=0)
    return ".".join(parts[after:])
