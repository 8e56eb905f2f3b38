"""The tokenizer beside an adapter is the base model's, and transformers 4 opens it as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.tiny_models import make_tokenizer
from training.adapter.tokenizer_files import write_tokenizer
from training.data.chat_template import DEFAULT_TEMPLATE, ChatTemplate

# As transformers 4 wrote it, with which most models on the hub were saved.
_PUBLISHED = {
    "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
    "additional_special_tokens": ["<|im_start|>"],
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "Qwen2Tokenizer",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model's folder with a tokenizer as transformers 5 saves it, with a template."""
    folder = tmp_path / "base"
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return folder


def _write(base: Path) -> Path:
    into = base.parent / "adapter"
    into.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ChatTemplate(tokenizer)
    write_tokenizer(base, tokenizer, into)
    return into


def _config(folder: Path, **values: Any) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if values:
        file.write_text(json.dumps(values))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_published_tokenizer_is_copied_unchanged(base: Path) -> None:
    _config(base, **_PUBLISHED)
    (base / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (base / "added_tokens.json").write_text('{"<|im_end|>": 2}')
    (base / "merges.txt").write_text("#version: 0.2\n")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (base / "model.safetensors").write_bytes(b"weights")
    into = _write(base)
    copied = {str(path.relative_to(into)) for path in into.rglob("*") if path.is_file()}
    assert copied == {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()} - {
        "config.json",
        "model.safetensors",
    }
    assert all((into / name).read_bytes() == (base / name).read_bytes() for name in copied)


def test_a_base_without_a_fast_tokenizer_s_file_gets_one_beside_the_adapter(base: Path) -> None:
    model = json.loads((base / "tokenizer.json").read_text())["model"]
    (base / "vocab.json").write_text(json.dumps(model["vocab"]))
    (base / "merges.txt").write_text("".join(f"{' '.join(pair)}\n" for pair in model["merges"]))
    (base / "tokenizer.json").unlink()
    _config(base, **_PUBLISHED)
    into = _write(base)
    assert all((into / name).read_bytes() == (base / name).read_bytes() for name in ("vocab.json", "merges.txt"))
    before, after = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(into)
    assert (into / "tokenizer.json").is_file() and after.get_vocab() == before.get_vocab()
    assert after("The cat is red.").input_ids == before("The cat is red.").input_ids


def test_a_template_inside_the_config_stands_in_a_file_as_well(base: Path) -> None:
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    _config(base, **_PUBLISHED, chat_template=template)
    into = _write(base)
    assert (into / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    assert (into / "chat_template.jinja").read_text() == template


def test_a_config_of_transformers_5_is_written_for_transformers_4_and_says_nothing_of_the_host(base: Path) -> None:
    assert _config(base)["tokenizer_class"] == "TokenizersBackend"
    config = _config(_write(base))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>"] and "extra_special_tokens" not in config
    assert not config.keys() & {"is_local", "local_files_only", "backend", "name_or_path"}


def test_the_written_tokenizer_is_the_same_tokenizer(base: Path) -> None:
    before, after = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(_write(base))
    messages = [{"role": "user", "content": "What colour is the cat?"}]
    assert after.get_vocab() == before.get_vocab() and after.chat_template == before.chat_template
    assert after.apply_chat_template(messages) == before.apply_chat_template(messages)
    assert set(after.all_special_tokens) == set(before.all_special_tokens)
    assert (after.eos_token, after.pad_token, after.bos_token) == (before.eos_token, before.pad_token, before.bos_token)


def test_our_template_stands_beside_a_base_that_has_none(base: Path) -> None:
    (base / "chat_template.jinja").unlink()
    _config(base, **_PUBLISHED)
    into = _write(base)
    assert (into / "chat_template.jinja").read_text() == DEFAULT_TEMPLATE
    assert _config(into) == _PUBLISHED and AutoTokenizer.from_pretrained(into).chat_template == DEFAULT_TEMPLATE


def test_a_tokenizer_whose_class_only_the_model_s_config_tells_gets_it_beside_the_adapter(base: Path) -> None:
    _config(base, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = _config(_write(base))
    assert config["tokenizer_class"] and config["eos_token"] == "<|im_end|>"
    assert len(AutoTokenizer.from_pretrained(base.parent / "adapter")) == len(AutoTokenizer.from_pretrained(base))
