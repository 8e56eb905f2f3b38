"""What each server must be told to serve an adapter: the manifest's `serving` block, and the model card's commands.

Learnt by loading adapters into these servers, and from their sources: vLLM 0.32, RunPod's worker for it, llama.cpp.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training.data.template.thinking import Thinking
from training.files.vllm_ranks import smallest_max_lora_rank

# The name under which the commands serve it.
NAME = "adapter"
TEMPLATE_FILE = "chat_template.jinja"
# Where RunPod mounts a network volume in a serverless worker.
_VOLUME = f"/runpod-volume/{NAME}"
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Serving:
    """How one adapter is served.

    `modules`: the adapted layers, by the last part of their names. `brings_template`: the base model has none of its
    own. `thinking`: what the chat template must be told so that it ends prompts as in training, and what comes of it.
    """

    base_model: str
    revision: str | None
    rank: int
    modules: tuple[str, ...]
    is_mixture: bool
    peft: str
    brings_template: bool = False
    thinking: Thinking = field(default_factory=Thinking)

    @property
    def max_lora_rank(self) -> int:
        """The smallest that vLLM takes: its buffers grow with it."""
        return smallest_max_lora_rank(self.rank)

    @property
    def has_linear_attention(self) -> bool:
        """SGLang has no adapters for these layers, so that it serves the merged model only."""
        return any(module.startswith("in_proj_") for module in self.modules)

    def vllm_arguments(self, folder: str) -> list[str]:
        """Returns the command line for vLLM; `folder` is the adapter's."""
        return [
            *("vllm", "serve", self.base_model),
            *(("--revision", self.revision) if self.revision else ()),
            *("--enable-lora", "--max-lora-rank", str(self.max_lora_rank)),
            *("--lora-modules", f"{NAME}={folder}"),
            *self._without_experts(),
            *(("--chat-template", f"{folder}/{TEMPLATE_FILE}") if self.brings_template else ()),
            *self._template_arguments(),
        ]

    def llama_arguments(self, adapter: str) -> list[str]:
        """Returns the command line for llama.cpp's server; `adapter` is the adapter as GGUF."""
        options = self.thinking.options
        return [
            *("llama-server", "--model", "base.gguf", "--lora", adapter, "--jinja"),
            *(("--chat-template-file", TEMPLATE_FILE) if self.brings_template else ()),
            *(("--chat-template-kwargs", json.dumps(dict(options))) if options else ()),
        ]

    def runpod_variables(self) -> dict[str, str]:
        """Returns the environment variables of RunPod's vLLM worker, with the adapter on the endpoint's volume.

        LORA_MODULES is one object: the worker hands it to vLLM as it is, which refuses a list."""
        more = [*self._without_experts(), *self._template_arguments()]
        return {
            "MODEL_NAME": self.base_model,
            **({"MODEL_REVISION": self.revision} if self.revision else {}),
            "ENABLE_LORA": "true",
            "MAX_LORA_RANK": str(self.max_lora_rank),
            "LORA_MODULES": json.dumps({"name": NAME, "path": _VOLUME}),
            **({"CUSTOM_CHAT_TEMPLATE": f"{_VOLUME}/{TEMPLATE_FILE}"} if self.brings_template else {}),
            **({"VLLM_EXTRA_ARGS": shlex.join(more)} if more else {}),
        }

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest's `serving` block: for programs, what the model card says to people."""
        return {
            "base_model": self.base_model,
            "base_model_revision": self.revision,
            "lora_rank": self.rank,
            "lora_modules": list(self.modules),
            "chat_template": TEMPLATE_FILE if self.brings_template else None,
            "chat_template_kwargs": dict(self.thinking.options),
            "answers_at_once": self.thinking.answers_at_once,
            "answers_end_a_thought": self.thinking.opens_thought,
            "vllm": {
                "max_lora_rank": self.max_lora_rank,
                "lora_target_modules": list(self.modules) if self.is_mixture else None,
                "command": self.vllm_arguments("."),
            },
            "runpod_vllm_worker": self.runpod_variables(),
            "peft": f">={self.peft}",
            # Ollama 0.34.1 and newer refuse an adapter; many before it did so at the first request.
            "forms": {
                "vllm": "adapter",
                "llama.cpp": "adapter",
                "ollama": "merged",
                "sglang": "merged" if self.has_linear_attention else "adapter",
            },
        }

    def _without_experts(self) -> list[str]:
        """vLLM reserves buffers for every expert, gigabytes of them, unless it is told which layers are adapted."""
        return ["--lora-target-modules", *self.modules] if self.is_mixture else []

    def _template_arguments(self) -> list[str]:
        options = self.thinking.options
        return ["--default-chat-template-kwargs", json.dumps(dict(options))] if options else []


def serving_of(
    adapter_config: Mapping[str, Any],
    base_config: Mapping[str, Any],
    *,
    peft: str,
    brings_template: bool,
    thinking: Thinking,
) -> Serving:
    """Reads what decides about serving from the adapter's config and the base model's (that of its language model).

    `peft`: the oldest version that opens the adapter."""
    return Serving(
        base_model=str(adapter_config["base_model_name_or_path"]),
        revision=adapter_config.get("revision"),
        rank=int(adapter_config["r"]),
        modules=_modules(adapter_config),
        is_mixture=max(int(base_config.get(key) or 1) for key in _EXPERT_COUNTS) > 1,
        peft=peft,
        brings_template=brings_template,
        thinking=thinking,
    )


def _modules(adapter_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Where PEFT would read a name otherwise, a layer stands as its weight in target_parameters."""
    named = [
        *(adapter_config.get("target_modules") or ()),
        *(name.removesuffix(".weight") for name in adapter_config.get("target_parameters") or ()),
    ]
    return tuple(sorted({str(name).rpartition(".")[2] for name in named}))
