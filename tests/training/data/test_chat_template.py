"""Loss on the assistant's words only, tested with the templates of real models."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl

from tests.tiny_models import CHATML, make_tokenizer
from training.data.chat_template import IGNORED, ChatTemplate, TemplateRefuses
from training.data.formats.conversation import Conversation, Turn

_SHIPPED = Path(trl.__file__).parent / "chat_templates"

# Mistral-7B-Instruct-v0.2's template on the hub: strict alternation, no system role.
MISTRAL_WITHOUT_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Later Mistral models: the system text is in the last user turn.
MISTRAL_WITH_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set loop_messages = "
    "messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}{%- if loop.first and system is defined %}"
    "{{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
# A template that silently drops a system role.
SILENT_ABOUT_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}<{{ message['role'] }}>"
    "{{ message['content'] | trim }}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _shipped(name: str) -> str:
    return (_SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")


# template, end of an answer
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "qwen2.5": (_shipped("qwen2_5"), "<|im_end|>"),
    "qwen3": (_shipped("qwen3"), "<|im_end|>"),
    "qwen3-instruct-2507": (_shipped("qwen3_instruct_2507"), "<|im_end|>"),
    "llama3": (_shipped("llama3"), "<|eot_id|>"),
    "llama3.1": (_shipped("llama3_1"), "<|eot_id|>"),
    "gemma": (_shipped("gemma"), "<end_of_turn>"),
    "gemma3": (_shipped("gemma3"), "<end_of_turn>"),
    "phi3": (_shipped("phi3"), "<|end|>"),
    "mistral-v0.2": (MISTRAL_WITHOUT_SYSTEM, "<|im_end|>"),
    "mistral-with-system": (MISTRAL_WITH_SYSTEM, "<|im_end|>"),
    "silent-about-system": (SILENT_ABOUT_SYSTEM, "</s>"),
    "default": (None, "<|im_end|>"),
}
_ANSWERS = ("The cat is red.", "The dog is blue. The dog is blue.")
_CONVERSATION = Conversation(
    (
        Turn("system", "You answer tersely.", trained=False),
        Turn("user", "What colour is the cat?", trained=False),
        Turn("assistant", _ANSWERS[0], trained=True),
        Turn("user", "What colour is the dog?", trained=False),
        Turn("assistant", _ANSWERS[1], trained=True),
    ),
    "line 1",
)


def _template(name: str) -> tuple[ChatTemplate, object]:
    text, end = TEMPLATES[name]
    marks = [end, *(mark for mark in ("<|user|>", "<|assistant|>", "<|system|>") if text and mark[2:-2] in text)]
    tokenizer = make_tokenizer(text, extra_tokens=[mark for mark in marks if mark != "<|im_end|>"])
    tokenizer.bos_token = "<|endoftext|>"
    return ChatTemplate(tokenizer), tokenizer


def _trained_pieces(tokenizer: object, input_ids: list[int], labels: list[int]) -> list[str]:
    """Returns the texts of the contiguous pieces that carry loss."""
    pieces: list[list[int]] = [[]]
    for token, label in zip(input_ids, labels, strict=True):
        if label != IGNORED:
            assert label == token
            pieces[-1].append(token)
        elif pieces[-1]:
            pieces.append([])
    return [tokenizer.decode(piece) for piece in pieces if piece]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_answers_and_their_end_mark_are_trained(name: str) -> None:
    template, tokenizer = _template(name)
    example = template.encode(_CONVERSATION)
    pieces = _trained_pieces(tokenizer, example.input_ids, example.labels)
    end = TEMPLATES[name][1]
    assert len(pieces) == 2, pieces
    for piece, answer in zip(pieces, _ANSWERS, strict=True):
        # Qwen3 puts an empty thought before the last answer, as it does when it generates.
        assert piece.strip().removeprefix("<think>\n\n</think>\n\n") == answer + end


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_system_text_reaches_the_model_once(name: str) -> None:
    template, tokenizer = _template(name)
    text = tokenizer.decode(template.encode(_CONVERSATION).input_ids)  # type: ignore[attr-defined]
    assert text.count("You answer tersely.") == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_follows_what_the_model_is_prompted_with(name: str) -> None:
    """The tokens before the first answer are exactly the prompt that the model gets when it is used."""
    template, tokenizer = _template(name)
    example = template.encode(_CONVERSATION)
    first = next(index for index, label in enumerate(example.labels) if label != IGNORED)
    prompt = template.prompt(_CONVERSATION.turns[:2])
    assert tokenizer.decode(example.input_ids[:first]).rstrip() == prompt.rstrip()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["mistral-v0.2", "gemma", "silent-about-system"])
def test_a_template_without_a_system_role_is_found_out(name: str) -> None:
    assert _template(name)[0].folds_system


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3", "mistral-with-system", "default"])
def test_a_template_with_a_system_role_keeps_it(name: str) -> None:
    assert not _template(name)[0].folds_system


def test_a_turn_that_is_history_carries_no_loss() -> None:
    template, tokenizer = _template("chatml")
    turns = list(_CONVERSATION.turns)
    turns[2] = Turn("assistant", _ANSWERS[0], trained=False)
    example = template.encode(Conversation(tuple(turns), "line 1"))
    assert _trained_pieces(tokenizer, example.input_ids, example.labels) == [_ANSWERS[1] + "<|im_end|>"]


def test_a_template_that_refuses_says_why() -> None:
    template, _ = _template("mistral-v0.2")
    twice = (Turn("user", "a", trained=False), Turn("user", "b", trained=False), Turn("assistant", "c", trained=True))
    with pytest.raises(TemplateRefuses, match="alternate"):
        template.encode(Conversation(twice, "line 1"))


def test_words_beyond_ascii_keep_their_borders() -> None:
    template, tokenizer = _template("chatml")
    turns = (Turn("user", "naïve 🦊?", trained=False), Turn("assistant", "日本語 🦊 é", trained=True))
    example = template.encode(Conversation(turns, "line 1"))
    assert _trained_pieces(tokenizer, example.input_ids, example.labels) == ["日本語 🦊 é<|im_end|>"]
