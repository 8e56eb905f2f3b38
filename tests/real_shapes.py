"""The shapes of real models, from their config.json on the hub, for tests of decisions that depend on a model.

They are built on the meta device, where a model of 671 billion parameters takes no memory. Small models would hide
errors that depend on size. `write_checkpoint` writes a model's folder as the hub has it, with the headers of its
weights and no data.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.core_model_loading import revert_weight_conversion

# What config.json says, without what changes neither shapes nor decisions.
REAL_SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": {
        "model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_conv_kernel_dim": 4, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "num_experts": 512, "num_experts_per_tok": 10,
        "max_position_embeddings": 262144, "partial_rotary_factor": 0.25, "rope_theta": 10000000,
    },
    "Qwen/Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960,
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "Qwen/Qwen3.5-9B": {
        "model_type": "qwen3_5", "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_5_text", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
            "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
            "linear_num_value_heads": 32, "linear_conv_kernel_dim": 4, "max_position_embeddings": 262144,
        },
        "vision_config": {
            "model_type": "qwen3_5", "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
            "num_position_embeddings": 2304, "out_hidden_size": 4096, "patch_size": 16,
        },
    },
    "Qwen/Qwen3.5-397B-A17B": {
        "model_type": "qwen3_5_moe", "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_5_moe_text", "hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32,
            "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 248320, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 64,
            "linear_conv_kernel_dim": 4, "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024,
            "num_experts": 512, "num_experts_per_tok": 10, "max_position_embeddings": 262144,
        },
        "vision_config": {
            "model_type": "qwen3_5_moe", "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
            "num_position_embeddings": 2304, "out_hidden_size": 4096, "patch_size": 16,
        },
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": {
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
            "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 202048, "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
            "max_position_embeddings": 10485760,
        },
        "vision_config": {
            "model_type": "llama4_vision_model", "hidden_size": 1408, "intermediate_size": 5632,
            "num_hidden_layers": 34, "num_attention_heads": 16,
        },
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": {
        "model_type": "mistral3",
        "text_config": {
            "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
            "max_position_embeddings": 131072,
        },
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24},
    },
    "mistralai/Mixtral-8x7B-Instruct-v0.1": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768, "sliding_window": None,
    },
    # It leaves out what equals the library's defaults: the vocabulary, the context length, the size of a head.
    "google/gemma-3-12b-it": {
        "model_type": "gemma3", "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
            "num_attention_heads": 16, "num_key_value_heads": 8, "sliding_window": 1024,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
            "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
        },
    },
    "microsoft/phi-4": {
        "model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352, "max_position_embeddings": 16384,
        "sliding_window": None, "pad_token_id": 100349,
    },
    "openai/gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
        "num_local_experts": 32, "num_experts_per_tok": 4, "max_position_embeddings": 131072,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        },
    },
    "deepseek-ai/DeepSeek-V3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "moe_intermediate_size": 2048,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840, "num_nextn_predict_layers": 1,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
    },
    # It reads as DeepSeek-V3 does, but by code of its own.
    "moonshotai/Kimi-K2-Instruct": {
        "model_type": "kimi_k2",
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "hidden_size": 7168, "num_hidden_layers": 61, "vocab_size": 163840, "n_routed_experts": 384,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
    },
    "zai-org/GLM-4.5-Air": {
        "model_type": "glm4_moe", "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151552,
        "moe_intermediate_size": 1408, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": False,
        "max_position_embeddings": 131072, "num_nextn_predict_layers": 1,
    },
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49152, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}  # fmt: skip

# Of these the library makes no causal language model: there are no tensors to speak of.
WITHOUT_A_CLASS = ("mistralai/Mistral-Small-3.2-24B-Instruct-2506", "moonshotai/Kimi-K2-Instruct")
_SHARD_TENSORS = 20_000


@dataclass(frozen=True)
class Stored:
    """One tensor in a weight file."""

    shape: tuple[int, ...]
    dtype: str = "BF16"


def config_of(name: str, layers: int | None = None, *, in_16_bits: bool = False) -> dict[str, Any]:
    """Returns config.json, with fewer layers if asked. Layers repeat: the first few have every kind of weight.

    `in_16_bits`: of the copies of a quantised model that others publish in BF16."""
    config = copy.deepcopy(REAL_SHAPES[name])
    if in_16_bits:
        config.pop("quantization_config", None)
    if layers is not None:
        config.get("text_config", config)["num_hidden_layers"] = layers
    return config


def skeleton(name: str, layers: int | None = None, **options: Any) -> Any:
    """Returns the model on the meta device, as AutoModelForCausalLM makes it from 16-bit weights."""
    values = config_of(name, layers, in_16_bits=True)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        return kind._from_config(
            config if kind.config_class is type(config) else config.get_text_config(), dtype=torch.bfloat16, **options
        )


def published_tensors(name: str, layers: int | None = None, *, in_16_bits: bool = False) -> dict[str, Stored]:
    """Returns the tensors as the hub has them: experts one by one where they are published so, fused elsewhere."""
    if name in WITHOUT_A_CLASS:
        # Nothing after config.json is looked at.
        return {"model.embed_tokens.weight": Stored((64, 64))}
    model = skeleton(name, layers)
    tied = set(model.all_tied_weights_keys)
    own = {path: tensor for path, tensor in model.state_dict().items() if path not in tied}
    kind = REAL_SHAPES[name]["model_type"]
    if kind not in ("qwen3_5_moe", "llama4"):
        with torch.device("meta"):
            own = revert_weight_conversion(model, own)
    stored = {path: Stored(tuple(tensor.shape)) for path, tensor in own.items()}
    count = model.config.get_text_config().num_hidden_layers
    match kind:
        case "qwen3_next":
            stored |= _prediction_layer(stored, f"model.layers.{count - 1}.", "mtp.layers.0.")
        case "glm4_moe" | "deepseek_v3":
            stored |= _prediction_layer(stored, f"model.layers.{count - 1}.", f"model.layers.{count}.")
        case "qwen3_5" | "qwen3_5_moe":
            stored = {path.replace("model.", "model.language_model.", 1): tensor for path, tensor in stored.items()}
            stored |= _prediction_layer(stored, f"model.language_model.layers.{count - 1}.", "mtp.layers.0.")
            stored |= dict(_vision(REAL_SHAPES[name]["vision_config"]))
        case "gemma3":
            stored = {
                path.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor
                for path, tensor in stored.items()
            }
        case "llama4":
            stored = {f"language_model.{path}": tensor for path, tensor in stored.items()}
    match None if in_16_bits else REAL_SHAPES[name].get("quantization_config", {}).get("quant_method"):
        case "fp8":
            return dict(_in_fp8(stored))
        case "mxfp4":
            return dict(_in_mxfp4(stored))
    return stored


def _prediction_layer(stored: dict[str, Stored], like: str, path: str) -> dict[str, Stored]:
    """A layer that predicts the token after the next: published with the model, and not loaded."""
    return {name.replace(like, path, 1): tensor for name, tensor in stored.items() if name.startswith(like)}


def _vision(config: dict[str, Any]) -> Iterator[tuple[str, Stored]]:
    """The linear layers of a vision tower, under names that a language model's layers have too."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    for number in range(config["depth"]):
        block = f"model.visual.blocks.{number}"
        yield f"{block}.attn.qkv.weight", Stored((3 * hidden, hidden))
        yield f"{block}.attn.proj.weight", Stored((hidden, hidden))
        yield f"{block}.mlp.linear_fc1.weight", Stored((middle, hidden))
        yield f"{block}.mlp.linear_fc2.weight", Stored((hidden, middle))


