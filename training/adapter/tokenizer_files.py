"""The tokenizer's files beside an adapter: the base model's own, unchanged, wherever every reader opens them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_TOKENIZER = "tokenizer.json"
# What transformers, vLLM and llama.cpp look for.
_FILES = (
    _TOKENIZER, _CONFIG, TEMPLATE, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
# What transformers 5 notes of how a tokenizer was loaded on the host that saved it.
_OF_THIS_HOST = ("is_local", "local_files_only", "backend")


def write_tokenizer(base: Path, tokenizer: PreTrainedTokenizerBase, into: Path) -> None:
    """Copies the tokenizer of the base model, and adds the chat template that was trained.

    Written anew is only what a reader would stumble over: a config that transformers 4 cannot open, and a fast
    tokenizer or a class where the base has none and transformers finds them by the model's config.
    """
    for name in _files_of(base):
        (into / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(base / name, into / name)
    config = _read(into / _CONFIG)
    with tempfile.TemporaryDirectory(dir=into) as saved:
        tokenizer.save_pretrained(saved)
        if not (into / _TOKENIZER).is_file():
            shutil.copyfile(Path(saved) / _TOKENIZER, into / _TOKENIZER)
        found = _read(Path(saved) / _CONFIG)
    if not config:
        config = found
    elif not config.get("tokenizer_class"):
        config = {**config, "tokenizer_class": found["tokenizer_class"]}
    readable = for_transformers_4(config)
    if readable != _read(into / _CONFIG):
        (into / _CONFIG).write_text(json.dumps(readable, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # Also where the config holds it: transformers takes this file first, and vLLM can be given it.
    template = tokenizer.chat_template
    if isinstance(template, str) and not (into / TEMPLATE).is_file():
        (into / TEMPLATE).write_text(template, encoding="utf-8")


def for_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a tokenizer_config.json that transformers 4 opens as well, and that says nothing of this host."""
    readable = {key: value for key, value in config.items() if key not in _OF_THIS_HOST}
    if readable.get("tokenizer_class") == "TokenizersBackend":
        readable["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Transformers 4 wants names for these, and has another key for those without.
    if isinstance(extra := readable.get("extra_special_tokens"), list):
        del readable["extra_special_tokens"]
        readable["additional_special_tokens"] = [*readable.get("additional_special_tokens", ()), *extra]
    return readable


def _files_of(base: Path) -> Iterator[str]:
    yield from (name for name in _FILES if (base / name).is_file())
    yield from (file.name for file in base.glob("*.tiktoken"))
    yield from (f"{_TEMPLATES}/{file.name}" for file in (base / _TEMPLATES).glob("*.jinja"))


def _read(path: Path) -> dict[str, Any]:
    """Returns {} for a file that is not there."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
