"""Real chat templates: those that TRL ships, and published ones that are stricter; with the tokens that stop a server.

All share one small tokenizer that knows every control token of every template.
"""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import trl

from tests.tiny_models import CHATML, make_tokenizer

_SHIPPED = Path(trl.__file__).parent / "chat_templates"

_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token END }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# The system text stands in the last user turn, and only where that is the last turn of all: in prompts.
_MISTRAL_V03 = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- for message in loop_messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}"
    "{%- endif %}{%- endfor %}{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] | trim + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}{%- endfor %}"
)
_LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
_PHI_4 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + "
    "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# It begins every answer with a thought, and shows none.
_QWQ = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}"
    "{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
# It thinks where it is told to, under another name than Qwen's.
_DEEPSEEK_V31 = (
    "{%- if thinking is not defined %}{%- set thinking = false %}{%- endif %}{{- bos_token }}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}"
    "{%- elif message.role == 'system' %}{{- message.content }}"
    "{%- else %}{{- '<｜Assistant｜></think>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{%- endif %}"
)
_WRITTEN = {
    "chatml": CHATML,
    "mistral-v0.1": _MISTRAL.replace("END", "+ ' '"),
    "mistral-v0.2": _MISTRAL.replace("END", ""),
    "mistral-v0.3": _MISTRAL_V03,
    "llama-2": _LLAMA_2,
    "zephyr": _ZEPHYR,
    "phi-4": _PHI_4,
    "smollm2": _SMOLLM2,
    "qwq": _QWQ,
    "deepseek-v3.1": _DEEPSEEK_V31,
}
# The tokens that stop a server, by the beginning of the name: the tokenizer's own first, then generation_config's.
_STOPS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "diffusion_gemma": ("<eos>", "<turn|>"),
    "gemma4": ("<eos>", "<turn|>"),
    "gemma": ("<eos>", "<end_of_turn>"),
    "glm4": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "idefics": ("<end_of_utterance>",),
    "smolvlm": ("<end_of_utterance>",),
    "llama3": ("<|eot_id|>",),
    "llava": ("</s>",),
    "mistral": ("</s>",),
    "llama-2": ("</s>",),
    "zephyr": ("</s>",),
    "muse": ("<|eot|>",),
    "phi-4": ("<|im_end|>",),
    "phi": ("<|endoftext|>", "<|end|>"),
}
SHIPPED = tuple(sorted(path.stem for path in _SHIPPED.glob("*.jinja") if not path.stem.endswith("_training")))
STRICT = tuple(_WRITTEN)


def template_text(name: str) -> str:
    return _WRITTEN.get(name) or (_SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(name: str, template: str | None = None) -> tuple[Any, tuple[int, ...]]:
    """Returns a tokenizer with this model's template, and the tokens that stop a server of that model."""
    tokenizer = copy.deepcopy(_with_all_control_tokens())
    stops = next((stops for start, stops in _STOPS.items() if name.startswith(start)), ("<|im_end|>",))
    tokenizer.eos_token = stops[0]
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = template or template_text(name)
    return tokenizer, tuple(tokenizer.convert_tokens_to_ids(list(stops)))


@cache
def _with_all_control_tokens() -> Any:
    control = {"<s>", "</s>", "<eos>", "[INST]", "[/INST]", "<end_of_turn>", "<start_of_turn>", "<end_of_utterance>"}
    control |= {"<|system|>", "<|user|>", "<|assistant|>", "<|call|>"}
    for name in (*SHIPPED, "phi-4"):
        control.update(re.findall(r"<[|｜][\w▁]+[|｜]?>|<\w+\|>", template_text(name)))
    return make_tokenizer(extra_tokens=sorted(control - {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}))
