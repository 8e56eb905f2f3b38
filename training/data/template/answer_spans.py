"""Finds the answers in a rendered conversation, and proves that each follows the prompt that a server would build.

A server renders the turns before an answer with the generation prompt; the model continues. So an answer is trained
where the whole conversation's text begins with exactly that prompt. Templates on the hub rarely mark answers
(`{% generation %}`), and many show an answer differently once others follow it, so nothing is taken for granted: the
prompt is rendered and compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from training.data.template.rendering import MARK, CannotEncode, Message, Renderer, TemplateRefuses
from training.data.template.thinking import END_OF_THOUGHT, THOUGHT_OPENED, Thinking, find_leads
from training.data.template.turn_end import TurnEnd, common_prefix

# The end of an empty thought that the prompt has begun, as Qwen3's and DeepSeek's models write it.
_EMPTY_THOUGHT = "\n</think>\n\n"
# Up to this many answers, each one's prompt is rendered; of more, those whose renderings together cost as much as two.
_ALL_COMPARED = 4


@dataclass(frozen=True)
class Span:
    """Where an answer is in a text: its prompt ends at `begin`, its own words are from `start` to `end`.

    `trimmed`: how many characters the template took from its front; None if it changed white space inside. Between
    `begin` and `start` is what the model writes first: an empty thought, or the name of a channel.
    """

    begin: int
    start: int
    end: int
    trimmed: int | None = 0


@dataclass(frozen=True)
class _Words:
    """Where each message's words start and end in a prompt, and what was trimmed from them; how the prompt ends."""

    places: list[tuple[int, int, int]]
    request: str


