"""What a tensor of a Hugging Face model is called in GGUF, and how its rows are ordered there, for each family.

The names come from the package `gguf`. What it does not know is here: llama.cpp rotates other pairs of dimensions than
transformers for Llama's family, keeps Gated DeltaNet's q, k and v apart from z, and expects Gemma's and Qwen3-Next's
norms with the one that those models add. Everything is a choice of rows or a change of single values, so that the same
rules serve whole weights and LoRA's B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from training.events import ErrorCode
from training.failures import TrainingFailed

Rows = np.ndarray[Any, np.dtype[np.int64]]
Change = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]

# By the class in config.json: llama.cpp's name of the architecture, as `gguf.MODEL_ARCH` spells it.
_FAMILIES = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "MixtralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "Qwen3MoeForCausalLM": "QWEN3MOE",
    "Qwen3NextForCausalLM": "QWEN3NEXT",
    "Gemma2ForCausalLM": "GEMMA2",
    "Gemma3ForCausalLM": "GEMMA3",
    "Gemma3ForConditionalGeneration": "GEMMA3",
    "Phi3ForCausalLM": "PHI3",
}
# Those that see too: only their language model is written, and their tensors are called as in the text-only class.
_PREFIXES = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.": ""}
_OTHER_PARTS = (
    "mtp.",
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
# One expert of a mixture, as Qwen and Mixtral publish it; and all experts of a layer in one tensor.
_ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_ALL_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?")
_MIXTRALS_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

OTHER_CONVERTER = (
    "export with --merged and convert that folder with llama.cpp's own convert_hf_to_gguf.py, if it knows this model"
)


@dataclass(frozen=True)
class Place:
    """Where (a part of) a published tensor goes. `name` is complete: `blk.0.attn_q.weight`."""

    name: str
    # The rows (dimension 0, of one expert if there are many) in GGUF's order; None means all, as they are.
    rows: Rows | None = None
    # A change of values that only whole weights have: norms, the decay of Gated DeltaNet.
    change: Change | None = None
    # The number of the expert whose weight this is; -1 for a tensor that holds all experts.
    expert: int | None = None


@dataclass(frozen=True)
class Family:
    """One model's rules. `config` is the language model's part of its configuration, as transformers reads it."""

    architecture: str
    config: Mapping[str, Any]

    @classmethod
    def of(cls, classes: list[str] | None, config: Mapping[str, Any]) -> Family:
        """Raises TrainingFailed(model_unsupported) for a model that we cannot write faithfully."""
        name = (classes or ["no class"])[0]
        if name not in _FAMILIES:
            raise refused(f"a GGUF of {name} cannot be written here")
        family = cls(_FAMILIES[name], config)
        family._refuse_what_llama_cpp_would_compute_otherwise()
        return family

    @property
    def name(self) -> str:
        """The architecture as it stands in the file: `llama`, `qwen3next`."""
        import gguf

        return str(gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[self.architecture]])

    @property
    def blocks(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def experts(self) -> int:
        """The number of experts in a layer; 0 for a dense model."""
        return int(self.config.get("num_local_experts") or self.config.get("num_experts") or 0)

    @property
    def head_dim(self) -> int:
        found = self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]
        return int(found)

    @property
    def lost_window(self) -> int | None:
        """The window of attention that llama.cpp leaves out: after so many tokens it answers as no transformers does.

        It has windows for Gemma only. Mistral 7B v0.1 has one of 4,096 tokens, Phi-3-mini-4k one of 2,047."""
        window = self.config.get("sliding_window")
        if not window or self.architecture in ("GEMMA2", "GEMMA3") or self.config.get("use_sliding_window") is False:
            return None
        return int(window) if window < self.config["max_position_embeddings"] else None

    def places(self, tensor: str) -> list[Place]:
        """Returns where a published tensor goes: one place, two for those that llama.cpp keeps apart, [] for none.

        Raises TrainingFailed(model_unsupported) for a tensor that llama.cpp has no name for."""
        for prefix, plain in _PREFIXES.items():
            if tensor.startswith(prefix):
                tensor = plain + tensor.removeprefix(prefix)
                break
        if tensor.startswith(_OTHER_PARTS) or tensor.endswith("rotary_emb.inv_freq"):
            return []
        if tensor == "lm_head.weight" and self.config.get("tie_word_embeddings"):
            return []
        if found := _ONE_EXPERT.fullmatch(tensor):
            part = _MIXTRALS_NAMES.get(found[3], found[3])
            return [Place(self._mapped(f"{_layer(tensor)}.mlp.experts.{part}.weight"), expert=int(found[2]))]
        if found := _ALL_EXPERTS.fullmatch(tensor):
            return self._all_experts(_layer(tensor), found[2])
        if tensor.endswith(".linear_attn.in_proj_qkvz.weight"):
            return self._qkvz(tensor)
        return [Place(self._mapped(_renamed(tensor)), self._rows(tensor), self._change(tensor))]

    def _mapped(self, tensor: str) -> str:
        found = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise refused(f"llama.cpp has no name for {tensor} in a {self.name} model")
        return str(found)

    @cached_property
    def _names(self) -> Any:
        import gguf

        return gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.architecture], self.blocks)

    def _rows(self, tensor: str) -> Rows | None:
        """Llama's q and k: transformers rotates a dimension with the one half a head away, llama.cpp with the next."""
        if self.architecture != "LLAMA":
            return None
        module = tensor.rpartition(".")[0]
        if module.endswith("q_proj"):
            heads = int(self.config["num_attention_heads"])
        elif module.endswith("k_proj"):
            heads = int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"])
        else:
            return None
        rows = np.arange(heads * self.head_dim, dtype=np.int64).reshape(heads, 2, self.head_dim // 2)
        return rows.swapaxes(1, 2).reshape(-1)

    def _change(self, tensor: str) -> Change | None:
        if self.architecture in ("GEMMA2", "GEMMA3") and tensor.endswith("norm.weight"):
            return _plus_one
        if self.architecture == "QWEN3NEXT":
            if tensor.endswith(".A_log"):
                return _decay
            if tensor.endswith(".conv1d.weight"):
                return _without_middle
            # The gated norm inside Gated DeltaNet is an ordinary one.
            if tensor.endswith("norm.weight") and not tensor.endswith("linear_attn.norm.weight"):
                return _plus_one
        return None

    def _qkvz(self, tensor: str) -> list[Place]:
        """Published by key head: q, k, v, z of the first, then of the second. llama.cpp reads all q, all k and all v as
        one tensor, and all z as another."""
        heads, values = int(self.config["linear_num_key_heads"]), int(self.config["linear_num_value_heads"])
        key, value = int(self.config["linear_key_head_dim"]), int(self.config["linear_value_head_dim"])
        widths = (key, key, values // heads * value, values // heads * value)
        by_head = np.arange(heads * sum(widths), dtype=np.int64).reshape(heads, sum(widths))
        q, k, v, z = (part.reshape(-1) for part in np.split(by_head, np.cumsum(widths)[:-1], axis=1))
        block = _layer(tensor).rpartition(".")[2]
        return [
            Place(f"blk.{block}.attn_qkv.weight", np.concatenate([q, k, v])),
            Place(f"blk.{block}.attn_gate.weight", z),
        ]

    def _all_experts(self, layer: str, part: str) -> list[Place]:
        if part == "down_proj":
            return [Place(self._mapped(f"{layer}.mlp.experts.down_proj.weight"), expert=-1)]
        width = int(self.config.get("moe_intermediate_size") or self.config["intermediate_size"])
        return [
            Place(self._mapped(f"{layer}.mlp.experts.{name}.weight"), np.arange(begin, begin + width), expert=-1)
            for name, begin in (("gate_proj", 0), ("up_proj", width))
        ]

    def _refuse_what_llama_cpp_would_compute_otherwise(self) -> None:
        """What llama.cpp takes as given for an architecture; another value would give other answers, silently."""
        config, name = self.config, self.name
        kind = (self.config.get("rope_parameters") or {}).get("rope_type", "default")
        if kind not in ("default", "linear", "yarn", "llama3", "longrope"):
            raise refused(f"llama.cpp does not know the rotary positions {kind!r} of this {name} model")
        if self.architecture in ("QWEN3MOE", "QWEN3NEXT"):
            if not config.get("norm_topk_prob"):
                raise refused("llama.cpp always normalises the weights of the chosen experts; this model does not")
            if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
                raise refused("llama.cpp expects experts in each layer; some layers of this model have none")
        if self.architecture == "QWEN3NEXT" and config["linear_key_head_dim"] != config["linear_value_head_dim"]:
            raise refused("llama.cpp expects Gated DeltaNet's keys and values to be of one size; here they differ")
        if self.architecture in ("GEMMA2", "GEMMA3"):
            self._refuse_another_gemma()

    def _refuse_another_gemma(self) -> None:
        every = 2 if self.architecture == "GEMMA2" else 6
        expected = [
            "full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(self.blocks)
        ]
        if list(self.config.get("layer_types") or expected) != expected:
            raise refused(f"llama.cpp expects full attention in every {every}th layer; this model has it elsewhere")
        # The 27B models are scaled by the width of a head as if there were no head_dim; llama.cpp knows them by depth.
        width = self.config["hidden_size"] // self.config["num_attention_heads"]
        depth_of_27b = 46 if self.architecture == "GEMMA2" else 62
        scaled_by = width if self.blocks == depth_of_27b else self.head_dim
        if float(self.config.get("query_pre_attn_scalar") or scaled_by) != float(scaled_by):
            raise refused(
                f"llama.cpp scales this model's attention by {scaled_by}, and its query_pre_attn_scalar is "
                f"{self.config['query_pre_attn_scalar']}"
            )


def refused(message: str) -> TrainingFailed:
    return TrainingFailed(ErrorCode.MODEL_UNSUPPORTED, message, OTHER_CONVERTER)


def _layer(tensor: str) -> str:
    """`model.layers.3.mlp.gate` → `model.layers.3`."""
    return ".".join(tensor.split(".")[:3])


def _renamed(tensor: str) -> str:
    # gguf's table knows it as the step of Mamba's recurrence.
    return tensor.replace(".linear_attn.dt_bias", ".linear_attn.dt_proj.bias")


def _plus_one(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values + 1


def _decay(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    negative: np.ndarray[Any, Any] = -np.exp(values)
    return negative


def _without_middle(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values.reshape(values.shape[0], -1)