def _in_fp8(stored: dict[str, Stored]) -> Iterator[tuple[str, Stored]]:
    for name, tensor in stored.items():
        if len(tensor.shape) == 2 and ".layers." in name and not name.endswith(".gate.weight"):
            rows, columns = tensor.shape
            yield name, Stored(tensor.shape, "F8_E4M3")
            yield f"{name}_scale_inv", Stored((-(-rows // 128), -(-columns // 128)), "F32")
        else:
            yield name, tensor


def _in_mxfp4(stored: dict[str, Stored]) -> Iterator[tuple[str, Stored]]:
    for name, tensor in stored.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, outer = tensor.shape
            yield f"{name}_blocks", Stored((experts, outer, inner // 32, 16), "U8")
            yield f"{name}_scales", Stored((experts, outer, inner // 32), "U8")
        else:
            yield name, tensor


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Stored]) -> Path:
    """Writes config.json and weight files of full length that take no room: a header, and a hole for the data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    names = list(tensors)
    shards = [names[start : start + _SHARD_TENSORS] for start in range(0, len(names), _SHARD_TENSORS)]
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in shard:
            start, end = end, end + _bytes_of(tensors[name])
            header[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": [start, end]}
            index[name] = file.name
        written = json.dumps(header).encode()
        with file.open("wb") as stream:
            stream.write(len(written).to_bytes(8, "little") + written)
            stream.truncate(8 + len(written) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return folder


def _bytes_of(tensor: Stored) -> int:
    return math.prod(tensor.shape) * {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}[tensor.dtype]


# Sizes of a model of some hundred thousand parameters, with every kind of layer that the real one has.
_SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "intermediate_size_mlp": 128, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 64,
    "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "sliding_window": 8,
    "max_position_embeddings": 2048, "depth": 1, "num_heads": 4, "out_hidden_size": 64, "num_position_embeddings": 16,
    "image_size": 28, "patch_size": 14, "mm_tokens_per_image": 4, "query_pre_attn_scalar": 32,
}  # fmt: skip


def small_config(name: str, vocabulary: int = 512) -> dict[str, Any]:
    """Returns the config of a small model of the same architecture, in 16 bits."""

    def shrink(part: dict[str, Any]) -> dict[str, Any]:
        small = {key: value if value is None else _SMALL.get(key, value) for key, value in part.items()}
        return {key: shrink(value) if isinstance(value, dict) else value for key, value in small.items()}

    config = shrink(config_of(name, in_16_bits=True))
    text = config.get("text_config", config)
    text |= {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    if text["model_type"] == "gemma3_text":
        text |= {"head_dim": 32, "query_pre_attn_scalar": 32}
        config |= {"image_token_index": vocabulary - 1, "boi_token_index": 3, "eoi_token_index": 4}
    if text["model_type"] == "deepseek_v3":
        text["num_key_value_heads"] = text["num_attention_heads"]
    if text["model_type"] == "gpt_oss":
        text["intermediate_size"] = 64
    if "vision_config" in config:
        config["vision_config"]["num_hidden_layers"] = 1
    return config


def write_small_model(folder: Path, name: str, tokenizer: Any) -> Path:
    """Writes a random model of `small_config`, with its tokenizer."""
    values = small_config(name, -(-len(tokenizer) // 64) * 64)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    torch.manual_seed(0)
    model = kind._from_config(
        config if kind.config_class is type(config) else config.get_text_config(), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
