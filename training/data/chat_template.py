"""Turns a conversation into tokens and labels with the model's chat template. Only the assistant's words carry loss.

The assistant's characters are found by rendering prefixes and comparing them, not by `{% generation %}` marks, which
templates on the hub rarely have. So any template works, and training matches generation: everything after the
generation prompt is trained, up to and including the mark that ends the turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from training.data.formats.conversation import Conversation, Turn
from training.events import ErrorCode
from training.failures import TrainingFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # PyTorch's cross entropy ignores such labels.

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

# A private-use character: it has no meaning in any template or dataset.
_MARK = "\ue0f0"


class TemplateRefuses(ValueError):
    """The template refused to render this conversation; the message is the template's own."""


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation and equally many labels, IGNORED where no loss is wanted."""

    input_ids: list[int]
    labels: list[int]
    place: str

    @property
    def trained_tokens(self) -> int:
        # Nothing comes before the first token, so it cannot be predicted.
        return sum(label != IGNORED for label in self.labels[1:])


class ChatTemplate:
    """The tokenizer's template, with a default if it has none and system turns folded if it refuses them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
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
                raise TrainingFailed(
                    ErrorCode.MODEL_INCOMPLETE,
                    "the tokenizer has neither a chat template nor an end-of-text token",
                    "restore tokenizer_config.json and special tokens from the model's repository",
                )
            self._tokenizer.chat_template = DEFAULT_TEMPLATE
        self.folds_system = not self._takes_system()
        self._end_mark = self._find_end_mark()

    def encode(self, conversation: Conversation) -> Example:
        """Tokenises with labels. Raises TemplateRefuses if the template does not accept these roles in this order."""
        turns = self.fold(conversation.turns)
        text, spans = self._render_with_spans(turns)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids: list[int] = encoded["input_ids"]
        labels = [IGNORED] * len(input_ids)
        # A token that overlaps an answer belongs to it: one that straddles the border ("▁Hello" takes the template's
        # space with it) is the first token that the model has to produce.
        position = 0
        for start, end in spans:
            while position < len(input_ids) and encoded["offset_mapping"][position][1] <= start:
                position += 1
            while position < len(input_ids) and encoded["offset_mapping"][position][0] < end:
                labels[position] = input_ids[position]
                position += 1
        return Example(input_ids, labels, conversation.place)

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Returns the text that the model continues with its answer."""
        return self._render(self.fold(turns), add_generation_prompt=True)

    def fold(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """Puts the system text in front of the first user turn if the template has no system role."""
        if not self.folds_system or not turns or turns[0].role != "system":
            return tuple(turns)
        system, *rest = turns
        for index, turn in enumerate(rest):
            if turn.role == "user":
                folded = Turn("user", f"{system.content}\n\n{turn.content}", trained=False)
                return (*rest[:index], folded, *rest[index + 1 :])
        return tuple(rest)

    def _takes_system(self) -> bool:
        """Looks for the system text in a rendering: some templates refuse the role, others drop it silently."""
        probe = (
            Turn("system", f"{_MARK}s", trained=False),
            Turn("user", "q", trained=False),
            Turn("assistant", "a", trained=True),
        )
        try:
            return f"{_MARK}s" in self._render(probe)
        except TemplateRefuses:
            return False

    def _render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise TemplateRefuses(str(error) or type(error).__name__) from None
        return rendered

    def _render_with_spans(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """Returns the whole conversation as text, and the character span of each trained answer, end mark included."""
        text = self._render(turns)
        spans = []
        for index, turn in enumerate(turns):
            if turn.trained:
                spans.append(self._span_of_answer(text, turns, index))
        return text, spans

    def _span_of_answer(self, text: str, turns: Sequence[Turn], index: int) -> tuple[int, int]:
        before = self._render(turns[:index], add_generation_prompt=True)
        through = self._render(turns[: index + 1])
        if text.startswith(through) and through.startswith(before):
            # Text after the mark is not part of the answer (Phi-3 closes the whole text with another mark).
            marked = through.rfind(self._end_mark, len(before)) if self._end_mark else -1
            return len(before), marked + len(self._end_mark) if marked >= 0 else len(through.rstrip())
        # The template renders a turn differently once others follow it (Qwen3 drops earlier reasoning). So change the
        # answer and see which characters change.
        changed = list(turns)
        changed[index] = Turn("assistant", f"{_MARK}{_MARK}", trained=True)
        other = self._render(changed)
        content_start = _common_prefix(text, other)
        content_end = max(content_start, len(text) - _common_suffix(text[content_start:], other[content_start:]))
        start = len(before) if text.startswith(before) and len(before) <= content_start else content_start
        end = content_end + (len(self._end_mark) if text.startswith(self._end_mark, content_end) else 0)
        return start, end

    def _find_end_mark(self) -> str:
        """Finds the text that follows an answer whether or not another turn comes after it."""
        turns = (Turn("user", "q", trained=False), Turn("assistant", f"{_MARK}a", trained=True))
        try:
            last = self._render(turns).rpartition(f"{_MARK}a")[2]
            followed = self._render((*turns, Turn("user", "q", trained=False))).rpartition(f"{_MARK}a")[2]
        except TemplateRefuses:
            return ""
        # Compare tokens, not characters: `<|user|>` and `<|end|>` begin with the same characters.
        left = self._tokenizer(last, add_special_tokens=False, return_offsets_mapping=True)
        right = self._tokenizer(followed, add_special_tokens=False)
        same = _common_prefix(left["input_ids"], right["input_ids"])
        return last[: left["offset_mapping"][same - 1][1]].rstrip() if same else ""


def _common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    length = min(len(left), len(right))
    return next((index for index in range(length) if left[index] != right[index]), length)


def _common_suffix(left: str, right: str) -> int:
    return _common_prefix(left[::-1], right[::-1])
