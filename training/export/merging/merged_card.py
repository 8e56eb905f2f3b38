"""Writes the model card of a merged model: what it was made from, whether that was in 4 bits, and how it is served.

Names and options come from files that others wrote: each is checked or quoted, so that it stays what it is.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.files.licence import Licence
from training.results.front_matter import front_matter
from training.spec import MODEL_NAME

_REVISION = re.compile(r"[0-9A-Za-z._-]{1,64}")
_OF_4_BITS = """\
**These weights were in 4 bits.** Only the 4-bit copy (NF4) of the base model was kept where this was made, so its
weights were unpacked: they are those that the adapter was trained on, and as far from the published ones as 4 bits are.
A merge into the published weights needs those: `brightrun-trainer models pull` fetches them. Layers for speculative
decoding (`mtp`) that the base model may have are not here."""
_ENDS_A_THOUGHT = """\
The chat template begins a thought before every answer. This model ends it at once, so an answer begins with `</think>`,
which a server's reasoning parser (in vLLM `--reasoning-parser deepseek_r1`) takes away."""


@dataclass(frozen=True)
class Origin:
    """What a merged model was made from. `serving` is that block of the adapter's manifest; {} without one."""

    base_model: str
    base_revision: str | None
    job_id: str | None
    is_dequantised: bool
    licence: Licence | None
    serving: Mapping[str, Any]


def merged_card(origin: Origin) -> str:
    """Returns the card: front matter that the hub reads, then Markdown."""
    known = re.fullmatch(MODEL_NAME, origin.base_model) is not None
    name = origin.base_model if known else "its base model"
    revision = origin.base_revision
    at = f", revision `{revision}`," if revision is not None and _REVISION.fullmatch(revision) else ""
    job = f" (job `{origin.job_id}`)" if origin.job_id is not None and _REVISION.fullmatch(origin.job_id) else ""
    parts = [
        front_matter(origin.base_model, origin.licence, relation="finetune", library="transformers"),
        f"# {name.rpartition('/')[2]}, fine-tuned",
        f"{name}{at} with a LoRA adapter merged into its weights{job}. The layout is the base model's, file by file: "
        "whatever opens the base model opens this.",
        *([_OF_4_BITS] if origin.is_dequantised else []),
        "## Serve it",
        f"The command is run in the folder of this file.\n\n```sh\n{_command(origin.serving)}\n```",
        *([_ENDS_A_THOUGHT] if origin.serving.get("answers_end_a_thought") is True else []),
        "Whatever else serves the base model serves this in its place: SGLang, transformers, and as GGUF llama.cpp and "
        "Ollama.",
        "`manifest.json` has the size and SHA-256 of each file. The base model's license applies.",
    ]
    return "\n\n".join(parts) + "\n"


def _command(serving: Mapping[str, Any]) -> str:
    """vLLM's, with what the chat template was told in training."""
    options = serving.get("chat_template_kwargs")
    words = ["vllm", "serve", "."]
    if isinstance(options, Mapping) and options:
        words += ["--default-chat-template-kwargs", json.dumps(dict(options))]
    return shlex.join(words)
