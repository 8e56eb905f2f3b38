"""Turns a conversation into tokens and labels with the model's chat template. Only the assistant's words carry loss.

The served text is the trained text: each answer is trained after exactly the prompt that a server builds for it, and
up to the token at which a server stops. Where one rendering of the whole conversation shows that for all its answers,
it becomes one example; where the template shows an earlier answer differently once others follow it, each answer
becomes an example of its own. Where neither can be proven, the conversation is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from training.data.example import Example
from training.data.formats.conversation import Conversation, Turn
from training.data.template.answer_spans import AnswerFinder, Span
from training.data.template.labelling import Labelled, Labeller, Trained
from training.data.template.rendering import MARK, CannotEncode, Message, Renderer, TemplateRefuses
from training.data.template.thinking import END_OF_THOUGHT, Thinking, choose_thinking
from training.data.template.turn_end import Ending, TurnEnd, find_turn_end
from training.events import ErrorCode
from training.failures import TrainingFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For base models without a template: readable plain text that ends each answer with the model's own end mark and uses
# no token that the model has never seen.
DEFAULT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}### User:\n{{ message['content'] }}\n\n"
    "{% else %}### Assistant:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)

_JOINED = "\n\n"


@dataclass(frozen=True)
class Encoded:
    """The examples of one conversation, and what was done to it on the way: counts under the codes of `remarks`."""

    examples: tuple[Example, ...]
    notes: Counter[str]


class ChatTemplate:
    """The tokenizer's template, or a default if it has none.

    `stops`: tokens that end generation, besides the tokenizer's own (`stop_tokens` reads them). `today`: the date that
    templates are told; the real one if None.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, stops: Collection[int] = (), today: date | None = None
    ) -> None:
        self._tokenizer: Any = tokenizer
        if not self._tokenizer.is_fast:
            raise TrainingFailed(
                ErrorCode.MODEL_UNSUPPORTED,
                "this model has no fast tokenizer (tokenizer.json), which training needs to find the answers' tokens",
                "convert it with transformers (save_pretrained of the fast class) and put it beside the model",
            )
        self.is_default = not self._tokenizer.chat_template
        if self.is_default:
            if not self._tokenizer.eos_token:
                raise _without_end("a chat template")
            self._tokenizer.chat_template = DEFAULT_TEMPLATE
        self._stops = {*stops, *([tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else [])}
        self._untold = Renderer(tokenizer, today)
        self._labeller = Labeller(self._tokenizer)
        self._control = _pattern_of(
            token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special
        )
        self.use(choose_thinking(self._untold, has_thoughts=False))

    def use(self, thinking: Thinking) -> None:
        """Asks the model in this way from now on."""
        self.thinking = thinking
        self._render = self._untold.told(thinking.options)
        turn_end = find_turn_end(self._render, self._tokenizer, self._stops)
        if turn_end is None:
            raise _without_end("a chat template that marks the end of an answer")
        self.turn_end: TurnEnd = turn_end
        self.folds_system = not self._takes_system()
        self._finder = AnswerFinder(self._render, turn_end, thinking)
        self.__dict__.pop("default_system_text", None)

    def suit(self, conversations: Iterable[Conversation]) -> None:
        """Chooses how the model is asked so that it can give these answers: with thoughts, or without any."""
        has_thoughts = any(
            turn.trained and END_OF_THOUGHT in turn.content for row in conversations for turn in row.turns
        )
        self.use(choose_thinking(self._untold, has_thoughts=has_thoughts))

    def encode(self, conversation: Conversation, most_tokens: int | None = None) -> Encoded:
        """Makes the examples. Raises CannotEncode if the answers cannot be trained as they will be asked for.

        With an example for each answer, each is longer than the one before: after one of more than `most_tokens` only
        the last is made, which tells how long all is.
        """
        notes: Counter[str] = Counter()
        messages = self._prepare(conversation.turns, notes)
        self._look_for_control_tokens(messages, notes)
        for shape in _shapes(messages):
            try:
                found = self._encode(shape, conversation.place, most_tokens)
            except CannotEncode as error:
                refusal = error
                continue
            notes["turns_merged"] += len(shape) < len(messages)
            return Encoded(found.examples, notes + found.notes)
        raise refusal

    def _encode(self, messages: Sequence[Message], place: str, most_tokens: int | None) -> Encoded:
        text = self._finder.shown(messages)
        if any(message.trained for message in messages[1:]):
            spans = self._finder.in_whole(messages, text)
            parts = None if spans is None else self._parts(messages, spans)
            labelled = None if parts is None else self._labeller.whole(text, parts)
            if spans is not None and labelled is not None:
                added = sum(_adds_thought(text, span, messages[index]) for index, span in spans.items())
                return Encoded((_example(labelled, place),), Counter(empty_thought_added=added))
        return self._alone(messages, place, most_tokens)

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Returns the text that the model continues with its answer."""
        for shape in _shapes(self._prepare(turns, Counter())):
            try:
                return self._render(shape, prompt=True)
            except TemplateRefuses as error:
                refusal = error
        raise refusal

    @property
    def stop_text(self) -> str:
        """The token that ends an answer."""
        text: str = self._tokenizer.convert_ids_to_tokens(self.turn_end.stop)
        return text

    @cached_property
    def default_system_text(self) -> str:
        """What the template says as system text in a conversation that has none; usually nothing."""
        user = Message("user", f"{MARK}u")
        try:
            without = self._render([user], prompt=True).partition(user.content)[0]
            head, mark, rest = self._render([Message("system", f"{MARK}s"), user], prompt=True).partition(f"{MARK}s")
        except TemplateRefuses:
            return ""
        rest = rest.partition(user.content)[0]
        if not mark or len(without) <= len(head) + len(rest):
            return ""
        found = without[len(head) : len(without) - len(rest)]
        return found.strip() if without == head + found + rest else ""

    def _prepare(self, turns: Sequence[Turn], notes: Counter[str]) -> list[Message]:
        """Takes off end marks that the data bring along, and puts the system text where the template takes it."""
        messages = [self._message(turn, number, notes) for number, turn in enumerate(turns, start=1)]
        if not self.folds_system or not messages or messages[0].role != "system":
            return messages
        system, *rest = messages
        if not system.content.strip():
            return rest
        for index, message in enumerate(rest):
            if message.role == "user":
                rest[index] = replace(message, content=f"{system.content}{_JOINED}{message.content}")
                return rest
        raise CannotEncode(
            "it has a system text and no user message to put it into, as the model's chat template has no system role"
        )

    def _message(self, turn: Turn, number: int, notes: Counter[str]) -> Message:
        content = turn.content
        if turn.role == "assistant":
            while (mark := next((m for m in self.turn_end.marks if content.rstrip().endswith(m)), None)) is not None:
                content = content.rstrip().removesuffix(mark)
            notes["end_marks_removed"] += content != turn.content
            if content != turn.content and not content.strip():
                raise CannotEncode("an answer is empty but for the mark that ends it")
        return Message(turn.role, content, ((0, len(content)),) if turn.trained else (), number)

    def _look_for_control_tokens(self, messages: Sequence[Message], notes: Counter[str]) -> None:
        for message in messages:
            found = set(self._control.findall(message.content)) if self._control is not None else set()
            if not found:
                continue
            if message.trained and (stop := next((mark for mark in self.turn_end.marks if mark in found), None)):
                raise CannotEncode(
                    f"an answer contains {stop}, at which the model stops: what follows it could never be said"
                )
            notes["control_tokens"] += 1

    def _alone(self, messages: Sequence[Message], place: str, most_tokens: int | None) -> Encoded:
        """Makes one example of each answer, with the turns before it as a server shows them."""
        notes: Counter[str] = Counter()
        examples: list[Example] = []
        is_too_long = False
        for index, message in enumerate(messages):
            if not message.trained or (is_too_long and index < len(messages) - 1):
                continue
            if index == 0:
                # No request, no prompt: what a server would build before it is not known.
                notes["opening_not_trained"] += 1
                continue
            before = [replace(earlier, trained=()) for earlier in messages[:index]]
            text, span = self._finder.at_the_end([*before, message])
            notes["empty_thought_added"] += _adds_thought(text, span, message)
            parts = self._parts([*before, message], {index: span})
            if parts is None:
                raise CannotEncode("one of the merged answers cannot be found again in what the template renders")
            labelled = self._labeller.whole(text, parts) or self._labeller.in_pieces(text, parts)
            examples.append(_example(labelled, place))
            is_too_long = most_tokens is not None and len(labelled.input_ids) > most_tokens
        if not examples:
            raise CannotEncode("nothing comes before its only answer")
        notes["split_by_answer"] += len(examples) > 1
        return Encoded(tuple(examples), notes)

    def _parts(self, messages: Sequence[Message], spans: dict[int, Span]) -> list[Trained] | None:
        """Returns what carries loss. None if a part of an answer cannot be told from the rest."""
        parts = []
        for index in sorted(spans):
            message, span = messages[index], spans[index]
            ending = self.turn_end.last if index == len(messages) - 1 else self.turn_end.earlier
            for start, end in message.trained:
                is_first, is_last = start == 0, end == len(message.content)
                if span.trimmed is None and not (is_first and is_last):
                    return None
                moved = span.start - (span.trimmed or 0)
                # An answer that another one follows in the same turn ended here when it was given.
                ending = ending if is_last else Ending("", self.turn_end.stop)
                parts.append(
                    Trained(
                        span.begin if is_first else moved + start,
                        (span.end if is_last else moved + end) + len(ending.text),
                        ending.stop,
                        message.turns,
                    )
                )
        return parts

    def _takes_system(self) -> bool:
        """Looks for the system text in a prompt: some templates refuse the role, others drop it silently."""
        try:
            return f"{MARK}s" in self._render([Message("system", f"{MARK}s"), Message("user", "q")], prompt=True)
        except TemplateRefuses:
            return False


def _adds_thought(text: str, span: Span, message: Message) -> bool:
    """True if what is trained has a thought, an empty one, that the data do not have."""
    return END_OF_THOUGHT in text[span.begin : span.end] and END_OF_THOUGHT not in message.content


def _example(labelled: Labelled, place: str) -> Example:
    return Example(labelled.input_ids, labelled.labels, place, labelled.cuts)


def _shapes(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Yields the messages as they are written; then, for templates that refuse that, with adjacent ones merged."""
    yield messages
    neighbours = {left.role for left, right in pairwise(messages) if left.role == right.role}
    for roles in ({"assistant"}, {"user"}, {"assistant", "user"}):
        if roles <= neighbours:
            yield _merge(messages, roles)


def _merge(messages: Sequence[Message], roles: Collection[str]) -> list[Message]:
    """Joins adjacent messages of one role with a blank line; each part keeps what it says of loss."""
    merged: list[Message] = []
    for message in messages:
        if not merged or message.role not in roles or merged[-1].role != message.role:
            merged.append(message)
            continue
        before = merged[-1]
        offset = len(before.content) + len(_JOINED)
        parts = [*before.trained, *((start + offset, end + offset) for start, end in message.trained)]
        if before.trained and message.trained and before.trained[-1][1] == len(before.content):
            # Both are trained: one answer, blank line and all.
            joint = len(before.trained) - 1
            parts[joint : joint + 2] = [(parts[joint][0], parts[joint + 1][1])]
        merged[-1] = Message(before.role, before.content + _JOINED + message.content, tuple(parts), message.turns)
    return merged


def _pattern_of(texts: Any) -> re.Pattern[str] | None:
    known = sorted({text for text in texts if text.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known))) if known else None


def _without_end(what: str) -> TrainingFailed:
    return TrainingFailed(
        ErrorCode.MODEL_INCOMPLETE,
        f"the tokenizer has neither {what} nor an end-of-text token",
        "restore tokenizer_config.json and special tokens from the model's repository",
    )
