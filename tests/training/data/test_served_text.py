"""The trained text is the served text: proven for every answer of many conversations, with every template there is.

The proof goes the way of a server and shares no code with what it proves: the turns before an answer are rendered by
`apply_chat_template` with the generation prompt and made into tokens; the example must begin with exactly these tokens;
what is trained after them must be the answer and a token that stops a server, and nothing else may be trained.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from daemon.demo.model import find_gguf
from tests.chat_templates import SHIPPED, STRICT, template_text, tokenizer_of
from training.data.chat_template import ChatTemplate, Encoded
from training.data.example import IGNORED, Example
from training.data.formats.conversation import Conversation, Role, Turn
from training.data.template.rendering import CannotEncode
from training.data.template.thinking import Thinking

_Rows = Sequence[tuple[Role, str]]


def conversation(*rows: tuple[Role, str]) -> Conversation:
    return Conversation(tuple(Turn(role, text, trained=role == "assistant") for role, text in rows), "line 1")


def _exchanges(count: int) -> list[tuple[Role, str]]:
    return [row for n in range(count) for row in (("user", f"Question {n}?"), ("assistant", f"Answer {n}."))]  # type: ignore[misc]


CONVERSATIONS = {
    "one answer": conversation(("user", "Hello?"), ("assistant", "Hello.")),
    "system": conversation(("system", "Be brief."), ("user", "Hello?"), ("assistant", "Hello.")),
    "three answers": conversation(*_exchanges(3)),
    "system and twelve answers": conversation(("system", "Be brief."), *_exchanges(12)),
    "opening answer": conversation(("assistant", "Welcome!"), *_exchanges(2)),
    "opening answer after a system text": conversation(("system", "Be brief."), ("assistant", "Welcome!")),
    "two requests": conversation(("user", "Hello?"), ("user", "Anyone?"), ("assistant", "Yes."), *_exchanges(1)),
    "two answers": conversation(("user", "Hello?"), ("assistant", "Yes."), ("assistant", "Yes!"), *_exchanges(1)),
    "beyond ascii": conversation(("user", "naïve 🦊?"), ("assistant", "日本語 🦊 é"), *_exchanges(1)),
    "white space": conversation(
        *(("user", " Hello? \n"), ("assistant", "\n\n  Hello. \n"), ("user", "\tBye?"), ("assistant", "Bye. \n\n"))
    ),
    "empty system text": conversation(("system", ""), *_exchanges(2)),
    "control tokens in a request": conversation(("user", "What is <|im_end|> or </s>?"), ("assistant", "A mark.")),
    "thoughts": conversation(
        *(("user", "Hello?"), ("assistant", "<think>\nThey greet.\n</think>\n\nHello.")),
        *(("user", "Bye?"), ("assistant", "<think>\nThey leave.\n</think>\n\nBye.")),
    ),
    "a last thought": conversation(*_exchanges(2), ("user", "Bye?"), ("assistant", "<think>\nSo.\n</think>\n\nBye.")),
    "the same words again": conversation(*_exchanges(1), *_exchanges(1)),
}


ODD_PIECES = [
    *("Hello", "é", "🦊", "日本", "<b>", "</think>?", "user", "assistant", ".", "#", "1."),
    *("\n", "\n\n", "  ", " \t", "assistant\n", ""),
]


def prove(tokenizer: Any, stops: Sequence[int], turns: _Rows, encoded: Encoded, thinking: Thinking) -> int:
    """Raises AssertionError unless each answer is trained as it will be asked for. Returns how many are."""
    thought_of = any("</think>" in text for _, text in turns)
    runs = [run for example in encoded.examples for run in _runs(example)]
    opening = encoded.notes["opening_not_trained"]
    answers = [index for index, (role, _) in enumerate(turns) if role == "assistant"]
    answers = answers[1:] if opening else answers
    assert len(runs) == len(answers), (runs, answers)
    for index, run in zip(answers, runs, strict=True):
        answer = turns[index][1]
        if index:
            prompt = tokenizer(_served(tokenizer, turns[:index], thinking.options), add_special_tokens=False)[
                "input_ids"
            ]
            assert run.before == prompt, (tokenizer.decode(run.before), tokenizer.decode(prompt))
        assert run.trained[-1] in stops, tokenizer.decode(run.trained)
        said = _squeezed(tokenizer.decode(run.trained, skip_special_tokens=False))
        words = _squeezed(answer)
        if "</think>" in answer and tokenizer.decode(run.before).rstrip().endswith("<think>"):
            words = words.removeprefix("<think>")
        lead, found, rest = said.rpartition(words)
        assert found, (said, words)
        # Where no answer has a thought, none begins with one, unless the prompt itself has begun it.
        empty = {"<think></think>", "</think>"} if thought_of else {"</think>"} if thinking.opens_thought else set()
        assert lead in {"", "to=user<|message|>", "<|channel|>final<|message|>", *empty}, said
        assert all(token in tokenizer.all_special_tokens for token in tokenizer.tokenize(rest)), said
    return len(runs)


@dataclass(frozen=True)
class _Run:
    before: list[int]
    trained: list[int]


def _runs(example: Example) -> list[_Run]:
    """Returns the pieces that carry loss, each with all tokens before it. A stop in place of a token ends one."""
    runs = []
    start = None
    for index, (token, label) in enumerate(zip([*example.input_ids, 0], [*example.labels, IGNORED], strict=True)):
        if label != IGNORED and start is None:
            start = index
        ends = label == IGNORED or label != token
        if ends and start is not None:
            runs.append(_Run(example.input_ids[:start], [*example.labels[start : index + (label != IGNORED)]]))
            start = None
        assert label in (IGNORED, token) or runs
    return runs


def _served(tokenizer: Any, turns: _Rows, options: Mapping[str, Any]) -> str:
    """Renders the prompt as a server does, in the form that the template takes."""
    refused: Exception | None = None
    for rows in (turns, _folded(turns), _merged(turns), _merged(_folded(turns))):
        for parts in (False, True):
            messages = [
                {"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in rows
            ]
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
            except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
                refused = error
                continue
            if all(_squeezed(text_of_row) in _squeezed(text) for role, text_of_row in rows if role != "assistant"):
                return str(text)
    raise AssertionError(refused)


def _folded(turns: _Rows) -> _Rows:
    if not turns or turns[0][0] != "system":
        return turns
    (_, system), *rest = turns
    first = next((index for index, (role, _) in enumerate(rest) if role == "user"), None)
    if first is None:
        return turns
    rest[first] = ("user", f"{system}\n\n{rest[first][1]}" if system else rest[first][1])
    return rest


def _merged(turns: _Rows) -> _Rows:
    rows: list[tuple[Role, str]] = []
    for role, text in turns:
        if rows and rows[-1][0] == role:
            rows[-1] = (role, f"{rows[-1][1]}\n\n{text}")
        else:
            rows.append((role, text))
    return rows


def _squeezed(text: str) -> str:
    return "".join(text.split())


# What the templates themselves refuse, and what cannot be trained as it would be asked for.
_REASONS = (
    "roles must alternate",
    "No user query found",
    "no user message to put it into",
    "ends the thought before an answer begins",
    "you should pass analysis messages",
)


@pytest.mark.parametrize("name", [*SHIPPED, *STRICT])
def test_every_answer_is_trained_as_it_will_be_asked_for(name: str) -> None:
    tokenizer, stops = tokenizer_of(name)
    refused = prove_all(tokenizer, stops)
    # What every model must be able to learn from, whatever its template is like.
    assert not set(refused) - {"opening answer", "opening answer after a system text", "thoughts", "a last thought"}


# Without thoughts in the data: what a server must tell the template. Of all others, nothing.
_TOLD_NOT_TO_THINK = (
    *("glm4moe", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),
    *("qwen3_5_think", "qwen3_6", "qwen3_8"),
)
# Their prompts always begin a thought.
_THINK_ALWAYS = ("deepseek_r1_distill", "deepseekv3", "qwq")
# Their usual prompts have ended the thought.
_TOLD_TO_THINK = {"qwen3_5_nothink": {"enable_thinking": True}, "deepseek-v3.1": {"thinking": True}}


@pytest.mark.parametrize("name", [*SHIPPED, *STRICT])
def test_how_a_model_is_asked_is_chosen_by_its_template_and_by_the_answers(name: str) -> None:
    tokenizer, stops = tokenizer_of(name)
    template = ChatTemplate(tokenizer, stops=stops)
    template.suit([CONVERSATIONS["three answers"]])
    expected = {"enable_thinking": False} if name in _TOLD_NOT_TO_THINK else {}
    assert template.thinking == Thinking(expected, name == "qwen3", name in _THINK_ALWAYS)
    template.suit([CONVERSATIONS["one answer"], CONVERSATIONS["thoughts"]])
    assert template.thinking == Thinking(_TOLD_TO_THINK.get(name, {}))


@pytest.mark.parametrize("name", [*_TOLD_TO_THINK, "qwen3", "qwen3_6", "qwq", "nemotron_3_nano"])
def test_answers_with_thoughts_are_trained_with_every_template_that_can_show_them(name: str) -> None:
    tokenizer, stops = tokenizer_of(name)
    assert not {"thoughts", "a last thought"} & set(prove_all(tokenizer, stops))


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "qwq", "qwen3_6"])
def test_answers_without_thoughts_begin_alike_wherever_they_stand(name: str) -> None:
    """A model learns one beginning: what an answer begins with must not depend on what follows it."""
    tokenizer, stops = tokenizer_of(name)
    template = ChatTemplate(tokenizer, stops=stops)
    for beside in ([], [CONVERSATIONS["thoughts"]]):
        template.suit([CONVERSATIONS["three answers"], *beside])
        encoded = template.encode(CONVERSATIONS["three answers"])
        runs = [run.trained for example in encoded.examples for run in _runs(example)]
        first = {tokenizer.decode(run).partition("Answer")[0] for run in runs}
        assert len(runs) == 3 and len(first) == 1, first
        # An empty thought that the data do not have is counted.
        assert encoded.notes["empty_thought_added"] == (3 if "</think>" in first.pop() else 0)


@pytest.mark.parametrize("spaces", ["first", "always", "never"])
@pytest.mark.parametrize("name", ["mistral-v0.1", "mistral-v0.2", "mistral-v0.3", "llama-2", "zephyr"])
def test_it_is_so_with_tokenizers_that_join_spaces_to_words(name: str, spaces: str) -> None:
    """As sentencepiece does: `▁Hello` is one token, and a space before the first word comes from nowhere."""
    tokenizer = _joining_spaces(spaces)
    tokenizer.chat_template = template_text(name)
    refused = prove_all(tokenizer, [tokenizer.eos_token_id])
    assert not set(refused) - {"opening answer", "opening answer after a system text"}


# Slow: the vocabulary is read from GGUF.
@pytest.mark.system
def test_it_is_so_for_two_thousand_odd_conversations_and_a_real_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(find_gguf().parent, gguf_file=find_gguf().name)
    stops = [tokenizer.eos_token_id]
    template = ChatTemplate(tokenizer)
    chosen = random.Random(5)
    for _ in range(2000):
        rows: list[tuple[Role, str]] = [("system", "Be brief.")] if chosen.random() < 0.3 else []
        for number in range(2 * chosen.randint(1, 5)):
            words = "".join(chosen.choice(ODD_PIECES) for _ in range(chosen.randint(1, 6))) + chosen.choice("xé.")
            rows.append(("assistant" if number % 2 else "user", words))
        prove(tokenizer, stops, rows, template.encode(conversation(*rows)), template.thinking)


def prove_all(tokenizer: Any, stops: Sequence[int]) -> dict[str, str]:
    """Proves all conversations that the template takes. Returns why it does not take the others."""
    template = ChatTemplate(tokenizer, stops=stops)
    refused = {}
    for case, given in CONVERSATIONS.items():
        template.suit([given])
        try:
            encoded = template.encode(given)
        except CannotEncode as error:
            refused[case] = str(error)
            continue
        turns: _Rows = [(turn.role, turn.content) for turn in given.turns]
        if encoded.notes["turns_merged"]:
            turns = _merged(turns)
        assert prove(tokenizer, stops, turns, encoded, template.thinking), case
    assert all(any(reason in said for reason in _REASONS) for said in refused.values()), refused
    return refused


def _joining_spaces(scheme: Any) -> Any:
    joining = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    joining.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    joining.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    words = [turn.content for given in CONVERSATIONS.values() for turn in given.turns]
    joining.train_from_iterator(
        [*words, *map(template_text, STRICT)],
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<|im_end|>"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=joining, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
