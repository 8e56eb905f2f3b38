"""A model in many files whose size is on paper: its weights are holes in its files, which take no room on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny_models import make_tokenizer
from training.export.merging.shard_file import header_of

_VOCABULARY = 1024
_RANK = 16


def write_large_model(folder: Path, *, hidden: int, layers: int) -> int:
    """Writes a Llama with one file for each layer; returns the bytes of the largest."""
    folder.mkdir(parents=True)
    make_tokenizer().save_pretrained(folder)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": _VOCABULARY,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards = [
        {
            **{f"model.layers.{layer}.{name}.weight": shape for name, shape in _linear(hidden).items()},
            f"model.layers.{layer}.input_layernorm.weight": (hidden,),
            f"model.layers.{layer}.post_attention_layernorm.weight": (hidden,),
        }
        for layer in range(layers)
    ]
    shards[0] |= {"model.embed_tokens.weight": (_VOCABULARY, hidden)}
    shards[-1] |= {"model.norm.weight": (hidden,), "lm_head.weight": (_VOCABULARY, hidden)}
    placed = {}
    for number, tensors in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{layers:05}.safetensors"
        head = header_of([(name, "BF16", shape) for name, shape in tensors.items()], {"format": "pt"})
        with file.open("wb") as opened:
            opened.write(head)
            opened.truncate(len(head) + sum(2 * torch.Size(shape).numel() for shape in tensors.values()))
        placed |= dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_large_adapter(folder: Path, *, hidden: int, layers: int, seed: int = 0) -> Path:
    """Writes an adapter on each linear layer of it."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (outputs, inputs) in _linear(hidden).items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = 0.02 * torch.randn(_RANK, inputs)
            tensors[f"{module}.lora_B.weight"] = 0.02 * torch.randn(outputs, _RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 32, "base_model_name_or_path": "acme/large"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _linear(hidden: int) -> dict[str, tuple[int, int]]:
    square, wide, narrow = (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)
    return {
        **{f"self_attn.{name}_proj": square for name in "qkvo"},
        "mlp.gate_proj": wide,
        "mlp.up_proj": wide,
        "mlp.down_proj": narrow,
    }
