"""The Modelfile for Ollama: its Go template writes what the model's own template writes, or is not there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.chat_templates import SHIPPED, STRICT, tokenizer_of
from tests.tiny_models import CHATML, make_tokenizer
from training.data.template.rendering import Message, Renderer, TemplateRefuses
from training.export.modelfile import go_template, modelfile, texts_of

_ROLES: tuple[tuple[Any, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
_CHATS = [[Message(role, f"{role} says {number}: {{{{ 1 }}}}") for number, role in enumerate(chat)] for chat in _ROLES]


def test_the_modelfile_names_file_template_and_stops() -> None:
    found = modelfile(make_tokenizer(), (2,), "model.gguf")

    assert found == (
        'FROM ./model.gguf\n\nTEMPLATE """'
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n<|im_start|>user\n'
        '{{ else if eq .Role "user" }}{{ if eq $i 0 }}<|im_start|>user\n{{ end }}{{ .Content }}'
        "{{ if $last }}<|im_end|>\n<|im_start|>assistant\n{{ else }}<|im_end|>\n<|im_start|>assistant\n{{ end }}"
        '{{ else if eq .Role "assistant" }}{{ .Content }}{{ if not $last }}<|im_end|>\n<|im_start|>user\n{{ end }}'
        '{{ end }}{{ end }}"""\n\nPARAMETER stop "<|im_end|>"\n'
    )


def test_what_ollama_cannot_write_is_left_out_with_a_word() -> None:
    dated = "{{ messages | length }}" + CHATML

    found = modelfile(make_tokenizer(dated), (2,), "model.gguf")

    assert 'TEMPLATE "' not in found
    assert "cannot be written as one of Ollama's" in found
    assert 'PARAMETER stop "<|im_end|>"' in found


def test_the_first_token_is_left_to_ollama_where_the_file_adds_it() -> None:
    template = "{{ bos_token }}" + CHATML
    tokenizer = make_tokenizer(template, bos="<s>")
    written = modelfile(tokenizer, (2,), "model.gguf")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    added = modelfile(tokenizer, (2,), "model.gguf")

    assert written.count("<s><|im_start|>") == 2
    assert "<s>" not in added


def test_the_template_is_told_what_it_was_told_in_training_and_the_day_is_fixed() -> None:
    tokenizer, stops = tokenizer_of("qwen3")
    plain, told = (
        modelfile(tokenizer, stops, "model.gguf", options=options) for options in ({}, {"enable_thinking": False})
    )
    assert "assistant\n{{ else" in plain
    assert "assistant\n<think>\n\n</think>\n\n{{ else" in told
    assert "the day of the export" not in plain

    dated = modelfile(*tokenizer_of("llama3_2"), "model.gguf")

    assert "# The date in this template is the day of the export.\n" in dated


@pytest.mark.parametrize("name", [*SHIPPED, *STRICT])
def test_every_known_template_is_written_or_left_out_and_its_stops_are_named(name: str) -> None:
    tokenizer, stops = tokenizer_of(name)

    found = modelfile(tokenizer, stops, "model.gguf")

    assert ('TEMPLATE """' in found) != ("cannot be written as one of Ollama's" in found)
    named = set(re.findall(r'PARAMETER stop "(.*)"', found))
    assert {tokenizer.convert_ids_to_tokens(stop) for stop in stops} <= named


@pytest.mark.system
def test_go_renders_as_jinja_does(tmp_path: Path) -> None:
    """All of TRL's templates and the stricter ones, by Go's own engine; a template that refuses a chat is not asked."""
    templates, expected = {}, {}
    for name in (*SHIPPED, *STRICT):
        render = Renderer(tokenizer_of(name)[0])
        if (texts := texts_of(render)) is None:
            continue
        templates[name] = go_template(texts)
        expected[name] = [
            _rendered(render, chat) if chat[0].role == "user" or texts.before_system is not None else None
            for chat in _CHATS
        ]
    program = Path(__file__).with_name("ollamas_templates.go")
    chats = [[{"Role": message.role, "Content": message.content} for message in chat] for chat in _CHATS]

    done = subprocess.run(
        ["go", "run", program],
        input=json.dumps({"Templates": templates, "Chats": chats}),
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod"},
        check=False,
        timeout=240,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, texts_ in expected.items():
        for text, wanted in zip(found[name], texts_, strict=True):
            assert wanted is None or text == wanted, name
    assert len(templates) >= 51, "fewer templates than ever are put together from texts"


def _rendered(render: Renderer, chat: list[Message]) -> str | None:
    try:
        return render(chat, prompt=True)
    except TemplateRefuses:
        return None
