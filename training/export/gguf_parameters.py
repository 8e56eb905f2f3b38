"""What llama.cpp must know of a model beside its weights: sizes, rotary positions, experts, windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from training.export.gguf_families import Family, refused

# Of Llama 3's published models; their configurations state all of them.
_LLAMA3_DEFAULTS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def add_parameters(writer: Any, family: Family) -> None:
    """Adds the architecture's keys to a GGUFWriter. `family.config` is the language model's configuration."""
    config = family.config
    writer.add_block_count(family.blocks)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    if config.get("intermediate_size"):
        writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(int(config["num_attention_heads"]))
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or config["num_attention_heads"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    if config.get("head_dim"):
        writer.add_key_length(family.head_dim)
        writer.add_value_length(family.head_dim)
    writer.add_rope_dimension_count(_rotated(family))
    _add_positions(writer, family)
    if family.experts:
        _add_experts(writer, config)
    if family.architecture == "QWEN3NEXT":
        _add_delta_net(writer, config)
    if family.architecture in ("GEMMA2", "GEMMA3") or (family.architecture == "PHI3"):
        # 0 tells Phi-4 from Phi-3, which llama.cpp guards with a window of its own.
        writer.add_sliding_window(int(config.get("sliding_window") or 0))
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(float(config["attn_logit_softcapping"]))
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))


def position_factors(family: Family) -> dict[str, np.ndarray[Any, Any]]:
    """Returns the tensors that stretch rotary positions, by their names in the file: Llama 3's and Phi-3's long
    context."""
    positions = _positions(family)
    kind = positions.get("rope_type", "default")
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(positions, _rotated(family))}
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(positions[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    return {}


def _positions(family: Family) -> Mapping[str, Any]:
    """Rotary positions of full attention; Gemma 3 states those of its sliding windows beside them."""
    found: Mapping[str, Any] = family.config.get("rope_parameters") or {}
    return found.get("full_attention", found) or {}


def _rotated(family: Family) -> int:
    share = _positions(family).get("partial_rotary_factor") or family.config.get("partial_rotary_factor") or 1.0
    return int(family.head_dim * float(share))


def _add_positions(writer: Any, family: Family) -> None:
    import gguf

    positions, kind = _positions(family), _positions(family).get("rope_type", "default")
    if positions.get("rope_theta"):
        writer.add_rope_freq_base(float(positions["rope_theta"]))
    sliding = (family.config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if sliding.get("rope_theta"):
        writer.add_rope_freq_base_swa(float(sliding["rope_theta"]))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(positions["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(positions["factor"]))
        writer.add_rope_scaling_orig_ctx_len(_trained_context(family, positions))
        if positions.get("attention_factor"):
            raise refused("this model sets YaRN's attention_factor itself, which llama.cpp reads otherwise")
        if positions.get("beta_fast"):
            writer.add_rope_scaling_yarn_beta_fast(float(positions["beta_fast"]))
        if positions.get("beta_slow"):
            writer.add_rope_scaling_yarn_beta_slow(float(positions["beta_slow"]))
    elif kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        trained = _trained_context(family, positions)
        writer.add_rope_scaling_orig_ctx_len(trained)
        stretch = int(family.config["max_position_embeddings"]) / trained
        stated = positions.get("attention_factor")
        computed = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0
        writer.add_rope_scaling_attn_factors(float(stated or computed))
    elif family.architecture == "PHI3":
        writer.add_rope_scaling_orig_ctx_len(_trained_context(family, positions))


def _trained_context(family: Family, positions: Mapping[str, Any]) -> int:
    stated = positions.get("original_max_position_embeddings") or family.config.get("original_max_position_embeddings")
    return int(stated or family.config["max_position_embeddings"])


def _llama3_factors(positions: Mapping[str, Any], rotated: int) -> np.ndarray[Any, Any]:
    """Llama 3 divides slow frequencies by `factor`, keeps fast ones, and blends between the two wavelengths."""
    stated = {**_LLAMA3_DEFAULTS, **{name: value for name, value in positions.items() if value is not None}}
    factor, slow, fast = (float(stated[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(stated.get("original_max_position_embeddings", 8192))
    exponents = np.arange(0, rotated, 2, dtype=np.float64) / rotated
    turns = context / (2 * math.pi * float(stated.get("rope_theta", 10000.0)) ** exponents)
    blend = np.clip((turns - slow) / (fast - slow), 0.0, 1.0)
    # The file says by how much a frequency is divided.
    factors: np.ndarray[Any, Any] = (1 / ((1 - blend) / factor + blend)).astype(np.float32)
    return factors


def _add_experts(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_expert_count(int(config.get("num_local_experts") or config["num_experts"]))
    writer.add_expert_used_count(int(config["num_experts_per_tok"]))
    if config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))
    if config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(int(config["shared_expert_intermediate_size"]))


def _add_delta_net(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_ssm_conv_kernel(int(config["linear_conv_kernel_dim"]))
    writer.add_ssm_state_size(int(config["linear_key_head_dim"]))
    writer.add_ssm_group_count(int(config["linear_num_key_heads"]))
    writer.add_ssm_time_step_rank(int(config["linear_num_value_heads"]))
    writer.add_ssm_inner_size(int(config["linear_value_head_dim"]) * int(config["linear_num_value_heads"]))
    kinds = list(config.get("layer_types") or [])
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 4
    expected = ["full_attention" if (layer + 1) % every == 0 else "linear_attention" for layer in range(len(kinds))]
    if kinds != expected:
        raise refused(f"llama.cpp expects full attention in every {every}th layer; this model has it elsewhere")
    writer.add_full_attention_interval(every)