class AnswerFinder:
    """Finds answers in what one template renders."""

    def __init__(self, render: Renderer, turn_end: TurnEnd, thinking: Thinking) -> None:
        self._render = render
        self._turn_end = turn_end
        leads = find_leads(render)
        # The empty thought that this template shows before the last answer, and no prompt contains.
        self._left_out = leads.empty_thought if thinking.answers_at_once else None
        self._leads = ("", *(lead for lead in (leads.earlier, leads.last) if lead not in {None, self._left_out}))
        self._lead = self._leads[-1]

    def shown(self, messages: Sequence[Message]) -> str:
        """Renders the conversation as it is trained."""
        text = self._render(messages)
        if self._left_out is None or messages[-1].role != "assistant" or END_OF_THOUGHT in messages[-1].content:
            return text
        prompt = self._prompt(messages[:-1])
        return prompt + text[len(prompt) :].removeprefix(self._left_out) if text.startswith(prompt) else text

    def in_whole(self, messages: Sequence[Message], text: str) -> dict[int, Span] | None:
        """Returns each answer's span in the text of the whole conversation; None if it differs from the prompts.

        Costs a few renderings, however many answers there are.
        """
        *earlier, last = [index for index, message in enumerate(messages) if message.trained]
        prompt = self._prompt(messages[:last])
        span = self._last_span(text, prompt, messages[last].content)
        if span is None:
            return None
        if not earlier:
            return {last: span}
        words = self._words(messages[:last], prompt)
        if words is None:
            return None
        spans = {last: span}
        for index in earlier:
            start, end, trimmed = words.places[index]
            begin = self._begin(messages, text, index, words)
            if begin is None or not self._may_lead(text[begin:start], messages[index].content):
                return None
            if not text.startswith(self._turn_end.earlier.text, end):
                return None
            spans[index] = Span(begin, start, end, trimmed)
        if len({END_OF_THOUGHT in text[span.begin : span.start] for span in spans.values()}) > 1:
            # After equal prompts one would begin with an empty thought and the other not.
            return None
        for index in _compared(earlier):
            if index and self._prompt(messages[:index]) != text[: spans[index].begin]:
                return None
        return spans

    def at_the_end(self, messages: Sequence[Message]) -> tuple[str, Span]:
        """Returns a text that ends with the last message's answer, and its span. Raises CannotEncode if none does."""
        content = messages[-1].content
        prompt = self._prompt(messages[:-1])
        text = self.shown(messages)
        span = self._last_span(text, prompt, content)
        if span is not None:
            return text, span
        if THOUGHT_OPENED.search(prompt):
            continuation = _after_opened_thought(prompt, content)
            text = prompt + continuation
            start = len(text) - len(continuation.lstrip())
            return text + self._turn_end.last.text, Span(len(prompt), start, len(text), None)
        for words, trimmed in _trimmings(content):
            if END_OF_THOUGHT not in content and text.endswith(self._lead + words + self._turn_end.tail):
                # Mistral v0.3 shows the system text in prompts only: the answer is shown as ever, after other text.
                start = len(prompt) + len(self._lead)
                end = start + len(words)
                text = prompt + self._lead + words + self._turn_end.last.text
                return text, Span(len(prompt), start, end, trimmed)
        raise CannotEncode(self._why_not(text, prompt, content))

    def _prompt(self, before: Sequence[Message]) -> str:
        return self._render(before, prompt=True)

    def _last_span(self, text: str, prompt: str, content: str) -> Span | None:
        tail = self._turn_end.tail
        if not (text.startswith(prompt) and text.endswith(tail)):
            return None
        begin, end = len(prompt), len(text) - len(tail)
        middle = text[begin:end]
        for words, trimmed in _trimmings(content):
            if middle.endswith(words) and self._may_lead(lead := middle[: len(middle) - len(words)], content):
                return Span(begin, begin + len(lead), end, trimmed)
        if END_OF_THOUGHT in content:
            # Templates set a thought apart with line breaks of their own; the prompt may have begun it.
            opened = "<think>" if THOUGHT_OPENED.search(prompt) else ""
            if _squeezed(content) in (_squeezed(middle), _squeezed(opened + middle)):
                return Span(begin, begin, end, None)
        return None

    def _may_lead(self, lead: str, content: str) -> bool:
        # Not an empty thought before an answer that brings its own.
        return lead in self._leads and not (END_OF_THOUGHT in lead and END_OF_THOUGHT in content)

    def _words(self, messages: Sequence[Message], prompt: str) -> _Words | None:
        """Finds each message's words in a prompt, and the template's own text between them."""
        glue = self._glue(messages)
        if glue is None:
            return None
        places: list[tuple[int, int, int]] = []
        position = 0
        for index, message in enumerate(messages):
            if not prompt.startswith(glue[index], position):
                return None
            position += len(glue[index])
            for words, trimmed in _trimmings(message.content):
                end = position + len(words)
                if prompt.startswith(words, position) and prompt.startswith(glue[index + 1], end):
                    places.append((position, end, trimmed))
                    position = end
                    break
            else:
                return None
        return _Words(places, glue[-1]) if prompt[position:] == glue[-1] else None

    def _glue(self, messages: Sequence[Message]) -> list[str] | None:
        """Returns what the template writes between the contents, by rendering marks in their place."""
        marked = [replace(message, content=f"{MARK}{index}{MARK}") for index, message in enumerate(messages)]
        try:
            pieces = re.split(f"{MARK}(\\d+){MARK}", self._prompt(marked))
        except TemplateRefuses:
            return None
        numbers, glue = pieces[1::2], pieces[::2]
        return glue if numbers == [str(index) for index in range(len(messages))] else None

    def _begin(self, messages: Sequence[Message], text: str, index: int, words: _Words) -> int | None:
        """Returns where this answer's prompt ends."""
        if index == 0:
            return self._begin_of_opening(text[: words.places[0][0]], words.request)
        if messages[index - 1].role != messages[len(words.places) - 1].role:
            prompt = self._prompt(messages[:index])
            return len(prompt) if text.startswith(prompt) else None
        end = words.places[index - 1][1]
        return end + len(words.request) if text.startswith(words.request, end) else None

    def _begin_of_opening(self, before: str, request: str) -> int | None:
        """An opening answer follows no request; its prompt ends as every other one does."""
        for lead in sorted(self._leads, key=len, reverse=True):
            if before.endswith(lead):
                begin = len(before) - len(lead)
                same = common_prefix(before[:begin][::-1], request[::-1])
                return begin if request[len(request) - same :].strip() else None
        return None

    def _why_not(self, text: str, prompt: str, content: str) -> str:
        if _squeezed(content) not in _squeezed(text):
            thought = ": it drops what comes before </think>" if END_OF_THOUGHT in content else ""
            return f"the model's chat template leaves out a part of the answer{thought}"
        if END_OF_THOUGHT in content and END_OF_THOUGHT in prompt[-40:]:
            return (
                "the answer has a thought, and the model's chat template ends the thought before an answer begins "
                f"(its prompt ends with {prompt[-40:]!r})"
            )
        return (
            "the model's chat template shows the answer after other text than it prompts with "
            f"(its prompt ends with {prompt[-40:]!r})"
        )


def _trimmings(content: str) -> Iterator[tuple[str, int]]:
    """Yields the content as templates show it, whole or trimmed, with the number of characters lost in front."""
    seen = set()
    for words in (content, content.strip(), content.lstrip("\n"), content.strip("\n"), content.rstrip()):
        if words not in seen:
            seen.add(words)
            yield words, content.find(words) if words else 0


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _after_opened_thought(prompt: str, content: str) -> str:
    """Returns what the model writes after a prompt that has begun a thought.

    DeepSeek-R1's template begins one and never shows one: the answer is put together here.
    """
    opened = THOUGHT_OPENED.search(prompt)
    assert opened is not None
    if END_OF_THOUGHT not in content:
        return _EMPTY_THOUGHT + content.strip()
    head, thought, rest = content.partition("<think>")
    if not thought:
        return content.lstrip("\n")
    if head.strip():
        raise CannotEncode("the answer has text before <think>, and the model's chat template begins with the thought")
    return rest.lstrip("\n") if opened.group().endswith("\n") else rest


def _compared(answers: Sequence[int]) -> Iterator[int]:
    """Yields the answers whose prompts are rendered to compare: all of a few, else the 1st, 2nd, 4th, 8th ..."""
    if len(answers) <= _ALL_COMPARED:
        yield from answers
        return
    step = 1
    while step <= len(answers):
        yield answers[step - 1]
        step *= 2
