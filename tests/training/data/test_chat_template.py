"""Loss on the assistant's words only, tested with the templates of real models."""

from __future__ import annotations

import pickle
from datetime import date
from typing import Any

import pytest

from tests.chat_templates import SHIPPED, template_text, tokenizer_of
from tests.tiny_models import CHATML
from training.data.chat_template import ChatTemplate
from training.data.example import IGNORED, Example
from training.data.formats.conversation import Conversation, Role, Turn
from training.data.template.rendering import CannotEncode, Message, Renderer, TemplateRefuses
from training.failures import TrainingFailed

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


# template, end of an answer
TEMPLATES: dict[str, tuple[str | None, str]] = {
    "chatml": (CHATML, "<|im_end|>"),
    "qwen2.5": (template_text("qwen2_5"), "<|im_end|>"),
    "qwen3": (template_text("qwen3"), "<|im_end|>"),
    "qwen3-instruct-2507": (template_text("qwen3_instruct_2507"), "<|im_end|>"),
    "llama3": (template_text("llama3"), "<|eot_id|>"),
    "llama3.1": (template_text("llama3_1"), "<|eot_id|>"),
    "gemma": (template_text("gemma"), "<end_of_turn>"),
    "gemma3": (template_text("gemma3"), "<end_of_turn>"),
    "phi3": (template_text("phi3"), "<|end|>"),
    "mistral-v0.2": (template_text("mistral-v0.2"), "</s>"),
    "mistral-with-system": (MISTRAL_WITH_SYSTEM, "</s>"),
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


def _template(name: str) -> tuple[ChatTemplate, Any]:
    text, end = TEMPLATES[name]
    tokenizer, _ = tokenizer_of(name, text or CHATML)
    tokenizer.chat_template, tokenizer.eos_token = text, end
    return ChatTemplate(tokenizer), tokenizer


def _encoded(template: ChatTemplate, conversation: Conversation) -> Example:
    (example,) = template.encode(conversation).examples
    return example


def _said(*lines: str, untrained: tuple[int, ...] = ()) -> Conversation:
    turns = []
    for number, line in enumerate(lines):
        role, _, text = line.partition(": ")
        known: Role = next(known for known in ("system", "user", "assistant") if known == role)  # type: ignore[assignment]
        turns.append(Turn(known, text, trained=role == "assistant" and number not in untrained))
    return Conversation(tuple(turns), "line 1")


def _pieces(template: ChatTemplate, tokenizer: Any, conversation: Conversation) -> list[list[str]]:
    """Returns what is trained, by example."""
    examples = template.encode(conversation).examples
    return [_trained_pieces(tokenizer, example.input_ids, example.labels) for example in examples]


def _trained_pieces(tokenizer: Any, input_ids: list[int], labels: list[int]) -> list[str]:
    """Returns the texts of the contiguous pieces that carry loss."""
    pieces: list[list[int]] = [[]]
    for token, label in zip(input_ids, labels, strict=True):
        if label != IGNORED:
            pieces[-1].append(label)
        # A stop in place of the token that the template goes on with ends a piece.
        if pieces[-1] and label != token:
            pieces.append([])
    return [tokenizer.decode(piece) for piece in pieces if piece]


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_answers_and_their_end_mark_are_trained(name: str) -> None:
    template, tokenizer = _template(name)
    example = _encoded(template, _CONVERSATION)
    pieces = _trained_pieces(tokenizer, example.input_ids, example.labels)
    end = TEMPLATES[name][1]
    assert len(pieces) == 2, pieces
    for piece, answer in zip(pieces, _ANSWERS, strict=True):
        # Qwen3 puts an empty thought before the last answer, as it does when it generates.
        assert piece.strip().removeprefix("<think>\n\n</think>\n\n") == answer + end


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_system_text_reaches_the_model_once(name: str) -> None:
    template, tokenizer = _template(name)
    text = tokenizer.decode(_encoded(template, _CONVERSATION).input_ids)
    assert text.count("You answer tersely.") == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_follows_what_the_model_is_prompted_with(name: str) -> None:
    """The tokens before the first answer are exactly the prompt that the model gets when it is used."""
    template, tokenizer = _template(name)
    example = _encoded(template, _CONVERSATION)
    first = next(index for index, label in enumerate(example.labels) if label != IGNORED)
    prompt = template.prompt(_CONVERSATION.turns[:2])
    assert tokenizer.decode(example.input_ids[:first]).rstrip() == prompt.rstrip()


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
    example = _encoded(template, Conversation(tuple(turns), "line 1"))
    assert _trained_pieces(tokenizer, example.input_ids, example.labels) == [_ANSWERS[1] + "<|im_end|>"]


def test_a_template_that_refuses_says_why() -> None:
    template, _ = _template("mistral-v0.2")
    with pytest.raises(TemplateRefuses, match="alternate"):
        template.encode(_said("assistant: Welcome!", "user: Hello?", "assistant: Hello."))


def test_words_beyond_ascii_keep_their_borders() -> None:
    template, tokenizer = _template("chatml")
    turns = (Turn("user", "naïve 🦊?", trained=False), Turn("assistant", "日本語 🦊 é", trained=True))
    example = _encoded(template, Conversation(turns, "line 1"))
    assert _trained_pieces(tokenizer, example.input_ids, example.labels) == ["日本語 🦊 é<|im_end|>"]


def test_adjacent_turns_are_merged_only_where_the_template_refuses_them() -> None:
    twice = _said("user: Hello?", "user: Anyone?", "assistant: Yes.")
    strict, _ = _template("mistral-v0.2")
    assert strict.encode(twice).notes == {"turns_merged": 1}
    assert "Hello?\n\nAnyone?" in strict.prompt(twice.turns[:2])
    loose, _ = _template("chatml")
    assert not +loose.encode(twice).notes
    assert "Hello?\n\nAnyone?" not in loose.prompt(twice.turns[:2])


@pytest.mark.parametrize(
    ("untrained", "trained"),
    [((), [["One.\n\nTwo.</s>"]]), ((1,), [["Two.</s>"]]), ((2,), [["One.</s>"]])],
    ids=["both", "the second", "the first"],
)
def test_of_a_merged_turn_only_the_trained_part_carries_loss(untrained: tuple[int, ...], trained: list[Any]) -> None:
    """Where the first part is an answer and the second is not, the first ends with the token that stops a server."""
    template, tokenizer = _template("mistral-v0.2")
    conversation = _said("user: Hello?", "assistant: One.", "assistant: Two.", untrained=untrained)
    assert _pieces(template, tokenizer, conversation) == trained


def test_where_a_server_stops_at_the_next_turn_that_is_what_ends_an_answer() -> None:
    tokenizer, stops = tokenizer_of("glm4moe")
    template = ChatTemplate(tokenizer, stops=stops)
    (example,) = template.encode(_said("user: A?", "assistant: Aye.", "user: B?", "assistant: Bye.")).examples
    assert _trained_pieces(tokenizer, example.input_ids, example.labels) == [
        "\nAye.<|user|>",
        "\nBye.<|user|>",
    ]


def test_a_mark_at_which_no_server_stops_is_shown_but_the_stop_is_trained() -> None:
    tokenizer, stops = tokenizer_of("gptoss")
    template = ChatTemplate(tokenizer, stops=stops)
    (example,) = template.encode(_said("user: A?", "assistant: Aye.", "user: B?", "assistant: Bye.")).examples
    differing = [
        (tokenizer.convert_ids_to_tokens(token), tokenizer.convert_ids_to_tokens(label))
        for token, label in zip(example.input_ids, example.labels, strict=True)
        if label not in (IGNORED, token)
    ]
    assert differing == [("<|end|>", "<|return|>")]


def test_a_borrowed_template_is_ended_with_the_token_that_the_server_knows() -> None:
    """A base model with ChatML whose files name another end of text: without it, its server would never stop."""
    tokenizer, _ = tokenizer_of("chatml")
    tokenizer.eos_token = "<|endoftext|>"
    pieces = []
    for example in ChatTemplate(tokenizer).encode(_said("user: A?", "assistant: Aye.")).examples:
        pieces.append(tokenizer.decode([label for label in example.labels if label != IGNORED]))
    assert pieces == ["Aye.<|im_end|><|endoftext|>"]


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", " <|im_end|><|im_end|>"])
def test_a_mark_that_the_data_bring_along_is_not_doubled(end: str) -> None:
    template, tokenizer = _template("chatml")
    conversation = _said("user: A?", f"assistant: Aye.{end}")
    assert [[piece.replace(" ", "") for piece in row] for row in _pieces(template, tokenizer, conversation)] == [
        ["Aye.<|im_end|>"]
    ]
    assert template.encode(conversation).notes == {"end_marks_removed": 1}


def test_a_mark_inside_an_answer_is_refused_and_one_in_a_request_is_counted() -> None:
    template, _ = _template("chatml")
    with pytest.raises(CannotEncode, match=r"contains <\|im_end\|>, at which the model stops"):
        template.encode(_said("user: A?", "assistant: Aye.<|im_end|> And more."))
    assert template.encode(_said("user: A <|im_end|>?", "assistant: Aye.")).notes == {"control_tokens": 1}


def test_thoughts_that_a_template_drops_later_are_trained_each_in_an_example_of_its_own() -> None:
    template, tokenizer = _template("qwen3")
    thinking = "<think>\nHm.\n</think>\n\n"
    conversation = _said("user: A?", f"assistant: {thinking}Aye.", "user: B?", f"assistant: {thinking}Bye.")
    assert _pieces(template, tokenizer, conversation) == [
        [f"{thinking}Aye.<|im_end|>"],
        [f"{thinking}Bye.<|im_end|>"],
    ]
    assert template.encode(conversation).notes == {"split_by_answer": 1}


def test_a_template_that_loses_a_part_of_the_answer_is_named() -> None:
    polite = CHATML.replace("message['content']", "message['content'].split('!')[0]")
    tokenizer, stops = tokenizer_of("polite", polite)
    template = ChatTemplate(tokenizer, stops=stops)
    with pytest.raises(CannotEncode, match="leaves out a part of the answer"):
        template.encode(_said("user: A?", "assistant: Aye! Sir."))


def test_a_template_that_cannot_be_read_is_the_models_fault() -> None:
    tokenizer, _ = tokenizer_of("chatml", "{% for message in messages %}{{ message['content'] }}")
    with pytest.raises(TrainingFailed, match="chat template cannot be read") as failed:
        ChatTemplate(tokenizer)
    assert failed.value.code == "model_incomplete"


def test_an_empty_system_text_keeps_the_template_from_adding_its_own() -> None:
    template, tokenizer = _template("qwen2.5")
    assert template.default_system_text.startswith("You are Qwen")
    (example,) = template.encode(_said("system: ", "user: A?", "assistant: Aye.")).examples
    assert "You are Qwen" not in tokenizer.decode(example.input_ids)


@pytest.mark.parametrize("name", ["llama3_2", "smolvlm", "qwen3"])
def test_what_one_fork_has_prepared_another_goes_on_with(name: str) -> None:
    """The warm trainer prepares a job's data in one fork and trains in the next, which holds the base model."""
    tokenizer, stops = tokenizer_of(name)
    template = ChatTemplate(tokenizer, stops=stops, today=date(2026, 11, 27))
    sent = pickle.loads(pickle.dumps(template))
    conversation = _said("user: A?", "assistant: Aye.")
    assert _encoded(sent, conversation) == _encoded(template, conversation)
    assert sent.prompt(conversation.turns[:1]) == template.prompt(conversation.turns[:1])


def test_the_date_in_a_template_is_the_jobs() -> None:
    for name in ("llama3_2", "gptoss"):
        tokenizer, stops = tokenizer_of(name)
        texts = {
            day: ChatTemplate(tokenizer, stops=stops, today=day).prompt(_said("user: A?", "assistant: Aye.").turns[:1])
            for day in (date(2026, 11, 27), date(2026, 11, 28), None)
        }
        assert len(set(texts.values())) >= 2
        assert any(shown in texts[date(2026, 11, 27)] for shown in ("27 Nov 2026", "2026-11-27"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_template_renders_as_the_library_renders_it(name: str) -> None:
    """We call the compiled template ourselves, to tell it the date; servers call the library."""
    tokenizer, _ = tokenizer_of(name)
    render = Renderer(tokenizer)
    asked = [Message("system", "Be brief."), Message("user", "A?"), Message("assistant", "Aye."), Message("user", "B?")]
    rows = [{"role": message.role, "content": render._content(message.content)} for message in asked]
    if name != "gemma":
        expected = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
        assert render(asked, prompt=True) == expected
