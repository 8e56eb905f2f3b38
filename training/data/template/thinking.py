"""Chooses how a model that can think is asked: from what its template writes, and from whether answers have thoughts.

Such templates differ in what stands before an answer. Qwen3's prompt leaves it to the model whether to think; Qwen3.5's
and Nemotron's begin a thought unless `enable_thinking` is false; QwQ's and DeepSeek-R1's always begin one. Many show an
answer without a thought after an empty one, which no prompt contains. What the model is trained to write after the
prompt is what its users will see, so the prompt is chosen first: the one that a server makes unless it is told
otherwise, where that lets the model answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training.data.template.rendering import MARK, Message, Renderer, TemplateRefuses

END_OF_THOUGHT = "</think>"
THOUGHT_OPENED = re.compile(r"<think>\s*\Z")
_THOUGHT_CLOSED = re.compile(r"</think>\s*\Z")
# What templates are told about thinking, by the families that have such a switch.
_SWITCHES: tuple[Mapping[str, bool], ...] = tuple(
    {name: value} for value in (False, True) for name in ("enable_thinking", "thinking")
)
_ASKED = Message("user", f"{MARK}q")
_ANSWERED = Message("assistant", f"{MARK}a")


@dataclass(frozen=True)
class Thinking:
    """How the model is asked.

    `options`: what the template is told, in training and by a server. `answers_at_once`: the empty thought that the
    template shows before the last answer is left out, since no prompt has it. `opens_thought`: each prompt begins a
    thought, which an answer without one ends first.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    answers_at_once: bool = False
    opens_thought: bool = False


@dataclass(frozen=True)
class Leads:
    """What the template writes between a prompt and its answer, where others follow and at the end; None if it shows
    the answer after another text than its prompt."""

    earlier: str | None
    last: str | None

    @property
    def empty_thought(self) -> str | None:
        """The empty thought that is shown before the last answer only, if there is one."""
        last = self.last if self.last is not None and END_OF_THOUGHT in self.last else None
        return last if self.earlier == "" else None


def find_leads(render: Renderer) -> Leads:
    """Renders an answer with and without another exchange after it."""
    again = (_ASKED, _ANSWERED, Message("user", f"{MARK}r"), Message("assistant", f"{MARK}b"))
    return Leads(_lead(render, again), _lead(render, again[:2]))


def choose_thinking(render: Renderer, *, has_thoughts: bool) -> Thinking:
    """Chooses for answers of which some have thoughts, or none. `render` must not have been told anything yet."""
    usual = _shape(render)
    if has_thoughts:
        # A prompt that has ended the thought already leaves no place for one.
        switch = _switch(render, {"opened", "plain"}) if usual == "closed" else None
        return Thinking(switch or {})
    if usual == "opened":
        switch = _switch(render, {"closed", "plain"})
        return Thinking(opens_thought=True) if switch is None else Thinking(switch)
    if usual == "plain":
        leads = find_leads(render)
        if leads.empty_thought is not None:
            return Thinking(answers_at_once=True)
        if leads.last is not None and END_OF_THOUGHT in leads.last:
            # GLM-4.5 shows it before earlier answers as well: its prompts have it where it is told not to think.
            return Thinking(_switch(render, {"closed"}) or {})
    return Thinking()


def _switch(render: Renderer, wanted: set[str]) -> Mapping[str, bool] | None:
    return next((switch for switch in _SWITCHES if _shape(render.told(switch)) in wanted), None)


def _shape(render: Renderer) -> str:
    """Whether a prompt ends inside a thought, after one, or without any."""
    try:
        prompt = render([_ASKED], prompt=True).rpartition(_ASKED.content)[2]
    except TemplateRefuses:
        return "unknown"
    if THOUGHT_OPENED.search(prompt):
        return "opened"
    return "closed" if _THOUGHT_CLOSED.search(prompt) else "plain"


def _lead(render: Renderer, rows: tuple[Message, ...]) -> str | None:
    try:
        text, prompt = render(rows), render(rows[:1], prompt=True)
    except TemplateRefuses:
        return None
    found = text.find(_ANSWERED.content, len(prompt))
    return text[len(prompt) : found] if text.startswith(prompt) and found >= 0 else None
