"""Real models of a few hundred thousand parameters, made on the spot: architecture, tokenizer and template in a folder.

Their random weights learn as large models do: enough to see that the loss falls, that a gradient is right and that a
checkpoint continues where it stopped, in a fraction of a second a step.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ARCHITECTURES = ("qwen3", "llama", "qwen3_next", "qwen3_moe", "mixtral")
DENSE = ("qwen3", "llama")
# More families, for what reads a finished adapter: layers of other names, norms and embeddings of other kinds.
OTHER_FAMILIES = ("mistral", "qwen2", "gemma2", "gemma3", "phi3")
MIXTURES = ("qwen3_next", "qwen3_moe", "mixtral")

CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

_THINGS = ["cat", "dog", "ship", "tree", "star", "lamp", "book", "road", "fish", "bird"]
_COLOURS = ["red", "blue", "green", "black", "white"]
_SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


def conversation(number: int, *, system: bool = False, exchanges: int = 1) -> dict[str, Any]:
    """Returns one chat row, different for each number."""
    chosen = random.Random(number)
    messages = [{"role": "system", "content": "You answer tersely."}] if system else []
    for exchange in range(exchanges):
        thing, colour = chosen.choice(_THINGS), chosen.choice(_COLOURS)
        messages.append({"role": "user", "content": f"What colour is the {thing} number {number}.{exchange}?"})
        messages.append({"role": "assistant", "content": f"The {thing} is {colour}. " * chosen.randint(1, 3)})
    return {"messages": messages}


def write_dataset(path: Path, rows: Iterable[Any]) -> Path:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_conversations(path: Path, count: int, **options: Any) -> Path:
    return write_dataset(path, [conversation(number, **options) for number in range(count)])


def make_tokenizer(
    template: str | None = CHATML, *, extra_tokens: Sequence[str] = (), bos: str | None = None, eos: str = "<|im_end|>"
) -> Any:
    """Returns a byte-level BPE tokenizer with 512 words; `<|im_end|>` ends a text, as in Qwen's models. `bos` and `eos`
    may be other tokens, as in Mistral's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    given = [token for token in (bos, eos, *extra_tokens) if token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [message["content"] for number in range(200) for message in conversation(number, system=True)["messages"]]
    tokenizer.train_from_iterator(
        [*corpus, "system user assistant\n"],
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=list(dict.fromkeys(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *given])),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *extra_tokens],
    )
    fast.chat_template = template
    return fast


def make_model(
    folder: Path, architecture: str, *, template: str | None = CHATML, tokenizer: Any = None, **config: Any
) -> Path:
    """Writes a random model of one of ARCHITECTURES or OTHER_FAMILIES, with its tokenizer. `config` overrides single
    values."""
    import torch
    import transformers

    tokenizer = tokenizer or make_tokenizer(template)
    values: dict[str, Any] = {
        **_SHAPE,
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        **_SPECIAL[architecture],
        **config,
    }
    prefix = _CLASS_PREFIX[architecture]
    torch.manual_seed(0)
    config_class = getattr(transformers, "Gemma3TextConfig" if architecture == "gemma3" else f"{prefix}Config")
    model = getattr(transformers, f"{prefix}ForCausalLM")(config_class(**values))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_CLASS_PREFIX = {
    "qwen3": "Qwen3",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "phi3": "Phi3",
    "qwen3_next": "Qwen3Next",
    "qwen3_moe": "Qwen3Moe",
    "mixtral": "Mixtral",
}
# As Gemma's models are: the embeddings are the head, and most layers look back through a window.
_GEMMA = {
    "intermediate_size": 128,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
}
_SPECIAL: dict[str, dict[str, Any]] = {
    "qwen3": {"intermediate_size": 128, "head_dim": 32},
    "llama": {"intermediate_size": 128},
    "mistral": {"intermediate_size": 128, "sliding_window": None},
    "qwen2": {"intermediate_size": 128},
    "gemma2": _GEMMA,
    "gemma3": {**_GEMMA, "num_hidden_layers": 7},
    # One layer for q, k and v, and one for gate and up.
    "phi3": {"intermediate_size": 128},
    "qwen3_next": {
        "intermediate_size": 128,
        "head_dim": 32,
        "num_hidden_layers": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "intermediate_size": 128,
        "head_dim": 32,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "mixtral": {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2},
}

# Wide enough for a card's kernels: a grouped product wants rows of 16 bytes, the gated delta rule heads of 64 or more.
_WIDE = {"hidden_size": 256, "num_attention_heads": 4}
CARD_SHAPE: dict[str, dict[str, Any]] = {
    "qwen3": {**_WIDE, "head_dim": 64},
    "llama": _WIDE,
    "qwen3_next": {**_WIDE, "head_dim": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "qwen3_moe": {**_WIDE, "head_dim": 64},
    "mixtral": _WIDE,
}
