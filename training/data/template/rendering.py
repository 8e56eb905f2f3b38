"""Renders messages to text with a model's chat template, as a server does; the date is the job's, not today's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any

import jinja2

from training.data.formats.conversation import Role
from training.events import ErrorCode
from training.failures import TrainingFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A private-use character: it has no meaning in any template or dataset.
MARK = "\ue0f0"


class CannotEncode(ValueError):
    """This conversation cannot be trained on with this template; the message says why."""


class TemplateRefuses(CannotEncode):
    """The template refused to render this conversation. `reason` is the template's own."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the model's chat template refuses it: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Message:
    """One turn as the template gets it: perhaps several turns of the conversation, merged.

    `trained`: the character ranges of the content that carry loss. `turns`: how many turns of the conversation have
    been shown when this one ends.
    """

    role: Role
    content: str
    trained: tuple[tuple[int, int], ...] = ()
    turns: int = 0


class Renderer:
    """Calls a tokenizer's template. `list_form`: gives it a list of parts in place of plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: date | None = None) -> None:
        try:
            self._source = tokenizer.get_chat_template()
            self._template = _compile(self._source)
        except (jinja2.TemplateError, ValueError) as error:
            raise TrainingFailed(
                ErrorCode.MODEL_INCOMPLETE,
                f"the model's chat template cannot be read: {error}",
                "restore tokenizer_config.json and chat_template.jinja from the model's repository",
            ) from error
        self._names: dict[str, Any] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        if today is not None:
            midnight = datetime.combine(today, time())
            self._names["strftime_now"] = midnight.strftime
        self._options: Mapping[str, Any] = {}
        self.list_form = False
        self.list_form = self._reads_only_lists()

    def told(self, options: Mapping[str, Any]) -> Renderer:
        """Returns one that tells the template these options, as a server does with `chat_template_kwargs`."""
        other = Renderer.__new__(Renderer)
        other.__dict__.update(self.__dict__, _options=options)
        return other

    def __call__(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Returns the text; with `prompt`, up to where the model begins to answer. Raises TemplateRefuses."""
        rows = [{"role": message.role, "content": self._content(message.content)} for message in messages]
        try:
            rendered: str = self._template.render(
                messages=rows, tools=None, documents=None, add_generation_prompt=prompt, **self._names, **self._options
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateRefuses(str(error) or type(error).__name__) from None
        return rendered

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled template, which holds functions: what one fork has prepared is sent to the next."""
        return {name: value for name, value in self.__dict__.items() if name != "_template"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._template = _compile(self._source)

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.list_form else text

    def _reads_only_lists(self) -> bool:
        """Templates of vision models may read parts only; servers then give them parts, even of plain text."""
        probe = (Message("user", f"{MARK}u"), Message("assistant", f"{MARK}a"))
        if self._shows(probe):
            return False
        self.list_form = True
        return self._shows(probe)

    def _shows(self, probe: Sequence[Message]) -> bool:
        try:
            text = self(probe)
        except TemplateRefuses:
            return False
        return all(message.content in text for message in probe)


def _compile(source: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # Not apply_chat_template: it takes no function that tells the date.
    return _compile_jinja_template(source)
